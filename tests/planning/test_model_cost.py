"""Costs counted on the meta device equal formulas derived by hand and the costs of a run on real tensors."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from fastformer.models import PRESETS, FastformerConfig, FastformerForCausalLM, FastformerForSeq2SeqLM, preset
from fastformer.planning.model_cost import attended_pairs, forward_flops, model_cost
from fastformer.planning.model_work import meta_model

pytestmark = pytest.mark.cpu


def cost_of(name: str, precision: str = "bf16-mixed", length: int = 64, **overrides):
    return model_cost(meta_model(preset(name, **overrides), PRESETS[name].model, precision), precision, length)


def flops_of(name: str, length: int, target_length: int | None = None, **overrides):
    return forward_flops(meta_model(preset(name, **overrides), PRESETS[name].model, "32-true"), length, target_length)


@pytest.mark.parametrize(("left", "right"), [(-1, -1), (-1, 0), (3, 0), (2, 2), (0, 0), (50, 1)])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (9, 9), (7, 12), (12, 7)])
def test_attended_pairs(queries: int, keys: int, left: int, right: int) -> None:
    distance = torch.arange(keys)[None] - torch.arange(queries)[:, None]
    seen = torch.ones(queries, keys, dtype=torch.bool)
    if left >= 0:
        seen &= distance >= -left
    if right >= 0:
        seen &= distance <= right
    assert attended_pairs(queries, keys, left, right) == seen.sum()


def projections(config: FastformerConfig) -> tuple[int, int]:
    """Return the number of weights of one block's attention and of its feed-forward network."""
    attention = config.hidden_size * config.size_per_head * 2 * (config.num_attention_heads + config.kv_heads)
    return attention, config.hidden_size * config.intermediate_size * (3 if config.gated else 2)


@pytest.mark.parametrize("name", ["gpt2-small", "gpt3-small", "llama3-8b", "qwen3-0.6b"])
def test_operations_of_decoders(name: str) -> None:
    length, layers = 700, 4
    flops = flops_of(name, length, num_hidden_layers=layers)
    config = preset(name, num_hidden_layers=layers)
    weights = layers * sum(projections(config)) + config.vocab_size * config.hidden_size
    assert flops.products == 2 * length * weights
    full = length * (length + 1) // 2
    banded = sum(min(position + 1, 256) for position in range(length))
    pairs = 2 * (full + banded) if name.startswith("gpt3") else 4 * full
    assert flops.attention == 4 * config.num_attention_heads * config.size_per_head * pairs
    assert flops.tokens == length


def test_operations_of_an_encoder() -> None:
    flops, config = flops_of("bert-mini", 100, sliding_window=8), preset("bert-mini")
    hidden = config.hidden_size
    # 15 of 100 tokens are predicted. The pooler and the next-sentence head compute one token.
    head = 15 * (hidden * hidden + hidden * config.vocab_size) + hidden * hidden + 2 * hidden
    assert flops.products == 2 * (100 * 4 * sum(projections(config)) + head)
    assert flops.attention == 4 * hidden * 4 * sum(min(i + 7, 99) - max(i - 7, 0) + 1 for i in range(100))


def test_operations_of_an_encoders_last_block() -> None:
    flops, config = flops_of("bert-mini", 100), preset("bert-mini")
    hidden, (attention, feed_forward) = config.hidden_size, projections(config)
    head = 15 * (hidden * hidden + hidden * config.vocab_size) + hidden * hidden + 2 * hidden
    # Keys and values are computed for all tokens, everything else for the predicted tokens and the first one.
    last = 100 * attention // 2 + 16 * (attention // 2 + feed_forward)
    assert flops.products == 2 * (100 * 3 * (attention + feed_forward) + last + head)
    assert flops.attention == 4 * hidden * (3 * 100 + 16) * 100


