"""Tests of ``fastformer bench gpu``: steps that hang, crash or are interrupted lose nothing of the other steps."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fastformer.benchmarking.gpu import run as gpu_run
from fastformer.benchmarking.gpu.records import append, append_record, compiled, ends, entries, records_of
from fastformer.benchmarking.gpu.runner import Known, Place, run_steps, share
from fastformer.benchmarking.gpu.step import Record, Step
from fastformer.cli import main
from fastformer.commands import bench_gpu as command

FIRST = """\
import os, subprocess, sys, time
from fastformer.benchmarking.gpu.step import Record, Step

def run(setting):
    yield Record("first", "fastformer", "forward", 1.0, "us", details={"left": setting.left})
"""
# The code of each kind of step after its first record.
KINDS = {
    "good": "    yield Record('second', 'fastformer', 'forward', float('inf'), 'us')",
    "raises": "    raise RuntimeError('an illegal access\\nand more of it')",
    "exits": "    print('the last words', flush=True); os._exit(7)",
    "crashes": "    os.kill(os.getpid(), 11)",
    "hangs": "    time.sleep(100)",
    "leaves": "    print('process', subprocess.Popen(['sleep', '100']).pid, flush=True)",
    "breaks": "    yield\n1 / 0",
    "ready": "    open(setting.out / 'ready', 'w').close(); time.sleep(100)",
}


def make(folder: Path, kinds: tuple[str, ...]) -> list[Known]:
    """Write the modules of steps of these kinds into `folder`, and return the steps."""
    for kind in kinds:
        step = f"\nSTEP = Step({kind!r}, 'a fake', 1.0, run)\n"
        (folder / f"fake_{kind}.py").write_text(FIRST + KINDS[kind] + step)
    return [Known(f"fake_{kind}", Step(kind, "a fake", 1.0, lambda setting: iter(()))) for kind in kinds]


@pytest.fixture
def steps(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Known]]:
    """Return a function that makes steps of the given kinds."""
    folder = tmp_path_factory.mktemp("modules")
    monkeypatch.syspath_prepend(str(folder))
    return lambda *kinds: make(folder, kinds)


def run(steps: list[Known], out: Path, seconds: float) -> dict[str, dict]:
    """Run the steps, and return how each step ended."""
    place = Place(out, "cpu", dry=True, variables={})
    run_steps(steps, place, time.monotonic() + seconds, lambda name: None)
    return ends(entries(place.records))


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run whose steps fail in every way but one: none of them hangs."""
    out, modules = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("modules")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(modules))
        run(make(modules, ("raises", "exits", "crashes", "leaves", "good")), out, 300)
    return out


def test_a_step_that_fails_loses_nothing(ran: Path) -> None:
    written = entries(ran / "records.jsonl")
    found = ends(written)
    assert [end["end"] for end in found.values()] == ["failed", "failed", "failed", "ok", "ok"]
    assert found["raises"]["error"] == "RuntimeError: an illegal access and more of it"
    assert found["exits"]["error"] == "exit status 7; last line printed: the last words"
    assert found["crashes"]["error"].startswith("ended by SIGSEGV")
    for name in found:
        assert records_of(written, name)[0]["value"] == 1.0
    assert "an illegal access" in (ran / "log.txt").read_text()


def test_a_figure_that_is_not_finite_is_none(ran: Path) -> None:
    second = records_of(entries(ran / "records.jsonl"), "good")[1]
    assert (second["value"], second["missing"]) == (None, "inf")


