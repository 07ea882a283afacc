"""Candidates are compiled before they are measured: their launches on a GPU compile nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from processes import python

# Two problems of one class each. One candidate of each is impossible: its warps are no power of two.
COMPILE = """
import json
import torch
from dataclasses import replace
from fastformer.kernel_reports.compilation import compiled_by
from fastformer.kernel_reports.tuning import compilation
from fastformer.kernel_reports.tuning.problem import FULL
from fastformer.kernel_reports.tuning.row_problems import softmax_problems
from pathlib import Path
import triton

if __name__ == "__main__":
    def others(problem, default, architecture):
        return [replace(default, thread_elements=32), replace(default, tile_elements=3000)]

    compilation.others = others
    problems = list(softmax_problems(torch.bfloat16, FULL))[-2:]
    with compilation.compiled_ahead(problems, "sm_90", 1) as prepare:
        failed = [[repr(each) for each in prepare(number)] for number in range(2)]
    launches = [
        launch
        for problem in problems
        for configuration, launch in compilation.launches(problem, "sm_90").items()
        if configuration.tile_elements == 4096
    ]
    missed = compiled_by(launches, ["sm_90"], Path(triton.knobs.cache.dir))
    print(json.dumps({"failed": failed, "launches": len(launches), "missed": missed}))
"""


@pytest.mark.cpu
def test_candidates_are_compiled_beforehand(tmp_path: Path) -> None:
    script = tmp_path / "compile.py"
    script.write_text(COMPILE)
    done = python(str(script), cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["launches"], found["missed"]) == (4, [])
    assert [len(failures) for failures in found["failed"]] == [1, 1]
    assert all("tile_elements=3000" in failures[0] for failures in found["failed"])


# Print, for each problem of attention's kernels, its operation, its head_dim, the key of its class, and its candidates.
CANDIDATES = """
import json
import torch
from dataclasses import asdict
from fastformer_kernels.attention.plan import OPERATION
from fastformer_kernels.configurations import shipped_defaults
from fastformer.kernel_reports.compilation import specializations_of
from fastformer.kernel_reports.tuning.compilation import launches
from fastformer.kernel_reports.tuning.problems import problems

for problem in problems([torch.bfloat16], ["attention"]):
    if problem.operation == OPERATION:
        continue
    with shipped_defaults() as asked:
        specializations_of([lambda: problem.call(*problem.tensors(torch.device("meta")))], "sm_90")
    key = next(key for key in asked if key.split()[0] == problem.operation)
    print(json.dumps([problem.operation, problem.head_dim, key, [*map(asdict, launches(problem, "sm_90"))]]))
"""


@pytest.mark.cpu
def test_problems_of_attention_are_of_different_classes_and_have_several_tiles() -> None:
    """With the widest heads, too. In their backward, dQ is added up or comes from a kernel of its own."""
    done = python("-c", CANDIDATES)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len({key for _, _, key, _ in found}) == len(found)
    for operation, head_dim, _, candidates in found:
        assert len({(choice["block_m"], choice["block_n"]) for choice in candidates}) > 2, (operation, head_dim)
        if operation == "attention_backward":
            assert {choice["two_kernels"] for choice in candidates} == {False, True}
    assert {operation for operation, head_dim, *_ in found if head_dim == 512} == {
        "attention_forward", "attention_backward", "attention_deterministic", "attention_query_gradient"
    }  # fmt: skip
