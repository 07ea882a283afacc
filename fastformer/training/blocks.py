"""The blocks of any Transformer."""

from __future__ import annotations

from torch import nn


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the members of the outermost `nn.ModuleList`s by name, in the order of their registration.

    Every Transformer has its layers there; an encoder's layers come before its decoder's.
    """
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    return {
        f"{name}.{child}": block for name in outermost for child, block in model.get_submodule(name).named_children()
    }
