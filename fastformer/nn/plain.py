"""Checks that calling a module does what its class defines and nothing else, so an operator may read its parameters.

A module that a user has replaced, hooked or changed is called instead, as PyTorch would call it.
"""

from __future__ import annotations

from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def is_own(module: nn.Module) -> bool:
    """Whether calling `module` runs its class's forward and nothing else: no hooks, no forward set on the object.

    Hooks of the whole process are ignored, so that tools such as `FlopCounterMode` measure what really runs.
    """
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return "forward" not in vars(module) and not any(hooks)


def is_plain(module: nn.Module | None, *kinds: type[nn.Module]) -> bool:
    """Whether calling `module` runs the forward of one of `kinds` and nothing else."""
    return module is not None and type(module) in kinds and is_own(module)


def is_plain_linear(*modules: nn.Module) -> bool:
    """Whether calling each module is exactly ``x @ weight^T + bias``.

    It is not if the module has another class (LoRA, quantisation, `torch.nn.utils.parametrize`), hooks (weight norm,
    pruning), a forward set on the object (offloading), or a tensor subclass (DTensor) as weight.
    """
    for module in modules:
        if not is_plain(module, nn.Linear):
            return False
        weight = module.weight
        if type(weight) is not nn.Parameter and is_traceable_wrapper_subclass(weight):
            return False
    return True


def dropout_p(dropout: nn.Module) -> float | None:
    """The probability with which `dropout` drops at present, or None if it does something else."""
    if not is_plain(dropout, nn.Dropout):
        return None
    return dropout.p if dropout.training else 0.0  # type: ignore[return-value]
