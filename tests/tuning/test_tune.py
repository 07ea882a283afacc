"""Choosing plans by measurement, and keeping them: without a GPU, with a timer that is told what to say."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
import triton
from fastformer_kernels import plans
from fastformer_kernels.plans import default_plan, is_fused, measured_plans, shape_class

from fastformer import cli
from fastformer.tuning.measurement import Problem, measure, problems
from fastformer.tuning.tune import store_plans


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Where plans are kept during the test."""
    monkeypatch.setenv("FASTFORMER_CACHE", str(tmp_path))
    plans.forget_plans_read()
    yield tmp_path / "plans.json"
    plans.forget_plans_read()


def small_problems() -> list[Problem]:
    return [Problem(operation, torch.float32, 3, 8) for operation in plans.SAVED_PASSES]


def test_the_faster_plan_wins() -> None:
    """The timer runs every call, in either plan, and says that fused takes 3 s and the library 2 s, then vice versa."""
    answers = iter([3.0, 2.0, 2.0, 3.0] * 2 + [3.0, 2.0])
    forced = []

    def timer(call) -> float:
        call()
        forced.append(plans._forced)
        return next(answers)

    found = list(measure(small_problems(), "cpu", timer))
    assert forced == ["fused", "library"] * 5
    assert [plan for _, plan, _ in found] == ["library", "fused", "library", "fused", "library"]
    assert all(advantage == 1.5 for _, _, advantage in found)
    assert plans._forced is None


def test_every_class_of_shapes_has_its_problem() -> None:
    measured = problems([torch.bfloat16])
    sizes = [1, 256, 257, 2048, 2049, 10**6]
    asked = {shape_class(o, "16-bit", tokens, depth) for o in plans.SAVED_PASSES for tokens in sizes for depth in sizes}
    asked |= {shape_class(o, "16-bit", 1, depth) for o in plans.SAVED_PASSES for depth in (1024, 4096, 9999)}
    assert asked <= {problem.shape_class for problem in measured}
    assert len(measured) == len({problem.shape_class for problem in measured})


def test_measured_plans_decide(path: Path) -> None:
    input = torch.zeros(7, 8)
    assert is_fused("hidden_forward", input, depth=8)
    store_plans(path, "interpreter", {shape_class("hidden_forward", "ieee", 7, 8): "library"})
    plans.forget_plans_read()
    assert not is_fused("hidden_forward", input, depth=8)
    assert is_fused("hidden_backward", input, depth=8)


def test_stored_plans_are_joined_by_architecture(path: Path) -> None:
    store_plans(path, "sm_90", {"a": "fused"})
    store_plans(path, "sm_80", {"a": "library"})
    store_plans(path, "sm_90", {"b": "library"})
    assert measured_plans("sm_90") == {"a": "fused", "b": "library"}
    assert measured_plans("sm_80") == {"a": "library"}
    assert list(path.parent.iterdir()) == [path]


def test_plans_of_another_triton_are_reported_and_not_used(path: Path) -> None:
    content = {"format": 1, "architectures": {"sm_90": {"triton": "3.0.0", "plans": {"a": "fused"}}}}
    path.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match=r"measured with triton 3\.0\.0, .*fastformer tune"):
        assert measured_plans("sm_90") == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert measured_plans("sm_80") == {}
    store_plans(path, "sm_90", {"b": "fused"})
    assert json.loads(path.read_text())["architectures"]["sm_90"] == {
        "triton": triton.__version__,
        "plans": {"b": "fused"},
    }


@pytest.mark.parametrize(
    "content",
    [
        '{"format": 1, "archi',
        "[]",
        '{"format": 2, "architectures": {}}',
        '{"format": 1, "architectures": []}',
        '{"format": 1, "architectures": {"sm_90": {"triton": "3.9.0", "plans": {"a": "fastest"}}}}',
    ],
)
def test_a_damaged_file_is_reported_and_replaced(path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    path.write_text(content)
    with pytest.warns(UserWarning, match=r"measured plans are not used: .*plans\.json"):
        assert measured_plans("sm_90") == {}
    store_plans(path, "sm_90", {"a": "fused"})
    assert "plans.json" in capsys.readouterr().err
    plans.forget_plans_read()
    assert measured_plans("sm_90") == {"a": "fused"}


def test_defaults_follow_depth_and_precision() -> None:
    assert default_plan("sm_90", "hidden_forward", "16-bit", 4096, 1024) == "fused"
    assert default_plan("sm_90", "hidden_forward", "16-bit", 4096, 1025) == "library"
    assert default_plan("sm_90", "hidden_backward", "16-bit", 4096, 2048) == "fused"
    assert default_plan("sm_90", "hidden_forward", "16-bit", 8, 1024) == "library"
    assert default_plan("sm_90", "hidden_forward", "tf32", 4096, 256) == "library"


def test_command_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert cli.main(["tune"]) == 2
    assert "tune measures kernels on a GPU, and PyTorch sees none" in capsys.readouterr().err


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["tune", "--help"])
    assert exit.value.code == 0
    shown = capsys.readouterr().out
    assert "examples:" in shown and "fastformer tune --dtypes bfloat16 float32" in shown
