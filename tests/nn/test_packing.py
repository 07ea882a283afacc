"""A padded batch is packed and unpacked without loss."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from fastformer.nn import DenseLayout, packed_positions


@settings(max_examples=50)
@given(data=st.data())
def test_there_and_back(data: st.DataObject) -> None:
    batch, sequence = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 6))
    cells = st.lists(st.booleans(), min_size=batch * sequence, max_size=batch * sequence)
    mask = torch.tensor(data.draw(cells)).view(batch, sequence)
    layout, packing = DenseLayout.from_mask(batch, sequence, mask.long(), mask.device)
    dense = torch.arange(1.0, batch * sequence * 2 + 1).view(batch, sequence, 2)
    packed = layout.pack(dense)
    for row in range(batch):
        start, end = packing.cu_seqlens[row], packing.cu_seqlens[row + 1]
        assert torch.equal(packed[start:end], dense[row][mask[row]])
    assert packing.cu_seqlens.dtype == torch.int32
    assert packing.max_seqlen >= packing.cu_seqlens.diff().max()
    assert torch.equal(layout.unpack(packed), dense * mask.unsqueeze(-1))


def test_without_padding_nothing_is_copied(device: torch.device) -> None:
    layout, packing = DenseLayout.from_mask(2, 3, None, device)
    dense = torch.randn(2, 3, 4)
    assert packing.cu_seqlens.tolist() == [0, 3, 6]
    assert layout.pack(dense).data_ptr() == dense.data_ptr() == layout.unpack(layout.pack(dense)).data_ptr()


def test_gradient_goes_through_both_ways(device: torch.device) -> None:
    layout, _ = DenseLayout.from_mask(2, 2, torch.tensor([[1, 0], [1, 1]]), device)
    dense = torch.randn(2, 2, 3, requires_grad=True)
    layout.unpack(layout.pack(dense)).sum().backward()
    assert torch.equal(dense.grad, torch.tensor([[1.0, 0.0], [1.0, 1.0]]).unsqueeze(-1).expand(2, 2, 3))


@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=6))
def test_positions_count_within_each_sequence(lengths: list[int]) -> None:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    expected = [position for length in lengths for position in range(length)]
    assert packed_positions(cu_seqlens, sum(lengths)).tolist() == expected


def test_refuses_a_mask_of_another_shape(device: torch.device) -> None:
    with pytest.raises(ValueError, match=r"attention_mask must have shape .* = \(2, 3\); got \(2, 1, 3\)"):
        DenseLayout.from_mask(2, 3, torch.ones(2, 1, 3), device)
