"""The launches of the attention kernels: configurations by rule, grids, and the choice between ways of loading."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
import triton

from fastformer_kernels.attention.arguments import UNBOUNDED, AttentionArguments
from fastformer_kernels.attention.kernel_arguments import Constants, folds_scale
from fastformer_kernels.attention.score_mod import score_mod_of
from fastformer_kernels.attention.tiles import ONE_LOOP, TWO_LOOPS, UNTESTED
from fastformer_kernels.configurations import chosen, size_class
from fastformer_kernels.constants import constants
from fastformer_kernels.launch import COMPILER_OPTIONS, architecture_of, for_triton, multiprocessors_of
from fastformer_kernels.precision import input_precision


@dataclass(frozen=True)
class AttentionConfiguration:
    """Tile sizes and the compiler's options for one kernel.

    Attributes:
        block_m, block_n: queries and keys of a tile.
        num_warps, num_stages: the compiler's options.
        resident: number of CTAs that a multiprocessor holds. Programs then take one tile after another where causality
            makes tiles of different lengths. 0 means one program for each tile, for kernels in which the compiler would
            keep too much in registers across tiles; the longest tiles still start first.
        descriptors: whether tiles are copied by the bulk copy engine (TMA), where alignment allows it.
        warp_specialize: whether, with descriptors, copies and products have separate warps. The compiler can do this
            only in a single loop.
        one_loop: where some tiles need a test, whether one loop tests all tiles; else those tiles have a separate loop.
        two_kernels: for the backward only: whether a separate kernel, which recomputes the weights, computes dQ.
            Else dQ is added up in memory.
        lazy_rescale: for the forward only: whether it rescales its sums only where a maximum has grown much.
        hoist: for the backward only: whether addresses that stay the same in a loop are computed before it. A wide tile
            has dozens. Else each use computes its own, which costs instructions and leaves registers free.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    resident: int = 0
    descriptors: bool = False
    warp_specialize: bool = False
    one_loop: bool = False
    two_kernels: bool = False
    lazy_rescale: bool = False
    hoist: bool = True

    @property
    def options(self) -> dict[str, object]:
        """The compiler's options for a launch."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **COMPILER_OPTIONS}


# Upper bounds of the classes of calls whose launches are measured, and a multiple of every measured tile size.
HEAD_DIM_CLASSES = (64, 128, 256, 512)
LENGTH_CLASSES = (512, 2048)
LARGEST_BLOCK = 128
# The widest heads whose tiles may be read element by element.
_WIDEST_BY_ELEMENT = 128
# Descriptors count rows and columns in 32 bits.
_FEWEST_64_BIT = 1 << 31


def _block_of(head_dim: int) -> int:
    """Columns of a tile that holds `head_dim`. A tile of a product has at least 16 rows and columns."""
    return max(16, triton.next_power_of_2(head_dim))


Table = dict[int, dict[int, AttentionConfiguration]]
# An architecture's name, an element's size in bytes and the greater head_dim.
Kind = tuple[str, int, int]
Feature = Literal["mask or bias", "grouped heads", "dropout", "score_mod", "softcap", "window", "alibi"]

# Configurations by element size and by the largest head_dim that each serves. They are chosen by their compiled code:
# no spills for 16-bit types at head_dim 64 and 128, forward or backward. With 64 rows, 8 warps would compute products
# twice at head_dim 64.
_FLOAT32_FORWARD = {
    64: AttentionConfiguration(32, 32, 4, 2),
    128: AttentionConfiguration(32, 32, 4, 2),
    256: AttentionConfiguration(32, 16, 8, 1),
    512: AttentionConfiguration(16, 16, 8, 1),
}
_FLOAT32_BACKWARD = {
    64: AttentionConfiguration(32, 32, 4, 1),
    128: AttentionConfiguration(32, 32, 8, 1),
    256: AttentionConfiguration(16, 16, 8, 1),
    # 16 keys and 16 queries would need more than 99 KiB of shared memory.
    512: AttentionConfiguration(16, 8, 8, 1, two_kernels=True),
}
_AMPERE_FORWARD: Table = {
    2: {
        64: AttentionConfiguration(128, 64, 8, 3),
        128: AttentionConfiguration(128, 64, 8, 3),
        256: AttentionConfiguration(64, 64, 8, 2),
        512: AttentionConfiguration(64, 16, 8, 2),
    },
    4: _FLOAT32_FORWARD,
}
_AMPERE_BACKWARD: Table = {
    2: {
        64: AttentionConfiguration(32, 64, 4, 2),
        128: AttentionConfiguration(64, 64, 8, 2),
        256: AttentionConfiguration(32, 32, 8, 1),
        512: AttentionConfiguration(32, 16, 8, 1, two_kernels=True),
    },
    4: _FLOAT32_BACKWARD,
}
# These GPUs have 99 KiB of shared memory.
_ADA_FORWARD: Table = {
    2: {
        **_AMPERE_FORWARD[2],
        128: AttentionConfiguration(128, 64, 8, 2),
        256: AttentionConfiguration(64, 32, 8, 2),
        512: AttentionConfiguration(32, 16, 8, 2),
    },
    4: _FLOAT32_FORWARD,
}
_ADA_BACKWARD: Table = {
    2: {**_AMPERE_BACKWARD[2], 512: AttentionConfiguration(16, 16, 8, 1, two_kernels=True)},
    4: _FLOAT32_BACKWARD,
}
_CDNA_FORWARD: Table = {
    2: {
        64: AttentionConfiguration(128, 64, 4, 1),
        128: AttentionConfiguration(128, 32, 4, 1),
        256: AttentionConfiguration(64, 32, 4, 1),
        512: AttentionConfiguration(64, 16, 4, 1),
    },
    4: {**_FLOAT32_FORWARD, 512: AttentionConfiguration(16, 16, 4, 1)},
}
_CDNA_BACKWARD: Table = {
    2: {
        64: AttentionConfiguration(32, 64, 4, 1),
        128: AttentionConfiguration(32, 64, 4, 1),
        256: AttentionConfiguration(16, 32, 4, 1),
        512: AttentionConfiguration(16, 16, 4, 1, two_kernels=True),
    },
    4: {
        64: AttentionConfiguration(32, 32, 4, 1),
        128: AttentionConfiguration(16, 32, 4, 1),
        256: AttentionConfiguration(16, 16, 4, 1),
        512: AttentionConfiguration(16, 16, 4, 1, two_kernels=True, hoist=False),
    },
}
_FORWARD: dict[str, Table] = {
    "sm_80": _AMPERE_FORWARD,
    "sm_86": _ADA_FORWARD,
    "sm_89": _ADA_FORWARD,
    "sm_90": {
        2: {
            64: AttentionConfiguration(128, 128, 8, 2, resident=1, descriptors=True),
            128: AttentionConfiguration(128, 128, 8, 2, descriptors=True),
            256: AttentionConfiguration(128, 64, 8, 2, resident=1, descriptors=True),
            512: AttentionConfiguration(64, 32, 8, 2, descriptors=True),
        },
        4: _FLOAT32_FORWARD,
    },
    "sm_100": {
        2: {
            64: AttentionConfiguration(128, 128, 8, 2, descriptors=True),
            128: AttentionConfiguration(128, 128, 8, 2, descriptors=True),
            256: AttentionConfiguration(128, 64, 8, 1, descriptors=True),
            512: AttentionConfiguration(64, 32, 8, 2, descriptors=True),
        },
        4: _FLOAT32_FORWARD,
    },
    # sm_120 multiplies with mma.sync, for which the compiler does not pipeline the bulk copy engine.
    "sm_120": _ADA_FORWARD,
    "gfx90a": _CDNA_FORWARD,
    "gfx942": _CDNA_FORWARD,
    "gfx950": _CDNA_FORWARD,
}
# One loop needs fewer registers than two.
_WIDE_HOPPER_FORWARD = AttentionConfiguration(64, 16, 8, 2, descriptors=True, one_loop=True)
# Where a mask or a bias is loaded with each tile, smaller tiles leave enough registers for it.
_AMPERE_FORWARD_LOADING: Table = {
    2: {64: AttentionConfiguration(64, 64, 4, 2), 128: AttentionConfiguration(64, 64, 8, 2)}
}
_AMPERE_BACKWARD_LOADING: Table = {
    2: {64: AttentionConfiguration(32, 32, 4, 2), 128: AttentionConfiguration(32, 32, 8, 2)}
}
_FORWARD_LOADING: dict[str, Table] = {
    **dict.fromkeys(("sm_80", "sm_86", "sm_89", "sm_120"), _AMPERE_FORWARD_LOADING),
    "sm_90": {
        2: {
            64: AttentionConfiguration(64, 64, 4, 2, descriptors=True),
            128: AttentionConfiguration(64, 64, 8, 2, descriptors=True),
            # A mask together with a float32 bias needs more than 64 keys leave free.
            256: AttentionConfiguration(128, 32, 8, 2, descriptors=True),
            512: _WIDE_HOPPER_FORWARD,
        }
    },
    "sm_100": {
        2: {
            64: AttentionConfiguration(64, 64, 8, 1, descriptors=True),
            128: AttentionConfiguration(64, 64, 8, 1, descriptors=True),
        }
    },
}
_BACKWARD_LOADING: dict[str, Table] = {
    **dict.fromkeys(("sm_80", "sm_86", "sm_89", "sm_120"), _AMPERE_BACKWARD_LOADING),
    "sm_90": {
        2: {
            64: AttentionConfiguration(32, 64, 4, 2, descriptors=True),
            128: AttentionConfiguration(32, 32, 8, 2, descriptors=True),
            256: AttentionConfiguration(32, 32, 8, 1, descriptors=True),
        }
    },
    "sm_100": {
        2: {
            64: AttentionConfiguration(32, 64, 8, 1, descriptors=True),
            128: AttentionConfiguration(32, 64, 8, 1, descriptors=True),
            256: AttentionConfiguration(32, 32, 8, 1, descriptors=True),
        }
    },
}
# One loop, which the compiler splits among specialised warps: some copy while others multiply. It tests every tile if
# some tiles need a test. It is for the calls of which `_suits_specialized_warps` is true.
_HOPPER_FORWARD_SPECIALIZED: Table = {
    2: {128: AttentionConfiguration(128, 128, 4, 2, resident=1, descriptors=True, warp_specialize=True, one_loop=True)}
}
_FORWARD_SPECIALIZED: dict[str, Table] = {
    # Triton 3.6 tests a score in three instructions instead of two: two loops that are not specialised have less to do.
    "sm_90": for_triton({(3, 6): {}, (3, 9): _HOPPER_FORWARD_SPECIALIZED}),
    "sm_100": {
        2: {
            64: AttentionConfiguration(128, 128, 4, 2, descriptors=True, warp_specialize=True, one_loop=True),
            128: AttentionConfiguration(128, 64, 8, 3, descriptors=True, warp_specialize=True, one_loop=True),
        }
    },
}
# Where no tile needs a test.
_FORWARD_WHOLE: dict[str, Table] = {
    "sm_90": _HOPPER_FORWARD_SPECIALIZED,
    "sm_100": {
        2: {
            64: _FORWARD_SPECIALIZED["sm_100"][2][64],
            128: AttentionConfiguration(128, 128, 8, 2, descriptors=True, warp_specialize=True),
        }
    },
}
# Above head_dim 256, gradients of keys and values fill the registers with 16 keys in a tile. Adding dQ up in memory for
# so few keys at a time would take most of the time: it has its own kernel.
_WIDE_HOPPER_BACKWARD = AttentionConfiguration(64, 16, 8, 1, descriptors=True, two_kernels=True)
_BACKWARD: dict[str, Table] = {
    "sm_80": _AMPERE_BACKWARD,
    "sm_86": _ADA_BACKWARD,
    "sm_89": _ADA_BACKWARD,
    "sm_90": {
        2: {
            64: AttentionConfiguration(64, 128, 8, 2, descriptors=True),
            128: for_triton(
                {
                    (3, 6): AttentionConfiguration(32, 128, 8, 2, descriptors=True, hoist=False),
                    (3, 9): AttentionConfiguration(32, 128, 8, 2, descriptors=True),
                }
            ),
            # One loop, without stages, leaves registers free for more keys.
            256: AttentionConfiguration(32, 64, 8, 1, descriptors=True, one_loop=True, hoist=False),
            512: _WIDE_HOPPER_BACKWARD,
        },
        4: _FLOAT32_BACKWARD,
    },
    "sm_100": {
        2: {
            64: AttentionConfiguration(64, 128, 8, 2, descriptors=True),
            128: AttentionConfiguration(64, 64, 8, 2, descriptors=True),
            256: AttentionConfiguration(32, 64, 8, 1, descriptors=True, hoist=False),
            512: _WIDE_HOPPER_BACKWARD,
        },
        4: _FLOAT32_BACKWARD,
    },
    "sm_120": _ADA_BACKWARD,
    "gfx90a": _CDNA_BACKWARD,
    "gfx942": _CDNA_BACKWARD,
    "gfx950": _CDNA_BACKWARD,
}
# Some features of a call need registers, which leaves fewer for the tiles. The first feature with an entry decides.
_HOPPER_FORWARD_DROPOUT: Table = {
    2: {
        64: _FORWARD["sm_90"][2][64],
        128: AttentionConfiguration(128, 64, 8, 2, resident=1, descriptors=True),
        256: AttentionConfiguration(128, 64, 8, 2, descriptors=True),
        512: _WIDE_HOPPER_FORWARD,
    }
}
_HOPPER_FORWARD_ALIBI: Table = {2: {**_FORWARD["sm_90"][2], 512: _WIDE_HOPPER_FORWARD}}
_BLACKWELL_BACKWARD_GROUPED: Table = {
    2: {
        64: AttentionConfiguration(64, 64, 8, 2, descriptors=True),
        128: AttentionConfiguration(32, 64, 8, 2, descriptors=True, one_loop=True, hoist=False),
        # Two loops would need more tensor memory than there is.
        256: AttentionConfiguration(32, 64, 8, 1, descriptors=True, one_loop=True, hoist=False),
    }
}
# Without addresses computed before the loops there is room for as many keys as without these features.
_HOPPER_BACKWARD_CROWDED: Table = {
    2: {
        64: _BACKWARD["sm_90"][2][64],
        128: AttentionConfiguration(32, 128, 8, 2, descriptors=True, hoist=False),
    }
}
_WIDE_BACKWARD_DROPOUT = AttentionConfiguration(32, 16, 8, 1, descriptors=True, two_kernels=True)
_HOPPER_BACKWARD_DROPOUT: Table = {
    2: {**_HOPPER_BACKWARD_CROWDED[2], 256: _BACKWARD["sm_90"][2][256], 512: _WIDE_BACKWARD_DROPOUT}
}
_BLACKWELL_BACKWARD_DROPOUT: Table = {2: {**_BACKWARD["sm_100"][2], 512: _WIDE_BACKWARD_DROPOUT}}
_ADA_BACKWARD_GROUPED: Table = {
    2: {
        64: _AMPERE_BACKWARD[2][64],
        128: AttentionConfiguration(32, 64, 8, 2),
        256: AttentionConfiguration(32, 32, 8, 1, one_loop=True),
    }
}
_AMPERE_BACKWARD_GROUPED: Table = {
    2: {**_ADA_BACKWARD_GROUPED[2], 512: AttentionConfiguration(32, 16, 8, 1, two_kernels=True, hoist=False)}
}
_BLACKWELL_FORWARD_SCORE_MOD: Table = {
    2: {
        64: AttentionConfiguration(128, 64, 8, 2, descriptors=True),
        128: AttentionConfiguration(128, 64, 8, 2, descriptors=True),
    }
}
# The hyperbolic tangent of a softcap leaves too few registers for specialised warps there.
_FORWARD_SPECIALIZED_WITH: dict[Feature, dict[str, Table]] = {"softcap": {"sm_100": _FORWARD["sm_100"]}}
_FORWARD_WITH: dict[Feature, dict[str, Table]] = {
    "mask or bias": _FORWARD_LOADING,
    "dropout": {"sm_90": _HOPPER_FORWARD_DROPOUT},
    "score_mod": {"sm_90": _HOPPER_FORWARD_DROPOUT, "sm_100": _BLACKWELL_FORWARD_SCORE_MOD},
    "alibi": {"sm_90": _HOPPER_FORWARD_ALIBI},
}
_BACKWARD_WITH: dict[Feature, dict[str, Table]] = {
    "mask or bias": _BACKWARD_LOADING,
    "grouped heads": {
        "sm_80": _AMPERE_BACKWARD_GROUPED,
        **dict.fromkeys(("sm_86", "sm_89", "sm_120"), _ADA_BACKWARD_GROUPED),
        "sm_90": _HOPPER_BACKWARD_CROWDED,
        "sm_100": _BLACKWELL_BACKWARD_GROUPED,
    },
    "dropout": {"sm_90": _HOPPER_BACKWARD_DROPOUT, "sm_100": _BLACKWELL_BACKWARD_DROPOUT},
    "score_mod": {"sm_90": _HOPPER_BACKWARD_CROWDED},
}
# dK and dV alone, in one loop with specialised warps, for calls for which `_default_alone` finds it possible. Each warp
# group needs 64 keys: with fewer, both would compute the same.
_KEY_VALUE_GRADIENT_SPECIALIZED: dict[str, Table] = {
    "sm_90": {
        2: {
            64: AttentionConfiguration(64, 128, 4, 2, descriptors=True, warp_specialize=True, one_loop=True),
            128: AttentionConfiguration(32, 128, 4, 2, descriptors=True, warp_specialize=True, one_loop=True),
        }
    }
}
# dQ alone, likewise. Later compilers cannot divide the rows' numbers between the warp groups.
_HOPPER_QUERY_GRADIENT_SPECIALIZED: Table = {
    2: {128: AttentionConfiguration(128, 64, 4, 2, descriptors=True, warp_specialize=True, one_loop=True)}
}
_QUERY_GRADIENT_SPECIALIZED: dict[str, Table] = {
    "sm_90": for_triton({(3, 6): _HOPPER_QUERY_GRADIENT_SPECIALIZED, (3, 7): {}})
}
_AMPERE_QUERY_GRADIENT: Table = {
    2: {**_AMPERE_BACKWARD[2], 512: AttentionConfiguration(32, 16, 8, 1)},
    4: {**_FLOAT32_BACKWARD, 512: AttentionConfiguration(8, 16, 8, 1)},
}
_HOPPER_QUERY_GRADIENT: Table = {
    2: {
        128: AttentionConfiguration(128, 64, 8, 2, descriptors=True),
        256: AttentionConfiguration(64, 32, 8, 2, descriptors=True),
        512: AttentionConfiguration(64, 32, 8, 1, descriptors=True, hoist=False),
    },
    4: _AMPERE_QUERY_GRADIENT[4],
}
_BLACKWELL_QUERY_GRADIENT: Table = {
    2: {**_AMPERE_QUERY_GRADIENT[2], 128: AttentionConfiguration(64, 32, 8, 2)},
    4: _AMPERE_QUERY_GRADIENT[4],
}
_CDNA_QUERY_GRADIENT: Table = {
    2: {**_CDNA_BACKWARD[2], 512: AttentionConfiguration(32, 16, 4, 1)},
    4: {**_CDNA_BACKWARD[4], 512: AttentionConfiguration(16, 16, 4, 1, hoist=False)},
}
_QUERY_GRADIENT: dict[str, Table] = {
    **dict.fromkeys(("sm_80", "sm_86", "sm_89", "sm_120"), _AMPERE_QUERY_GRADIENT),
    "sm_90": _HOPPER_QUERY_GRADIENT,
    "sm_100": _BLACKWELL_QUERY_GRADIENT,
    **dict.fromkeys(("gfx90a", "gfx942", "gfx950"), _CDNA_QUERY_GRADIENT),
}
_WIDE_HOPPER_QUERY_GRADIENT = AttentionConfiguration(64, 16, 8, 1, descriptors=True, hoist=False)
_QUERY_GRADIENT_WITH: dict[Feature, dict[str, Table]] = {
    "mask or bias": {
        "sm_90": {
            2: {
                64: AttentionConfiguration(64, 32, 4, 2, descriptors=True),
                128: AttentionConfiguration(64, 32, 8, 2, descriptors=True),
                256: _AMPERE_BACKWARD[2][256],
                512: _WIDE_HOPPER_QUERY_GRADIENT,
            }
        },
        "sm_100": {2: {**_BLACKWELL_QUERY_GRADIENT[2], 512: AttentionConfiguration(16, 16, 8, 1)}},
    },
    "dropout": {
        "sm_90": {
            2: {
                **_HOPPER_QUERY_GRADIENT[2],
                128: AttentionConfiguration(64, 64, 8, 2, descriptors=True),
                512: _WIDE_HOPPER_QUERY_GRADIENT,
            }
        }
    },
}
# Small tiles, so that small tests have several of them.
_INTERPRETER = AttentionConfiguration(16, 16, 1, 1, resident=1)


def forward_configuration(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, arguments: AttentionArguments
) -> AttentionConfiguration:
    """The forward kernel's configuration for this call."""
    default = _default_forward(query, key, value, arguments)
    return chosen("attention_forward", query, default, lambda: _shape_class(query, value, arguments))


