"""Whether calling a module does what its class says and nothing else, so that an operator may read its parameters.

What a user has put in a module's place, hung on it or changed in it is called as PyTorch would call it.
"""

from __future__ import annotations

from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def is_own(module: nn.Module) -> bool:
    """Whether calling `module` runs its class's forward and nothing else: no hooks, no forward of its own.

    Hooks of the whole process do not count: those who measure, as `FlopCounterMode` does, shall see what really runs.
    """
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return "forward" not in vars(module) and not any(hooks)


def is_plain(module: nn.Module | None, *kinds: type[nn.Module]) -> bool:
    """Whether calling `module` runs the forward of one of `kinds` and nothing else."""
    return module is not None and type(module) in kinds and is_own(module)


def is_plain_linear(*modules: nn.Module) -> bool:
    """Whether calling each module is exactly ``x @ weight^T + bias``.

    It is not where the module is of another class (LoRA, quantisation, `torch.nn.utils.parametrize`), has hooks (weight
    norm, pruning) or a forward of its own (offloading), or where its weight is a tensor subclass (DTensor).
    """
    for module in modules:
        if not is_plain(module, nn.Linear):
            return False
        weight = module.weight
        if type(weight) is not nn.Parameter and is_traceable_wrapper_subclass(weight):
            return False
    return True


def dropout_p(dropout: nn.Module) -> float | None:
    """The probability with which `dropout` now drops, or None where it does something else."""
    if not is_plain(dropout, nn.Dropout):
        return None
    return dropout.p if dropout.training else 0.0  # type: ignore[return-value]
