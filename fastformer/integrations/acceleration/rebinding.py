"""Copies of a method in which global names are bound to other objects; code and decorators stay the same.

A function that a module calls by a global name (such as one that rotates queries and keys, or a loss's class) is not a
module of the model. Changing the name in the module's file would affect every model of the process.
"""

from __future__ import annotations

from types import CellType, FunctionType
from typing import Any


def innermost(method: Any) -> FunctionType | None:
    """Return the function under a method's decorators if they keep it in a closure; otherwise None."""
    while isinstance(method, FunctionType) and hasattr(method, "__wrapped__"):
        if not any(_holds(cell, method.__wrapped__) for cell in method.__closure__ or ()):
            return None
        method = method.__wrapped__
    return method if isinstance(method, FunctionType) else None


def global_names(method: Any) -> dict[str, Any]:
    """Return the globals that the function under a method's decorators uses."""
    function = innermost(method)
    if function is None:
        return {}
    known = function.__globals__
    return {name: known[name] for name in function.__code__.co_names if name in known}


def rebind(method: Any, names: dict[str, Any]) -> Any:
    """Copy `method`, with `names` bound to new objects in its innermost function, which `innermost` must find."""
    inner = getattr(method, "__wrapped__", None)
    closure = method.__closure__
    variables = method.__globals__
    if inner is None:
        # If a function's globals have a __name__, torch.compile looks for them in the module of that name.
        variables = {name: value for name, value in variables.items() if name != "__name__"} | names
    else:
        rebound = rebind(inner, names)
        closure = tuple(CellType(rebound) if _holds(cell, inner) else cell for cell in closure)
    copy = FunctionType(method.__code__, variables, method.__name__, method.__defaults__, closure)
    copy.__kwdefaults__ = method.__kwdefaults__
    copy.__dict__.update(method.__dict__)
    copy.__doc__, copy.__module__, copy.__qualname__ = method.__doc__, method.__module__, method.__qualname__
    copy.__annotations__ = method.__annotations__
    if inner is not None:
        copy.__wrapped__ = rebound  # type: ignore[attr-defined]
    return copy


def _holds(cell: CellType, value: Any) -> bool:
    try:
        return cell.cell_contents is value
    except ValueError:  # an empty cell
        return False
