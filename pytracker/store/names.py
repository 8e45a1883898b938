"""Names for runs: a date that sorts, and two words that can be said aloud."""

from __future__ import annotations

import random
import time

from .._checks import shown, wrong_type
from ..errors import InvalidValueError

_MOODS = (
    "able amber brave brisk calm clear cosy crisp curly dapper deep eager early fair fleet fond frank fresh "
    "gentle glad golden grand green happy hardy honest jolly keen kind light lively lucky merry mild mossy "
    "neat nimble noble patient plain polite proud quick quiet rapid ready rosy round royal sharp shiny silver "
    "simple sleek smooth snug solid spry steady still sunny swift tender tidy trim true velvet vivid warm wise "
    "witty young zesty"
)
_ANIMALS = (
    "badger bat beaver bison bream camel carp cat crane crow deer dingo dove duck eagle eel egret elk falcon "
    "ferret finch fox frog gecko goat goose gull hare hawk heron horse ibex jackal jay kite koala lark lemur "
    "lion lizard llama lynx marten mole moose mouse newt ocelot otter owl panda perch pike plover puffin quail "
    "rabbit raven robin salmon seal shrew sloth snail sparrow stork swan swift tapir tern toad trout turtle "
    "vole walrus weasel whale wolf wren yak zebra"
)


def readable_name() -> str:
    """Return a new name, such as ``20261122-231415-brisk-otter``."""
    generator = random.SystemRandom()  # a seeded training makes other names each time
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{generator.choice(_MOODS.split())}-{generator.choice(_ANIMALS.split())}"


def checked_name(name: str) -> str:
    """Return ``name`` if it can be a folder's name.

    Raises:
        InvalidTypeError: it is not a string.
        InvalidValueError: it is empty, has a slash or a control character in it, starts with a dot, or is too long.
    """
    if not isinstance(name, str):
        raise wrong_type("name", name, "a str")
    if not name or name.startswith(".") or not name.isprintable() or set(name) & set("/\\") or len(name.encode()) > 200:
        raise InvalidValueError(
            f"name is {shown(name)}, which can't be a folder's name; use 1 to 200 printable characters, no slash, "
            "no dot in front"
        )
    return name
