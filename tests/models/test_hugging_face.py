"""Tests of the models with Hugging Face's tools: configurations, presets, saving, loading, pipelines and Trainer."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    DataCollatorForLanguageModeling,
    EvalPrediction,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

from fastformer.models import (
    FastformerConfig,
    FastformerForMaskedLM,
    FastformerForPreTraining,
    FastformerForSequenceClassification,
    FastformerModel,
    to_hugging_face,
)

pytestmark = pytest.mark.cpu

WORDS = ["[PAD]", "[MASK]", "[UNK]", "the", "cat", "sat", "on", "a", "mat", "and", "saw", "dogs", "run", "home"]
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def config(**options) -> FastformerConfig:
    return FastformerConfig(**{"vocab_size": len(WORDS), "max_position_embeddings": 20, **SMALL, **options})


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", mask_token="[MASK]", unk_token="[UNK]", model_max_length=20
    )


@pytest.mark.parametrize(
    ("auto", "own"),
    [
        (AutoModel, FastformerModel),
        (AutoModelForPreTraining, FastformerForPreTraining),
        (AutoModelForMaskedLM, FastformerForMaskedLM),
        (AutoModelForSequenceClassification, FastformerForSequenceClassification),
    ],
)
def test_saved_and_loaded_by_auto_class(tmp_path: Path, auto: type, own: type) -> None:
    model = own(config(num_labels=3, hidden_act="gelu_new")).eval()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == model.config.to_diff_dict()
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is own
    torch.testing.assert_close(dict(loaded.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    ids = torch.randint(3, len(WORDS), (2, 5))
    torch.testing.assert_close(loaded(ids).to_tuple(), model(ids).to_tuple())


def test_tied_decoder_is_one_tensor_saved_once(tmp_path: Path) -> None:
    model = FastformerForPreTraining(config())
    model.save_pretrained(tmp_path)
    assert "mlm_head.decoder.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = FastformerForPreTraining.from_pretrained(tmp_path)
    assert loaded.mlm_head.decoder.weight is loaded.model.embeddings.word.weight
    untied = FastformerForPreTraining(config(tie_word_embeddings=False))
    assert untied.mlm_head.decoder.weight is not untied.model.embeddings.word.weight


def test_embeddings_resize_with_the_decoder() -> None:
    model = FastformerForMaskedLM(config())
    model.resize_token_embeddings(21)
    assert model.config.vocab_size == 21
    assert model(torch.tensor([[20, 3]])).logits.shape == (1, 2, 21)
    assert model.mlm_head.decoder.weight is model.model.embeddings.word.weight


def test_heads_load_from_a_pretraining_checkpoint(tmp_path: Path) -> None:
    pretrained = FastformerForPreTraining(config()).eval()
    pretrained.save_pretrained(tmp_path)
    ids = torch.randint(3, len(WORDS), (2, 5))
    masked_lm, info = FastformerForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    torch.testing.assert_close(masked_lm(ids).logits, pretrained(ids).prediction_logits)
    base = FastformerModel.from_pretrained(tmp_path)
    classifier = FastformerForSequenceClassification.from_pretrained(tmp_path)
    for model in (base, classifier.model):
        torch.testing.assert_close(model(ids).pooler_output, pretrained.model(ids).pooler_output)


@pytest.mark.parametrize("cut", [5, 500, -1])
def test_a_truncated_checkpoint_is_refused_by_name(tmp_path: Path, cut: int) -> None:
    FastformerForMaskedLM(config()).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    for loader in (FastformerForMaskedLM, AutoModelForMaskedLM):
        with pytest.raises(OSError, match=r"the weights in .*model.safetensors are damaged or cut short"):
            loader.from_pretrained(tmp_path)


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    FastformerForMaskedLM(config()).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.embeddings.norm.weight"] = torch.ones(15)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match=r"mismatched|size mismatch"):
        FastformerForMaskedLM.from_pretrained(tmp_path)


def test_fill_mask_pipeline(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    FastformerForPreTraining(config()).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    fill_mask = pipeline("fill-mask", str(tmp_path))
    answers = fill_mask(["the cat sat on a [MASK]", "[MASK] dogs run"], top_k=3, batch_size=2)
    assert [[answer["token_str"] in WORDS for answer in each] for each in answers] == [[True] * 3] * 2


def test_text_classification_pipeline(tokenizer: PreTrainedTokenizerFast) -> None:
    model = FastformerForSequenceClassification(config(id2label={0: "bad", 1: "good"}))
    assert pipeline("text-classification", model, tokenizer=tokenizer)("the cat sat")[0]["label"] in ("bad", "good")


def test_trainer_trains_and_evaluates_as_it_does_bert(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    examples = [tokenizer(text) for text in ("the cat sat on a mat", "dogs run home", "a cat saw dogs and run home")]
    own = FastformerForMaskedLM(config(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    arguments = TrainingArguments(tmp_path, num_train_epochs=3, learning_rate=0.1, report_to=[], use_cpu=True)
    losses = []
    for model in (to_hugging_face(own, "bert"), own):
        collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.5, seed=0)
        trainer = Trainer(model, arguments, collate, train_dataset=examples, eval_dataset=examples)
        losses.append((trainer.train().training_loss, trainer.evaluate()["eval_loss"]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[0][1] < losses[0][0] - 0.1


def test_trainer_trains_evaluates_and_resumes(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    pytest.importorskip("accelerate", reason="Hugging Face's Trainer needs accelerate")
    texts = ["the cat sat on a mat", "dogs run home", "a cat saw dogs and run home"] * 4
    examples = [tokenizer(text) for text in texts]
    arguments = TrainingArguments(
        tmp_path,
        max_steps=2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        save_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(
        FastformerForMaskedLM(config()),
        arguments,
        DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.5, seed=0),
        train_dataset=examples,
        eval_dataset=examples,
    )
    # With small random weights the loss is near chance. A loss that is added up over batches, or divided twice, is not.
    assert trainer.train().training_loss == pytest.approx(math.log(len(WORDS)), abs=0.2)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(math.log(len(WORDS)), abs=0.2)
    assert trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1")).global_step == 2
    FastformerForMaskedLM.from_pretrained(tmp_path / "checkpoint-2")


@pytest.mark.parametrize("own", [FastformerForMaskedLM, FastformerForPreTraining])
def test_trainer_computes_metrics_from_logits(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, own: type) -> None:
    pytest.importorskip("accelerate", reason="Hugging Face's Trainer needs accelerate")
    mask = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.5, seed=0)

    def collate(examples: list) -> dict:
        batch = {**mask(examples), "return_logits": True}
        return {**batch, "next_sentence_label": torch.tensor([0] * 3)} if own is FastformerForPreTraining else batch

    shapes = []

    def compute_metrics(evaluated: EvalPrediction) -> dict[str, float]:
        first = evaluated.predictions[0] if isinstance(evaluated.predictions, tuple) else evaluated.predictions
        shapes.append(first.shape)
        return {"tokens": float((evaluated.predictions[0] != 0).sum())}

    trainer = Trainer(
        own(config()),
        TrainingArguments(
            tmp_path, per_device_eval_batch_size=3, report_to=[], use_cpu=True, remove_unused_columns=False
        ),
        collate,
        eval_dataset=[tokenizer("the cat sat on a mat")] * 6,
        compute_metrics=compute_metrics,
    )
    assert trainer.evaluate()["eval_tokens"] > 0
    assert shapes == [(6, 6, len(WORDS))]


def test_initial_weights_are_berts() -> None:
    model = FastformerForPreTraining(config(vocab_size=1000, hidden_size=64, intermediate_size=256))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert torch.equal(parameter, torch.zeros_like(parameter)), name
        elif "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            # The tolerance is six standard errors. That of a standard deviation from n samples is sigma / sqrt(2 n).
            error = abs(parameter.std().item() - 0.02)
            assert error < 6 * 0.02 / (2 * parameter.numel()) ** 0.5 + 0.02 / 1000, name
    assert torch.equal(model.model.embeddings.word.weight[0], torch.zeros(64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"num_attention_heads": 5},
            "num_attention_heads must divide hidden_size; got 5 heads for a hidden_size of 16",
        ),
        ({"hidden_act": "tanh"}, "hidden_act must be one of relu, .*; got 'tanh'"),
        ({"vocab_size": 0}, "vocab_size must be 1 or more; got 0"),
        ({"hidden_dropout_prob": 1.0}, r"hidden_dropout_prob must be in \[0, 1\); got 1.0"),
        ({"pad_token_id": 14}, r"pad_token_id must be in \[0, vocab_size = 14\); got 14"),
        ({"hidden_size": "sixteen"}, "hidden_size"),
        ({"hiden_size": 16}, "FastformerConfig has no field 'hiden_size'"),
        ({"chunk_size_feed_forward": 4}, "chunk_size_feed_forward"),
        ({"per_layer_config": {0: {"hidden_act": "relu"}}}, "per_layer_config"),
    ],
)
def test_configurations_that_cannot_be_honoured_are_refused(options: dict, message: str) -> None:
    with pytest.raises(Exception, match=message):
        config(**options)


def test_an_unknown_field_in_a_file_is_refused(tmp_path: Path) -> None:
    config().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "position": "rotary"}))
    with pytest.raises(ValueError, match="FastformerConfig has no field 'position'"):
        AutoConfig.from_pretrained(tmp_path)


def test_another_attention_implementation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="scaled_dot_product_attention"):
        FastformerModel._from_config(config(), attn_implementation="sdpa")
