"""The registry: every operator once, with inputs, our function, and the same function in plain PyTorch.

What the package does with every operator is built from it: the kernels that are compiled and reported, `fastformer
numerics` and `doctor`, the benchmarks, and the tests that draw calls or execute compiled kernels. A new operator is a
new module here: the instances of `Operator` in each module are found. Each of those users takes the operator with its
ordinary inputs; a list beside it, by operator's name, has the sizes and features that it takes in addition.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import NoReturn

from fastformer.registry.make import Make
from fastformer.registry.operator import Call, Operator

__all__ = ["OPERATORS", "Call", "Make", "Operator"]


class _Operators(dict[str, Operator]):
    """Operators by name, with an error that lists the names."""

    def __missing__(self, name: str) -> NoReturn:
        raise LookupError(f"no operator in the registry is called {name!r}; there are {', '.join(self)}")


def _found() -> _Operators:
    modules = [importlib.import_module(f"{__name__}.{each.name}") for each in pkgutil.iter_modules(__path__)]
    values = [value for module in modules for value in vars(module).values()]
    operators = {value.name: value for value in values if isinstance(value, Operator)}
    return _Operators(sorted(operators.items()))


OPERATORS: Mapping[str, Operator] = _found()
"""The operators by name, in alphabetical order."""
