"""Every architecture that the configuration allows equals a naive float64 Transformer: packed, dense and cached."""

from __future__ import annotations

from fnmatch import fnmatch

import pytest
import torch
import torch.distributed as dist
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_transformer import ReferenceTransformer
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.fsdp import fully_shard
from transformers import StaticCache

import fastformer
from fastformer.models import (
    FastformerConfig,
    FastformerEncoderDecoderModel,
    FastformerForCausalLM,
    FastformerForImageClassification,
    FastformerForSeq2SeqLM,
    FastformerModel,
)
from fastformer.models.block import Block

LENGTHS, SOURCES = [5, 1, 11], [7, 3, 2]
SHAPE = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 6,
    "initializer_range": 0.3,
    "hidden_dropout_prob": 0.0,
    "layer_norm_eps": 1e-6,
}
DECODER = {"stack": "decoder", "norm_placement": "pre", "type_vocab_size": 0, "embedding_norm": False}


@st.composite
def architectures(draw: st.DrawFn, stack: str) -> FastformerConfig:
    heads = draw(st.sampled_from([2, 4]))
    position = draw(st.sampled_from(["learned", "sinusoidal", "rotary", "alibi", "relative", "none"]))
    layer_types = [draw(st.sampled_from(["full_attention", "sliding_attention"])) for _ in range(2)]
    options = {
        "stack": stack,
        "num_attention_heads": heads,
        "num_key_value_heads": draw(st.sampled_from([None, 1, 2])),
        "head_dim": draw(st.sampled_from([None, 6])),
        "position_embedding": position,
        "norm": draw(st.sampled_from(["layer", "rms"])),
        "norm_placement": draw(st.sampled_from(["pre", "post"])),
        "hidden_act": draw(st.sampled_from(["relu", "relu2", "gelu", "gelu_new", "silu"])),
        "layer_types": draw(st.sampled_from([None, layer_types])),
        "sliding_window": 3,
        "type_vocab_size": 0 if stack == "encoder_decoder" else draw(st.sampled_from([0, 2])),
        "attention_scale": draw(st.sampled_from([None, 1.0])),
        "embedding_scale": draw(st.sampled_from([1.0, 4.0])),
    }
    if options["layer_types"] is None:
        options["sliding_window"] = None
    if position == "rotary":
        options["rope_parameters"] = {"rope_type": "default", "rope_theta": 100.0}
    flags = ("gated", "embedding_norm", "qk_norm", "attention_bias", "attention_output_bias", "feed_forward_bias")
    return FastformerConfig(**SHAPE, **options, **{flag: draw(st.booleans()) for flag in flags})


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Return `model` in evaluation. No weight is zero or one everywhere, so a lost weight shows."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.3)
    return model.eval()


def packed(lengths: list[int]) -> dict[str, torch.Tensor | int]:
    return {
        "input_ids": torch.randint(1, 50, (sum(lengths),)),
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        "max_seqlen": max(lengths),
    }


def padded(ids: torch.Tensor, lengths: list[int], side: str = "right") -> tuple[torch.Tensor, torch.Tensor]:
    """Return packed tokens as a dense batch, and the mask of the places where they are."""
    columns, count = torch.arange(max(lengths)), torch.tensor(lengths)[:, None]
    real = columns < count if side == "right" else columns >= max(lengths) - count
    dense = torch.zeros(real.shape, dtype=ids.dtype)
    dense[real] = ids
    return dense, real


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    # Pre-norm and post-norm stacks end in a norm: their values are of order one, after twenty float32 operations.
    torch.testing.assert_close(actual.double(), expected.double(), rtol=2e-5, atol=2e-5)


any_architecture = settings(max_examples=25)


@any_architecture
@given(st.data(), st.sampled_from(["encoder", "decoder"]))
def test_a_stack_computes_what_the_papers_say(data: st.DataObject, stack: str) -> None:
    config = data.draw(architectures(stack))
    torch.manual_seed(0)
    model = randomised(FastformerModel(config))
    batch = packed(LENGTHS)
    types = torch.randint(0, 2, batch["input_ids"].shape) if config.type_vocab_size else None
    reference = ReferenceTransformer(config, model.state_dict(), "", causal=stack == "decoder")
    words = model.embeddings.word.weight.detach()[batch["input_ids"]].split(LENGTHS)
    segments = [None] * 3 if types is None else types.split(LENGTHS)
    expected = torch.cat([reference(each, 2, kinds) for each, kinds in zip(words, segments, strict=True)])
    with torch.no_grad():
        close(model(**batch, token_type_ids=types).last_hidden_state, expected)
        for side in ("right", "left"):
            dense, real = padded(batch["input_ids"], LENGTHS, side)
            kinds = None if types is None else padded(types, LENGTHS, side)[0]
            positions = (real.cumsum(1) - 1).clamp(min=0)
            states = model(dense, real, kinds, positions).last_hidden_state
            close(states[real], expected)
            assert torch.equal(states[~real], torch.zeros_like(states[~real]))


