"""The model from which fine-tuning starts keeps what was pretrained, has the task's head, and says what is new."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from fastformer.models import (
    FastformerConfig,
    FastformerForCausalLM,
    FastformerForEmbedding,
    FastformerForPreTraining,
    FastformerForSeq2SeqLM,
)
from fastformer.training.starting_point import CLASSES, from_scratch, pretrained

SHAPE = {"vocab_size": 12, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 2}


@pytest.fixture
def ours(tmp_path: Path) -> FastformerForPreTraining:
    model = FastformerForPreTraining(FastformerConfig(**SHAPE))
    model.save_pretrained(tmp_path)
    return model


@pytest.mark.parametrize(
    ("task", "new"), [("classify", ["classifier.projection"]), ("tag", ["classifier.projection"]), ("qa", ["span"])]
)
def test_our_pretrained_weights_are_kept_and_the_head_is_new(
    task: str, new: list[str], ours: FastformerForPreTraining, tmp_path: Path
) -> None:
    labels = None if task == "qa" else ["no", "yes", "maybe"]
    start = pretrained(tmp_path, task, labels)
    assert type(start.model) is CLASSES[task].ours
    assert start.packed
    assert start.new_layers == new
    weights = start.model.state_dict()
    types = "model.embeddings.token_type.weight"
    if task == "qa":  # the type of matching words begins as the context's type
        assert torch.equal(weights[types][2], weights[types][1])
        weights[types] = weights[types][:2]
    assert all(
        torch.equal(weights[f"model.{name}"], weight)
        for name, weight in ours.model.state_dict().items()
        if f"model.{name}" in weights
    )
    if labels:
        assert start.model.config.id2label == dict(enumerate(labels))
        assert start.model.classifier.projection.out_features == 3


def test_what_starts_from_a_model_of_ours_can_be_kept(ours: FastformerForPreTraining, tmp_path: Path) -> None:
    for task in ("qa", "classify"):
        start = pretrained(tmp_path, task, None if task == "qa" else ["no", "yes"])
        start.model.save_pretrained(tmp_path / task)
        again = CLASSES[task].ours.from_pretrained(tmp_path / task)
        for name, weight in start.model.state_dict().items():
            torch.testing.assert_close(again.state_dict()[name], weight, rtol=0, atol=0)


def test_embeddings_have_nothing_new(ours: FastformerForPreTraining, tmp_path: Path) -> None:
    start = pretrained(tmp_path, "embed")
    assert type(start.model) is FastformerForEmbedding
    assert (start.new_layers, start.model.config.pooling) == ([], "mean")


def test_a_model_of_another_stack_is_refused(ours: FastformerForPreTraining, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"FastformerForSeq2SeqLM needs .*encoder_decoder.*got 'encoder'"):
        pretrained(tmp_path, "summarize")


def test_hugging_face_models_run_as_they_are(tmp_path: Path) -> None:
    BertForMaskedLM(BertConfig(**SHAPE)).save_pretrained(tmp_path / "bert")
    start = pretrained(tmp_path / "bert", "classify", ["no", "yes"])
    assert type(start.model).__name__ == "BertForSequenceClassification"
    assert not start.packed
    assert "classifier" in start.new_layers
    assert start.attention == start.model.config._attn_implementation
    T5ForConditionalGeneration(
        T5Config(vocab_size=12, d_model=8, d_ff=8, d_kv=4, num_heads=2, num_layers=1)
    ).save_pretrained(tmp_path / "t5")
    assert pretrained(tmp_path / "t5", "translate").new_layers == []
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        pretrained(tmp_path / "bert", "translate")


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no model in .*: it has no config.json"):
        pretrained(tmp_path, "classify")


@pytest.mark.parametrize(
    ("task", "own"),
    [("generate", FastformerForCausalLM), ("summarize", FastformerForSeq2SeqLM), ("embed", FastformerForEmbedding)],
)
def test_from_scratch_takes_vocabulary_and_special_tokens_from_the_tokenizer(task: str, own: type) -> None:
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "b"]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )
    start = from_scratch("bert-tiny", task, tokenizer, max_length=32, num_hidden_layers=1)
    config = start.model.config
    assert type(start.model) is own
    assert start.new_layers is None
    assert (config.vocab_size, config.pad_token_id, config.bos_token_id, config.eos_token_id) == (6, 0, 1, 2)
    assert (config.max_position_embeddings, config.num_hidden_layers) == (32, 1)
    # Weights of models that generate are drawn for the width, unless another deviation is given.
    weights = next(weight for name, weight in start.model.named_parameters() if name.endswith("qkv.weight"))
    assert weights.std().item() == pytest.approx(0.02 if task == "embed" else 128**-0.5, rel=0.05)
    other = from_scratch("bert-tiny", task, tokenizer, max_length=32, initializer_range=0.5)
    assert other.model.config.initializer_range == 0.5
