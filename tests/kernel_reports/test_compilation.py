"""Ahead-of-time compilation: a machine with the cache launches without compiling, and this test can fail."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from processes import fastformer, python

pytestmark = pytest.mark.cpu

# Do what a machine with a GPU does up to the launch: run operators through Triton's launch path on a given cache.
LAUNCH = """
import json, sys
import torch, triton
import fastformer
from fastformer.kernel_reports.meta_operators import kernels_of_meta_operators
from fastformer.kernel_reports.stand_in import stand_in

compiled = []
triton.knobs.compilation.listener = lambda *, src, cache_hit, **_: cache_hit or compiled.append(src.name)
architecture, dtype, rows, columns = sys.argv[1], getattr(torch, sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
with stand_in(architecture) as launched, kernels_of_meta_operators():
    x = torch.empty(rows, columns, dtype=dtype, device="meta", requires_grad=True)
    fastformer.softmax(x).backward(torch.empty_like(x))
print(json.dumps({"launched": [kernel.name for kernel in launched], "compiled": compiled}))
"""


def launch(cache: Path, architecture: str, dtype: str, rows: int, columns: int) -> dict[str, list[str]]:
    done = python("-c", LAUNCH, architecture, dtype, str(rows), str(columns), cache=cache)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compiled") / "cache"
    options = ("--operators", "softmax", "--dtypes", "bfloat16", "--layouts", "aligned,odd", "--processes", "1")
    done = fastformer("kernels", "compile", "--arch", "sm_90,gfx942", *options, "--out", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "launched again, none was compiled" in done.stdout
    return path


@pytest.mark.parametrize("architecture", ["sm_90", "gfx942"])
@pytest.mark.parametrize(("rows", "columns"), [(4096, 1024), (4093, 1021)])
def test_a_launch_finds_its_kernels_in_the_cache(cache: Path, architecture: str, rows: int, columns: int) -> None:
    found = launch(cache, architecture, "bfloat16", rows, columns)
    assert len(found["launched"]) == 2
    assert found["compiled"] == []


def test_a_cache_has_what_a_launch_needs_alone(cache: Path) -> None:
    kernels = {file.suffix for file in cache.glob("*/*kernel*")}
    assert kernels == {".json", ".cubin", ".hsaco"}


def test_what_was_not_compiled_ahead_is_missed(cache: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(cache, tmp_path / "cache")
    assert len(launch(copy, "sm_90", "float16", 4096, 1024)["compiled"]) == 2
    assert len(launch(copy, "sm_80", "bfloat16", 4096, 1024)["compiled"]) == 2


def test_a_cache_is_used_where_it_was_prepared_for(cache: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(cache, home)
    code = "import sys; from pathlib import Path; from fastformer.kernel_reports.portable_cache import relocate\n"
    code += "relocate(Path(sys.argv[1]), Path(sys.argv[1]))"
    hidden = cache.rename(cache.with_name("hidden"))
    try:
        away = shutil.copytree(home, tmp_path / "away")
        assert len(launch(away, "sm_90", "bfloat16", 4096, 1024)["compiled"]) == 2
        assert python("-c", code, str(home)).returncode == 0
        assert launch(home, "sm_90", "bfloat16", 4096, 1024)["compiled"] == []
    finally:
        hidden.rename(cache)


# Print the kernels of a training step that the command would not compile for the model; nothing is compiled.
MISSED = """
import sys
import torch
from fastformer.kernel_reports.compilation import specializations_of
from fastformer.planning.model_work import known_model, meta_model, model_work, two_blocks

config, kind = known_model(sys.argv[1])
model = meta_model(two_blocks(config), kind, "32-true")
compiled = specializations_of(model_work(model, "32-true"), "sm_80")
def integers(size, dtype=torch.int64): return torch.empty(size, dtype=dtype, device="meta")

def step(max_seqlen, masked, types):
    model(
        input_ids=integers(77), cu_seqlens=integers(4, torch.int32), max_seqlen=max_seqlen, labels=integers(77),
        masked_positions=integers(masked), next_sentence_label=integers(3), token_type_ids=types,
    ).loss.backward()

model.train()
batches = [(32, 11, None), (27, 16, integers(77)), (31, 200, None), (1, 1, None)]
wanted = [s for batch in batches for s in specializations_of([lambda: step(*batch)], "sm_80")]
print(len(wanted), [s.kernel for s in wanted if s not in compiled])
"""


def test_a_model_launches_nothing_but_what_is_compiled_for_it(tmp_path: Path) -> None:
    from fastformer.models import preset

    shape = {"hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 32, "vocab_size": 512}
    config = preset("bert-tiny", num_hidden_layers=5, attention_probs_dropout_prob=0.1, **shape)
    config.architectures = ["FastformerForPreTraining"]
    config.save_pretrained(tmp_path)
    done = python("-c", MISSED, str(tmp_path))
    assert done.returncode == 0, done.stderr
    launched, _, rest = done.stdout.strip().partition(" ")
    assert int(launched) >= 30
    assert rest == "[]"


# The same for a decoder, an encoder-decoder and a Vision Transformer, whose batches have other arguments.
MISSED_BY_OTHERS = """
import sys
import torch
from fastformer.kernel_reports.compilation import specializations_of
from fastformer.planning.model_work import meta_model, model_work, two_blocks
from fastformer.models import preset

def integers(size, dtype=torch.int64): return torch.empty(size, dtype=dtype, device="meta")

def packed(prefix, tokens, sequences, longest):
    return {
        prefix + "cu_seqlens": integers(sequences + 1, torch.int32),
        prefix + "max_seqlen": longest,
        prefix + "input_ids": integers(tokens),
    }

def decoder(tokens, sequences, longest, *_):
    return {**packed("", tokens, sequences, longest), "labels": integers(tokens)}

def encoder_decoder(tokens, sequences, longest, targets, longest_target):
    source, target = packed("", tokens, sequences, longest), packed("decoder_", targets, sequences, longest_target)
    return {**source, **target, "labels": integers(targets)}

def image(tokens, sequences, *_):
    return {"pixel_values": torch.empty(sequences, 3, 32, 32, device="meta"), "labels": integers(sequences)}

shape = {"num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 32}
cases = {
    "decoder": ("gpt3-small", "FastformerForCausalLM", decoder, {"vocab_size": 512, "sliding_window": 8}),
    "encoder_decoder": ("t5-small", "FastformerForSeq2SeqLM", encoder_decoder, {"vocab_size": 512, "head_dim": 16}),
    "image": ("vit-b-16", "FastformerForImageClassification", image, {"image_size": 32, "num_labels": 10}),
}
name, kind, arguments, options = cases[sys.argv[1]]
config = preset(name, hidden_size=32, **{**shape, **options})
model = meta_model(two_blocks(config), kind, "32-true")
compiled = specializations_of(model_work(model, "32-true"), "sm_80")
model = meta_model(config, kind, "32-true")

def step(training, batch):
    model.train(training)
    with torch.set_grad_enabled(training):
        loss = model(**arguments(*batch)).loss
        if training:
            loss.backward()

batches = [(77, 3, 32, 90, 27), (64, 4, 17, 77, 32), (100, 16, 31, 40, 16), (21, 21, 1, 1000, 29)]
work = [lambda batch=batch, training=training: step(training, batch) for batch in batches for training in (True, False)]
wanted = [s for run in work for s in specializations_of([run], "sm_80")]
print(len(wanted), [s.kernel for s in wanted if s not in compiled])
"""


@pytest.mark.parametrize("kind", ["decoder", "encoder_decoder", "image"])
def test_every_kind_of_model_launches_nothing_but_what_is_compiled_for_it(kind: str) -> None:
    done = python("-c", MISSED_BY_OTHERS, kind)
    assert done.returncode == 0, done.stderr
    launched, _, rest = done.stdout.strip().partition(" ")
    assert int(launched) >= 50
    assert rest == "[]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--arch", "sm_91"), "--arch must be among sm_80"),
        (("--arch", "sm_90", "--operators", "sofmax"), "operators must be among attention"),
        (("--arch", "sm_90", "--model", "bert-huge"), "the model must be a folder with a config.json or a preset"),
        (("--arch", "sm_90", "--model", "bert-tiny", "--precision", "8"), "--precision must be one of 32-true"),
        (("--arch", "sm_90", "--model", "bert-tiny", "--dtypes", "float16"), "--dtypes and --layouts select cases"),
        (("--arch", "sm_90", "--bench-gpu", "atention"), "step must be one of environment, smoke"),
        (("--arch", "sm_90", "--bench-gpu", "all", "--model", "bert-tiny"), "--bench-gpu cannot be combined with"),
        (("--arch", "sm_90", "--home", "here"), "--home must be an absolute path"),
    ],
)
def test_wrong_options_are_named(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    done = fastformer("kernels", "compile", *arguments, "--out", str(tmp_path / "cache"))
    assert done.returncode == 2
    assert message in done.stderr


# Abort the compiler's process, as LLVM does on some errors, and compile a good kernel too.
CRASH = """
import sys
from pathlib import Path
import torch
import fastformer
from fastformer.kernel_reports.compilation import Specialization, compiler, specializations_of

if __name__ == "__main__":
    softmax = specializations_of([lambda: fastformer.softmax(torch.empty(64, 64, device="meta"))], "sm_90")
    crashes = Specialization("sm_90", "aborts", "kernel", "{}", b"")
    with compiler(Path(sys.argv[1]), 1) as submit:
        print([done.result() for done in [submit(crashes), *map(submit, softmax), submit(crashes)]])
"""


def test_a_compiler_that_crashes_fails_its_own_kernel_alone(tmp_path: Path) -> None:
    (tmp_path / "aborts.py").write_text("import os; os.abort()")
    (tmp_path / "crash.py").write_text(CRASH)
    done = python(str(tmp_path / "crash.py"), str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    crashed = "the compiler ended its process; see its last output for the reason"
    assert done.stdout.splitlines()[-1] == str([crashed, None, crashed])
    assert list((tmp_path / "cache").glob("*/*.cubin"))


# A user's own functions of the scores, compiled ahead by one process ("compile") and launched by another.
FUNCTIONS = """
import triton
import fastformer

@triton.jit
def halved(score, b, h, q, k):
    return score * 0.5

def found():
    return fastformer.ScoreMod(halved, halved, lambda score, b, h, q, k: score * 0.5)

def hidden():
    @triton.jit
    def within(score, b, h, q, k):
        return score * 0.5

    return fastformer.ScoreMod(within, within)
"""
ATTEND = """
import sys
from pathlib import Path
import torch
import fastformer, functions
from fastformer.kernel_reports.compilation import compile_ahead, compiled_by

def attend():
    query, key, value = (torch.empty(1, 1, 64, 16, dtype=torch.float16, device="meta") for _ in range(3))
    fastformer.attention(query, key, value, score_mod=getattr(functions, sys.argv[2])())

if __name__ == "__main__":
    cache = Path(sys.argv[3])
    if sys.argv[1] == "compile":
        print([str(failure) for failure in compile_ahead([attend], ["sm_80"], cache, 1)[1]])
    else:
        print(compiled_by([attend], ["sm_80"], cache))
"""


@pytest.fixture
def attend(tmp_path: Path) -> Path:
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    script = tmp_path / "attend.py"
    script.write_text(ATTEND)
    return script


def test_a_function_of_the_scores_is_compiled_ahead(attend: Path, tmp_path: Path) -> None:
    for step in ("compile", "launch"):
        done = python(str(attend), step, "found", str(tmp_path / "cache"))
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "[]"
    assert len(list((tmp_path / "cache").glob("*/*.cubin"))) == 1


def test_a_function_that_no_other_process_finds_is_named(attend: Path, tmp_path: Path) -> None:
    done = python(str(attend), "compile", "hidden", str(tmp_path / "cache"))
    assert done.returncode == 1
    assert "the Triton function hidden.<locals>.within of module functions cannot be compiled" in done.stderr


# Print the number of kernels, and those whose name in the cache changes if they are visited in reverse order.
NAMES = """
import importlib, pkgutil
import fastformer_kernels
from triton.runtime.jit import JITFunction

kernels = {}
for module in pkgutil.walk_packages(fastformer_kernels.__path__, "fastformer_kernels."):
    functions = vars(importlib.import_module(module.name)).items()
    kernels |= {f"{module.name}.{name}": each for name, each in functions if isinstance(each, JITFunction)}

def names(order):
    for kernel in kernels.values():
        kernel.hash, kernel.used_global_vals = None, {}
    return {name: kernels[name].cache_key for name in order}

forwards, backwards = names(list(kernels)), names(list(reversed(kernels)))
print(len(kernels), [name for name in kernels if forwards[name] != backwards[name]])
"""


def test_the_name_of_a_kernel_does_not_depend_on_which_came_first() -> None:
    done = python("-c", NAMES)
    assert done.returncode == 0, done.stderr
    kernels, _, found = done.stdout.strip().partition(" ")
    assert int(kernels) > 50
    assert found == "[]"
