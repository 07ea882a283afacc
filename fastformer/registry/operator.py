"""What the registry knows of an operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Function = Callable[..., Any]


class Call(NamedTuple):
    """What an operator is called with: tensors, and other options, both by the names of its arguments."""

    tensors: dict[str, Tensor]
    options: dict[str, Any]

    def on(self, device: torch.device) -> Call:
        """The same call of tensors on a device."""
        return self._replace(tensors={name: each.to(device) for name, each in self.tensors.items()})

    def double(self) -> Call:
        """The same call of floating tensors in float64."""
        tensors = {name: each.double() if each.is_floating_point() else each for name, each in self.tensors.items()}
        return self._replace(tensors=tensors)


@dataclass(frozen=True)
class Operator:
    """One operator: inputs, our function, and the same function in plain PyTorch.

    Attributes:
        name: of the function in `fastformer`.
        inputs: makes a call. It takes a `Make`, and sizes and features by keyword, which all have small defaults.
        plain: the formula in plain PyTorch. It takes the arguments that `inputs` makes by the same names, and computes
            in the dtype of its tensors: in float64 its result is the exact one.
        fused: PyTorch's own fused function, where it has one for attention; it takes what `plain` takes.
        constants: floating tensors that have no gradient.
        written: tensors that are results too: a call writes to them.
        compared: how many results are compared with those of `plain`: the first ones, which have one dtype.
    """

    name: str
    inputs: Callable[..., Call]
    plain: Function
    fused: Function | None = None
    constants: frozenset[str] = frozenset()
    written: tuple[str, ...] = ()
    compared: int = 1

    def ours(self, **arguments: Any) -> Any:
        """Call Fastformer's function."""
        import fastformer

        return getattr(fastformer, self.name)(**arguments)

    def differentiable(self, tensors: dict[str, Tensor]) -> list[str]:
        """The names of the tensors that have gradients."""
        return [name for name, each in tensors.items() if each.is_floating_point() and name not in self.constants]

    def leaves(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same tensors, of which the differentiable ones require a gradient."""
        wanted = self.differentiable(tensors)
        return {name: each.detach().requires_grad_(name in wanted) for name, each in tensors.items()}

    def run(self, function: Function, call: Call) -> list[Tensor]:
        """What a call of `ours`, `plain` or `fused` gives: all results, then the written tensors.

        The tensors of `call` are not changed: what the function writes to is a copy.
        """
        given = {name: each.clone() if name in self.written else each for name, each in call.tensors.items()}
        result = function(**given, **call.options)
        results = [each for each in (result if isinstance(result, tuple) else (result,)) if each is not None]
        return [*results, *(given[name] for name in self.written)]

    def output(self, function: Function, call: Call) -> Tensor:
        """The results that are compared, as one row of numbers."""
        results = self.run(function, call)
        written = results[len(results) - len(self.written) :]
        return torch.cat([each.flatten() for each in (*results[: self.compared], *written)])
