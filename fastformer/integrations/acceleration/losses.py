"""Cross-entropy: transformers' loss functions of language models, and forwards that name PyTorch's class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastformer.backends import use_triton
from fastformer.integrations.acceleration.probing import ERRORS, close
from fastformer.integrations.acceleration.rebinding import global_names, rebind
from fastformer.integrations.acceleration.swapping import OperatorRecipe, Recipe
from fastformer.nn.cross_entropy import CrossEntropyLoss
from fastformer.ops.cross_entropy import cross_entropy


@dataclass(frozen=True)
class LanguageModelLoss:
    """A transformers loss function of a language model, on Fastformer's cross-entropy where kernels run.

    Attributes:
        own: the loss function that it replaces.
        shifts: whether labels are those of the tokens at their positions, so that the position before predicts each.
        was_set: whether `own` had been set on the model; otherwise it comes from the model's type.
    """

    own: Callable[..., Tensor]
    shifts: bool
    was_set: bool

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return the mean over labels, or their sum over `num_items_in_batch` in accumulated batches, like `own`."""
        if not use_triton(logits):
            given = kwargs if shift_labels is None else {"shift_labels": shift_labels, **kwargs}
            return self.own(logits, labels, vocab_size, num_items_in_batch, ignore_index, **given)
        return self.run(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels)

    def run(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
    ) -> Tensor:
        """Compute the loss by the operator."""
        if not self.shifts:
            target = labels
        elif shift_labels is None:
            target = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        else:
            target = shift_labels
        rows = logits.view(-1, vocab_size)
        wide = rows.float()
        loss = cross_entropy(
            wide,
            target.reshape(-1).to(logits.device),
            ignore_index=ignore_index,
            reduction="mean" if num_items_in_batch is None else "sum",
            # Nothing else uses the float32 copy.
            inplace=wide is not rows,
        )
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        return loss if num_items_in_batch is None else loss / num_items_in_batch


def recognise_function(own: Callable[..., Tensor], was_set: bool) -> LanguageModelLoss | str:
    """Return the loss that replaces `own`, or the reason why there is none."""
    for shifts in (True, False):
        loss = LanguageModelLoss(own, shifts, was_set)
        if _is_proven(loss):
            return loss
    return "it is not the cross-entropy of a language model"


def _is_proven(loss: LanguageModelLoss) -> bool:
    generator = torch.Generator("cpu").manual_seed(2)
    labels, next_labels = torch.randint(11, (2, 2, 7), generator=generator)
    labels[0, 3] = next_labels[1, 2] = -100
    logits = torch.randn(2, 7, 11, generator=generator)
    cases: list[dict[str, Any]] = [{}, {"num_items_in_batch": torch.tensor(5)}, {"ignore_index": 3}]
    if loss.shifts:
        cases.append({"shift_labels": next_labels})
    for case in cases:
        known = labels.masked_fill(labels == -100, 3) if "ignore_index" in case else labels
        results = []
        for function in (loss.own, loss.run):
            leaf = logits.clone().requires_grad_()
            try:
                value = function(logits=leaf, labels=known, vocab_size=11, **case)
                results.append((value, *torch.autograd.grad(value, leaf)))
            except ERRORS:
                return False
        if not all(close(actual, expected) for expected, actual in zip(*results, strict=True)):
            return False
    return True


@dataclass(frozen=True)
class LossModule(OperatorRecipe):
    """A child module that is PyTorch's `CrossEntropyLoss`."""

    part = "loss"

    def describe(self) -> str:
        return "fastformer.cross_entropy"

    def tensors(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, ...] | None:
        return args if len(args) == 2 and not kwargs else None

    def holds(self, module: nn.Module, *tensors: Tensor) -> bool:
        return True

    def run(self, module: Any, *tensors: Tensor) -> Tensor:
        logits, target = tensors
        return cross_entropy(
            logits,
            target,
            weight=module.weight,
            ignore_index=module.ignore_index,
            reduction=module.reduction,
            label_smoothing=module.label_smoothing,
        )


class _DispatchedLoss(CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss`, on Fastformer's operator where kernels run."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if use_triton(input):
            return super().forward(input, target)
        return nn.CrossEntropyLoss.forward(self, input, target)


@dataclass(frozen=True)
class NamedLoss(Recipe):
    """A forward that makes its loss by ``CrossEntropyLoss(...)``: the name is bound to Fastformer's class instead."""

    name: str

    part = "loss"

    def methods(self, original: type[nn.Module]) -> dict[str, Callable[..., Any]]:
        return {"forward": rebind(original.forward, {self.name: _DispatchedLoss})}

    def describe(self) -> str:
        return "fastformer.nn.CrossEntropyLoss"


def recognise(module: nn.Module) -> LossModule | NamedLoss | None:
    """Return the recipe for PyTorch's `CrossEntropyLoss`, or for a module whose forward names it; None for others."""
    if type(module) is nn.CrossEntropyLoss:
        return LossModule()
    for name, value in global_names(type(module).forward).items():
        if value is nn.CrossEntropyLoss:
            return NamedLoss(name)
    return None
