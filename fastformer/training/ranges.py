"""The accepted values of the training commands' numeric options, checked before anything is read or written."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from jsonargparse import Namespace

_LARGEST = 2**32 - 1


class _Range(NamedTuple):
    words: str
    accepts: Callable[[float], bool]


_TABLE = 2**22  # largest vocabulary or number of positions: each has a vector
_SIZE = _Range(f"from 1 to {_TABLE:,}", lambda value: 1 <= value <= _TABLE)
_COUNT = _Range("at least 1", lambda value: value >= 1)
_COUNT_OR_NONE = _Range("at least 0", lambda value: value >= 0)
_NOT_NEGATIVE = _Range("at least 0, and finite", lambda value: 0 <= value < math.inf)
_LIMIT = _Range("at least 1, or -1 for no limit", lambda value: value >= 1 or value == -1)
_POSITIVE = _Range("above 0, and finite", lambda value: 0 < value < math.inf)
_BELOW_ONE = _Range("at least 0 and below 1", lambda value: 0 <= value < 1)
_BETWEEN = _Range("above 0 and below 1", lambda value: 0 < value < 1)
_UP_TO_ONE = _Range("above 0 and at most 1", lambda value: 0 < value <= 1)
_SHARE_OR_STEPS = _Range(
    "a whole number of steps, or a share below 1",
    lambda value: 0 <= value < math.inf and (value < 1 or value == int(value)),
)

_RANGES: dict[str, _Range] = {
    "max_minutes": _POSITIVE,
    "accumulate": _COUNT,
    "max_steps": _LIMIT,
    "evaluate_every": _COUNT,
    "seed": _Range(f"from 0 to {_LARGEST:,}", lambda value: 0 <= value <= _LARGEST),
    "tensor_parallel": _COUNT,
    "vocab_size": _SIZE,
    "max_length": _SIZE,
    "max_train_examples": _COUNT,
    "epochs": _LIMIT,
    "tokens_per_batch": _COUNT,
    "patience": _COUNT,
    "privacy_epsilon": _POSITIVE,
    "corpus.mask_probability": _BETWEEN,
    "corpus.heldout_fraction": _BELOW_ONE,
    "text.max_target_length": _SIZE,
    "text.stride": _COUNT_OR_NONE,
    "text.beams": _COUNT,
    "optimizer.learning_rate": _POSITIVE,
    "optimizer.weight_decay": _NOT_NEGATIVE,
    "optimizer.betas": _BELOW_ONE,
    "optimizer.eps": _POSITIVE,
    "optimizer.warmup_steps": _SHARE_OR_STEPS,
    "optimizer.layer_decay": _UP_TO_ONE,
    "adapter.rank": _COUNT,
    "adapter.alpha": _POSITIVE,
    "adapter.dropout": _BELOW_ONE,
    "adversary.epsilon": _POSITIVE,
    "adversary.step_size": _POSITIVE,
    "adversary.steps": _COUNT,
    "adversary.weight": _POSITIVE,
    "privacy.delta": _BETWEEN,
    "privacy.max_grad_norm": _POSITIVE,
    "privacy.batch_size": _COUNT,
    "trainer.num_nodes": _COUNT,
    "trainer.min_epochs": _COUNT_OR_NONE,
    "trainer.min_steps": _COUNT_OR_NONE,
    "trainer.log_every_n_steps": _COUNT_OR_NONE,
    "trainer.gradient_clip_val": _NOT_NEGATIVE,
    "trainer.limit_train_batches": _Range(
        "above 0: a number of batches, or a share of at most 1",
        lambda value: value >= 1 if isinstance(value, int) else 0 < value <= 1,
    ),
    "trainer.limit_val_batches": _Range(
        "at least 0: a number of batches, or a share of at most 1",
        lambda value: value >= 0 if isinstance(value, int) else 0 <= value <= 1,
    ),
}


def check_ranges(options: Namespace) -> None:
    """Raise ValueError for the first number that is not accepted, with the option's name."""
    for name, allowed in _RANGES.items():
        given = options.get(name)
        for value in given if isinstance(given, (list, tuple)) else [given]:
            if value is None:
                continue
            if not allowed.accepts(value):
                raise ValueError(f"--{name} must be {allowed.words}; got {value}")
            if isinstance(value, int) and value > _LARGEST:
                raise ValueError(f"--{name} must be at most {_LARGEST:,}; got {value}")
