"""An accelerated module keeps its identity, parameters, buffers and children: only its class changes.

The new class derives from the module's own and differs in one method. It has the old one's name, so that what goes by
names (FSDP's wrapping policies, `architectures` in a saved configuration) sees no difference, and nothing is left on
the instance when the class is set back.
"""

from __future__ import annotations

import copyreg
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastformer.backends import use_triton


class Recipe(ABC):
    """How modules of one structure are accelerated. Hashable and picklable: modules of one recipe share a class."""

    part: ClassVar[str]
    """What such a module is, in a report."""

    @abstractmethod
    def methods(self, original: type[nn.Module]) -> dict[str, Callable[..., Any]]:
        """What the accelerated class has in place of methods of `original`."""

    @abstractmethod
    def describe(self) -> str:
        """What runs in its place, in a report."""


@dataclass(frozen=True)
class OperatorRecipe(Recipe):
    """One method's computation as a Fastformer operator, wherever kernels run.

    Elsewhere the module's own method runs: on a CPU the operators are PyTorch's own functions, and have the cost of a
    registered operator's call besides.
    """

    method: ClassVar[str] = "forward"

    def methods(self, original: type[nn.Module]) -> dict[str, Callable[..., Any]]:
        own = getattr(original, self.method)

        @functools.wraps(own)
        def accelerated(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            tensors = self.tensors(module, *args, **kwargs)
            if tensors is None or not use_triton(tensors[0]) or any(map(is_traceable_wrapper_subclass, tensors)):
                return own(module, *args, **kwargs)
            if not self.holds(module, *tensors):
                return own(module, *args, **kwargs)
            return self.run(module, *tensors)

        return {self.method: accelerated}

    def tensors(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, ...] | None:
        """The operator's inputs among a call's arguments; None for a call that it does not serve."""
        given = (*args, *kwargs.values())
        return given if len(given) == 1 and isinstance(given[0], Tensor) else None

    @abstractmethod
    def holds(self, module: nn.Module, *tensors: Tensor) -> bool:
        """Whether `module` still is what was recognised (a projection may have become LoRA's), for these inputs."""

    @abstractmethod
    def run(self, module: nn.Module, *tensors: Tensor) -> Tensor:
        """The module's result, by the operator."""


class Accelerated(nn.Module):
    """What every accelerated module is an instance of, besides its own class."""

    fastformer_original: ClassVar[type[nn.Module]]
    fastformer_recipe: ClassVar[Recipe]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A class made at run time has no name to be found by: pickle and copy keep what it is made from."""
        reduced: Any = super().__reduce_ex__(max(int(protocol), 2))
        create, (_, *arguments), *state = reduced
        if create is not copyreg.__newobj__:  # type: ignore[attr-defined]
            raise TypeError(f"{type(self).__name__} is pickled in a way of its own; fastformer.restore(model) first")
        return _new, (self.fastformer_original, self.fastformer_recipe, *arguments), *state


def _new(original: type[nn.Module], recipe: Recipe, *arguments: Any) -> nn.Module:
    cls = accelerated_class(original, recipe)  # type: ignore[arg-type]
    return cls.__new__(cls, *arguments)


@functools.cache
def accelerated_class(original: type[nn.Module], recipe: Recipe) -> type[nn.Module]:
    """The class of `original`'s modules once they are accelerated by `recipe`."""
    return type(
        original.__name__,
        (Accelerated, original),
        {
            **recipe.methods(original),
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
            "fastformer_original": original,
            "fastformer_recipe": recipe,
        },
    )


def swap(module: nn.Module, recipe: Recipe) -> None:
    """Accelerate `module` by `recipe`."""
    module.__class__ = accelerated_class(type(module), recipe)  # type: ignore[arg-type]


def can_swap_back(module: Accelerated) -> bool:
    """Whether the class of an accelerated module was not changed once more since."""
    return "fastformer_original" in vars(type(module))


def swap_back(module: Accelerated) -> None:
    """Give an accelerated module its own class again."""
    module.__class__ = module.fastformer_original  # type: ignore[assignment]


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of `module`, accelerated or not, before acceleration."""
    return module.fastformer_original if isinstance(module, Accelerated) else type(module)
