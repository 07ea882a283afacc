"""No kernel multiplies two unknowns in 32 bits for an offset, so tensors beyond 2^31 elements are addressed right."""

from __future__ import annotations

import json

import pytest
from processes import python

pytestmark = pytest.mark.cpu

# Products that fit in 32 bits: they count tiles of work, of which there are at most as many as programs.
COUNTS = {
    "tiles * heads_in_cache": "tiles of the heads that are taken together, at most all programs",
    "group * heads_in_cache": "a quotient times its divisor, at most the program's number",
    "first_head * tiles": "tiles of the heads before these, at most the program's number",
    "split * share": "tiles of keys before a split, at most the tiles of a sequence",
}


@pytest.fixture(scope="module")
def products() -> dict[str, list[str]]:
    """The narrow products of each kernel, including the planted kernels."""
    done = python("-m", "kernel_reports.offsets_of_every_kernel")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [("narrow_kernel", ["row * stride"]), ("carried_kernel", ["at * stride"]), ("wide_kernel", [])],
)
def test_planted_products_are_found(products: dict[str, list[str]], kernel: str, expected: list[str]) -> None:
    assert products[kernel] == expected


def test_no_kernel_has_a_narrow_product(products: dict[str, list[str]]) -> None:
    kernels = {name: lines for name, lines in products.items() if name.startswith("_")}
    assert len(kernels) > 10
    assert {name: left for name, lines in kernels.items() if (left := sorted(set(lines) - set(COUNTS)))} == {}


def test_every_exception_is_needed(products: dict[str, list[str]]) -> None:
    assert set(COUNTS) <= {line for lines in products.values() for line in lines}