def backward_configuration(
    query: torch.Tensor, value: torch.Tensor, arguments: AttentionArguments
) -> AttentionConfiguration:
    """The configuration of the backward kernel that adds dQ up in memory."""
    default = _default_backward(query, value, arguments)
    return chosen("attention_backward", query, default, lambda: _shape_class(query, value, arguments))


def deterministic_configuration(
    query: torch.Tensor, value: torch.Tensor, arguments: AttentionArguments
) -> AttentionConfiguration:
    """The configuration of the kernel that computes dK and dV where determinism is asked for."""
    default = _default_alone(_KEY_VALUE_GRADIENT_SPECIALIZED, query, value, arguments)
    default = default or _default_backward(query, value, arguments)
    return chosen("attention_deterministic", query, default, lambda: _shape_class(query, value, arguments))


def query_gradient_configuration(
    query: torch.Tensor, value: torch.Tensor, arguments: AttentionArguments
) -> AttentionConfiguration:
    """The configuration of the kernel that computes dQ alone."""
    default = _default_alone(_QUERY_GRADIENT_SPECIALIZED, query, value, arguments)
    if default is None:
        kind, present = _kind(query, value), _features(query, value, arguments)
        default = _choose_with(_QUERY_GRADIENT_WITH, kind, present) or _choose(_QUERY_GRADIENT, kind) or _INTERPRETER
    return chosen("attention_query_gradient", query, default, lambda: _shape_class(query, value, arguments))