def test_what_a_step_started_ends_with_it(ran: Path) -> None:
    (process,) = re.findall(r"^process (\d+)$", (ran / "log.txt").read_text(), re.M)
    state = Path(f"/proc/{process}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_a_deadline_comes_before_the_end_by_force(ran: Path) -> None:
    left = records_of(entries(ran / "records.jsonl"), "raises")[0]["details"]["left"]
    assert 50 < left < 300 / 5 - 2.9


def test_a_step_that_hangs_is_ended_and_the_rest_goes_on(steps, tmp_path: Path) -> None:
    began = time.monotonic()
    found = run(steps("hangs", "good"), tmp_path, 40)
    assert time.monotonic() - began < 40
    assert [end["end"] for end in found.values()] == ["timed out", "ok"]
    assert 19 < found["hangs"]["seconds"] < 22
    assert "fake_hangs.py" in (tmp_path / "log.txt").read_text(), "where it hung is not in the log"


def test_time_that_a_step_leaves_is_shared_by_the_others() -> None:
    steps = [Step(str(seconds), "", seconds, lambda setting: iter(())) for seconds in (30.0, 60.0, 10.0)]
    assert share(200.0, steps) == 60.0
    assert share(195.0, steps[1:]) == pytest.approx(195 * 60 / 70)
    assert share(7.0, steps[2:]) == 7.0
    assert share(-1.0, steps) == 0.0


def test_half_a_line_is_left_out_and_the_next_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    append_record(path, "a", Record("one", "fastformer", "forward", 1.0, "us"))
    with open(path, "a") as file:
        file.write('{"step": "a", "case": "tw')
    append(path, step="a", compiled="_kernel")
    assert [record["case"] for record in records_of(entries(path), "a")] == ["one"]
    assert list(compiled(entries(path))) == [("a", "_kernel")]


def test_of_a_step_that_ran_twice_the_last_figure_counts(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    for value in (1.0, 2.0):
        append_record(path, "a", Record("one", "fastformer", "forward", value, "us"))
    assert [record["value"] for record in records_of(entries(path), "a")] == [2.0]


# --- The command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def known(steps, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that makes fake steps and lets the command use them in place of its own."""

    def make(*kinds: str) -> None:
        fakes = {each.step.name: each for each in steps(*kinds)}
        monkeypatch.setattr(command, "STEPS", tuple(fakes))
        monkeypatch.setattr(command, "module_of", lambda name: fakes[name].module)
        monkeypatch.setattr(gpu_run, "module_of", lambda name: fakes[name].module)
        monkeypatch.setattr(gpu_run, "load", lambda name: importlib.import_module(fakes[name].module).STEP)

    return make


def bench(*arguments: object) -> None:
    command.main(["--dry-run", *map(str, arguments)], time.monotonic())


@pytest.fixture(autouse=True)
def this_process_has_just_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_process_began", lambda known: known)


def test_what_a_run_leaves_and_a_resumed_one_adds(known, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known("good", "raises")
    with pytest.raises(SystemExit) as exit:
        bench("--out", tmp_path / "out", "--minutes", 1)
    assert exit.value.code == 1
    assert sorted(os.listdir(tmp_path / "out")) == ["log.txt", "records.jsonl", "results.json", "table.md"]
    printed = capsys.readouterr().out
    assert "raises: failed" in printed and "! RuntimeError: an illegal access" in printed and "good: ok" in printed
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["steps"]["good"]["records"][0]["value"] == 1.0
    assert results["steps"]["raises"]["end"] == "failed"
    assert results["runs"][0]["dry"] is True
    with pytest.raises(ValueError, match="--out must be a new folder, or give --resume to continue"):
        bench("--out", tmp_path / "out")
    with pytest.raises(SystemExit):
        bench("--out", tmp_path / "out", "--resume", "--minutes", 1)
    written = entries(tmp_path / "out/records.jsonl")
    assert [entry["step"] for entry in written if "end" in entry] == ["good", "raises", "raises"]
    assert [entry["run"]["steps"] for entry in written if "run" in entry] == [["good", "raises"], ["raises"]]


def test_a_run_is_resumed_as_it_was_started(known, tmp_path: Path) -> None:
    known("good")
    (tmp_path / "out").mkdir()
    append(tmp_path / "out/records.jsonl", run={"dry": False})
    with pytest.raises(ValueError, match="--dry-run must be the same as in the run to resume"):
        bench("--out", tmp_path / "out", "--resume")


# Run the command in a separate process, with a fake step in place of the real ones.
COMMAND = """
import sys, time
import fake_ready
from fastformer.benchmarking.gpu import run
from fastformer.commands import bench_gpu as command
command.STEPS, command.module_of = ("ready",), lambda name: "fake_ready"
run.module_of, run.load = command.module_of, lambda name: fake_ready.STEP
command.main(["--dry-run", "--out", sys.argv[1]], time.monotonic())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_what_was_found_survives_a_signal(steps, tmp_path: Path, number: signal.Signals) -> None:
    steps("ready")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", COMMAND, str(out)], env=environment, stdout=subprocess.PIPE)
    try:
        _wait_for(lambda: (out / "ready").exists())
        process.send_signal(number)
        printed, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    written = entries(out / "records.jsonl")
    assert [record["case"] for record in records_of(written, "ready")] == ["first"]
    if number != signal.SIGKILL:
        assert process.returncode == 130
        assert b"ready: stopped" in printed
        assert ends(written)["ready"]["end"] == "stopped"
        assert json.loads((out / "results.json").read_text())["steps"]["ready"]["records"]
    assert not _processes_with(str(out)), "the step's process goes on"


def _wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def _processes_with(argument: str) -> list[str]:
    """Wait a second, and return the commands of the processes that were started with `argument`."""
    time.sleep(1.0)
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode().split("\0")
        except OSError:
            continue
        if argument in words:
            found.append(" ".join(words))
    return found


def test_list(known, capsys: pytest.CaptureFixture[str]) -> None:
    known("good", "breaks")
    bench("--list")
    assert capsys.readouterr().out.splitlines() == [
        "good              1 s  a fake",
        "breaks            0 s  cannot run: ZeroDivisionError: division by zero",
    ]


def test_a_step_that_cannot_be_imported_loses_nothing(known, tmp_path: Path) -> None:
    known("breaks", "good")
    with pytest.raises(SystemExit):
        bench("--out", tmp_path / "out", "--minutes", 1)
    found = ends(entries(tmp_path / "out/records.jsonl"))
    assert (found["breaks"]["end"], found["breaks"]["error"]) == ("failed", "ZeroDivisionError: division by zero")
    assert found["good"]["end"] == "ok"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "smoke,absent"], "step must be one of environment, smoke, "),
        (["--minutes", "0"], "must be a number above 0, got 0"),
    ],
)
def test_errors(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["bench", "gpu", *arguments])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_a_cache_must_be_one(known, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known("good")
    arguments = ["--cache", str(tmp_path), "--out", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="--cache has no use with --dry-run"):
        command.main([*arguments, "--dry-run"], 0.0)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(ValueError, match="--cache must be a folder made by `fastformer kernels compile`"):
        command.main(arguments, 0.0)


def test_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, known, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known("good")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["bench", "gpu", "--out", str(tmp_path / "out")]) == 2
    assert "PyTorch sees no GPU; --dry-run runs the steps on a CPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