def test_operations_of_an_encoder_decoder() -> None:
    source, target = 90, 30
    flops, config = flops_of("t5-small", source, target), preset("t5-small")
    attention, feed_forward = projections(config)
    encoder = source * (attention + feed_forward)
    # In the cross-attention, queries and output have the target's tokens, keys and values the source's.
    decoder = target * (attention + feed_forward) + (source + target) * attention // 2
    assert flops.products == 2 * (6 * (encoder + decoder) + target * config.vocab_size * config.hidden_size)
    assert flops.attention == 4 * 512 * 6 * (source * source + target * (target + 1) // 2 + target * source)
    assert flops.tokens == source + target


def test_operations_of_a_vision_transformer() -> None:
    flops, config = flops_of("vit-b-16", 1), preset("vit-b-16")
    head = 196 * 3 * 16 * 16 * 768 + 1000 * 768
    assert flops.products == 2 * (197 * 12 * sum(projections(config)) + head)
    assert flops.attention == 4 * 768 * 12 * 197 * 197
    assert flops.tokens == 197


def kept_by_block(config: FastformerConfig) -> int:
    """Return the bytes per token that a block keeps in bf16-mixed, derived from what its backward needs."""
    head_dim, heads, kv_heads = config.size_per_head, config.num_attention_heads, config.kv_heads
    kept = 2 * config.hidden_size + 2 * (heads + 2 * kv_heads) * head_dim  # the projection's input and output
    if config.position_embedding == "rotary":
        kept += 2 * (heads + kv_heads) * head_dim
    kept += 2 * heads * head_dim + 4 * heads  # the attention's output and log-sum-exp
    kept += 2 * config.hidden_size + 2 * config.intermediate_size * (2 if config.gated else 1)
    statistics = 8 if config.norm == "layer" else 4
    return kept + 2 * (4 * config.hidden_size + statistics)


def kept_by_last_block(config: FastformerConfig, length: int) -> int:
    """Return the bytes per example that BERT's last block keeps.

    It computes only the predicted tokens and the first one.
    """
    keys_and_values = 4 * config.kv_heads * config.size_per_head
    computed = round(0.15 * length) + 1
    return length * (2 * config.hidden_size + keys_and_values) + computed * (kept_by_block(config) - keys_and_values)


@pytest.mark.parametrize("name", ["bert-mini", "gpt2-small", "llama3-8b"])
def test_what_a_block_keeps(name: str) -> None:
    cost, config = cost_of(name, num_hidden_layers=4), preset(name)
    kept = 4 * 64 * kept_by_block(config)
    if name == "bert-mini":
        kept += kept_by_last_block(config, 64) - 64 * kept_by_block(config)
    # The seeds and the sequences' boundaries add a few bytes per block.
    assert cost.saved_by_blocks == pytest.approx(kept, rel=1e-3)
    assert cost.block_inputs == 64 * 4 * 4 * config.hidden_size
    # The weights are kept in bfloat16, once. The vocabulary projection keeps its gradient instead.
    assert cost.casts_by_blocks == pytest.approx(2 * cost.blocks_parameters, rel=0.01)
    if name != "llama3-8b":
        assert kept_by_block(config) == 28 * config.hidden_size + 4 * config.num_attention_heads + 16


def test_all_parameters_are_counted() -> None:
    cost = cost_of("gpt2-small")
    assert cost.parameters == 124_439_808
    assert cost.blocks_parameters == 12 * cost.block_parameters == 12 * 7_087_872


@pytest.mark.parametrize("kind", ["decoder", "encoder_decoder"])
def test_a_real_run_keeps_what_was_counted(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Use the loss for many logits: for few logits on a CPU, PyTorch's own loss keeps the probabilities.
    monkeypatch.setattr(import_module("fastformer.ops.cross_entropy"), "_FEW_ELEMENTS", 0)
    shape = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "vocab_size": 60}
    config = FastformerConfig(stack=kind, intermediate_size=48, type_vocab_size=0, norm_placement="pre", **shape)
    made = FastformerForCausalLM if kind == "decoder" else FastformerForSeq2SeqLM
    model, length, examples = made(config).train(), 20, 3
    counted = model_cost(meta_model(config, made.__name__, "32-true"), "32-true", length)
    ids = torch.randint(1, 60, (length * examples,))
    boundaries = torch.arange(0, length * examples + 1, length, dtype=torch.int32)
    batch = {"input_ids": ids, "cu_seqlens": boundaries, "max_seqlen": length, "labels": ids}
    if kind == "encoder_decoder":
        batch |= {"decoder_input_ids": ids, "decoder_cu_seqlens": boundaries, "decoder_max_seqlen": length}
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), ids, boundaries)}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**batch).loss
    kept = sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in own)
    assert kept == pytest.approx(examples * counted.saved + counted.casts, rel=0.01)
    loss.backward()
