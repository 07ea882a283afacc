"""The input block as a module equals the composition of its parts, also of parts that were replaced."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastformer.nn import TransformerEmbedding

BOUNDARIES = [0, 5, 10]


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 9, (2, 5))


def composed(module: TransformerEmbedding, ids: torch.Tensor, types: torch.Tensor | None) -> torch.Tensor:
    total = module.word(ids) + module.position(torch.arange(ids.shape[1]))
    if module.token_type is not None:
        total = total + module.token_type(torch.zeros_like(ids) if types is None else types)
    return nn.functional.layer_norm(total, module.norm.normalized_shape, module.norm.weight, module.norm.bias, 1e-12)


@pytest.mark.parametrize("typed", [True, False])
def test_equals_its_parts(ids: torch.Tensor, typed: bool) -> None:
    types = torch.randint(0, 2, ids.shape) if typed else None
    module = TransformerEmbedding(9, 8, 6, token_types=2, padding_idx=3).eval()
    torch.nn.init.normal_(module.norm.weight)
    results = []
    for output in (module(ids, types), composed(module, ids, types)):
        results.append((output, torch.autograd.grad(output.square().sum() + output.sum(), list(module.parameters()))))
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-4)


def test_packed_equals_dense(ids: torch.Tensor) -> None:
    module = TransformerEmbedding(9, 8, 6).eval()
    boundaries = torch.tensor(BOUNDARIES, dtype=torch.int32)
    torch.testing.assert_close(module(ids.flatten(), cu_seqlens=boundaries), module(ids).flatten(0, 1))


def test_dropout_drops_in_training_only(ids: torch.Tensor) -> None:
    module = TransformerEmbedding(9, 64, 6, dropout=0.5)
    assert (module(ids) == 0).any()
    assert not (module.eval()(ids) == 0).any()


class Doubled(nn.Embedding):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2.0 * super().forward(input)


def test_replaced_and_hooked_parts_are_called(ids: torch.Tensor) -> None:
    module = TransformerEmbedding(9, 8, 6, token_types=2).eval()
    plain = module(ids)
    handle = module.word.register_forward_hook(lambda _, arguments, output: output * 3.0)
    hooked = module(ids)
    handle.remove()
    assert not torch.allclose(hooked, plain)
    torch.testing.assert_close(module(ids), plain)
    word = Doubled(9, 8)
    word.load_state_dict(module.word.state_dict())
    module.word = word
    torch.testing.assert_close(module(ids), composed(module, ids, None))
    boundaries = torch.tensor(BOUNDARIES, dtype=torch.int32)
    torch.testing.assert_close(module(ids.flatten(), cu_seqlens=boundaries), module(ids).flatten(0, 1))
