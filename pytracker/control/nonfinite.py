"""Locates the first NaN or Inf of a step: which module made it, forward or backward, and from what."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .._checks import function, wrong_type


@dataclass(frozen=True)
class NonfiniteOrigin:
    """What was not finite first in a step.

    Example:
        >>> print(NonfiniteOrigin("forward", ("head",), "the output of 'head' (Linear)", 2, 0, (), ("head.weight",)))
        forward: the output of 'head' (Linear) has 2 NaN; not finite before it: the parameter 'head.weight'
    """

    phase: str
    """"forward" or "backward"."""
    modules: tuple[str, ...]
    """Names of the modules that made it: one, or several where they share the input whose gradient it is. Empty where
    it is from what follows all modules: the loss."""
    what: str
    """What was not finite, in words."""
    nan: int
    """How many of its elements are NaN."""
    inf: int
    """How many are Inf."""
    bad_inputs: tuple[int, ...] = ()
    """Which of the module's tensors of input were not finite already, by position."""
    bad_parameters: tuple[str, ...] = ()
    """Which of its parameters and buffers were not, by name."""

    def __str__(self) -> str:
        counts = [f"{count} {kind}" for count, kind in ((self.nan, "NaN"), (self.inf, "Inf")) if count]
        before = [f"the input {place}" for place in self.bad_inputs]
        before += [f"the parameter {name!r}" for name in self.bad_parameters]
        blame = f"not finite before it: {', '.join(before)}" if before else "what it was made from was finite"
        return f"{self.phase}: {self.what} has {' and '.join(counts)}; {blame}"


class NonfiniteSearch:
    """Hooks on a model for one step, which look at every output, and at every gradient on its way back. Waits for each.

    A module that is compiled runs none of them.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.origin: NonfiniteOrigin | None = None
        self.ran = False  # whether a forward pass has begun
        self._names = {module: name for name, module in model.named_modules()}
        self._makers: dict[int, str] = {}  # by the id of a tensor: the innermost module whose output it is
        self._takers: dict[int, list[str]] = {}  # those whose input it is
        self._kept: list[Tensor] = []  # while ids stand for them
        self._handles: list[Any] = []
        for module in self._names:
            self._handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._after, with_kwargs=True))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and parameter.is_leaf:
                self._hook(parameter, self._watch_parameter(name))

    def stop(self) -> NonfiniteOrigin | None:
        """Take the hooks off, and return what was found."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._makers.clear()
        self._takers.clear()
        self._kept.clear()
        return self.origin

    def _hook(self, tensor: Tensor, look: Callable[[Tensor], None]) -> None:
        self._handles.append(tensor.register_hook(look))  # type: ignore[no-untyped-call]

    def _before(self, module: torch.nn.Module, arguments: Any, keywords: Any) -> None:
        self.ran = True
        for tensor in _floating((arguments, keywords)):
            self._takers.setdefault(id(tensor), []).append(self._names[module])
            self._kept.append(tensor)

    def _after(self, module: torch.nn.Module, arguments: Any, keywords: Any, output: Any) -> None:
        if self.origin is not None:
            return
        name = self._names[module]
        for tensor in _floating(output):
            if (counts := _counts(tensor)) is not None:
                own = [*module.named_parameters(name, recurse=False), *module.named_buffers(name, recurse=False)]
                self.origin = NonfiniteOrigin(
                    "forward",
                    (name,),
                    f"the output of {self._in_words(name)}",
                    *counts,
                    tuple(place for place, each in enumerate(_floating((arguments, keywords))) if _counts(each)),
                    tuple(of for of, each in own if _counts(each)),
                )
                return
            if tensor.requires_grad and id(tensor) not in self._makers:
                self._makers[id(tensor)] = name
                self._kept.append(tensor)
                self._hook(tensor, self._watch_output(id(tensor), name))

    def _watch_output(self, place: int, name: str) -> Callable[[Tensor], None]:
        def look(gradient: Tensor) -> None:
            if self.origin is None and (counts := _counts(gradient)) is not None:
                takers = self._takers.get(place, [])
                outer = {taker for taker in takers if any(each.startswith(f"{taker}.") for each in takers)} | {""}
                makers = tuple(dict.fromkeys(taker for taker in takers if taker not in outer))
                after = " and ".join(map(self._in_words, makers)) or "the loss, or what else follows the module"
                what = f"the gradient of the output of {self._in_words(name)}, which comes from {after},"
                self.origin = NonfiniteOrigin("backward", makers, what, *counts)

        return look

    def _watch_parameter(self, name: str) -> Callable[[Tensor], None]:
        def look(gradient: Tensor) -> None:
            if self.origin is None and (counts := _counts(gradient)) is not None:
                owner = name.rpartition(".")[0]
                what = f"the gradient of the parameter {name!r} of {self._in_words(owner)}"
                self.origin = NonfiniteOrigin("backward", (owner,), what, *counts)

        return look

    def _in_words(self, name: str) -> str:
        kinds = {known: type(module).__name__ for module, known in self._names.items()}
        return f"{name!r} ({kinds[name]})" if name else f"the model ({kinds[name]})"


def locate_nonfinite(model: torch.nn.Module, step_function: Callable[[], object]) -> NonfiniteOrigin | None:
    """Run one step of training, and return where NaN or Inf came from first; None where all was finite.

    Every module's output is looked at as it is made, and every gradient on its way back, each with a wait. Modules
    that ``torch.compile`` has compiled are not looked into: give the model before.

    Args:
        model: the modules to look at.
        step_function: computes the loss and its gradients (``lambda: loss_of(model(x), y).backward()``). Where it
            raises after something was found, that is returned all the same.

    Raises:
        InvalidTypeError: ``model`` is no module, or ``step_function`` can't be called.
        Exception: what ``step_function`` raises while all was finite.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Softmax(dim=-1), torch.nn.Linear(2, 1))
        >>> _ = torch.nn.init.constant_(model[2].weight, float("inf"))
        >>> print(locate_nonfinite(model, lambda: model(torch.ones(1, 2)).sum().backward()))
        forward: the output of '2' (Linear) has 1 Inf; not finite before it: the parameter '2.weight'
    """
    if not isinstance(model, torch.nn.Module):
        raise wrong_type("model", model, "a torch.nn.Module")
    if isinstance(function("step_function", step_function), torch.nn.Module):
        raise wrong_type("step_function", step_function, "a function that computes the loss and its gradients")
    search = NonfiniteSearch(model)
    try:
        step_function()
    except Exception:
        if search.origin is None:
            raise
    finally:
        search.stop()
    return search.origin


def _floating(values: Any) -> Iterator[Tensor]:
    for leaf in tree_leaves(values):
        if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
            yield leaf


def _counts(tensor: Tensor) -> tuple[int, int] | None:
    """Return how many elements are NaN and how many Inf; None where there is none, or the kind can't be asked.

    Of a DTensor, those of this rank: the others may not search, and so would not answer.
    """
    with torch.no_grad():
        values = getattr(tensor, "_local_tensor", tensor).detach()
        try:
            values = values.coalesce().values() if values.layout == torch.sparse_coo else values
            nan, inf = int(torch.isnan(values).sum()), int(torch.isinf(values).sum())
        except RuntimeError:  # CSR, say: what cannot be looked at must not end the training
            return None
    return (nan, inf) if nan or inf else None
