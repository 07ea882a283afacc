"""The launch configurations to measure: as many as fit, to the byte."""

import pytest
from fastformer_kernels.matmul import Configuration, product_candidates

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
