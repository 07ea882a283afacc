"""A method with global names bound to other objects: the same code, decorated as it was, and nothing else is changed.

What a module calls by a global name (a function that rotates queries and keys, a loss's class) is no module of the
model. The name could be bound anew in the module's file, but then for every model of the process.
"""

from __future__ import annotations

from types import CellType, FunctionType
from typing import Any


def innermost(method: Any) -> FunctionType | None:
    """The function under a method's decorators, as far as they keep it in a closure; None if they do not."""
    while isinstance(method, FunctionType) and hasattr(method, "__wrapped__"):
        if not any(_holds(cell, method.__wrapped__) for cell in method.__closure__ or ()):
            return None
        method = method.__wrapped__
    return method if isinstance(method, FunctionType) else None


def global_names(method: Any) -> dict[str, Any]:
    """The globals that the function under a method's decorators mentions."""
    function = innermost(method)
    if function is None:
        return {}
    known = function.__globals__
    return {name: known[name] for name in function.__code__.co_names if name in known}


def rebind(method: Any, names: dict[str, Any]) -> Any:
    """`method` with `names` bound anew in the function under its decorators, for which `innermost` finds one."""
    inner = getattr(method, "__wrapped__", None)
    closure = method.__closure__
    variables = method.__globals__
    if inner is None:
        # torch.compile looks for the globals of a function with a __name__ among them in the module of that name.
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
