"""Plans are compared with published figures and with each other; the commands show them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from fastformer.cli import main
from fastformer.models import PRESETS, preset
from fastformer.planning.gpus import GIB, GPUS
from fastformer.planning.needs import Plan, Setup, _part, plan, whole_run

pytestmark = pytest.mark.cpu

H100 = GPUS["h100"]


def planned(name: str, setup: Setup, **overrides) -> Plan:
    return plan(preset(name, **overrides), PRESETS[name].model, setup)


# Brown et al. 2020, table D.1: the operations to train on 300 billion tokens, without attention.
@pytest.mark.parametrize(
    ("name", "published"), [("gpt3-6.7b", "1.20e+22"), ("gpt3-13b", "2.31e+22"), ("gpt3-175b", "3.14e+23")]
)
def test_training_operations_of_gpt3(name: str, published: str) -> None:
    setup = Setup(H100, 64, "fsdp", length=2048, batch_size=1)
    found = planned(name, setup)
    run = whole_run(found, setup, 300_000_000_000, None)
    products = run.flops * (1 - found.attention_share)
    assert f"{products:.2e}" == published
    # Each parameter and token costs six operations. Attention is a small part at this size.
    assert products == pytest.approx(6 * found.parameters * 300e9, rel=0.005)
    assert found.attention_share < 0.03


# Rajbhandari et al. 2020, figure 1: GB per device for 7.5 billion parameters on 64 devices.
@pytest.mark.parametrize(
    ("strategy", "published"),
    [("ddp", "120"), ("zero-1", "31.4"), ("zero-2", "16.6"), ("zero-3", "1.9"), ("fsdp", "1.9")],
)
def test_states_are_divided_as_zero_divides_them(strategy: str, published: str) -> None:
    memory = planned("gpt2-small", Setup(H100, 64, strategy, length=128, batch_size=1)).memory
    each = (memory.weights + memory.gradients + memory.optimizer) / 124_439_808
    digits = len(published.partition(".")[2])
    assert f"{7.5 * each:.{digits}f}" == published


@pytest.mark.parametrize(("precision", "each"), [("32-true", 16), ("bf16-mixed", 16), ("bf16-true", 8)])
def test_states_of_one_device(precision: str, each: int) -> None:
    memory = planned("gpt2-small", Setup(H100, precision=precision, length=128, batch_size=1)).memory
    assert memory.weights + memory.gradients + memory.optimizer == each * 124_439_808


def test_momentum_keeps_half_of_what_adamw_does() -> None:
    adamw = Setup(H100, length=128, batch_size=1)
    memory, other = planned("gpt2-small", adamw).memory, planned("gpt2-small", replace(adamw, optimizer="sgd")).memory
    assert other == replace(memory, optimizer=memory.optimizer / 2)


def test_a_part_of_a_model_has_its_share_of_the_parameters() -> None:
    config = preset("gpt2-small", vocab_size=50256)
    setup = Setup(H100, length=128, batch_size=1)
    whole = plan(config, "FastformerForCausalLM", setup).parameters
    part = plan(_part(config, 4), "FastformerForCausalLM", setup).parameters
    # Positions, norms, and the biases behind the sums are whole on every device.
    replicated = 1024 * 768 + 12 * (4 + 2) * 768 + 2 * 768
    assert 4 * (part - replicated) + replicated == whole
    memory = plan(config, "FastformerForCausalLM", replace(setup, devices=4, tensor_parallel=4)).memory
    assert memory.weights == 4 * part


def test_heads_shared_by_queries_are_divided_or_repeated() -> None:
    assert _part(preset("llama3-8b"), 4).kv_heads == 2
    assert _part(preset("llama3-8b"), 16).kv_heads == 1
    with pytest.raises(ValueError, match="tensor_parallel must divide num_attention_heads, 25; got 2"):
        _part(preset("gpt2-xl"), 2)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_chosen_batch_is_the_largest_that_fits(checkpointing: bool) -> None:
    setup = Setup(GPUS["rtx-4090"], length=256, checkpointing=checkpointing)
    found = planned("bert-base", setup)
    assert found.fits
    assert found.memory == planned("bert-base", replace(setup, batch_size=found.batch_size)).memory
    assert not planned("bert-base", replace(setup, batch_size=found.batch_size + 1)).fits


def test_checkpointing_saves_memory_and_costs_no_operations_of_the_model() -> None:
    setup = Setup(H100, length=512, batch_size=8)
    kept, again = planned("bert-base", setup), planned("bert-base", replace(setup, checkpointing=True))
    # Eleven of twelve blocks keep only their inputs, in float32. The last block computes keys and values for all
    # tokens, and the rest for the 77 predicted tokens and the first one.
    block, inputs, keys_and_values = 28 * 768 + 4 * 12 + 16, 4 * 768, 4 * 768
    last = 512 * (2 * 768 + keys_and_values) + 78 * (block - keys_and_values)
    saved = 8 * (512 * (10 * block - 12 * inputs) + last)
    assert kept.memory.activations - again.memory.activations == pytest.approx(saved, rel=1e-3)
    assert again.flops == kept.flops


def test_batches_are_accumulated_to_the_tokens_of_a_step() -> None:
    found = planned("gpt2-small", Setup(H100, 8, length=1024, batch_size=4, global_tokens=500_000))
    assert found.accumulation == 16
    assert found.tokens == 16 * 8 * 4 * 1024
    assert planned("gpt2-small", Setup(H100, 8, length=1024, global_tokens=16384)).batch_size == 2


@pytest.mark.quick
def test_time_follows_from_the_stated_utilisation() -> None:
    setup = Setup(H100, 8, length=1024, batch_size=4)
    found = planned("gpt2-small", setup)
    assert found.tokens_per_second * found.flops_per_token == pytest.approx(0.4 * 8 * 989.4e12)
    assert planned("gpt2-small", replace(setup, mfu=0.2)).tokens_per_second == pytest.approx(
        found.tokens_per_second / 2
    )
    run = whole_run(found, setup, 10**10, 2.0)
    assert run.seconds == pytest.approx(10**10 / found.tokens_per_second)
    assert run.gpu_hours == pytest.approx(8 * run.seconds / 3600)
    assert run.price == pytest.approx(2 * run.gpu_hours)
    assert (run.steps - 1) * found.tokens < 10**10 <= run.steps * found.tokens


def test_communication_of_ring_algorithms() -> None:
    setup = Setup(H100, 8, "ddp", length=128, batch_size=1)
    parameters = 124_439_808
    assert planned("gpt2-small", setup).communication == pytest.approx(2 * 7 / 8 * 4 * parameters / 450e9)
    divided = planned("gpt2-small", replace(setup, strategy="fsdp", devices=16)).communication
    assert divided == pytest.approx(3 * 15 / 16 * 2 * parameters / 50e9)
    assert planned("gpt2-small", replace(setup, devices=1)).communication == 0
    parts = replace(setup, tensor_parallel=8)
    sums = 12 * 2 * 2 * 128 * 768  # blocks, sublayers, forward and backward, tokens, features
    assert plan(
        preset("gpt2-small", num_attention_heads=8, head_dim=96), "FastformerForCausalLM", parts
    ).communication == pytest.approx(sums * 2 * 2 * 7 / 8 / 450e9)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "dp"}, "strategy must be one of ddp, fsdp, zero-1"),
        ({"precision": "8"}, "precision must be one of 32-true"),
        ({"devices": 0}, "devices must be 1 or more; got 0"),
        ({"mfu": 40.0}, "mfu must be above 0 and at most 1; got 40.0"),
        ({"tensor_parallel": 3}, "tensor_parallel must divide the 8 devices; got 3"),
        ({"tensor_parallel": 2, "strategy": "zero-1"}, "tensor_parallel goes with ddp and fsdp; got strategy 'zero-1'"),
    ],
)
def test_refused_setups(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Setup(**{"gpu": H100, "devices": 8, **changes})


def test_lengths_beyond_the_context_are_refused() -> None:
    with pytest.raises(ValueError, match="length must be at most the model's 1024 positions; got 2048"):
        planned("gpt2-small", Setup(H100, length=2048))


def test_gpus_have_published_numbers() -> None:
    assert {name: gpu.memory / GIB for name, gpu in GPUS.items()} == {
        "a100": 80,
        "h100": 80,
        "h200": 141,
        "b200": 180,
        "l40s": 48,
        "rtx-4090": 24,
        "rtx-5090": 32,
        "mi300x": 192,
    }
    # A100 datasheet: 312 and 19.5 TFLOPS; MI300X: 1,307.4 and 163.4.
    assert GPUS["a100"].flops == {16: 312e12, 32: pytest.approx(19.5e12, rel=0.005)}
    assert GPUS["mi300x"].flops == {16: 1307.4e12, 32: 163.4e12}
    assert GPUS["h200"].bandwidth == 4.8e12 and GPUS["h200"].flops == GPUS["h100"].flops


@pytest.mark.quick
def test_plan_command(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--preset", "bert-base", "--gpu", "h100:8", "--tokens", "137e9", "--price", "2.5"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "8 x H100 SXM" in shown and "110 M parameters" in shown and "137 B" in shown and "fits" in shown
    assert main([*arguments, "--batch_size", "32", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["plan"]["batch_size"] == 32
    assert report["plan"]["tokens"] == 32 * 8 * 512
    assert report["run"]["tokens"] == 137_000_000_000
    assert report["plan"]["memory_total"] == sum(report["plan"]["memory"].values())


def test_what_does_not_fit_is_told_with_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--preset", "gpt3-2.7b", "--gpu", "rtx-5090:8", "--length", "512"]
    with pytest.raises(SystemExit, match="1"):
        main(arguments)
    shown = capsys.readouterr().out
    assert "does not fit" in shown
    assert "it fits with --strategy fsdp\n" in shown
    assert main([*arguments, "--strategy", "fsdp"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "bert-huge", "--gpu", "h100"], "the model must be a folder with a config.json or a preset"),
        (["--preset", "bert-base", "--gpu", "h1000"], "--gpu must be one of a100, h100"),
        (["--preset", "bert-base", "--gpu", "h100:many"], "--gpu takes a number after the colon"),
        (["--preset", "bert-base", "--gpu", "h100", "--price", "2"], "--price needs --tokens"),
        (["--preset", "bert-base", "--gpu", "h100", "--target_length", "9"], "--target_length is for encoder-decoders"),
        (["--preset", "vit-b-16", "--gpu", "h100", "--length", "9"], "--length is for text"),
    ],
)
def test_wrong_options_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_models_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "gpt3-125m"]) == 2
    assert "there is no preset gpt3-125m; there are bert-tiny" in capsys.readouterr().err
    assert main(["models", "bert-base", "t5-small", "vit-b-16", "--json"]) == 0
    bert, t5, vit = json.loads(capsys.readouterr().out)
    assert bert["parameters"] == 110_106_428
    assert bert["training_bytes"] == 16 * bert["parameters"]
    assert "Devlin" in bert["source"] and bert["suits"]
    assert bert["training_flops_per_token"] == 3 * bert["forward_flops_per_token"]
    assert (t5["context"], vit["context"]) == (512, 197)
    assert main(["models", "bert-base"]) == 0
    assert "110 M" in capsys.readouterr().out