def _default_alone(
    tables: dict[str, Table], query: torch.Tensor, value: torch.Tensor, arguments: AttentionArguments
) -> AttentionConfiguration | None:
    """The configuration with specialised warps of a backward kernel that writes only tiles it owns, if it has one."""
    # The loop over the heads that share keys would be around the specialised loop, which the compiler refuses.
    alone = query.shape[1] == value.shape[1] and uses_descriptors(query, value)
    return _choose(tables, _kind(query, value)) if alone and _suits_specialized_warps(arguments) else None


def _shape_class(query: torch.Tensor, value: torch.Tensor, arguments: AttentionArguments) -> tuple[str, ...]:
    """The class of a call. `fastformer tune` finds one best configuration for each class."""
    borders = any(
        needs_tests(arguments, length, LARGEST_BLOCK) for length in (arguments.max_seqlen_q, arguments.max_seqlen_k)
    )
    return _class_words(
        query.element_size(),
        query.shape[-1],
        value.shape[-1],
        arguments.max_seqlen_k,
        "listed" if arguments.query_lists is not None else "borders" if borders else "whole",
        _scoring(arguments),
        "undropped" if arguments.seed is None else "dropped",
        "descriptors" if uses_descriptors(query, value) else "pointers",
    )


def _scoring(arguments: AttentionArguments) -> str:
    """The word of a call's class that says what its scores cost."""
    if arguments.loads_scores:
        return "loaded"
    if arguments.score_mod is not None:
        return "modified"
    return "folded" if folds_scale(arguments) else "computed"


