"""Inside transformers models, ``attn_implementation="fastformer"`` gives what their eager attention gives."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from hugging_face_models import (
    MODELS,
    REFUSING,
    TOKENS,
    VOCABULARY,
    Small,
    assert_equal,
    assert_same_training,
    results,
)
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel, masking_utils
from transformers.loss import loss_utils

import fastformer
import fastformer.integrations.attention.forward as attention_module

# transformers 5.17 makes the masks of static caches with an argument that masks of chunks do not accept.
CHUNKS_IN_STATIC_CACHES = "block_sequence_ids" in inspect.signature(masking_utils.create_chunked_causal_mask).parameters
# The option for the number of tokens in a page of the paged cache, under its new or its old name.
PAGE_SIZE = next(name for name in ("page_size", "block_size") if hasattr(ContinuousBatchingConfig, name))
PADDED = [name for name, small in MODELS.items() if small.kind not in ("image", "speech")]


@pytest.fixture(autouse=True)
def operator(device: torch.device) -> Iterator[None]:
    """Ask for a backend in every test. Otherwise a model's own SDPA would serve these small calls on a CPU."""
    with fastformer.backend("torch" if device.type == "cpu" else "triton"):
        yield


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Return the list that records the arguments of every call of `fastformer.attention` by a model."""
    recorded: list[dict[str, Any]] = []

    def record(*tensors: torch.Tensor, **arguments: Any) -> Any:
        recorded.append(arguments)
        return original(*tensors, **arguments)

    original = attention_module.attention
    monkeypatch.setattr(attention_module, "attention", record)
    return recorded


@pytest.mark.parametrize("name", MODELS)
def test_forward_loss_and_every_gradient(name: str, calls: list) -> None:
    assert_same_training(MODELS[name].build(), MODELS[name].batch())
    assert len(calls) >= 2


@pytest.mark.parametrize("padding", ["left", "right", "holes"])
@pytest.mark.parametrize("name", PADDED)
def test_padded(name: str, padding: str) -> None:
    assert_same_training(MODELS[name].build(), MODELS[name].batch(padding))


@pytest.mark.parametrize("name", [name for name, small in MODELS.items() if small.packs])
def test_packed_documents(name: str, calls: list) -> None:
    """Documents whose position_ids start at zero again are kept apart, in the eager implementation and in ours."""
    batch = MODELS[name].batch()
    del batch["attention_mask"]
    batch["use_cache"] = False  # transformers looks for documents only without a cache
    batch["position_ids"] = torch.tensor([[*range(4), *range(5)], [*range(9)], [0, *range(6), 0, 1]])
    assert_same_training(MODELS[name].build(), batch)
    packed = [call for call in calls if call.get("cu_seqlens_q") is not None]
    assert packed
    assert packed[0]["cu_seqlens_q"].tolist() == [0, 4, 9, 18, 19, 25, 27]


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", [name for name, small in MODELS.items() if small.generates])
def test_generate(name: str, cache: str | None) -> None:
    """Greedy generation from left-padded prompts gives the same tokens, also past the end of sliding windows."""
    if cache == "static" and name == "Llama 4" and not CHUNKS_IN_STATIC_CACHES:
        pytest.skip(f"transformers {transformers.__version__} itself fails at chunks of keys in a static cache")
    small = MODELS[name]
    model = small.build()
    inputs = {key: value for key, value in small.batch("left").items() if "label" not in key and "decoder" not in key}
    # On a GPU transformers would compile the model for a static cache, which tests/gpu does.
    options = {"max_new_tokens": 7, "min_new_tokens": 7, "do_sample": False, "disable_compile": True}
    options["cache_implementation"] = cache
    generated = {}
    for implementation in ("eager", "fastformer"):
        model.set_attn_implementation(implementation)
        generated[implementation] = model.generate(
            **inputs, **options, return_dict_in_generate=True, output_logits=True
        )
    expected, actual = generated["eager"], generated["fastformer"]
    assert actual.sequences.tolist() == expected.sequences.tolist()
    assert_equal("logits", torch.stack(actual.logits), torch.stack(expected.logits))


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma 2"])
def test_prompt_in_pieces(name: str) -> None:
    """A prompt in pieces, several queries behind a cache that already has keys, generates the same tokens."""
    model = MODELS[name].build()
    inputs = {key: value for key, value in MODELS[name].batch("left").items() if key != "labels"}
    options = {"max_new_tokens": 3, "do_sample": False}
    expected = model.generate(**inputs, **options)
    model.set_attn_implementation("fastformer")
    assert model.generate(**inputs, **options, prefill_chunk_size=4).tolist() == expected.tolist()


def test_beam_search_with_cross_attention() -> None:
    model = MODELS["BART"].build()
    inputs = {
        key: value for key, value in MODELS["BART"].batch("right").items() if key in ("input_ids", "attention_mask")
    }
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False}
    expected = model.generate(**inputs, **options)
    model.set_attn_implementation("fastformer")
    assert model.generate(**inputs, **options).tolist() == expected.tolist()


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma 2", "gpt-oss"])
def test_continuous_batching(name: str) -> None:
    """In `generate_batch`, requests of different lengths share a paged cache and every step."""
    model = MODELS[name].build()
    prompts = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [20, 21, 22]]
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    expected = [model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist() for prompt in prompts]
    model.set_attn_implementation("fastformer")
    outputs = model.generate_batch(
        prompts,
        generation_config=GenerationConfig(eos_token_id=-1, pad_token_id=0, **options),
        continuous_batching_config=ContinuousBatchingConfig(
            num_blocks=64, max_batch_tokens=32, use_cuda_graph=False, **{PAGE_SIZE: 32}
        ),
        progress_bar=False,
    )
    assert [output.generated_tokens for output in outputs.values()] == expected
    assert model.config._attn_implementation == "fastformer"


@pytest.mark.parametrize("name", ["BERT", "ELECTRA", "ModernBERT", "Llama", "Mistral", "Gemma 2", "gpt-oss"])
def test_boundaries_of_a_packed_batch(name: str) -> None:
    """cu_seq_lens from `DataCollatorWithFlattening` keep documents apart, also where position_ids alone would not."""
    model = MODELS[name].build()
    documents = [torch.randint(3, VOCABULARY - 1, (1, length)) for length in (7, 2, 5)]
    expected = torch.cat([model(document).logits for document in documents], 1)
    model.set_attn_implementation("fastformer")
    boundaries = torch.tensor([0, 7, 9, 14])
    packed = {
        "input_ids": torch.cat(documents, 1),
        "position_ids": torch.cat([torch.arange(document.shape[1]) for document in documents])[None],
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": 7,
        "max_length_k": 7,
    }
    options = {"use_cache": False} if MODELS[name].kind == "decoder" else {}
    assert_equal("logits", model(**packed, **options).logits, expected)


@pytest.mark.parametrize("padding", ["left", "right", "holes"])
def test_boundaries_and_padding_hold_together(padding: str) -> None:
    model, batch = MODELS["BERT"].build(), MODELS["BERT"].batch(padding)
    sequence = torch.tensor([0] * 4 + [1] * 10 + [2] * 13).view(3, TOKENS)
    allowed = (sequence[:, :, None] == sequence[:, None]) & batch["attention_mask"][:, None].bool()
    # Each padding token sees itself. If it saw nothing, it would see everything in eager attention.
    allowed |= torch.eye(TOKENS, dtype=torch.bool)
    additive = torch.zeros(3, 1, TOKENS, TOKENS).masked_fill(~allowed[:, None], torch.finfo(torch.float32).min)
    expected = model(**{**batch, "attention_mask": additive})
    model.set_attn_implementation("fastformer")
    boundaries = torch.tensor([0, 4, 14, 27], dtype=torch.int32)
    actual = model(**batch, cu_seq_lens_q=boundaries, cu_seq_lens_k=boundaries, max_length_q=13, max_length_k=13)
    seen = batch["attention_mask"].bool()
    assert_equal("logits", actual.logits[seen], expected.logits[seen])


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("name", ["BERT", "Llama", "Gemma 2"])
def test_mask_of_the_users_own(name: str, dtype: torch.dtype) -> None:
    """A mask of shape (batch, 1, queries, keys) may be additive or boolean, which eager attention does not accept."""
    allowed = torch.rand(3, 1, TOKENS, TOKENS) > 0.3
    allowed |= torch.eye(TOKENS, dtype=torch.bool)
    additive = torch.zeros(3, 1, TOKENS, TOKENS).masked_fill(~allowed, torch.finfo(torch.float32).min)
    model, batch = MODELS[name].build(), MODELS[name].batch()
    expected = results(model, {**batch, "attention_mask": additive}, "eager")
    actual = results(model, {**batch, "attention_mask": allowed if dtype == torch.bool else additive}, "fastformer")
    for key, value in expected.items():
        assert_equal(key, actual[key], value)


@pytest.mark.parametrize("name", ["BERT", "Llama", "Gemma 2", "gpt-oss", "T5", "BART", "ViT"])
def test_output_attentions(name: str) -> None:
    model, batch = MODELS[name].build(), MODELS[name].batch()
    expected = model(**batch, output_attentions=True)
    model.set_attn_implementation("fastformer")
    actual = model(**batch, output_attentions=True)
    for key in ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions"):
        for mine, eager in zip(actual.get(key) or (), expected.get(key) or (), strict=True):
            assert_equal(key, mine, eager)
    assert any("attentions" in key for key in actual)
    weights = next(value for key, value in actual.items() if "attentions" in key)[0]
    with pytest.raises(RuntimeError, match="not differentiable"):
        weights.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["Mistral", "T5"])
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    model, batch = MODELS[name].build(), MODELS[name].batch("right")
    expected = results(model, batch, "eager")
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    actual = results(_without_dropout(model.train()), batch, "fastformer")
    for key, value in expected.items():
        assert_equal(key, actual[key], value)


def _without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model with no dropout: it can train, as checkpointing needs, and gives the results of evaluation."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
    return model


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["BERT", "Llama", "Gemma 2", "T5", "ViT"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """The error is at most twice that of eager attention in the same precision, plus one rounding."""
    model, batch = MODELS[name].build(), MODELS[name].batch("right")
    exact = results(model, batch, "eager")["logits"]
    batch = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}
    eager = results(model.to(dtype), batch, "eager")["logits"]
    actual = results(model, batch, "fastformer")["logits"]
    assert actual.dtype == dtype
    rounding = torch.finfo(dtype).eps * exact.abs().max()
    assert (actual - exact).abs().max() <= 2 * (eager - exact).abs().max() + rounding


def test_dropout_only_in_training(calls: list) -> None:
    small = Small("BertForMaskedLM", "encoder", {**MODELS["BERT"].options, "attention_probs_dropout_prob": 0.25})
    model, batch = small.build(), small.batch()
    model.set_attn_implementation("fastformer")
    model(**batch)
    model.train()(**batch)
    assert [call["dropout_p"] for call in calls] == [0.0, 0.0, 0.25, 0.25]


@pytest.mark.parametrize("name", ["BERT", "Llama", "Gemma 2", "T5"])
def test_compiles_as_one_graph(name: str) -> None:
    model, batch = MODELS[name].build(), MODELS[name].batch("right")
    if name == "T5" and torch.__version__ < "2.13":
        batch["use_cache"] = False  # for the cache, transformers copies the configuration, and that breaks the graph
    expected = model(**batch).loss
    model.set_attn_implementation("fastformer")
    torch._dynamo.reset()
    assert_equal("loss", torch.compile(model, fullgraph=True, backend="aot_eager")(**batch).loss, expected)


def test_compiled_layer_by_layer() -> None:
    """The mask is made outside of the graphs, and no graph uses the lengths of another batch."""
    model = MODELS["Mistral"].build()
    batches = [MODELS["Mistral"].batch(padding) for padding in ("right", "left", "none", "right")]
    batches[-1]["attention_mask"] = batches[-1]["attention_mask"].flip(0)
    batches[-1]["labels"] = batches[-1]["labels"].masked_fill(batches[-1]["attention_mask"] == 0, -100)
    expected = [model(**batch).loss for batch in batches]
    model.set_attn_implementation("fastformer")
    torch._dynamo.reset()
    for block in model.model.layers:
        block.compile(fullgraph=True, backend="aot_eager")
    for batch, loss in zip(batches, expected, strict=True):
        assert_equal("loss", model(**batch).loss, loss)


@pytest.mark.parametrize("name", REFUSING)
def test_class_with_attention_of_its_own(name: str, calls: list) -> None:
    """A class with its own attention cannot be switched: transformers says it, and the model's results stay right."""
    small, _ = REFUSING[name]
    model, batch = small.build(), small.batch("right")
    expected = model(**batch).logits
    model.set_attn_implementation("fastformer")
    assert model.config._attn_implementation == "eager"
    # `from_pretrained` passes the name on without asking the class.
    model.config._attn_implementation = "fastformer"
    assert_equal("logits", model(**batch).logits, expected)
    assert not calls


