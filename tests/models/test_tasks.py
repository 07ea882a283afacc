"""Tests of every head with Hugging Face's tools: Auto classes, pipelines, generation, Trainer, LoRA, sharded files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForTextEncoding,
    AutoModelForTokenClassification,
    DataCollatorForSeq2Seq,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    ViTImageProcessorPil,
    pipeline,
)

from fastformer.models import (
    FastformerConfig,
    FastformerEncoderDecoderModel,
    FastformerForCausalLM,
    FastformerForEmbedding,
    FastformerForImageClassification,
    FastformerForMaskedLM,
    FastformerForQuestionAnswering,
    FastformerForSeq2SeqLM,
    FastformerForSequenceClassification,
    FastformerForTokenClassification,
    FastformerModel,
)

WORDS = [
    "[PAD]",
    "[MASK]",
    "[UNK]",
    "[EOS]",
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "saw",
    "dogs",
    "run",
    "home",
]
SHAPE = {
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "initializer_range": 0.3,
    "eos_token_id": 3,
}
DECODER = {"stack": "decoder", "norm_placement": "pre", "embedding_norm": False, "type_vocab_size": 0}
LLAMA = {
    **DECODER,
    "norm": "rms",
    "gated": True,
    "hidden_act": "silu",
    "position_embedding": "rotary",
    "num_key_value_heads": 1,
    "attention_bias": False,
    "attention_output_bias": False,
    "feed_forward_bias": False,
}
ALTERNATING = {**DECODER, "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4}
T5 = {
    "stack": "encoder_decoder",
    "norm": "rms",
    "norm_placement": "pre",
    "embedding_norm": False,
    "type_vocab_size": 0,
    "position_embedding": "relative",
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 6,
    "attention_scale": 1.0,
    "decoder_start_token_id": 0,
}
BART = {"stack": "encoder_decoder", "type_vocab_size": 0, "decoder_start_token_id": 3, "lm_head_bias": True}
VIT = {"norm_placement": "pre", "pooler_act": "none", "image_size": 8, "patch_size": 4, "num_channels": 3}
# On a GPU transformers would compile a model for a static cache, which tests/gpu does.
NOT_COMPILED = {"disable_compile": True}
TEXTS = ["the cat sat on a mat", "dogs run", "a cat saw dogs and run home"]


def config(**options) -> FastformerConfig:
    return FastformerConfig(**{**SHAPE, **options})


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[PAD]",
        mask_token="[MASK]",
        unk_token="[UNK]",
        eos_token="[EOS]",
        model_max_length=40,
        padding_side="left",
    )


@pytest.mark.parametrize(
    ("auto", "own", "options"),
    [
        (AutoModelForCausalLM, FastformerForCausalLM, LLAMA),
        (AutoModelForCausalLM, FastformerForCausalLM, {**DECODER, "position_embedding": "alibi"}),
        (AutoModelForCausalLM, FastformerForCausalLM, {**DECODER, "position_embedding": "sinusoidal"}),
        (AutoModelForSeq2SeqLM, FastformerForSeq2SeqLM, T5),
        (AutoModelForSeq2SeqLM, FastformerForSeq2SeqLM, BART),
        (AutoModel, FastformerEncoderDecoderModel, BART),
        (AutoModel, FastformerModel, LLAMA),
        (AutoModelForTokenClassification, FastformerForTokenClassification, {}),
        (AutoModelForQuestionAnswering, FastformerForQuestionAnswering, {}),
        (AutoModelForTextEncoding, FastformerForEmbedding, {"pooling": "mean"}),
        (AutoModelForImageClassification, FastformerForImageClassification, VIT),
    ],
)
@pytest.mark.parametrize("shard", ["5GB", "5KB"])
def test_saved_and_loaded_by_auto_class(
    tmp_path: Path, auto: type, own: type, options: dict, shard: str, device: torch.device
) -> None:
    model = own(config(**options)).eval()
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").is_file() == (shard == "5KB")
    inputs: dict = {"input_ids": torch.randint(4, len(WORDS), (2, 5))}
    if options is VIT:
        inputs = {"pixel_values": torch.randn(2, 3, 8, 8)}
    elif options.get("stack") == "encoder_decoder":
        inputs["decoder_input_ids"] = torch.randint(4, len(WORDS), (2, 4))
    for device_map in (None, {"": device}):
        loaded = auto.from_pretrained(tmp_path, device_map=device_map)
        assert type(loaded) is own
        # The outputs depend on tables that are not saved, those of rotary and sinusoidal positions.
        torch.testing.assert_close(loaded(**inputs).to_tuple(), model(**inputs).to_tuple(), rtol=0, atol=0)


@pytest.mark.quick
@pytest.mark.parametrize("options", [LLAMA, ALTERNATING, {**DECODER, "position_embedding": "alibi"}])
@pytest.mark.parametrize(
    "strategy",
    [
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"num_beams": 3},
        {"do_sample": True, "top_k": 5},
        {"cache_implementation": "static", "num_beams": 2},
    ],
)
def test_generation_of_prompts_of_different_lengths(
    tokenizer: PreTrainedTokenizerFast, options: dict, strategy: dict
) -> None:
    model = FastformerForCausalLM(config(**options)).eval()
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "pad_token_id": 0, **NOT_COMPILED}
    settings |= {"output_scores": True, "return_dict_in_generate": True}
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True, return_token_type_ids=False)
    torch.manual_seed(0)
    expected = model.generate(**batch, **settings, **{**strategy, "cache_implementation": "dynamic", "use_cache": True})
    torch.manual_seed(0)
    actual = model.generate(**batch, **settings, **strategy)
    assert torch.equal(actual.sequences, expected.sequences)
    torch.testing.assert_close(actual.scores, expected.scores, rtol=1e-4, atol=1e-5)
    if "do_sample" in strategy:
        return
    for row, text in enumerate(TEXTS):  # padding has no effect
        alone = model.generate(
            **tokenizer(text, return_tensors="pt", return_token_type_ids=False), **settings, **strategy
        )
        assert alone.sequences[0, -12:].tolist() == actual.sequences[row, -12:].tolist()


@pytest.mark.parametrize("options", [T5, BART])
@pytest.mark.parametrize("strategy", [{}, {"cache_implementation": "static"}, {"use_cache": False}, {"num_beams": 3}])
def test_generation_from_sources_of_different_lengths(
    tokenizer: PreTrainedTokenizerFast, options: dict, strategy: dict
) -> None:
    torch.manual_seed(0)
    model = FastformerForSeq2SeqLM(config(**options)).eval()
    torch.nn.init.normal_(model.model.decoder.layers[0].feed_forward_norm.weight, 1.0, 0.5)
    settings = {"max_new_tokens": 10, "min_new_tokens": 10, "pad_token_id": 0, **NOT_COMPILED, **strategy}
    tokenizer.padding_side = "right"  # learned positions count columns, padding included
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True, return_token_type_ids=False)
    together = model.generate(**batch, **settings)
    assert len(set(map(tuple, together.tolist()))) > 1
    for text, row in zip(TEXTS, together, strict=True):
        alone = model.generate(**tokenizer(text, return_tensors="pt", return_token_type_ids=False), **settings)
        assert torch.equal(alone[0], row)


@pytest.mark.cpu
def test_text_generation_pipeline(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    FastformerForCausalLM(config(**LLAMA)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    generate = pipeline("text-generation", str(tmp_path))
    chosen = GenerationConfig(max_new_tokens=4, min_new_tokens=4, do_sample=False, eos_token_id=3, pad_token_id=0)
    answers = generate(TEXTS, batch_size=3, generation_config=chosen, return_full_text=False)
    for text, (answer,) in zip(TEXTS, answers, strict=True):
        assert answer == generate(text, generation_config=chosen, return_full_text=False)[0]


@pytest.mark.cpu
def test_token_classification_and_features_pipelines(tokenizer: PreTrainedTokenizerFast) -> None:
    tagger = FastformerForTokenClassification(config(id2label={0: "thing", 1: "deed"})).eval()
    found = pipeline("token-classification", tagger, tokenizer=tokenizer, batch_size=2)(TEXTS)
    assert [[entity["word"] for entity in entities] for entities in found] == [text.split() for text in TEXTS]
    features = pipeline("feature-extraction", tagger.model, tokenizer=tokenizer)(TEXTS[1])
    assert torch.tensor(features).shape == (1, 2, 16)


@pytest.mark.cpu
def test_zero_shot_classification_pipeline(tokenizer: PreTrainedTokenizerFast) -> None:
    labels = {0: "contradiction", 1: "entailment"}
    model = FastformerForSequenceClassification(config(id2label=labels, label2id={v: k for k, v in labels.items()}))
    answer = pipeline("zero-shot-classification", model, tokenizer=tokenizer)(TEXTS[0], ["cat", "dogs"])
    assert sorted(answer["labels"]) == ["cat", "dogs"]


@pytest.mark.cpu
def test_image_classification_pipeline(tmp_path: Path) -> None:
    FastformerForImageClassification(config(**VIT, id2label={0: "cat", 1: "dog"})).save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path)
    answers = pipeline("image-classification", str(tmp_path))(Image.new("RGB", (20, 20), "red"))
    assert {answer["label"] for answer in answers} == {"cat", "dog"}


def test_answers_lie_among_the_tokens_and_packed_equals_dense() -> None:
    model = FastformerForQuestionAnswering(config()).eval()
    lengths = torch.tensor([5, 2, 7])
    real = torch.arange(7) < lengths[:, None]
    dense = torch.randint(4, len(WORDS), (3, 7))
    positions = {"start_positions": torch.tensor([1, 0, 9]), "end_positions": torch.tensor([3, 1, 6])}
    output = model(dense, real, **positions)
    least = torch.finfo(torch.float32).min
    assert torch.equal(output.start_logits[~real], torch.full_like(output.start_logits[~real], least))
    losses = []
    for logits, at in ((output.start_logits, positions["start_positions"]), (output.end_logits, [3, 1, 6])):
        # An answer in another part of a long context does not count.
        known = [row[mask].log_softmax(0)[i] for row, mask, i in zip(logits, real, at, strict=True) if i < 7]
        losses.append(-torch.stack(known).mean())
    torch.testing.assert_close(output.loss, torch.stack(losses).mean())
    packing = {"cu_seqlens": torch.tensor([0, 5, 7, 14], dtype=torch.int32), "max_seqlen": 7}
    packed = model(dense[real], **packing, **positions)
    torch.testing.assert_close(packed.start_logits, output.start_logits[real])
    torch.testing.assert_close(packed.loss, output.loss)


@pytest.mark.parametrize("pooling", ["first", "last", "mean"])
def test_embeddings_do_not_depend_on_padding(pooling: str) -> None:
    model = FastformerForEmbedding(config(pooling=pooling)).eval()
    ids, mask = torch.randint(4, len(WORDS), (2, 6)), torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    together = model(ids, mask)
    torch.testing.assert_close(together.embeddings.norm(dim=1), torch.ones(2))
    alone = model(ids[1:, :4])
    torch.testing.assert_close(alone.embeddings[0], together.embeddings[1])
    states = alone.last_hidden_state[0]
    expected = {"first": states[0], "last": states[-1], "mean": states.mean(0)}[pooling]
    torch.testing.assert_close(alone.embeddings[0], torch.nn.functional.normalize(expected, dim=0))


@pytest.mark.cpu
def test_trainer_trains_a_sequence_to_sequence_model(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    examples = [{**tokenizer(text, text_target=text), "token_type_ids": None} for text in TEXTS]
    examples = [{name: value for name, value in each.items() if value is not None} for each in examples]
    model = FastformerForSeq2SeqLM(config(**T5))
    arguments = TrainingArguments(
        tmp_path,
        max_steps=30,
        learning_rate=1e-2,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        logging_steps=10,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, DataCollatorForSeq2Seq(tokenizer, model), train_dataset=examples * 4)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_lora_trains_and_merges(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="LoRA needs peft")
    model = FastformerForCausalLM(config(**LLAMA))
    base = {name: weight.clone() for name, weight in model.state_dict().items()}
    targets = ["qkv", "output", "up", "gate", "down"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    ids = torch.randint(4, len(WORDS), (2, 8))
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        adapted(ids, labels=ids).loss.backward()
        optimizer.step()
    adapted.eval()
    trained = adapted(ids).logits
    assert not torch.allclose(trained, FastformerForCausalLM(model.config).eval()(ids).logits)
    adapted.save_pretrained(tmp_path)
    merged = adapted.merge_and_unload()
    assert type(merged.model.layers[0].attention.qkv) is torch.nn.Linear
    torch.testing.assert_close(merged(ids).logits, trained)
    assert any(not torch.equal(weight, base[name]) for name, weight in merged.state_dict().items())


def test_a_model_is_for_its_stack() -> None:
    with pytest.raises(ValueError, match=r"FastformerForMaskedLM needs .* stack='encoder'; got 'decoder'"):
        FastformerForMaskedLM(config(**DECODER))
    with pytest.raises(ValueError, match=r"FastformerModel is one stack; .* FastformerEncoderDecoderModel"):
        FastformerModel(config(**T5))
    with pytest.raises(ValueError, match=r"a cache .* is for decoders; this model is an encoder"):
        FastformerModel(config())(torch.ones(1, 2, dtype=torch.int64), use_cache=True)
    with pytest.raises(ValueError, match=r"a cache .* is for inference; this model is in training mode"):
        FastformerForCausalLM(config(**DECODER)).train()(torch.ones(1, 2, dtype=torch.int64), use_cache=True)
    with pytest.raises(ValueError, match="image_size, patch_size and num_channels must be set"):
        FastformerForImageClassification(config())