@lru_cache
def _class_words(element_size: int, head_dim: int, value_dim: int, keys: int, *words: str) -> tuple[str, ...]:
    return (
        f"{8 * element_size}-bit",
        f"head_dim{size_class(head_dim, HEAD_DIM_CLASSES)}",
        f"value_dim{size_class(value_dim, HEAD_DIM_CLASSES)}",
        *words,
        f"keys{size_class(keys, LENGTH_CLASSES)}",
    )


def _default_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, arguments: AttentionArguments
) -> AttentionConfiguration:
    """The configuration of the forward kernel that is shipped for such a call."""
    kind, present = _kind(query, value), _features(query, value, arguments)
    if _suits_specialized_warps(arguments) and uses_descriptors(query, key, value):
        whole = not needs_tests(arguments, arguments.max_seqlen_k, LARGEST_BLOCK)
        specialized = _choose_with(_FORWARD_SPECIALIZED_WITH, kind, present)
        specialized = specialized or _choose(_FORWARD_WHOLE if whole else _FORWARD_SPECIALIZED, kind)
        if specialized is not None:
            return specialized
    return _choose_with(_FORWARD_WITH, kind, present) or _choose(_FORWARD, kind) or _INTERPRETER


def _suits_specialized_warps(arguments: AttentionArguments) -> bool:
    """True if the compiler can specialise warps: a call loads only queries, keys and values, and drops nothing."""
    return (
        arguments.seed is None
        and not arguments.loads_scores
        and arguments.query_lists is None
        and arguments.score_mod is None
    )


