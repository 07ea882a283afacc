"""Models of other architectures compute the same as Fastformer's, and come back as they were."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import transformers
from convertible_models import CONFIGS, EVERY_HEAD, HEAD_NAMES, VOCABULARY, batch_for, find_head, random_model
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel

from fastformer.models import (
    FastformerConfig,
    FastformerForCausalLM,
    FastformerForEmbedding,
    FastformerForMaskedLM,
    FastformerForQuestionAnswering,
    FastformerForSeq2SeqLM,
    FastformerForSequenceClassification,
    FastformerModel,
    from_hugging_face,
    to_hugging_face,
)
from fastformer.models.conversion import ARCHITECTURES
from fastformer.models.conversion.configurations import read_config

pytestmark = pytest.mark.cpu

EXACT = {"rtol": 0.0, "atol": 1e-5}
HIDDEN_STATES = ("hidden_states", "decoder_hidden_states", "encoder_hidden_states")
# Settings of each class in addition to those of the table of models. Each changes what is computed.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("BertForMaskedLM", {"tie_word_embeddings": False, "hidden_act": "gelu_new"}),
    ("BertForTokenClassification", {"classifier_dropout": 0.3, "layer_norm_eps": 1e-3, "hidden_act": "relu"}),
    ("RobertaForMaskedLM", {"tie_word_embeddings": False, "pad_token_id": 0, "type_vocab_size": 1}),
    ("DistilBertForMaskedLM", {"activation": "relu", "sinusoidal_pos_embds": True, "tie_word_embeddings": False}),
    ("GPT2LMHeadModel", {"scale_attn_weights": False, "n_inner": 56, "activation_function": "silu"}),
    ("GPT2LMHeadModel", {"tie_word_embeddings": False, "layer_norm_epsilon": 1e-3, "pad_token_id": None}),
    ("GPTNeoForCausalLM", {"attention_types": [[["global"], 2]], "intermediate_size": 56}),
    ("GPTNeoForCausalLM", {"attention_types": [[["local"], 2]], "window_size": 1}),
    ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("LlamaForCausalLM", {"head_dim": 12, "hidden_act": "gelu", "rms_norm_eps": 1e-3, "num_key_value_heads": 1}),
    ("LlamaForCausalLM", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0}}),
    (
        "LlamaForCausalLM",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 100.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8,
            }
        },
    ),
    (
        "LlamaForCausalLM",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 100.0,
                "factor": 3.0,
                "original_max_position_embeddings": 8,
            }
        },
    ),
    ("Qwen2ForCausalLM", {"use_sliding_window": False}),
    ("Qwen2ForCausalLM", {"layer_types": ["sliding_attention", "full_attention"], "tie_word_embeddings": True}),
    ("Qwen3ForCausalLM", {"attention_bias": True, "use_sliding_window": True, "sliding_window": 3}),
    ("MistralForCausalLM", {"sliding_window": None, "head_dim": 16}),
    ("T5ForConditionalGeneration", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    ("T5ForConditionalGeneration", {"feed_forward_proj": "gated-silu", "num_decoder_layers": 1, "dropout_rate": 0.3}),
    ("T5EncoderModel", {"feed_forward_proj": "gelu", "layer_norm_epsilon": 1e-3}),
    ("BartForConditionalGeneration", {"scale_embedding": False, "tie_word_embeddings": False}),
    ("MBartForConditionalGeneration", {"activation_function": "relu", "activation_dropout": 0.2}),
    ("MarianMTModel", {"activation_function": "silu", "scale_embedding": False}),
    ("ViTModel", {"pooler_act": "relu", "qkv_bias": False, "image_size": [12, 12], "hidden_act": "gelu_new"}),
]


def assert_same_outputs(actual: PreTrainedModel, expected: PreTrainedModel, batch: dict[str, torch.Tensor]) -> None:
    """Check every output, also the hidden states of every block.

    Values at padding have no meaning and are not compared.
    """
    with torch.no_grad():
        theirs, ours = (model(**batch, output_hidden_states=True) for model in (expected, actual))
    if (
        type(actual) is not type(expected) and "pixel_values" in batch
    ):  # transformers' last hidden states of a ViT are not normalised
        norm = expected.get_submodule("layernorm" if hasattr(expected, "layernorm") else "vit.layernorm")
        theirs.hidden_states = (*theirs.hidden_states[:-1], norm(theirs.hidden_states[-1]).detach())
    # The caches have another form in each model.
    names = set(theirs) - {"cache", "past_key_values"}
    assert set(ours) - {"cache", "past_key_values"} == names
    real = batch["attention_mask"].bool() if "attention_mask" in batch else None
    for name in sorted(names):
        values, references = (each[name] if name in HIDDEN_STATES else (each[name],) for each in (ours, theirs))
        assert len(values) == len(references)
        for value, reference in zip(values, references, strict=True):
            if real is not None and reference.shape[:2] == real.shape:
                value, reference = value[real], reference[real]
            torch.testing.assert_close(value, reference, **EXACT, msg=lambda message, name=name: f"{name}: {message}")


def assert_same_model(actual: PreTrainedModel, expected: PreTrainedModel) -> None:
    assert type(actual) is type(expected)
    torch.testing.assert_close(dict(actual.state_dict()), dict(expected.state_dict()), rtol=0.0, atol=0.0)


@pytest.mark.parametrize("class_name", HEAD_NAMES)
def test_every_class_computes_the_same_and_comes_back(class_name: str) -> None:
    theirs = random_model(class_name)
    architecture, head = find_head(class_name)
    ours = from_hugging_face(theirs)
    assert type(ours) is head.ours
    assert_same_outputs(ours, theirs, batch_for(theirs))
    assert_same_model(to_hugging_face(ours, architecture.name), theirs)


@pytest.mark.parametrize(("class_name", "options"), VARIANTS)
def test_every_setting_computes_the_same_and_comes_back(class_name: str, options: dict[str, Any]) -> None:
    theirs = random_model(class_name, **options)
    batch = batch_for(theirs) if theirs.config.model_type == "vit" or theirs.config.pad_token_id is not None else None
    batch = batch or {"input_ids": torch.randint(3, VOCABULARY - 1, (2, 9))}
    ours = from_hugging_face(theirs)
    assert_same_outputs(ours, theirs, batch)
    back = to_hugging_face(ours, theirs.config.model_type)
    assert_same_model(back, theirs)
    assert_same_outputs(back, theirs, batch)


def test_t5_with_an_output_of_its_own() -> None:
    theirs = random_model("T5ForConditionalGeneration", feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    theirs.lm_head.weight = torch.nn.Parameter(0.3 * torch.randn_like(theirs.lm_head.weight))
    ours = from_hugging_face(theirs)
    assert not ours.config.tie_word_embeddings
    assert ours.config.logit_scale == 1.0
    assert_same_outputs(ours, theirs, batch_for(theirs))
    assert_same_model(to_hugging_face(ours, "t5"), theirs)


@pytest.mark.quick
def test_a_base_model_without_its_pooler() -> None:
    theirs = transformers.BertModel(random_model("BertModel").config, add_pooling_layer=False).eval()
    ours = from_hugging_face(theirs)
    assert ours.pooler is None
    assert_same_outputs(ours, theirs, batch_for(theirs))
    again = FastformerModel(FastformerConfig(**SMALL), add_pooling_layer=False)
    assert from_hugging_face(to_hugging_face(again, "bert")).config.hidden_size == 32


@pytest.mark.parametrize(
    "class_name",
    ["BertForPreTraining", "GPT2LMHeadModel", "LlamaForCausalLM", "T5ForConditionalGeneration", "BartModel"],
)
def test_every_gradient_is_the_same(class_name: str) -> None:
    theirs = random_model(class_name)
    ours = from_hugging_face(theirs)
    batch = batch_for(theirs)
    for model in (theirs, ours):
        outputs = model(**batch)
        logits = outputs[0 if class_name == "BartModel" else next(name for name in outputs if name.endswith("logits"))]
        rows = batch["attention_mask"].bool() if logits.shape[1] == batch["input_ids"].shape[1] else ...
        loss = logits[rows].square().mean()
        if class_name == "BertForPreTraining":
            loss = loss + outputs.seq_relationship_logits.square().mean()
        loss.backward()
    # Gradients have the names of the parameters, so they are converted in the same way.
    for parameter in theirs.parameters():
        parameter.data.copy_(parameter.grad)
    expected = dict(from_hugging_face(theirs).named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].data, **EXACT, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    "class_name",
    [
        *("GPT2LMHeadModel", "GPTNeoForCausalLM", "LlamaForCausalLM", "Qwen2ForCausalLM", "MistralForCausalLM"),
        *("T5ForConditionalGeneration", "BartForConditionalGeneration", "MarianMTModel"),
    ],
)
def test_greedy_generation_is_the_same(class_name: str) -> None:
    # transformers' T5 generates only if both stacks have the same number of blocks.
    theirs = random_model(class_name, **({"num_decoder_layers": 2} if class_name.startswith("T5") else {}))
    ours = from_hugging_face(theirs)
    batch = {name: tensor for name, tensor in batch_for(theirs).items() if not name.startswith("decoder")}
    if not theirs.config.is_encoder_decoder:  # prompts are padded on the left
        batch = {name: tensor.flip(1) for name, tensor in batch.items()}
    for processing in ({}, {"repetition_penalty": 2.0}):
        generated = ours.generate(**batch, max_new_tokens=8, do_sample=False, **processing)
        expected = theirs.generate(**batch, max_new_tokens=8, do_sample=False, **processing)
        assert torch.equal(generated, expected)
    assert len(set(expected[:, -8:].flatten().tolist())) > 3


@pytest.mark.parametrize("architecture", ["bart", "mbart"])
def test_an_output_without_bias_becomes_one_of_zeros(architecture: str) -> None:
    placement = {"bart": "post", "mbart": "pre"}[architecture]
    sizes = {**SMALL, "max_position_embeddings": 24, "norm_placement": placement, "layer_norm_eps": 1e-5}
    config = FastformerConfig(stack="encoder_decoder", type_vocab_size=0, lm_head_bias=False, **sizes)
    ours = FastformerForSeq2SeqLM(config).eval()
    theirs = to_hugging_face(ours, architecture)
    assert not theirs.final_logits_bias.any()
    ids = torch.randint(3, VOCABULARY, (2, 5))
    assert_same_outputs(ours, theirs, {"input_ids": ids, "decoder_input_ids": ids[:, :3]})


def test_models_share_no_memory() -> None:
    theirs = random_model("GPT2LMHeadModel")
    ours = from_hugging_face(theirs)
    before = ours.model.embeddings.word.weight.clone()
    theirs.transformer.wte.weight.data.zero_()
    assert torch.equal(ours.model.embeddings.word.weight, before)


def test_dtype_is_kept() -> None:
    ours = from_hugging_face(random_model("LlamaForCausalLM").bfloat16())
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.bfloat16}
    assert to_hugging_face(ours, "llama").dtype == torch.bfloat16


# --- What cannot be expressed ----------------------------------------------------------------------------------------

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("BertModel", {"is_decoder": True}, "is_decoder must be False; got True"),
    ("BertModel", {"add_cross_attention": True}, "add_cross_attention must be False; got True"),
    ("BertModel", {"position_embedding_type": "relative_key"}, "position_embedding_type must be 'absolute'; got 'rel"),
    ("BertModel", {"hidden_act": "tanh"}, "hidden_act must be one of relu, .*; got 'tanh'"),
    ("RobertaModel", {"pad_token_id": None}, "pad_token_id must be a number in roberta.*; got None"),
    ("RobertaForMaskedLM", {"hidden_act": "relu"}, "hidden_act must be 'gelu'; got 'relu'"),
    ("DistilBertModel", {"activation": "tanh"}, "activation must be one of relu, .*; got 'tanh'"),
    (
        "GPT2LMHeadModel",
        {"scale_attn_by_inverse_layer_idx": True},
        "scale_attn_by_inverse_layer_idx must be False; got True",
    ),
    ("GPT2LMHeadModel", {"embd_pdrop": 0.0}, "embd_pdrop must be 0.1; got 0.0"),
    ("GPT2LMHeadModel", {"add_cross_attention": True}, "add_cross_attention must be False; got True"),
    ("GPTNeoForCausalLM", {"embed_dropout": 0.2}, "embed_dropout must be 0.0; got 0.2"),
    (
        "LlamaForCausalLM",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        "rope_type must be one of default, .*; got 'dynamic'",
    ),
    (
        "Qwen2ForCausalLM",
        {"layer_types": ["chunked_attention"] * 2},
        "layer_types must hold full_attention and .*chunk",
    ),
    ("T5ForConditionalGeneration", {"feed_forward_proj": "gated-tanh"}, "hidden_act must be one of .*; got 'tanh'"),
    ("BartModel", {"decoder_ffn_dim": 48}, "decoder_ffn_dim must be 40; got 48"),
    ("BartModel", {"decoder_attention_heads": 2}, "decoder_attention_heads must be 4; got 2"),
    ("BartModel", {"encoder_layerdrop": 0.1}, "encoder_layerdrop must be 0.0; got 0.1"),
    ("MarianModel", {"decoder_vocab_size": 50}, "decoder_vocab_size must be 61; got 50"),
    (
        "MarianModel",
        {"share_encoder_decoder_embeddings": False},
        "share_encoder_decoder_embeddings must be True; got False",
    ),
    ("ViTModel", {"image_size": [12, 8]}, r"image_size must be square; got \[12, 8\]"),
    ("ViTModel", {"pooler_output_size": 16}, "pooler_output_size must be 32; got 16"),
    ("ViTModel", {"pooler_act": "gelu"}, "pooler_act must be one of .*; got 'gelu'"),
]


@pytest.mark.parametrize(("class_name", "options", "message"), REFUSED)
def test_a_configuration_without_counterpart_is_refused(class_name: str, options: dict, message: str) -> None:
    architecture, head = find_head(class_name)
    config = architecture.config_class(**{**CONFIGS[architecture.name], **options})
    with pytest.raises(ValueError, match=message):
        head.ours(read_config(architecture, head, config, {"pooler.dense.weight"}))


def changed(name: str, field: str) -> PreTrainedConfig | None:
    """Return a configuration with another value in one field.

    Return None if transformers itself refuses every other value.
    """
    value = getattr(ARCHITECTURES[name].config_class(**CONFIGS[name]), field)
    for other in (not value, 0.25, 7, "unknown", ["unknown"], [[["local", "global"], 1]], {"rope_type": "unknown"}):
        if value is not None and type(other) is not type(value):
            continue
        try:
            config = ARCHITECTURES[name].config_class(**{**CONFIGS[name], field: other})
        except (StrictDataclassError, ValueError, TypeError):
            continue
        if getattr(config, field) != value:
            return config
    return None


def every_field() -> list[tuple[str, Any, str]]:
    """Return each class of every architecture, with each field that its configuration declares."""
    of_every_config = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    return [
        (name, head, field.name)
        for name, head in EVERY_HEAD
        for field in dataclasses.fields(ARCHITECTURES[name].config_class)
        if field.name not in of_every_config | ARCHITECTURES[name].without_effect
    ]


def test_no_field_of_a_configuration_is_ignored() -> None:
    """Whatever field changes, Fastformer's configuration changes, or the field is refused."""
    ignored = []
    for name, head, field in every_field():
        architecture = ARCHITECTURES[name]
        given = architecture.config_class(**CONFIGS[name])
        other = changed(name, field)
        has_no_decoder = name == "t5" and head.implied.get("stack") == "encoder"
        if other is None or (field == "num_decoder_layers" and has_no_decoder):
            continue
        names = {"pooler.dense.weight", "final_logits_bias"}
        try:
            same = read_config(architecture, head, other, names) == read_config(architecture, head, given, names)
        except (ValueError, TypeError, KeyError, StrictDataclassError):
            continue
        if same:
            ignored.append(f"{name}.{field}")
    assert not ignored


SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
DECODER = {**SMALL, "stack": "decoder", "norm_placement": "pre", "embedding_norm": False, "type_vocab_size": 0}
NOT_EXPRESSED: list[tuple[type, dict[str, Any], str, list[str]]] = [
    (FastformerForMaskedLM, {"norm": "rms"}, "bert", ["norm must be 'layer'; got 'rms'"]),
    (
        FastformerForMaskedLM,
        {"position_embedding": "alibi", "attention_scale": 0.5},
        "bert",
        ["position_embedding must be 'learned'; got 'alibi'", "attention_scale must be 0.35.*; got 0.5"],
    ),
    (FastformerForMaskedLM, {"sliding_window": 4}, "bert", [r"layer_types must be \[None, None\]; got \[4, 4\]"]),
    (FastformerForMaskedLM, {"pad_positions": False}, "bert", ["pad_positions must be True; got False"]),
    (FastformerForMaskedLM, {"pad_positions": True}, "roberta", ["pad_positions must be False; got True"]),
    (FastformerForSequenceClassification, {"pooling": "mean"}, "bert", ["pooling must be 'first'; got 'mean'"]),
    (FastformerForSequenceClassification, {"pooler_act": "relu"}, "bert", ["pooler_act must be 'tanh'; got 'relu'"]),
    (
        FastformerForCausalLM,
        {**DECODER, "train_padding": True, "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 3},
        "gpt2",
        [r"layer_types must be \[None, None\]; got \[None, 3\]"],
    ),
    (
        FastformerForCausalLM,
        {**DECODER, "gated": True, "norm": "rms", "position_embedding": "rotary"},
        "mistral",
        [
            "attention_bias must be False; got True",
            "feed_forward_bias must be False; got True",
            "hidden_dropout_prob must be 0.0; got 0.1",
        ],
    ),
    (
        FastformerForCausalLM,
        {**DECODER, "train_padding": True, "lm_head_bias": True},
        "gpt2",
        ["lm_head_bias must be F"],
    ),
    (FastformerForCausalLM, DECODER, "bert", ["the model must be one of FastformerModel, .* to become a bert; got"]),
    (FastformerForEmbedding, SMALL, "bert", ["the model must be one of .*; got FastformerForEmbedding"]),
    (FastformerForMaskedLM, SMALL, "electra", ["the architecture must be one of bert, .*; got 'electra'"]),
    (
        FastformerForSeq2SeqLM,
        {**SMALL, "stack": "encoder_decoder", "type_vocab_size": 0, "embedding_scale": 2.0, "layer_norm_eps": 1e-5},
        "bart",
        [r"embedding_scale must be 5.65\d+; got 2.0"],
    ),
]


@pytest.mark.parametrize("padding", [None, 0])
def test_a_decoder_becomes_a_gpt2_whatever_its_padding(padding: int | None) -> None:
    ours = FastformerForCausalLM(FastformerConfig(**DECODER, layer_norm_eps=1e-5, pad_token_id=padding)).eval()
    ids = torch.tensor([[3, 4, 0, 5]])
    torch.testing.assert_close(to_hugging_face(ours, "gpt2")(ids).logits, ours(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("ours", "options", "architecture", "messages"), NOT_EXPRESSED)
def test_a_model_that_an_architecture_cannot_express_is_refused(
    ours: type, options: dict[str, Any], architecture: str, messages: list[str]
) -> None:
    model = ours(FastformerConfig(**{**SMALL, **options}))
    for message in messages:
        with pytest.raises(ValueError, match=message):
            to_hugging_face(model, architecture)


def test_labels_of_an_answer_are_two_whatever_the_configuration_says() -> None:
    theirs = to_hugging_face(FastformerForQuestionAnswering(FastformerConfig(**SMALL, num_labels=5)), "bert")
    assert theirs.config.num_labels == 2
    assert theirs(torch.tensor([[3, 4]])).start_logits.shape == (1, 2)


def test_labels_travel() -> None:
    labels = {0: "bad", 1: "fair", 2: "good"}
    theirs = random_model("BertForSequenceClassification", id2label=labels, problem_type="multi_label_classification")
    ours = from_hugging_face(theirs)
    assert (ours.config.id2label, ours.config.problem_type) == (labels, "multi_label_classification")
    assert to_hugging_face(ours, "bert").config.id2label == labels


def test_a_class_without_counterpart_is_named() -> None:
    model = transformers.BertForMultipleChoice(random_model("BertModel").config)
    with pytest.raises(ValueError, match=r"the class must be one of BertModel, .* in bert; got 'BertForM"):
        from_hugging_face(model)
