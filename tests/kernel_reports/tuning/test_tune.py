"""Measured plans are kept and used."""

from __future__ import annotations

import json
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import triton
from fastformer_kernels.configurations import (
    chosen,
    class_key,
    forced,
    forget_plans_read,
    measured_configurations,
    shipped_defaults,
)
from fastformer_kernels.plans import default_plan, is_fused, shape_class
from fastformer_kernels.rows import RowConfiguration

from fastformer import cli
from fastformer.commands.tune import _OPERATIONS
from fastformer.kernel_reports.tuning.problem import GROUPS
from fastformer.kernel_reports.tuning.results import store_plans


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The file that keeps the plans during a test."""
    monkeypatch.setenv("FASTFORMER_CACHE", str(tmp_path))
    forget_plans_read()
    yield tmp_path / "plans.json"
    forget_plans_read()


@pytest.mark.cpu
def test_measured_plans_decide(path: Path) -> None:
    input = torch.zeros(7, 8)
    assert is_fused("hidden_forward", input, depth=8)
    store_plans(path, "interpreter", {class_key("hidden_forward", shape_class("ieee", 7, 8)): {"fused": False}})
    forget_plans_read()
    assert not is_fused("hidden_forward", input, depth=8)
    assert is_fused("hidden_backward", input, depth=8)


SHIPPED, MEASURED, FORCED = (RowConfiguration(size, 8) for size in (1024, 2048, 4096))


def asked() -> RowConfiguration:
    return chosen("softmax_forward", torch.zeros(1), SHIPPED, lambda: ("32-bit", "columns<=256"))


@pytest.mark.cpu
def test_threads_leave_what_they_force_in_any_order(path: Path) -> None:
    first, second = forced({"softmax_forward": MEASURED}), forced({"softmax_forward": FORCED})
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert asked() == FORCED
    second.__exit__(None, None, None)
    assert asked() == SHIPPED


@pytest.mark.quick
@pytest.mark.cpu
def test_forced_before_measured_before_shipped(path: Path) -> None:
    assert asked() == SHIPPED
    store_plans(path, "interpreter", {"softmax_forward 32-bit columns<=256": asdict(MEASURED)})
    forget_plans_read()
    assert asked() == MEASURED
    with forced({"softmax_forward": FORCED}):
        assert asked() == FORCED
        with ThreadPoolExecutor(1) as threads:
            assert threads.submit(asked).result() == FORCED
    with shipped_defaults() as classes:
        assert asked() == SHIPPED
    assert classes == {"softmax_forward 32-bit columns<=256": SHIPPED}
    assert asked() == MEASURED


@pytest.mark.cpu
def test_the_class_is_asked_for_only_where_something_was_measured(path: Path) -> None:
    def fails() -> tuple[str, ...]:
        raise AssertionError("asked")

    assert chosen("softmax_forward", torch.zeros(1), SHIPPED, fails) is SHIPPED
    store_plans(path, "interpreter", {"x": {}})
    forget_plans_read()
    with pytest.raises(AssertionError, match="asked"):
        chosen("softmax_forward", torch.zeros(1), SHIPPED, fails)


@pytest.mark.cpu
def test_fields_that_a_configuration_lacks_are_reported(path: Path) -> None:
    store_plans(path, "interpreter", {"softmax_forward 32-bit columns<=256": {"threads": 8}})
    forget_plans_read()
    with pytest.warns(UserWarning, match=r"softmax_forward 32-bit columns<=256 .* is not used: .*threads"):
        assert asked() == SHIPPED


def test_stored_plans_are_joined_by_architecture(path: Path) -> None:
    store_plans(path, "sm_90", {"a": {"fused": True}})
    store_plans(path, "sm_80", {"a": {"fused": False}})
    store_plans(path, "sm_90", {"b": {"fused": False}})
    assert measured_configurations("sm_90") == {"a": {"fused": True}, "b": {"fused": False}}
    assert measured_configurations("sm_80") == {"a": {"fused": False}}
    assert list(path.parent.iterdir()) == [path]


def test_plans_of_another_triton_are_reported_and_not_used(path: Path) -> None:
    content = {"format": 2, "architectures": {"sm_90": {"triton": "3.0.0", "configurations": {"a": {"fused": True}}}}}
    path.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match=r"measured with triton 3\.0\.0, .*fastformer tune"):
        assert measured_configurations("sm_90") == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert measured_configurations("sm_80") == {}
    store_plans(path, "sm_90", {"b": {"fused": True}})
    assert json.loads(path.read_text())["architectures"]["sm_90"] == {
        "triton": triton.__version__,
        "configurations": {"b": {"fused": True}},
    }


@pytest.mark.parametrize(
    "content",
    [
        '{"format": 2, "archi',
        "[]",
        '{"format": 1, "architectures": {"sm_90": {"triton": "3.9.0", "plans": {"a": "fused"}}}}',
        '{"format": 2, "architectures": []}',
        '{"format": 2, "architectures": {"sm_90": {"triton": "3.9.0", "configurations": {"a": "fastest"}}}}',
    ],
)
def test_a_damaged_file_is_reported_and_replaced(path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    path.write_text(content)
    with pytest.warns(UserWarning, match=r"measured plans are not used: .*plans\.json"):
        assert measured_configurations("sm_90") == {}
    store_plans(path, "sm_90", {"a": {"fused": True}})
    assert "plans.json" in capsys.readouterr().err
    forget_plans_read()
    assert measured_configurations("sm_90") == {"a": {"fused": True}}


def test_defaults_follow_depth_and_precision() -> None:
    assert default_plan("sm_90", "hidden_forward", "16-bit", 4096, 1024) == "fused"
    assert default_plan("sm_90", "hidden_forward", "16-bit", 4096, 1025) == "library"
    assert default_plan("sm_90", "hidden_backward", "16-bit", 4096, 2048) == "fused"
    assert default_plan("sm_90", "hidden_forward", "16-bit", 8, 1024) == "library"
    assert default_plan("sm_90", "hidden_forward", "tf32", 4096, 256) == "library"


@pytest.mark.cpu
def test_command_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune"]) == 2
    assert "tune measures kernels on a GPU, but PyTorch sees none" in capsys.readouterr().err


def test_operations_are_those_that_have_problems() -> None:
    assert set(_OPERATIONS) == set(GROUPS)


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["tune", "--help"])
    assert exit.value.code == 0
    shown = capsys.readouterr().out
    assert "examples:" in shown and "fastformer tune --dtypes bfloat16 float32" in shown
