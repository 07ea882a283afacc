"""The launch configurations to measure are exactly those that fit, to the byte."""

from dataclasses import replace

import pytest
from fastformer_kernels.attention.candidates import forward_candidates
from fastformer_kernels.attention.launch import AttentionConfiguration
from fastformer_kernels.launch import ARCHITECTURES
from fastformer_kernels.matmul import Configuration, product_candidates
from fastformer_kernels.rows import RowConfiguration, row_candidates

pytestmark = [pytest.mark.cpu, pytest.mark.quick]


def test_products_fill_the_shared_memory_and_need_no_more() -> None:
    shipped = Configuration(64, 128, 32, 4, 3, descriptors=True)
    every = product_candidates(shipped, 2, 1 << 30)
    with_tiles_of_their_own = [choice for choice in every if choice.descriptors]
    assert len(with_tiles_of_their_own) > 5
    for choice in with_tiles_of_their_own:
        needed = choice.stages * (choice.rows + choice.columns) * choice.depth * 2
        assert choice in product_candidates(shipped, 2, needed)
        assert choice not in product_candidates(shipped, 2, needed - 1)


def test_products_overlap_their_epilogue_where_there_are_descriptors() -> None:
    with_descriptors = product_candidates(Configuration(64, 128, 32, 4, 3, descriptors=True, flatten=True), 2, 1 << 30)
    assert {(each.descriptor_stores, each.flatten) for each in with_descriptors if each.descriptors} >= {
        (False, False), (True, False), (True, True)
    }  # fmt: skip
    assert {each.warps for each in with_descriptors if each.warp_specialize} == {4, 8}
    without = product_candidates(Configuration(64, 128, 32, 4, 3), 2, 1 << 30)
    assert not any(each.descriptor_stores or each.warp_specialize for each in without)
    assert any(each.flatten for each in without)
    assert all(each.descriptors for each in with_descriptors if each.descriptor_stores or each.warp_specialize)


def test_few_rows_are_split_over_few_and_many_programs_or_not_at_all() -> None:
    shipped = RowConfiguration(4096, 16, split=4)
    every = row_candidates(shipped)
    assert len(set(every)) == len(every) and shipped not in every
    assert {each.split for each in every if replace(each, split=4) == shipped} == {0, 1, 2, 8}
    assert {each.tile_elements for each in every if each.split == 4} == {2048, 4096, 8192, 16384}


def test_rows_are_loaded_ahead_to_two_depths_by_few_programs() -> None:
    shipped = RowConfiguration(4096, 16, programs=8, stages=0)
    every = row_candidates(shipped)
    assert len(set(every)) == len(every) and shipped not in every
    ahead = {(choice.programs, choice.stages) for choice in every if choice.stages}
    assert {stages for _, stages in ahead} == {2, 3}
    assert len(ahead) == 2 * len({programs for programs, _ in ahead})
    assert all(programs.bit_count() == 1 for programs, _ in ahead)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sums_are_rescaled_lazily_where_a_warp_has_16_rows_of_them_in_registers(architecture: str) -> None:
    def lazy(shipped: AttentionConfiguration) -> list[AttentionConfiguration]:
        every = forward_candidates(shipped, ARCHITECTURES[architecture], 64, 2)
        return [choice for choice in every if choice.lazy_rescale]

    shipped = AttentionConfiguration(64, 64, 4, 2)
    in_registers = architecture.startswith("sm") and architecture != "sm_100"
    assert lazy(shipped) == ([replace(shipped, lazy_rescale=True)] if in_registers else [])
    assert lazy(replace(shipped, num_warps=8)) == []
    if architecture == "sm_90":
        assert [choice.warp_specialize for choice in lazy(replace(shipped, descriptors=True))] == [False, True]
