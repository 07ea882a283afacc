"""Tests of the steps of the GPU benchmark that read what other programs print, and of what the steps launch."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from processes import fastformer, python

from fastformer.benchmarking.gpu.steps import STEPS, load, smoke
from fastformer.benchmarking.gpu.steps.sanitizer import profile_records

PROFILE = """\
==PROF== Connected to process 7
==PROF== Profiling "_softmax_forward_kernel": 0%....100% - 1 pass
"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","7","_softmax_forward_kernel","GPU Speed Of Light Throughput","Duration","us","9.00"
"0","7","_softmax_forward_kernel","Occupancy","Block Limit SM","block","32"
"1","7","_softmax_forward_kernel","GPU Speed Of Light Throughput","Duration","us","1,234.50"
"1","7","_softmax_forward_kernel","Launch Statistics","Registers Per Thread","register/thread","40"
"""


def test_a_profile_is_read() -> None:
    found = [(each.case, each.metric, each.value, each.unit) for each in profile_records(PROFILE.splitlines())]
    assert found == [
        ("_softmax_forward_kernel", "Duration", 1234.5, "us"),
        ("_softmax_forward_kernel", "Registers Per Thread", 40.0, "register/thread"),
    ]
    assert list(profile_records(["==ERROR== no permission"])) == []


def test_steps_have_names_of_their_modules_and_fill_nine_minutes() -> None:
    steps = [load(name) for name in STEPS]
    assert [step.name for step in steps] == list(STEPS)
    assert 500 <= sum(step.seconds for step in steps) <= 600


# Use a cache made elsewhere, as a GPU machine does, and print which kernels it would still compile for a step.
LAUNCH = """
import sys
from pathlib import Path
from fastformer.benchmarking.gpu.run import cache_variables
from fastformer.benchmarking.gpu.steps import load
from fastformer.kernel_reports.compilation import compiled_by

cache = Path(cache_variables(Path(sys.argv[1]))["TRITON_CACHE_DIR"])
print(compiled_by(list(load("host").launches()), ["sm_90"], cache))
"""


def test_the_kernels_of_a_step_are_those_in_the_cache(tmp_path: Path) -> None:
    """The cache holds all kernels of this one step.

    ``fastformer kernels compile --bench-gpu all`` proves it for all steps.
    """
    done = fastformer("kernels", "compile", "--arch", "sm_90", "--bench-gpu", "host", "--out", str(tmp_path / "made"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "launched again, none was compiled" in done.stdout
    shutil.move(tmp_path / "made", tmp_path / "brought")
    launched = python("-c", LAUNCH, str(tmp_path / "brought"))
    assert launched.returncode == 0, launched.stderr
    assert launched.stdout.strip() == "[]"
    # The check can fail: it reports a kernel that is taken away.
    for folder in (tmp_path / "brought").iterdir():
        if list(folder.glob("_softmax_forward_kernel.cubin")):
            shutil.rmtree(folder)
    assert python("-c", LAUNCH, str(tmp_path / "brought")).stdout.strip() == "['_softmax_forward_kernel']"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "[gw3] [ 12%] PASSED tests/gpu/test_a.py::test_b[softmax of long rows-bf16]",
            ("softmax of long rows", "PASSED"),
        ),
        ("[gw0] [100%] FAILED tests/gpu/test_a.py::test_b[rms_norm] ", ("rms_norm", "FAILED")),
        ("tests/gpu/test_a.py::test_b[a sum] ERROR    [ 50%]", ("a sum", "ERROR")),
        ("FAILED tests/gpu/test_a.py::test_b[a sum] - assert 1 == 2", None),
        ("collected 3 items", None),
    ],
)
def test_outcomes_of_tests_whose_names_have_spaces(line: str, expected: tuple[str, str] | None) -> None:
    found = smoke.outcome_of(line)
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        assert f"[{expected[0]}" in found[0] and found[0].strip().endswith("]") and found[1] == expected[1]
