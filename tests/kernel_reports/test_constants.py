"""Kernels lose nothing when Triton compiles arguments that are 1 or None as constants.

Triton 3.6 forgets the constants of a named tuple in a named tuple: a window with an extent of 1 lost its border test.
"""

from __future__ import annotations

import json

import pytest
from processes import python

# Print the names of the launched kernels, and of those that have a tuple in a tuple as an argument.
NESTED = """
import json, pickle
from fastformer.kernel_reports.compilation import specializations_of
from fastformer.kernel_reports.workload import cases

def nested(types):
    return any(isinstance(inner, tuple) for outer in types if isinstance(outer, tuple) for inner in outer)

work = [case.run for case in cases(dtypes=["bfloat16"], layouts=["aligned"])]
launched = {s.kernel: pickle.loads(s.arguments)[0] for s in specializations_of(work, "sm_90")}
print(json.dumps([list(launched), [kernel for kernel, signature in launched.items() if nested(signature.values())]]))
"""


@pytest.fixture(scope="module")
def operations() -> dict[str, list[dict[str, dict[str, int]]]]:
    """The counts of tests, loads and stores in each kernel, for pairs of calls, one with arguments that are 1."""
    done = python("-m", "kernel_reports.attention_with_ones")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_an_argument_that_is_1_loses_nothing(operations: dict[str, list[dict[str, dict[str, int]]]]) -> None:
    assert len(operations) > 5
    assert all(counts["arith.cmpi"] > 0 for pair in operations.values() for counts in pair[1].values())
    assert {name: pair for name, pair in operations.items() if pair[0] != pair[1]} == {}


def test_no_kernel_takes_a_tuple_within_a_tuple() -> None:
    done = python("-c", NESTED)
    assert done.returncode == 0, done.stderr
    launched, nested = json.loads(done.stdout.splitlines()[-1])
    assert len(launched) > 20
    assert nested == []
