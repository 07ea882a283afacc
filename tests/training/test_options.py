"""One option language: what `pretrain` and `finetune` both have is spelt alike and means the same in both."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastformer import cli
from fastformer.extras import require

pytestmark = pytest.mark.quick

TASKS = ("classify", "tag", "qa", "summarize", "translate", "generate", "embed")
FORMER = {
    "model.learning_rate": "optimizer.learning_rate",
    "model.weight_decay": "optimizer.weight_decay",
    "model.betas": "optimizer.betas",
    "model.eps": "optimizer.eps",
    "model.warmup_steps": "optimizer.warmup_steps",
    "model.schedule": "optimizer.schedule",
    "model.overrides": "overrides",
    "model.overrides.hidden_size": "overrides.hidden_size",
    "corpus.vocab_size": "vocab_size",
    "corpus.max_length": "max_length",
    "corpus.tokens_per_batch": "tokens_per_batch",
    "corpus.num_workers": "num_workers",
    "corpus.cache_dir": "cache_dir",
    "text.max_length": "max_length",
    "trainer.accelerator": "accelerator",
    "trainer.accumulate_grad_batches": "accumulate",
    "trainer.devices": "devices",
    "trainer.max_epochs": "epochs",
    "trainer.max_steps": "max_steps",
    "trainer.precision": "precision",
    "trainer.strategy": "strategy",
    "trainer.val_check_interval": "evaluate_every",
    "privacy-epsilon": "privacy_epsilon",
}


@pytest.fixture(scope="module")
def parsers() -> dict[str, Any]:
    require("jsonargparse")
    from fastformer.commands import finetune, pretrain

    return {"pretrain": pretrain.build_parser(), **{task: finetune.build_parser(task) for task in TASKS}}


def options(parser: Any) -> dict[str, dict[str, Any]]:
    """What there is to compare of each option that can be given; those that others determine cannot."""
    return {
        action.dest: {
            "spelt": action.option_strings,
            "type": getattr(action, "_typehint", action.type),
            "choices": action.choices,
            "help": action.help,
            "metavar": action.metavar,
            "takes": action.nargs,
        }
        for action in parser._actions
        if action.option_strings and " --> " not in action.option_strings[0]
    }


@pytest.mark.parametrize("task", TASKS)
def test_what_both_commands_have_is_the_same(task: str, parsers: dict[str, Any]) -> None:
    from fastformer.training.optimization import Optimization

    ours, theirs = options(parsers["pretrain"]), options(parsers[task])
    both = (ours.keys() & theirs.keys()) - {"data"}  # which is text to one, and labelled examples to the other
    expected = {
        *(f"optimizer.{field.name}" for field in fields(Optimization)),
        *("preset", "overrides", "vocab_size", "max_length", "tokens_per_batch", "epochs", "max_steps"),
        *("evaluate_every", "seed", "num_workers", "cache_dir", "activation_checkpointing", "accumulate"),
        *("precision", "devices", "trainer.gradient_clip_val", "output", "resume", "config"),
    }
    assert expected <= both
    assert {name: ours[name] for name in both} == {name: theirs[name] for name in both}


def test_each_option_has_one_place(parsers: dict[str, Any]) -> None:
    """None is at the top level of one command and within a group of the other, nor within two groups."""
    groups = ("model", "corpus", "text", "optimizer", "")
    ours, theirs = ({*options(parsers[name])} for name in ("pretrain", "classify"))
    for option in ours | theirs:
        group, _, name = option.rpartition(".")
        if group in groups and name:
            assert [each for each in groups if f"{each}.{name}".lstrip(".") in ours | theirs] == [group]


def test_no_option_has_a_second_spelling(parsers: dict[str, Any]) -> None:
    for parser in parsers.values():
        for option in options(parser).values():
            if option["spelt"] != ["-h", "--help"]:
                (spelt,) = (name for name in option["spelt"] if not name.endswith("+"))  # which adds to a list
                assert "-" not in spelt.removeprefix("--")


COMMANDS = (["pretrain"], ["finetune", "classify"])


def fails(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """The one line of error that a command line ends with, of status 2."""
    require("jsonargparse")
    try:
        status = cli.main(list(arguments))
    except SystemExit as exit:
        status = exit.code
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert status == 2
    return line


@pytest.mark.parametrize("old", FORMER)
def test_a_former_spelling_ends_with_the_new_one(old: str) -> None:
    from fastformer.training.option_files import check_spelling

    for given in ([f"--{old}=1"], [f"--{old}", "1"], ["--seed", "3", f"--{old}", "1", "--print_config"]):
        with pytest.raises(ValueError) as raised:
            check_spelling(given)
        assert str(raised.value) == f"--{old} is spelt --{FORMER[old]}"


@pytest.mark.parametrize("old", FORMER)
def test_a_former_spelling_in_a_file_of_options(old: str, tmp_path: Path) -> None:
    from fastformer.training.option_files import read_options

    group, _, name = old.partition(".")
    file = tmp_path / "config.yaml"
    for content in ({old: 1}, {group: {name: 1}} if name else {old: 1}):
        file.write_text(yaml.safe_dump(content))
        with pytest.raises(ValueError) as raised:
            read_options(file)
        assert str(raised.value) == f"{file}: {old} is spelt {FORMER[old]}"


@pytest.mark.parametrize("old", [name for name in FORMER if "." in name])
def test_a_former_spelling_within_a_group(old: str, tmp_path: Path) -> None:
    """A group's value is JSON or a file: on the command line, and in a file of options."""
    from fastformer.training.option_files import check_spelling, read_options

    group, _, name = old.partition(".")
    file, config = tmp_path / "group.yaml", tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({name: 1}))
    for value in (f'{{"{name}": 1}}', str(file)):
        for given in ([f"--{group}", value], [f"--{group}={value}"]):
            with pytest.raises(ValueError) as raised:
                check_spelling(given)
            assert str(raised.value) == f"--{old} is spelt --{FORMER[old]}"
    for value in (f'{{"{name}": 1}}', file.name):
        config.write_text(yaml.safe_dump({group: value}))
        with pytest.raises(ValueError) as raised:
            read_options(config)
        assert str(raised.value) == f"{config}: {old} is spelt {FORMER[old]}"


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("way", ["option", "group", "--config", "--resume", "--elastic"])
def test_the_commands_refuse_a_former_spelling(
    way: str, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Files of options may be those of an older run."""
    file = tmp_path / "config.yaml"
    file.write_text("trainer:\n  max_epochs: 1\n")
    output = ["--output", str(tmp_path)]
    given = {"option": ["--trainer.max_epochs", "1"], "group": ["--trainer", '{"max_epochs": 1}']}
    given |= {"--config": ["--config", str(file)]}
    line = fails(capsys, *command, *given.get(way, [way]), *output)
    said = "--trainer.max_epochs is spelt --epochs"
    if way not in ("option", "group"):
        said = f"{file}: trainer.max_epochs is spelt epochs"
    assert line == f"fastformer {command[0]}: error: {said}"
    assert [*tmp_path.iterdir()] == [file]


def test_what_other_options_determine_has_a_spelling(parsers: dict[str, Any]) -> None:
    """Lightning's options that one of ours determines would be ignored in a file: each has a line in the error."""
    from fastformer.training.option_files import check_spelling

    for parser in parsers.values():
        determined = [action.dest for action in parser._actions if " --> " in "".join(action.option_strings)]
        assert len(determined) == 8
        for name in determined:
            with pytest.raises(ValueError, match=f"^--{name} is spelt --"):
                check_spelling([f"--{name}", "1"])


def test_no_option_is_needed(parsers: dict[str, Any]) -> None:
    from fastformer.training.options import parse

    for name, parser in parsers.items():
        assert parse(parser, []).output == f"runs/{name}"


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("given", ["--vocab", "--conf", "--trus", "--trainer.val_check", "--resum"])
def test_no_option_is_abbreviated(given: str, command: list[str], capsys: pytest.CaptureFixture) -> None:
    """An abbreviation would pass the check of spelling, which knows whole names."""
    assert fails(capsys, *command, f"{given}=1").endswith(f"error: unrecognized arguments: {given}=1")


GROUPS = [
    ("pretrain", "trainer", "log_every_n_steps", 3),
    ("pretrain", "optimizer", "learning_rate", 0.5),
    ("pretrain", "corpus", "whole_word", True),
    ("classify", "optimizer", "learning_rate", 0.5),
    ("translate", "text", "beams", 3),
]


@pytest.mark.parametrize(("name", "group", "option", "value"), GROUPS)
def test_options_within_a_group_are_accepted(
    name: str,
    group: str,
    option: str,
    value: Any,
    parsers: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A group's value may be JSON or a file, whose name alone is not taken for that of a class."""
    from fastformer.training.options import classes_allowed, parse

    monkeypatch.chdir(tmp_path)
    (tmp_path / "group.yaml").write_text(yaml.safe_dump({option: value}))
    for given in (
        [f"--{group}", "group.yaml"],
        [f"--{group}=group.yaml"],
        [f"--{group}", yaml.safe_dump({option: value})],
    ):
        with classes_allowed(given):
            options = parse(parsers[name], given)
        assert options[f"{group}.{option}"] == value


def test_a_file_of_a_group_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    line = fails(capsys, "finetune", "classify", "--optimizer", "none.yaml")
    assert "write ./none.yaml for a file of options" in line


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("trainer:\n  log_every_n_steps: 3\ntrainer:\n  min_steps: 3\n", "trainer is there twice, again in line 3"),
        ("seed: 3\nseed: 3\n", "seed is there twice, again in line 2"),
        ("optimizer:\n  eps: 1\n  eps: 2\n", "eps is there twice, again in line 3"),
        ("optimizer:\n  eps: 1\noptimizer.eps: 2\n", "optimizer.eps is there twice"),
        ("config: other.yaml\n", "names another file of options: give each of them with --config"),
    ],
)
def test_a_file_in_which_a_value_would_be_lost(content: str, said: str, tmp_path: Path) -> None:
    from fastformer.training.option_files import read_options

    file = tmp_path / "config.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match=f"^{re.escape(str(file))}.*{said}$"):
        read_options(file)


