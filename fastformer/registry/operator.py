"""An operator of the registry, and a call of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Function = Callable[..., Any]


class Call(NamedTuple):
    """The arguments of a call of an operator, by name: its tensors, and its other options."""

    tensors: dict[str, Tensor]
    options: dict[str, Any]

    def on(self, device: torch.device) -> Call:
        """The same call with its tensors on `device`."""
        return self._replace(tensors={name: each.to(device) for name, each in self.tensors.items()})

    def double(self) -> Call:
        """The same call with its floating-point tensors in float64."""
        tensors = {name: each.double() if each.is_floating_point() else each for name, each in self.tensors.items()}
        return self._replace(tensors=tensors)


@dataclass(frozen=True)
class Operator:
    """One operator: its inputs, our function, and the same function in plain PyTorch.

    Attributes:
        name: the name of the function in `fastformer`.
        inputs: makes a call. It takes a `Make`, and sizes and features as keyword arguments, which have small defaults.
        plain: the formula in plain PyTorch. It takes the arguments that `inputs` makes, by the same names. It computes
            in the dtype of its tensors: its result in float64 counts as exact.
        fused: PyTorch's fused attention, which takes the arguments of `plain`; None if it cannot do the same work.
        constants: the names of floating-point tensors that have no gradient.
        written: the names of tensors that a call writes to. They are results too.
        compared: the number of results, from the first on, that are compared with those of `plain`. They have the same
            dtype.
        backward_kernel: whether the backward launches kernels. It does not if the forward has made the gradients, or
            if PyTorch's own functions make them.
    """

    name: str
    inputs: Callable[..., Call]
    plain: Function
    fused: Function | None = None
    constants: frozenset[str] = frozenset()
    written: tuple[str, ...] = ()
    compared: int = 1
    backward_kernel: bool = True

    def ours(self, **arguments: Any) -> Any:
        """Call Fastformer's function."""
        import fastformer

        return getattr(fastformer, self.name)(**arguments)

    def differentiable(self, tensors: dict[str, Tensor]) -> list[str]:
        """The names of the tensors that have gradients."""
        return [name for name, each in tensors.items() if each.is_floating_point() and name not in self.constants]

    def leaves(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same tensors as leaves of a graph. Only the differentiable ones require a gradient."""
        wanted = self.differentiable(tensors)
        return {name: each.detach().requires_grad_(name in wanted) for name, each in tensors.items()}

    def run(self, function: Function, call: Call) -> list[Tensor]:
        """Call `ours`, `plain` or `fused`. Return all results, followed by the written tensors.

        The tensors of `call` are not changed, because the function writes to copies.
        """
        given = {name: each.clone() if name in self.written else each for name, each in call.tensors.items()}
        result = function(**given, **call.options)
        results = [each for each in (result if isinstance(result, tuple) else (result,)) if each is not None]
        return [*results, *(given[name] for name in self.written)]

    def output(self, function: Function, call: Call) -> Tensor:
        """The results that are compared, joined in one flat tensor."""
        results = self.run(function, call)
        written = results[len(results) - len(self.written) :]
        return torch.cat([each.flatten() for each in (*results[: self.compared], *written)])
