"""The registry: every operator once, with inputs, our function, and the same function in plain PyTorch.

Everything that the package does with all operators is built from the registry: the kernels that are compiled and
reported, `fastformer numerics` and `doctor`, the benchmarks, and the tests that draw calls or execute compiled kernels.
To add an operator, add a module to this folder: the registry finds the instances of `Operator` in each module. Each
user of the registry calls an operator with its ordinary inputs, or with the sizes and features that the user's own list
has for the operator's name.
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
    """Operators by name. An unknown name raises an error that lists all names."""

    def __missing__(self, name: str) -> NoReturn:
        raise LookupError(f"no operator in the registry is called {name!r}; there are {', '.join(self)}")


def _operators_of_modules() -> _Operators:
    """Import the modules of this folder; return the operators that they define."""
    modules = [importlib.import_module(f"{__name__}.{each.name}") for each in pkgutil.iter_modules(__path__)]
    values = [value for module in modules for value in vars(module).values()]
    operators = {value.name: value for value in values if isinstance(value, Operator)}
    return _Operators(sorted(operators.items()))


OPERATORS: Mapping[str, Operator] = _operators_of_modules()
"""The operators by name, in alphabetical order."""