def test_overrides_do_not_remove_earlier_ones() -> None:
    from fastformer.training.option_files import check_spelling

    items, whole = ["--overrides.hidden_size", "8"], ["--overrides", '{"num_hidden_layers": 6}']
    check_spelling([*whole, *items])
    with pytest.raises(
        ValueError, match=r"^--overrides would remove --overrides\.hidden_size: give --overrides first$"
    ):
        check_spelling([*items, *whole])


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("classify", "--adapter.rank=16", "--adapter.rank is for --lora, which is not given"),
        ("classify", "--adversary.steps=5", "--adversary.steps is for --adversarial, which is not given"),
        ("classify", "--privacy.delta=0.1", "--privacy.delta is for --privacy_epsilon, which is not given"),
        ("classify", "--monitor=accuracy", "--monitor is for --patience, which is not given"),
        ("classify", "--text.stride=3", "--text.stride is for qa, not for classify"),
        ("qa", "--text.beams=3", "--text.beams is for summarize and translate and generate, not for qa"),
    ],
)
def test_an_option_without_effect_is_refused(name: str, given: str, said: str, parsers: dict[str, Any]) -> None:
    from fastformer.training.options import parse

    with pytest.raises(ValueError, match=f"^{said}"):
        parse(parsers[name], [given])


def test_the_same_option_where_it_has_an_effect(parsers: dict[str, Any]) -> None:
    from fastformer.training.options import parse

    assert parse(parsers["classify"], ["--lora", "--adapter.rank=16"]).adapter.rank == 16
    assert parse(parsers["qa"], ["--text.stride=3"]).text.stride == 3
    assert parse(parsers["pretrain"], ["--objective=denoising", "--corpus.permute_sentences=false"])