@any_architecture
@given(architectures("encoder_decoder"))
def test_encoder_and_decoder_compute_what_the_papers_say(config: FastformerConfig) -> None:
    torch.manual_seed(0)
    model = randomised(FastformerEncoderDecoderModel(config))
    state, source, target = model.state_dict(), packed(SOURCES), packed(LENGTHS)
    table = model.get_input_embeddings().weight.detach()
    encoder = ReferenceTransformer(config, state, "encoder.", causal=False)
    decoder = ReferenceTransformer(config, state, "decoder.", causal=True)
    encoded = [encoder(table[ids], 2) for ids in source["input_ids"].split(SOURCES)]
    expected = torch.cat(
        [
            decoder(table[ids], 2, encoded=states)
            for ids, states in zip(target["input_ids"].split(LENGTHS), encoded, strict=True)
        ]
    )
    with torch.no_grad():
        outputs = model(
            source["input_ids"],
            decoder_input_ids=target["input_ids"],
            decoder_cu_seqlens=target["cu_seqlens"],
            decoder_max_seqlen=target["max_seqlen"],
            cu_seqlens=source["cu_seqlens"],
            max_seqlen=source["max_seqlen"],
        )
        close(outputs.encoder_last_hidden_state, torch.cat(encoded))
        close(outputs.last_hidden_state, expected)
        (sources, mask), (targets, real) = padded(source["input_ids"], SOURCES), padded(target["input_ids"], LENGTHS)
        close(model(sources, mask, targets).last_hidden_state[real], expected)
        close(model(sources, mask, targets, use_cache=True).last_hidden_state[real], expected)


@any_architecture
@given(architectures("decoder"), st.booleans())
def test_a_cache_changes_nothing(config: FastformerConfig, static: bool) -> None:
    torch.manual_seed(0)
    model = randomised(FastformerForCausalLM(config))
    dense, real = padded(packed(LENGTHS)["input_ids"], LENGTHS, "left")
    positions = (real.cumsum(1) - 1).clamp(min=0)
    cache = StaticCache(config=config, max_cache_len=16) if static else None
    with torch.no_grad():
        whole = model(dense, real, position_ids=positions).logits
        for first, last in ((0, 6), (6, 7), (7, 11)):
            step = model(
                dense[:, first:last],
                real[:, :last],
                position_ids=positions[:, first:last],
                cache=cache,
                use_cache=True,
            )
            cache = step.past_key_values
            now = real[:, first:last]
            close(step.logits[now], whole[:, first:last][now])


def gpt3_like() -> FastformerConfig:
    alternating = ["full_attention", "sliding_attention"]
    return FastformerConfig(**SHAPE, **DECODER, num_attention_heads=2, layer_types=alternating, sliding_window=4)


def test_the_loss_is_the_next_tokens_and_packed_equals_dense() -> None:
    model = randomised(FastformerForCausalLM(gpt3_like()))
    batch = packed(LENGTHS)
    labels = batch["input_ids"].masked_fill(torch.rand(sum(LENGTHS)) < 0.2, -100)
    logits = model(**batch).logits
    expected, start = [], 0
    for length in LENGTHS:
        rows = torch.nn.functional.log_softmax(logits[start : start + length - 1].double(), -1)
        targets = labels[start + 1 : start + length]
        expected += [-row[target] for row, target in zip(rows, targets, strict=True) if target != -100]
        start += length
    loss = model(**batch, labels=labels).loss
    close(loss, torch.stack(expected).mean())
    dense, real = padded(batch["input_ids"], LENGTHS)
    dense_labels = padded(labels, LENGTHS)[0].masked_fill(~real, -100)
    torch.testing.assert_close(model(dense, real, labels=dense_labels).loss, loss)