def layer(**attributes: Any) -> torch.nn.Module:
    module = torch.nn.Module().eval()
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def tensors(queries: int = 5, keys: int = 5) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return torch.randn(2, 4, queries, 8), torch.randn(2, 2, keys, 8), torch.randn(2, 2, keys, 6)


def test_unknown_argument() -> None:
    with pytest.raises(
        TypeError, match=r'Module passes block_table to its attention, which .*"fastformer" does not know'
    ):
        attention_module.attention_forward(layer(), *tensors(), None, block_table=torch.zeros(1), use_cache=False)
    attention_module.attention_forward(layer(), *tensors(), None, block_table=None)


LOSSES = ["ForCausalLM", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"]


def test_what_losses_take_is_not_for_attention() -> None:
    """Keywords that losses take do not reach attention.

    A model passes all keywords of its forward to its loss and to its attention.
    """
    functions = [loss_utils.fixed_cross_entropy, *(loss_utils.LOSS_MAPPING[name] for name in LOSSES)]
    parameters = [each for function in functions for each in inspect.signature(function).parameters.values()]
    names = {each.name for each in parameters if each.default is not inspect.Parameter.empty}
    assert {"ignore_index", "shift_labels", "num_items_in_batch"} <= names
    assert names <= attention_module.NOT_FOR_ATTENTION


@pytest.mark.parametrize("name", ["BERT", "ModernBERT", "GPT-2", "Llama", "Gemma 3", "gpt-oss"])
def test_keywords_of_a_loss(name: str) -> None:
    model, batch = MODELS[name].build(), MODELS[name].batch()
    batch["labels"][:, 3] = 5
    keywords: list[dict[str, Any]] = [{"ignore_index": 5}, {"num_items_in_batch": torch.tensor(7)}]
    if MODELS[name].kind == "decoder":
        shifted = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        keywords.append({"shift_labels": shifted.masked_fill(shifted == 5, -100)})
    plain = model(**batch).loss
    for given in keywords:
        expected = results(model, {**batch, **given}, "eager")
        assert MODELS[name].kind == "encoder" or not torch.equal(expected["loss"], plain)
        actual = results(model, {**batch, **given}, "fastformer")
        for key, value in expected.items():
            assert_equal(key, actual[key], value)


def test_mask_of_padding_is_not_taken_for_scores() -> None:
    with pytest.raises(ValueError, match=r"attention_mask must be \(batch, heads, queries, keys\); got shape \(5, 5\)"):
        attention_module.attention_forward(layer(), *tensors(), torch.ones(5, 5, dtype=torch.bool))


def test_lengths_of_continuous_batching_without_its_cache() -> None:
    with pytest.raises(
        ValueError, match="max_seqlen_q and max_seqlen_k belong to continuous batching, which has a cache"
    ):
        attention_module.attention_forward(layer(), *tensors(), None, max_seqlen_q=5, max_seqlen_k=5)


def test_deterministic() -> None:
    with pytest.raises(ValueError, match="use_deterministic_algorithms"):
        attention_module.attention_forward(layer(), *tensors(), None, deterministic=True)


def test_dropout_of_a_module_that_does_not_train() -> None:
    """A module that does not train drops nothing, whatever dropout probability it passes, as in eager attention."""
    output, _ = attention_module.attention_forward(layer(), *tensors(), None, dropout=0.9)
    expected, _ = attention_module.attention_forward(layer(), *tensors(), None)
    torch.testing.assert_close(output, expected, rtol=0, atol=0)


@pytest.mark.parametrize("causal", [True, False])
def test_without_a_mask(causal: bool) -> None:
    """Without a mask, the module's is_causal counts, unless the call gives another, and so does the window."""
    q, k, v = tensors(5, 7)
    for module, argument in ((layer(is_causal=causal), None), (layer(is_causal=not causal), causal)):
        output, weights = attention_module.attention_forward(
            module, q, k, v, None, is_causal=argument, sliding_window=2
        )
        distance = torch.arange(7) - torch.arange(2, 7)[:, None]
        allowed = (distance > -2) & (distance < (1 if causal else 2))
        k4, v4 = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        expected = torch.nn.functional.scaled_dot_product_attention(q, k4, v4, allowed)
        torch.testing.assert_close(output, expected.transpose(1, 2))
        assert weights is None and output.is_contiguous()


def test_sinks_of_each_query() -> None:
    q, k, v = tensors()
    sinks = torch.randn(2, 4, 5, 3, requires_grad=True)
    output, _ = attention_module.attention_forward(layer(), q, k, v, None, sinks=sinks)
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    weights = torch.cat([q @ k.mT / 8**0.5, sinks], -1).softmax(-1)[..., :5]
    torch.testing.assert_close(output, (weights @ v).transpose(1, 2))
    (gradient,) = torch.autograd.grad(output.square().sum(), sinks)
    (expected,) = torch.autograd.grad((weights @ v).square().sum(), sinks)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("mask", [None, torch.bool, torch.float32])
def test_indices_of_the_only_keys(mask: torch.dtype | None) -> None:
    q, k, v = tensors()
    indices = torch.randint(0, 5, (2, 5, 3), dtype=torch.int32)
    allowed = torch.zeros(2, 5, 5, dtype=torch.bool).scatter(-1, indices.long(), True)[:, None]
    other = torch.rand(2, 1, 5, 5) > 0.2
    given = other if mask == torch.bool else torch.where(other, 0.0, float("-inf"))
    output, _ = attention_module.attention_forward(layer(), q, k, v, None if mask is None else given, indices=indices)
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    allowed = allowed if mask is None else allowed & other
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, allowed).nan_to_num()
    torch.testing.assert_close(output, expected.transpose(1, 2))


