"""Every script in examples/ runs on a CPU without a download, and does what its docstring says."""

from __future__ import annotations

import ast
import runpy
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.cpu

FOLDER = Path(__file__).parent.parent / "examples"


def run(name: str) -> Any:
    """Run the `main` of a script and return its result."""
    return runpy.run_path(str(FOLDER / name))["main"]()


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.name)
def test_each_is_short_says_how_it_is_run_and_has_a_test(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 60
    assert f"python examples/{path.name}\n" in (ast.get_docstring(ast.parse(text)) or "") + "\n"
    assert f'run("{path.name}")' in Path(__file__).read_text()


def test_the_trainers_losses_stay_the_same() -> None:
    pytest.importorskip("accelerate", reason="transformers' Trainer needs it")
    own, ours, callback = run("drop_in_trainer.py")
    assert len(ours) == 16 and len({round(loss, 3) for loss in ours}) > 8
    assert ours == pytest.approx(own, abs=1e-4)
    assert callback.report.replaced and 'attn_implementation="fastformer"' in str(callback.report)


def test_a_lightning_module_learns_and_is_its_twin_of_torch() -> None:
    pytest.importorskip("lightning")
    accuracy, difference = run("lightning_module.py")
    assert accuracy > 0.95
    assert 0 <= difference < 1e-4


def test_packed_pretraining_learns_without_padding() -> None:
    pytest.importorskip("lightning")
    before, after, boundaries = run("packed_pretraining.py")
    assert before > 5 and after < 1
    assert (
        len(boundaries) > 5 and boundaries[0] == 0 and boundaries == sorted(set(boundaries)) and boundaries[-1] <= 512
    )


def test_embeddings_of_new_pairs_find_each_other() -> None:
    before, after = run("sentence_embeddings.py")
    assert before < 0.3 and after > 0.9


def test_generation_is_that_of_hugging_face(capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs, streamed = run("generation.py")
    assert ours == theirs and streamed == ours[0]
    assert "the early bird -> may catch the worm" in capsys.readouterr().out
