"""The registry: every operator once, with inputs, our function, and the same function in plain PyTorch.

What the package does with every operator is built from it: the kernels that are compiled and reported, `fastformer
numerics` and `doctor`, the benchmarks, and the tests that draw calls or execute compiled kernels. A new operator is a
new module here: the instances of `Operator` in each module are found. Those who use the registry give it its ordinary
inputs, until they have wishes of their own.
"""

from __future__ import annotations

import importlib
import pkgutil

from fastformer.registry.make import Make
from fastformer.registry.operator import Call, Operator

__all__ = ["OPERATORS", "Call", "Make", "Operator"]


def _found() -> dict[str, Operator]:
    modules = [importlib.import_module(f"{__name__}.{each.name}") for each in pkgutil.iter_modules(__path__)]
    values = [value for module in modules for value in vars(module).values()]
    operators = {value.name: value for value in values if isinstance(value, Operator)}
    return dict(sorted(operators.items()))


OPERATORS = _found()
"""By name, in alphabetical order."""
