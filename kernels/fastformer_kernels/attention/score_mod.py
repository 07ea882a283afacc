"""A function of the user's own that changes scores. Every backend shares this: no triton is needed."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

Reference = Callable[..., torch.Tensor]


class ScoreMod:
    """A function that changes the scores of attention, compiled into its kernels, in the sense of FlexAttention.

    It takes each score after scale and softcap, before biases and masks. Make it once: calls with the same functions
    share compiled kernels. It gets no gradient of its own, and takes no tensors from outside: for learned numbers there
    are `bias`, `relative_bias`, `alibi_slopes` and a `scale` for each head.

    Args:
        forward: a ``@triton.jit`` function ``(score, b, h, q, k) -> score``. The scores are a float32 tile, b and h are
            numbers, and q and k are tiles that broadcast to the scores: batch, query head, and indices within the
            sequence. It is also called for indices beyond the ends; what it returns there is ignored.
        backward: a ``@triton.jit`` function ``(dscore, score, b, h, q, k) -> dscore``: its derivative by the score,
            times the gradient of its result. `score` is what `forward` took.
        reference: the same as `forward` in PyTorch's functions, elementwise and differentiable, for the backend on a
            CPU. b, h, q and k are int64 tensors that broadcast to the scores (batch, heads, queries, keys).

    One without `forward` and `backward` works on a CPU only, and one without `reference` on a GPU only.

    Raises:
        TypeError: a function is missing or of the wrong kind.
        ValueError: `reference` uses a tensor that requires a gradient.

    >>> @triton.jit
    ... def decay(score, b, h, q, k):
    ...     return score * tl.exp2(-0.01 * tl.abs(q - k).to(tl.float32))
    >>> @triton.jit
    ... def decay_gradient(dscore, score, b, h, q, k):
    ...     return dscore * tl.exp2(-0.01 * tl.abs(q - k).to(tl.float32))
    >>> decays = fastformer.ScoreMod(decay, decay_gradient, lambda s, b, h, q, k: s * torch.exp2(-0.01 * (q - k).abs()))
    >>> fastformer.attention(query, key, value, score_mod=decays)
    """

    def __init__(self, forward: Any = None, backward: Any = None, reference: Reference | None = None) -> None:
        if (forward is None) != (backward is None):
            raise TypeError("forward and backward must be given together")
        if forward is None and reference is None:
            raise TypeError("forward and backward, or reference, must be given")
        for name, function in (("forward", forward), ("backward", backward)):
            if function is not None and not hasattr(function, "fn"):
                raise TypeError(f"{name} must be a @triton.jit function; got {type(function).__name__}")
        if reference is not None and not callable(reference):
            raise TypeError(f"reference must be a function; got {type(reference).__name__}")
        if learned := _learned_by(reference):
            raise ValueError(
                f"reference must not use tensors that learn, which would get no gradient; got {', '.join(learned)}. "
                "There are bias, relative_bias, alibi_slopes and a scale for each head"
            )
        self.forward, self.backward, self.reference = forward, backward, reference
        self.source = f"{_source_key(forward)} {_source_key(backward)}"
        self.key = " ".join((self.source, *(str(id(function)) for function in (forward, backward, reference))))
        # An operator takes no function: it takes this key. Functions stay, since a kept launch may refer to them.
        _known[self.key] = self

    def __reduce__(self) -> tuple[Any, ...]:
        # The key is of this process.
        return ScoreMod, (self.forward, self.backward, self.reference)


_known: dict[str, ScoreMod] = {}


def score_mod_of(key: str) -> ScoreMod:
    """The ScoreMod with this key.

    Raises:
        RuntimeError: it was made in another process, whose exported program runs here.
    """
    if key not in _known:
        raise RuntimeError("score_mod is unknown in this process: export a program anew where its ScoreMod is made")
    return _known[key]


def _learned_by(function: Any) -> list[str]:
    """The names of the variables from outside that a function uses and that are tensors with a gradient."""
    if not inspect.isfunction(function):
        return []
    outside = inspect.getclosurevars(function)
    values = {**outside.globals, **outside.nonlocals}
    return [name for name, value in values.items() if isinstance(value, torch.Tensor) and value.requires_grad]


def _source_key(function: Any) -> str:
    """A key of a Triton function's source and of what it calls; its source alone in the interpreter."""
    if function is None:
        return ""
    return getattr(function, "cache_key", None) or f"{function.fn.__qualname__}\n{inspect.getsource(function.fn)}"
