"""Acceleration by a change of class: a module keeps its identity, parameters, buffers and children.

The new class derives from the module's own and replaces one method. It keeps the old name, so that code that uses names
(FSDP's wrapping policies, `architectures` in a saved configuration) sees no difference. When the class is set back,
nothing remains on the instance.
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
    """The way to accelerate modules of one structure. Hashable and picklable: modules of one recipe share a class."""

    part: ClassVar[str]
    """The name in a report of the kind of module."""

    @abstractmethod
    def methods(self, original: type[nn.Module]) -> dict[str, Callable[..., Any]]:
        """Return the methods of the accelerated class that replace those of `original`."""

    @abstractmethod
    def describe(self) -> str:
        """Describe in a report what replaces the module."""


@dataclass(frozen=True)
class OperatorRecipe(Recipe):
    """A recipe that computes one method by a Fastformer operator where kernels run.

    Elsewhere the module's own method runs: on a CPU the operators are PyTorch's own functions plus the cost of calling
    a registered operator.
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
        """Return the operator's inputs from a call's arguments; None for a call that the operator does not support."""
        given = (*args, *kwargs.values())
        return given if len(given) == 1 and isinstance(given[0], Tensor) else None

    @abstractmethod
    def holds(self, module: nn.Module, *tensors: Tensor) -> bool:
        """Whether `module` is still as it was recognised (LoRA may have replaced a projection), for these inputs."""

    @abstractmethod
    def run(self, module: nn.Module, *tensors: Tensor) -> Tensor:
        """Compute the module's result by the operator."""


class Accelerated(nn.Module):
    """The class that every accelerated module is an instance of, besides its own class."""

    fastformer_original: ClassVar[type[nn.Module]]
    fastformer_recipe: ClassVar[Recipe]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy by what the class is made from, since a class made at run time cannot be found by name."""
        reduced: Any = super().__reduce_ex__(max(int(protocol), 2))
        create, (_, *arguments), *state = reduced
        if create is not copyreg.__newobj__:  # type: ignore[attr-defined]
            raise TypeError(f"{type(self).__name__} has its own way of pickling; call fastformer.restore(model) first")
        return _new, (self.fastformer_original, self.fastformer_recipe, *arguments), *state


def _new(original: type[nn.Module], recipe: Recipe, *arguments: Any) -> nn.Module:
    cls = accelerated_class(original, recipe)  # type: ignore[arg-type]
    return cls.__new__(cls, *arguments)


@functools.cache
def accelerated_class(original: type[nn.Module], recipe: Recipe) -> type[nn.Module]:
    """Return the class of modules of class `original` that are accelerated by `recipe`."""
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
    """Whether the class of an accelerated module has not been changed again since."""
    return "fastformer_original" in vars(type(module))


def swap_back(module: Accelerated) -> None:
    """Give an accelerated module its original class."""
    module.__class__ = module.fastformer_original  # type: ignore[assignment]


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of `module` before acceleration; the module may be accelerated or not."""
    return module.fastformer_original if isinstance(module, Accelerated) else type(module)