def _default_backward(
    query: torch.Tensor, value: torch.Tensor, arguments: AttentionArguments
) -> AttentionConfiguration:
    return _shipped_backward(_kind(query, value), _features(query, value, arguments))


# Every call needs this before its launch, to know what to allocate.
@lru_cache
def _shipped_backward(kind: Kind, features: tuple[Feature, ...]) -> AttentionConfiguration:
    return _choose_with(_BACKWARD_WITH, kind, features) or _choose(_BACKWARD, kind) or _INTERPRETER


def weights_configuration(query: torch.Tensor) -> AttentionConfiguration:
    """The configuration of the kernel that writes weights. Its tiles are small, since few rows are wanted."""
    if architecture_of(query).name == "interpreter":
        return _INTERPRETER
    return AttentionConfiguration(16, 64 if query.shape[-1] <= 256 else 16, 4, 1)


def _kind(query: torch.Tensor, value: torch.Tensor) -> Kind:
    """The key of a call in every table."""
    return architecture_of(query).name, query.element_size(), max(query.shape[-1], value.shape[-1])


def _features(query: torch.Tensor, value: torch.Tensor, arguments: AttentionArguments) -> tuple[Feature, ...]:
    """The features of a call that have an entry in some table."""
    present: list[Feature] = []
    if arguments.loads_scores:
        present.append("mask or bias")
    if query.shape[1] != value.shape[1]:
        present.append("grouped heads")
    if arguments.seed is not None:
        present.append("dropout")
    if arguments.score_mod is not None:
        present.append("score_mod")
    if arguments.softcap:
        present.append("softcap")
    if arguments.left != UNBOUNDED:
        present.append("window")
    if arguments.alibi_slopes is not None:
        present.append("alibi")
    return tuple(present)


