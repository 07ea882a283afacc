"""Registration of ``attn_implementation="fastformer"`` in transformers, only if and when transformers is imported."""

from __future__ import annotations

import importlib.abc
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

NAME = "fastformer"


def register() -> None:
    """Register in the modules of transformers that are already imported, and in others right after their import."""
    if not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
    for name, register_with in _AFTER_IMPORT.items():
        if name in sys.modules:
            register_with(sys.modules[name])


def _register_attention(modeling_utils: ModuleType) -> None:
    from transformers.masking_utils import AttentionMaskInterface

    from fastformer.integrations.attention.forward import attention_forward
    from fastformer.integrations.attention.mask import attention_mask

    modeling_utils.AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)
    _wrap(modeling_utils.PreTrainedModel, "get_correct_attn_implementation", _warn_where_it_has_no_effect)
    _wrap(modeling_utils.PreTrainedModel, "set_attn_implementation", _reach_copied_configurations)


def _register_continuous_batching(continuous_api: ModuleType) -> None:
    _wrap(continuous_api.ContinuousBatchingManager, "switch_to_cb_friendly_attn", _stay_if_ours)


def _warn_where_it_has_no_effect(
    original: Callable, self: Any, requested: str | None, *args: Any, **kwargs: Any
) -> Any:
    """Warn for classes with their own attention, for which `from_pretrained` accepts any registered name."""
    if requested == NAME and not self._can_set_attn_implementation():
        warnings.warn(
            f'{type(self).__name__} computes attention itself: attn_implementation="{NAME}" has no effect on it',
            stacklevel=2,
        )
        requested = None  # the class's default: some classes look up their attention by their own name
    return original(self, requested, *args, **kwargs)


def _reach_copied_configurations(original: Callable, self: Any, *args: Any, **kwargs: Any) -> None:
    """Set the name in stacks with a copied configuration, such as T5's, which transformers before 5.20 leaves out."""
    original(self, *args, **kwargs)
    implementation = self.config._attn_implementation
    for stack in self.modules():
        own: Any = getattr(stack, "config", None)
        if type(own) is type(self.config) and NAME in (implementation, own._attn_implementation):
            own._attn_implementation_internal = implementation


def _stay_if_ours(original: Callable, self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
    """Keep our attention in `generate_batch`, which accepts only a few names and those with "flash" in them."""
    if model.config._attn_implementation != NAME:
        original(self, model, *args, **kwargs)


def _wrap(owner: type, name: str, wrapper: Callable) -> None:
    """Make calls of a method go through `wrapper`, whose first argument is the original method."""
    original = getattr(owner, name)
    if hasattr(original, "wrapped_by_fastformer"):
        return

    @wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    vars(method)["wrapped_by_fastformer"] = True
    setattr(owner, name, method)


_AFTER_IMPORT: dict[str, Callable[[ModuleType], None]] = {
    "transformers.modeling_utils": _register_attention,
    "transformers.generation.continuous_batching.continuous_api": _register_continuous_batching,
}


class _AfterImport(importlib.abc.MetaPathFinder):
    """A finder that finds transformers' modules like other finders, and runs our registration after their import."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _AFTER_IMPORT:
            return None
        specs = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _AFTER_IMPORT[fullname](module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
