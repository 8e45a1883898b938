"""What a metric's name says: whether high or low is good, and what it is shown beside. Conventions, in one place."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final, Literal

Goal = Literal["max", "min"] | None

_HIGH: Final = (
    "acc accuracy auc auroc ap map f1 precision recall iou miou dice bleu rouge score reward return psnr ssim r2 "
    "throughput top1 top5 hit hits ndcg win"
)
_LOW: Final = "loss error err perplexity ppl mse rmse mae nll bce ce wer cer fid kl bpb bpc"
_WORD: Final = r"[A-Z]?[a-z0-9]+|[A-Z]+"
_HIGH_WORDS, _LOW_WORDS = frozenset(_HIGH.split()), frozenset(_LOW.split())
_VALIDATION: Final = frozenset(("val", "valid", "validation", "eval", "test", "dev", "holdout"))
_TRAINING: Final = frozenset(("train", "training"))


def words(name: str) -> list[str]:
    """Return the words of a name: ``val/lossPerToken`` has val, loss, per and token."""
    return [word.lower() for word in re.findall(_WORD, name)]


def goal(name: str) -> Goal:
    """Return "max" where a high value is good, "min" where a low one is, None where neither (lr, grad_norm, epoch).

    >>> goal("val_accuracy"), goal("train/loss"), goal("grad_norm")
    ('max', 'min', None)
    """
    found = set(words(name))
    if found & _LOW_WORDS:
        return "min"
    return "max" if found & _HIGH_WORDS else None


def split(name: str) -> str:
    """Return "val" for a metric of data held out, else "train".

    >>> split("val_loss"), split("loss")
    ('val', 'train')
    """
    return "val" if _VALIDATION & set(words(name)) else "train"


def subject(name: str) -> str:
    """Return the name without what it says of the split, so that train and validation share a chart.

    >>> subject("val_loss"), subject("train/loss"), subject("eval/rouge_L"), subject("val")
    ('loss', 'loss', 'rouge_L', 'val')
    """

    def kept(found: re.Match[str]) -> str:
        return "" if found[0].lower() in _VALIDATION | _TRAINING else found[0]

    left = re.sub(r"([_\-/. ])[_\-/. ]+", r"\1", re.sub(_WORD, kept, name)).strip("_-/. ")
    return left or name


def group(name: str) -> str:
    """Return the heading that a metric is found under: what it measures, or its prefix before a slash.

    >>> [group(name) for name in ("val_loss", "eval/loss", "lr/0", "grad_max", "rollout/kl/mean", "depth")]
    ['Metrics', 'Metrics', 'Learning rate', 'Gradients', 'rollout', 'More']
    """
    if is_learning_rate(name):
        return "Learning rate"
    if name.startswith("grad_"):
        return "Gradients"
    prefix, slash, _ = subject(name).partition("/")
    if slash and prefix:
        return prefix
    return "Metrics" if goal(name) else "More"


def describe(name: str) -> dict[str, Any]:
    """Return all that a metric's name says, as JSON-able data."""
    return {"goal": goal(name), "split": split(name), "subject": subject(name), "group": group(name)}


def is_learning_rate(name: str) -> bool:
    """Tell whether the series is a learning rate: ``lr``, or ``lr/<group>``, of all or behind a player's name.

    >>> is_learning_rate("lr/0"), is_learning_rate("D/lr"), is_learning_rate("D/lr_loss")
    (True, True, False)
    """
    return "lr" in name.split("/")[:2]


def ordered(names: Iterable[str]) -> list[str]:
    """Return names as people look for them: losses, other judged metrics, learning rates, gradients, the rest.

    >>> ordered(["epoch", "grad_norm", "lr", "val_accuracy", "loss"])
    ['loss', 'val_accuracy', 'lr', 'grad_norm', 'epoch']
    """

    def place(name: str) -> int:
        if goal(name):
            return 0 if "loss" in words(name) else 1
        return 2 if is_learning_rate(name) else 3 if name.startswith("grad_") else 5 if name == "epoch" else 4

    return sorted(names, key=place)


def headline(names: list[str]) -> str | None:
    """Return the metric that says most in one number: validation before training, a loss before others."""
    judged = [name for name in names if goal(name)]
    return min(judged, key=lambda name: (split(name) != "val", "loss" not in words(name), len(name)), default=None)