def _choose_with(
    tables: dict[Feature, dict[str, Table]], kind: Kind, features: tuple[Feature, ...]
) -> AttentionConfiguration | None:
    """The configuration for the first feature that has one, in the order of `tables`."""
    choices = (_choose(by_architecture, kind) for feature, by_architecture in tables.items() if feature in features)
    return next((choice for choice in choices if choice is not None), None)


def _choose(tables: dict[str, Table], kind: Kind) -> AttentionConfiguration | None:
    """The first configuration that serves these head_dims on the tensors' architecture, if any does."""
    architecture, element_size, head_dim = kind
    by_head_dim = tables.get(architecture, {}).get(element_size, {})
    return next((choice for largest, choice in by_head_dim.items() if head_dim <= largest), None)


def constants_of_call(
    query: torch.Tensor,
    value: torch.Tensor,
    arguments: AttentionArguments,
    configuration: AttentionConfiguration,
    *,
    loops: int = TWO_LOOPS.value,
    persistent: bool = False,
    descriptors: bool = False,
    warp_specialize: bool = False,
    whole_tensors: bool = False,
) -> Constants:
    """The compile-time constants of a kernel for this call."""
    score_mod = None if arguments.score_mod is None else score_mod_of(arguments.score_mod)
    return constants(
        Constants(
            head_dim=query.shape[-1],
            value_dim=value.shape[-1],
            BLOCK_M=configuration.block_m,
            BLOCK_N=configuration.block_n,
            BLOCK_D=_block_of(query.shape[-1]),
            BLOCK_V=_block_of(value.shape[-1]),
            BOTTOM_RIGHT=arguments.bottom_right,
            FOLD_SCALE=folds_scale(arguments),
            INPUT_PRECISION=input_precision(query.dtype),
            LOOPS=loops,
            PERSISTENT=persistent,
            DESCRIPTORS=descriptors,
            WARP_SPECIALIZE=warp_specialize,
            LAZY_RESCALE=configuration.lazy_rescale,
            WHOLE_TENSORS=whole_tensors,
            HOIST=configuration.hoist,
            SCORE_MOD=None if score_mod is None else score_mod.source,
            MOD_SCORES=None if score_mod is None else score_mod.forward,
            MOD_GRADIENT=None if score_mod is None else score_mod.backward,
        )
    )


