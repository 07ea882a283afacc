"""Acceleration of a model: its layers run on Fastformer's operators; and the way back."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from fastformer.integrations.acceleration import (
    embeddings,
    feed_forward,
    losses,
    norms,
    residual_norm,
    rotary,
    split_feed_forward,
)
from fastformer.integrations.acceleration.losses import LanguageModelLoss
from fastformer.integrations.acceleration.probing import conditions, structure_of
from fastformer.integrations.acceleration.rebinding import innermost
from fastformer.integrations.acceleration.report import Acceleration, Decision
from fastformer.integrations.acceleration.swapping import Accelerated, Recipe, can_swap_back, swap, swap_back

ATTENTION = "fastformer"
"""The name of Fastformer's attention implementation in transformers."""
_OWN_ATTENTION = "_fastformer_own_attention"

# What a module may be recognised as, and by which function. A layer's own method is checked without its attention.
_RECOGNISERS: list[tuple[str, Callable[[nn.Module], Recipe | str | None]]] = [
    (norms.Norm.part, norms.recognise),
    (feed_forward.FeedForward.part, feed_forward.recognise),
    (residual_norm.ResidualNorm.part, residual_norm.recognise),
    (split_feed_forward.SplitFeedForward.part, split_feed_forward.recognise),
    (embeddings.Embeddings.part, embeddings.recognise),
    (losses.NamedLoss.part, losses.recognise),
]


def accelerate(model: nn.Module) -> Acceleration:
    """Run a model on Fastformer's operators: its norms, feed-forwards, rotary and input embeddings, loss and attention.

    A layer is recognised by its structure and by what it computes. Its own forward and the operator's call are run on
    random parameters and inputs, and have to agree in outputs and gradients. A layer that is not proven equal is not
    changed. Modules, parameters, buffers, hooks and the state_dict stay the same objects in the same places, so that
    checkpoints, optimisers and PEFT continue to work. A projection that LoRA or quantisation replaces later is called.
    Kernels run where a backend runs them, by default on a GPU; elsewhere a layer's own forward runs.

    While a layer is checked, random float32 parameters of its shapes take several times its memory on the CPU. Layers
    of the same structure are checked only once.

    A model of Hugging Face's that accepts attention implementations gets "fastformer".

    Args:
        model: any `nn.Module`, in any dtype, on any device, trained or to be loaded. It is changed in place.

    Returns:
        The parts that were replaced, and the others with the reason; printing it shows a table.

    Raises:
        TypeError: `model` is not an `nn.Module`.

    >>> report = fastformer.accelerate(model)
    >>> print(report)
    >>> fastformer.restore(model)
    """
    _check(model)
    with conditions():
        decisions = _accelerate_layers(model)
    decisions += _accelerate_attention(model)
    return Acceleration(type(model).__name__, decisions)


def restore(model: nn.Module) -> None:
    """Undo `accelerate`: every module of `model` has its own class again, and no change remains on it.

    Raises:
        TypeError: `model` is not an `nn.Module`.
        ValueError: a module's class was changed after it was accelerated.
    """
    _check(model)
    accelerated = [(name, module) for name, module in model.named_modules() if isinstance(module, Accelerated)]
    changed = [name for name, module in accelerated if not can_swap_back(module)]
    if changed:
        raise ValueError(
            f"{', '.join(changed)}: the class was changed after acceleration (fully_shard, parametrize): undo that"
        )
    for _, accelerated_module in accelerated:
        swap_back(accelerated_module)
    for module in model.modules():
        loss = vars(module).get("_loss_function")
        if isinstance(loss, LanguageModelLoss):
            if loss.was_set:
                module._loss_function = loss.own  # type: ignore[assignment]
            else:
                del module._loss_function
        for config, implementation in vars(module).pop(_OWN_ATTENTION, ()):
            config._attn_implementation_internal = implementation


def _accelerate_layers(model: nn.Module) -> list[Decision]:
    """Swap the class of every recognised module, and the loss functions."""
    decisions: list[Decision] = []
    halves = rotary.tables_have_halves(model)
    known: dict[Any, Recipe | str | None] = {}
    recognisers = [*_RECOGNISERS, (rotary.Rotary.part, lambda module: rotary.recognise(module, halves))]
    for name, module in model.named_modules():
        class_name = type(module).__name__
        if isinstance(module, Accelerated):
            recipe = module.fastformer_recipe
            decisions.append(Decision(name, class_name, recipe.part, True, recipe.describe()))
            continue
        if "forward" in vars(module):
            decisions.append(Decision(name, class_name, "forward", False, "its forward has been replaced already"))
            continue
        structure = structure_of(module)
        for part, recognise in recognisers:
            key = (recognise, structure)
            if key not in known:
                known[key] = recognise(module)
            found = known[key]
            if isinstance(found, Recipe):
                swap(module, found)
                decisions.append(Decision(name, class_name, part, True, found.describe()))
                break
            if found is not None:
                decisions.append(Decision(name, class_name, part, False, found))
        decisions += _accelerate_loss_function(name, module)
    return decisions


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module; got {type(model).__name__}")


def _accelerate_loss_function(name: str, module: nn.Module) -> list[Decision]:
    """Accelerate the loss function that a transformers model has, set or by its type, if its forward uses one."""
    forward = innermost(type(module).forward)
    if (
        not hasattr(type(module), "loss_function")
        or forward is None
        or "loss_function" not in forward.__code__.co_names
    ):
        return []
    own: Any = module.loss_function
    found = (
        own if isinstance(own, LanguageModelLoss) else losses.recognise_function(own, "_loss_function" in vars(module))
    )
    if isinstance(found, LanguageModelLoss):
        module.loss_function = found  # type: ignore[assignment]
        return [Decision(name, type(module).__name__, "loss", True, "fastformer.cross_entropy")]
    return [Decision(name, type(module).__name__, "loss", False, f"{getattr(own, '__name__', own)}: {found}")]


def _accelerate_attention(model: nn.Module) -> list[Decision]:
    """Set Fastformer's attention in every transformers model in `model` that accepts an attention implementation."""
    models = {name: module for name, module in model.named_modules() if _is_pretrained(module)}
    configs = {id(module.config): (name, module) for name, module in reversed(models.items())}
    decisions = []
    for name, module in reversed(configs.values()):
        class_name, previous = type(module).__name__, module.config._attn_implementation
        detail = f'attn_implementation="{ATTENTION}"'
        if previous == ATTENTION:
            decisions.append(Decision(name, class_name, "attention", True, detail))
            continue
        reason = _set_attention(module)
        if reason is None:
            vars(model).setdefault(_OWN_ATTENTION, []).append((module.config, previous))
        decisions.append(Decision(name, class_name, "attention", reason is None, reason or detail))
    return decisions


def _set_attention(model: Any) -> str | None:
    """Set our attention in this model, not in inner ones with their own configurations; return why it is refused."""
    if not model._can_set_attn_implementation():
        return "its class does not support attention implementations"
    try:
        chosen = model._check_and_adjust_attn_implementation(ATTENTION, is_init_check=False)
    except (ValueError, ImportError) as error:
        return " ".join(str(error).split())
    model.config._attn_implementation_internal = chosen
    return None


def _is_pretrained(module: nn.Module) -> bool:
    transformers = sys.modules.get("transformers.modeling_utils")
    return transformers is not None and isinstance(module, transformers.PreTrainedModel)