def test_blocks_of_the_only_keys() -> None:
    """Each group of heads sees the keys of its own blocks; the block -1 is no block."""
    q, k, v = tensors(3, 7)
    indexer = torch.nn.Module()
    indexer.block_size = 2
    blocks = torch.tensor([[[[0, 3], [1, -1], [0, 1]]], [[[2, 0], [3, 1], [2, -1]]]]).repeat(1, 2, 1, 1)
    blocks[:, 1] = 2
    allowed = (blocks[..., None] == torch.arange(7) // 2).any(-2).repeat_interleave(2, 1)
    output, _ = attention_module.attention_forward(layer(indexer=indexer), q, k, v, None, block_indices=blocks)
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, allowed)
    torch.testing.assert_close(output, expected.transpose(1, 2))


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_weights_of_a_packed_batch(documents: bool, compiled: bool) -> None:
    """The weights of a packed batch are right if the mask knows the documents by position_ids.

    They are right too if only cu_seq_lens_q tells them.
    """
    model = MODELS["Llama"].build()
    inputs = {"input_ids": torch.randint(3, VOCABULARY, (1, 9)), "use_cache": False, "output_attentions": not compiled}
    positions = {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])}
    expected = model(**inputs, **positions)
    model.set_attn_implementation("fastformer")
    boundaries = {"cu_seq_lens_q": torch.tensor([0, 4, 9], dtype=torch.int32), "max_length_q": 5}
    torch._dynamo.reset()
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    actual = run(**inputs, **boundaries, **(positions if documents else {}))
    assert_equal("logits", actual.logits, expected.logits)
    if not compiled:
        assert_equal("weights", actual.attentions[1], expected.attentions[1])


def test_boundaries_with_a_cache_are_not_laid_out_by_row() -> None:
    boundaries = {"cu_seq_lens_q": torch.tensor([0, 2, 10]), "cu_seq_lens_k": torch.tensor([0, 5, 14])}
    with pytest.raises(ValueError, match=r"of sequences with a cache cannot be combined with .* position_bias"):
        attention_module.attention_forward(
            layer(), *tensors(5, 7), None, **boundaries, max_length_q=8, position_bias=torch.zeros(1, 4, 5, 7)
        )


def test_queries_that_stand_for_every_sequence() -> None:
    q, k, v = tensors()
    output, _ = attention_module.attention_forward(layer(), q[:1], k, v, None)
    expected, _ = attention_module.attention_forward(layer(), q[:1].repeat(2, 1, 1, 1), k, v, None)
    torch.testing.assert_close(output, expected)