def needs_tests(arguments: AttentionArguments, length: int, block: int) -> bool:
    """True if some tile of `block` rows, in a sequence of `length` rows, may need a test."""
    return (
        arguments.left != UNBOUNDED
        or arguments.right != UNBOUNDED
        or arguments.chunk != 0
        or arguments.key_lengths is not None
        or arguments.packed
        or arguments.query_lists is not None
        or length % block != 0
    )


def loops_of(configuration: AttentionConfiguration, arguments: AttentionArguments, tested: bool) -> int:
    """The constant LOOPS of a kernel, in which some tiles may need a test if `tested`.

    A block mask has bits only for the tiles that need a test.
    """
    if not tested:
        return UNTESTED.value
    return ONE_LOOP.value if configuration.one_loop and arguments.query_lists is None else TWO_LOOPS.value


def specializes_warps(configuration: AttentionConfiguration, arguments: AttentionArguments, loops: int) -> bool:
    """True if copies and products have separate warps in a kernel with this constant LOOPS."""
    return configuration.warp_specialize and loops != TWO_LOOPS.value and _suits_specialized_warps(arguments)


def launch_size(
    tiles: int, query: torch.Tensor, arguments: AttentionArguments, configuration: AttentionConfiguration
) -> int:
    """The number of programs of a launch.

    Where causality makes tiles of different lengths, it is the number that the device holds, and each takes one tile
    after another. Else each tile has its own program.
    """
    if arguments.right == UNBOUNDED or configuration.resident == 0:
        return tiles
    return min(tiles, multiprocessors_of(query) * configuration.resident)


