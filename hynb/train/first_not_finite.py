"""Where a loss or gradient stops being finite: one more pass over the failed batch, with hooks on all modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(kw_only=True, frozen=True)
class Found:
    """The first module, in the order of execution, with something that is not finite.

    Args:
        module: its name in the model.
        kind: "output", or "gradient" of its output.
        weights: names of its own weights that have such values themselves.
        samples: indices of the samples whose values are not finite; empty where that is not known.
        conversations: of packed samples, the indices of the conversations among all of the batch.
    """

    module: str
    kind: str
    weights: tuple[str, ...] = ()
    samples: tuple[int, ...] = ()
    conversations: tuple[int, ...] = ()

    def __str__(self) -> str:
        what = "the output" if self.kind == "output" else "the gradient of the output"
        text = f"{what} of {self.module or 'the model'} is the first that is not finite"
        if self.weights:
            text += f": its own weights have values that are not finite ({', '.join(self.weights)})"
        return text


def first_output(model: nn.Module, inputs: dict[str, Any], forward: Callable[[], Any]) -> Found | None:
    """The first module whose output is not finite; under ZeRO-3 all ranks have to call it together.

    Args:
        inputs: the batch.
        forward: computes its loss.
    """
    found: list[Found] = []
    weights: dict[nn.Module, tuple[str, ...]] = {}

    def look_at_weights(module: nn.Module, *_: Any) -> None:
        # Now, because ZeRO-3 releases them before the hooks behind the pass are called.
        if not found:
            own = module.named_parameters(recurse=False)
            weights[module] = tuple(name for name, weight in own if not _is_finite(weight))

    def look(name: str, module: nn.Module, output: Any) -> None:
        for tensor in _tensors(output):
            if not found and not _is_finite(tensor):
                samples, conversations = _places(tensor, inputs)
                own = weights.get(module, ())
                found.append(
                    Found(module=name, kind="output", weights=own, samples=samples, conversations=conversations)
                )

    with torch.no_grad(), _hooked(model, look_at_weights, look):
        forward()
    return found[0] if found else None


def first_gradient(model: nn.Module, forward: Callable[[], torch.Tensor]) -> Found | None:
    """The first module, from the loss backwards, whose output has a gradient that is not finite; not under ZeRO-3.

    Args:
        forward: computes the loss of a batch.
    """
    found: list[Found] = []
    # The first output that depends on what is trained: gradients are computed down to it alone, so that those of
    # weights, and what DeepSpeed does when they are there, stay out of it.
    root: list[torch.Tensor] = []

    def look(name: str, _: nn.Module, output: Any) -> None:
        for tensor in _tensors(output):
            if tensor.requires_grad:
                root.append(tensor) if not root else None
                tensor.register_hook(lambda gradient, name=name: note(name, gradient))

    def note(name: str, gradient: torch.Tensor) -> None:
        if not found and not _is_finite(gradient):
            found.append(Found(module=name, kind="gradient"))

    with torch.enable_grad(), _hooked(model, None, look):
        loss = forward()
        if root:
            torch.autograd.grad(loss, root, allow_unused=True)
    return found[0] if found else None


@contextmanager
def _hooked(
    model: nn.Module, before: Callable[..., None] | None, after: Callable[[str, nn.Module, Any], None]
) -> Iterator[None]:
    hooks: list[Any] = []
    for name, module in model.named_modules():
        if before is not None:
            hooks.append(module.register_forward_pre_hook(before))
        hooks.append(module.register_forward_hook(lambda module, _, output, name=name: after(name, module, output)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _tensors(value)


def _is_finite(tensor: torch.Tensor) -> bool:
    return bool(torch.isfinite(tensor.detach()).all())


def _places(tensor: torch.Tensor, inputs: dict[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The samples and, of a row of packed ones, the conversations at which a tensor is not finite."""
    rows, length = inputs["input_ids"].shape
    if tensor.dim() < 2 or tuple(tensor.shape[:2]) != (rows, length):
        return (), ()
    bad = ~torch.isfinite(tensor.detach()).flatten(2).all(-1) if tensor.dim() > 2 else ~torch.isfinite(tensor)
    positions = inputs.get("position_ids")
    if positions is None:
        return tuple(torch.nonzero(bad.any(1)).flatten().tolist()), ()
    if rows > 1:
        return (), ()
    conversations = (positions[0] == 0).cumsum(0) - 1
    return (), tuple(torch.unique(conversations[bad[0]]).tolist())
