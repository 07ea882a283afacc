"""Steps that a CUDA graph records do not use the host, wait for it, or allocate sizes that depend on values."""

from __future__ import annotations

import json

import pytest
from processes import python


@pytest.fixture(scope="module")
def kernels() -> dict[str, dict[str, int]]:
    """The number of launches of each kernel in each step."""
    done = python("-m", "kernel_reports.recorded_steps")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_decoding(kernels: dict[str, dict[str, int]]) -> None:
    for kind, passes in (("decoding", 1), ("paged decoding", 1), ("speculative decoding", 5)):
        for name in ("_append_kernel", "_decode_kernel"):
            assert kernels[kind][name] == passes, kind


def test_training(kernels: dict[str, dict[str, int]]) -> None:
    """A training step of two batches launches the kernels of each attention and of the loss twice."""
    for kind, attentions in (("mlm", 1), ("clm", 1), ("span-corruption", 3), ("denoising", 3)):
        for name in ("_attention_forward_kernel", "_key_value_gradient_kernel"):
            assert kernels[kind][name] == 2 * attentions, kind
        assert kernels[kind]["_cross_entropy_kernel"] == 2, kind


def test_static_caches(kernels: dict[str, dict[str, int]]) -> None:
    for kind, layers in (
        ("static cache", 2),
        ("masked static cache", 2),
        ("Llama's static cache", 1),
        ("Llama's masked static cache", 1),
    ):
        assert kernels[kind]["_attention_forward_kernel"] == layers, kind