def test_checkpointing_blocks_changes_no_gradient() -> None:
    for model, batch in _training_cases():
        expected = torch.autograd.grad(model(**batch).loss, list(model.parameters()))
        model.gradient_checkpointing_enable({"use_reentrant": False})
        actual = torch.autograd.grad(model(**batch).loss, list(model.parameters()))
        for ours, theirs in zip(actual, expected, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_triton_kernels_give_the_same_loss_and_gradients() -> None:
    for model, batch in _training_cases():
        results = []
        for backend in ("torch", "triton"):
            with fastformer.backend(backend):
                loss = model(**batch).loss
                results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.cpu
def test_the_declared_units_are_sharded_by_fsdp2() -> None:
    for model, batch in _training_cases():
        gradients = torch.autograd.grad(model(**batch).loss, list(model.parameters()))
        expected = dict(zip(dict(model.named_parameters()), gradients, strict=True))
        units = [
            module
            for name, module in model.named_modules()
            for pattern in model.fsdp_plan
            if fnmatch(name, pattern) and name.count(".") == pattern.count(".")
        ]
        blocks = [module for module in model.modules() if isinstance(module, Block)]
        assert set(blocks) == set(units)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            mesh = dist.init_device_mesh("cpu", (1,))
            for unit in units:
                fully_shard(unit, mesh=mesh)
            fully_shard(model, mesh=mesh)
            model(**batch).loss.backward()
        finally:
            dist.destroy_process_group()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad.full_tensor(), expected[name], msg=name)


def _training_cases() -> list[tuple[torch.nn.Module, dict]]:
    batch = packed(LENGTHS)
    causal = FastformerForCausalLM(gpt3_like())
    llama = {**DECODER, "norm": "rms", "gated": True, "hidden_act": "silu", "position_embedding": "rotary"}
    grouped = FastformerConfig(**SHAPE, **llama, num_attention_heads=4, num_key_value_heads=2, attention_bias=False)
    shape = {**SHAPE, "num_attention_heads": 2, "type_vocab_size": 0}
    t5 = {"stack": "encoder_decoder", "norm": "rms", "norm_placement": "pre", "position_embedding": "relative"}
    sequence_to_sequence = FastformerForSeq2SeqLM(FastformerConfig(**shape, **t5, embedding_norm=False))
    sources, mask = padded(batch["input_ids"], LENGTHS)
    targets = torch.randint(1, 50, (3, 4))
    pairs = {"input_ids": sources, "attention_mask": mask, "decoder_input_ids": targets, "labels": targets}
    sequences = {**batch, "labels": batch["input_ids"]}
    return [
        (causal.train(), sequences),
        (FastformerForCausalLM(grouped).train(), sequences),
        (sequence_to_sequence.train(), pairs),
    ]


def test_compiles_without_graph_break_for_any_length() -> None:
    model = randomised(FastformerForCausalLM(gpt3_like()))
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for lengths in ([5, 3, 9], [4, 6, 2], [13, 1, 7]):
        batch = packed(lengths)
        with torch.no_grad():
            torch.testing.assert_close(
                compiled(**batch, labels=batch["input_ids"]).loss, model(**batch, labels=batch["input_ids"]).loss
            )
    assert counter.frame_count == 1


def test_an_image_is_patches_behind_a_token_of_its_own() -> None:
    image = {"image_size": 8, "patch_size": 4, "num_channels": 3, "norm_placement": "pre", "pooler_act": "none"}
    config = FastformerConfig(**SHAPE, **image, num_attention_heads=2, num_labels=3, type_vocab_size=0)
    model = randomised(FastformerForImageClassification(config))
    torch.nn.init.normal_(model.model.embeddings.image)
    pixels = torch.randn(2, 3, 8, 8)
    embeddings = model.model.embeddings
    weight = embeddings.projection.weight.detach().flatten(1).double()
    reference = ReferenceTransformer(config, model.state_dict(), "model.", causal=False)
    reference.embed = lambda words, types: words
    for image_pixels, logits in zip(pixels, model(pixels).logits, strict=True):
        tiles = rearrange(image_pixels.double(), "c (rows y) (columns x) -> (rows columns) (c y x)", y=4, x=4)
        patches = tiles @ weight.T + embeddings.projection.bias.detach()
        tokens = torch.stack([embeddings.image.detach().double(), *patches]) + embeddings.position.weight.detach()
        pooled = reference(tokens, 2)[0]
        projection = model.classifier.projection
        close(logits, pooled @ projection.weight.detach().double().T + projection.bias.detach())
    with pytest.raises(ValueError, match=r"pixel_values must be \(batch, 3, 8, 8\); got \(2, 3, 8, 7\)"):
        model(pixels[..., 1:])
