"""The workload that is compiled, reported and guarded has every kernel, in every layout."""

from __future__ import annotations

import json

import pytest
from processes import python

pytestmark = pytest.mark.cpu

# Print the kernels that the cases launch, and those with a stride or size of 64 bits; nothing is compiled.
LAUNCHED = """
import importlib, json, pkgutil
import fastformer_kernels
from triton.runtime.jit import JITFunction
from fastformer.kernel_reports.compilation import specializations_of
from fastformer.kernel_reports.workload import LAYOUTS, cases

kernels = set()
for module in pkgutil.walk_packages(fastformer_kernels.__path__, "fastformer_kernels."):
    for name, value in vars(importlib.import_module(module.name)).items():
        if isinstance(value, JITFunction) and name.endswith("_kernel"):
            kernels.add(f"{value.module}.{name}")
launched = {}
for layout in LAYOUTS:
    work = [case.run for case in cases(dtypes=["bfloat16"], layouts=[layout])]
    found = specializations_of(work, "sm_90")
    launched[layout] = {
        "kernels": sorted({f"{s.module}.{s.kernel}" for s in found}),
        "wide": sorted({f"{s.module}.{s.kernel}" for s in found if "'i64'" in s.key}),
    }
guarded = {f"{s.module}.{s.kernel}" for s in specializations_of([c.run for c in cases(guarded=True)], "sm_90")}
print(json.dumps({"kernels": sorted(kernels), "launched": launched, "guarded": sorted(guarded)}))
"""


@pytest.fixture(scope="module")
def found() -> dict:
    done = python("-c", LAUNCHED)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("layout", ["aligned", "odd", "offset", "huge"])
def test_every_kernel_is_compiled(found: dict, layout: str) -> None:
    # The input's rows in the offset layout do not lie end to end.
    not_there = {"_forward_of_odd_rows_kernel"} if layout == "offset" else set()
    expected = [name for name in found["kernels"] if name.rpartition(".")[2] not in not_there]
    assert expected
    assert found["launched"][layout]["kernels"] == expected


def test_a_layout_is_huge_where_the_others_are_not(found: dict) -> None:
    always = set(found["launched"]["aligned"]["wide"])  # seeds and indices are 64-bit in any layout
    assert set(found["launched"]["huge"]["wide"]) - always
    assert set(found["launched"]["odd"]["wide"]) == always


def test_the_gate_watches_every_kernel_that_trains(found: dict) -> None:
    unwatched = {name.rsplit(".", 1)[1] for name in set(found["kernels"]) - set(found["guarded"])}
    assert unwatched <= {"_attention_weights_kernel"}