def heads_in_cache(first: torch.Tensor, second: torch.Tensor, arguments: AttentionArguments) -> int:
    """The number of heads that fill half of the L2 cache with the two matrices over which their tiles walk."""
    length = max(arguments.max_seqlen_q, arguments.max_seqlen_k, 1)
    bytes_per_head = length * (first.shape[-1] + second.shape[-1]) * first.element_size()
    return max(1, architecture_of(first).l2 // 2 // bytes_per_head)


def describes_whole_tensors(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    arguments: AttentionArguments,
    configuration: AttentionConfiguration,
) -> bool:
    """True if a descriptor of a whole tensor serves all its heads: no tile reaches beyond a sequence or a head."""
    return (
        not arguments.packed
        and arguments.key_lengths is None
        and arguments.max_seqlen_q % configuration.block_m == 0
        and arguments.max_seqlen_k % configuration.block_n == 0
        and all(_is_matrix_of_heads(tensor) for tensor in (query, key, value))
    )


def _is_matrix_of_heads(tensor: torch.Tensor) -> bool:
    """True if each head of a dense tensor is a block of one matrix with rows of `stride(2)` elements."""
    batch, heads, length, head_dim = tensor.shape
    stride_b, stride_h, stride_row, _ = tensor.stride()
    last = (batch - 1) * stride_b + (heads - 1) * stride_h
    # Each stride leads to other rows, or all places that it leads to are in one row.
    batches_in_a_row = last + head_dim <= stride_row
    heads_in_a_row = (heads - 1) * stride_h + head_dim <= stride_row and stride_b % stride_row == 0
    other_rows = stride_h % stride_row == 0 and stride_b % stride_row == 0
    return (
        head_dim == _block_of(head_dim)
        and (batches_in_a_row or heads_in_a_row or other_rows)
        and stride_row < _FEWEST_64_BIT
        and last // stride_row + length < _FEWEST_64_BIT
    )


def with_aligned_rows(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors; where heads are wide, copies of those that no descriptor can describe.

    A tile of wide heads that is read element by element needs more registers than there are. A copy takes a fraction of
    the time that attention takes.
    """
    if max(tensor.shape[-1] for tensor in tensors) <= _WIDEST_BY_ELEMENT:
        return tensors
    return tuple(tensor if uses_descriptors(tensor) else _with_aligned_rows(tensor) for tensor in tensors)


def _with_aligned_rows(tensor: torch.Tensor) -> torch.Tensor:
    elements = 16 // tensor.element_size()
    width = triton.cdiv(tensor.shape[-1], elements) * elements
    return tensor.new_empty((*tensor.shape[:-1], width))[..., : tensor.shape[-1]].copy_(tensor)


def uses_descriptors(*tensors: torch.Tensor) -> bool:
    """True if tensor descriptors can describe these tensors: aligned to 16 bytes, with contiguous, separate rows."""
    return all(
        tensor.stride(-1) == 1
        and tensor.data_ptr() % 16 == 0
        and tensor.stride(0 if tensor.dim() == 3 else 2) > 0
        and all(stride * tensor.element_size() % 16 == 0 for stride in tensor.stride()[:-1])
        for tensor in tensors
    )
