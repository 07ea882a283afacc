"""The steps of the GPU benchmark that read what other programs print, and what they launch."""

from __future__ import annotations

from fastformer.benchmarking.gpu.steps import STEPS, load
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
