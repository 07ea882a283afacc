"""Dropout on a GPU drops what it drops on a CPU for the same seed."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from gpu.making import Maker
from torch import Tensor

import fastformer
from fastformer.ops import attention, feed_forward, layer_norm, transformer_embedding

STATE = torch.tensor([2**62 + 12345, 2**40 + 678])
DROPOUT_P = 0.3


def _weights(make: Maker, device: torch.device) -> Tensor:
    """Return attention's weights after dropout, as the output for values that are the identity matrix."""
    keys = make.size(250, 19)
    query, key = (torch.zeros(2, 3, rows, 16, device=device) for rows in (make.size(3000, 21), keys))
    identity = torch.eye(keys, device=device).expand(2, 3, keys, keys)
    output = attention(query, key, identity, dropout_p=DROPOUT_P)
    assert isinstance(output, Tensor)
    return output


def _sum(make: Maker, device: torch.device) -> Tensor:
    """Return the input of a norm after dropout, as the sum with a residual of zeros."""
    x = torch.ones(make.size(5000, 9), make.size(1001, 21), device=device)
    _, total = layer_norm(x, x.shape[1:], residual=torch.zeros_like(x), dropout_p=DROPOUT_P)
    return total


def _hidden(make: Maker, device: torch.device) -> Tensor:
    """Return a feed-forward's hidden layer after dropout, as the output of a second projection by the identity."""
    size = make.size(256, 20)
    x, identity = torch.ones(make.size(3000, 21), 1, device=device), torch.eye(size, device=device)
    up = torch.ones(size, 1, device=device)
    return feed_forward(x, up, identity, activation="identity", hidden_dropout_p=DROPOUT_P)


def _output(make: Maker, device: torch.device) -> Tensor:
    """Return a feed-forward's output after dropout."""
    x, weight = torch.ones(make.size(3000, 21), 1, device=device), torch.ones(make.size(700, 20), 1, device=device)
    return feed_forward(x, weight[:1], weight, activation="identity", output_dropout_p=DROPOUT_P)


def _embedded(make: Maker, device: torch.device) -> Tensor:
    """Return an embedding after dropout, of a norm whose bias makes every element 1."""
    ids, hidden = torch.zeros(make.size(8, 2), make.size(300, 9), dtype=torch.int64, device=device), make.size(513, 20)
    table, weight, bias = (value * torch.ones(hidden, device=device) for value in (1.0, 0.0, 1.0))
    positions = torch.zeros(ids.shape[1], hidden, device=device)
    return transformer_embedding(ids, table[None], positions, None, weight, bias, eps=1.0, dropout_p=DROPOUT_P)


@pytest.mark.parametrize("dropped", [_weights, _sum, _hidden, _output, _embedded], ids=lambda each: each.__name__[1:])
def test_the_mask_of_a_cpu(
    dropped: Callable[[Maker, torch.device], Tensor], make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("attention.attention", "normalization", "feed_forward", "embedding"):
        found = importlib.import_module(f"fastformer.ops.{module}")  # the module, not the function of that name
        monkeypatch.setattr(found, "draw_seed", lambda device: STATE.to(device))
    actual = dropped(make, make.device)
    with fastformer.backend("torch"):
        expected = dropped(make, torch.device("cpu"))
    assert torch.equal((actual == 0).cpu(), expected == 0)
    share = (expected == 0).float().mean().item()
    assert abs(share - DROPOUT_P) < 5 * (DROPOUT_P * (1 - DROPOUT_P) / expected.numel()) ** 0.5
