"""Small transformers models whose random weights make attention far from uniform, and batches for them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCABULARY = 64
PADDING = 0
TOKENS = 9
ENCODER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
DECODER = {
    **ENCODER,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
SPEECH_FRAMES = 20


@dataclass(frozen=True)
class Small:
    """A model class, with the options of a small configuration of it.

    Attributes:
        model: the name of the class in transformers; its `config_class` is the class of the configuration.
        kind: its input: "encoder" and "decoder" read tokens, "encoder_decoder" two rows of them, "image" pixels,
            "image_text" both, "speech" a spectrogram.
        options: the options of the configuration.
        packs: whether position_ids that start again at 0 separate packed documents.
    """

    model: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    packs: bool = False

    def build(self, seed: int = 0) -> PreTrainedModel:
        """Build the model in eval mode, with eager attention."""
        torch.manual_seed(seed)
        model_class = getattr(transformers, self.model)
        config = model_class.config_class(**{"vocab_size": VOCABULARY, **self.options})
        model = model_class._from_config(config, attn_implementation="eager").eval()
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn_like(parameter)
                if parameter.dim() > 1:
                    parameter.copy_(noise * 1.2 / parameter[0].numel() ** 0.5)
                else:
                    parameter.add_(noise * 0.1)
        return model

    def batch(self, padding: str = "none", seed: int = 1) -> dict[str, torch.Tensor]:
        """Return three sequences with labels, padded "none", "left", "right", or with "holes".

        Padding has no label. The token after padding has none either: a causal model would predict it from nothing.
        """
        torch.manual_seed(seed)
        if self.kind == "image":
            return {"pixel_values": torch.randn(3, 3, 12, 12), "labels": torch.tensor([0, 2, 1])}
        if self.kind == "speech":
            features = torch.randn(3, self.options["num_mel_bins"], SPEECH_FRAMES)
            return {"input_features": features, "labels": _tokens(TOKENS)}
        mask = _padding_mask(padding)
        ids = _tokens(TOKENS).where(mask, PADDING)
        batch = {"input_ids": ids, "attention_mask": mask.long()}
        if self.kind == "image_text":
            ids.masked_fill_(torch.arange(TOKENS) == TOKENS - 1, VOCABULARY - 1)
            return {**batch, "pixel_values": torch.randn(3, 3, 12, 12), "return_loss": True}
        if self.kind == "encoder_decoder":
            target = _padding_mask("none" if padding == "none" else "right")[:, :-2]
            labels = _tokens(TOKENS - 2).masked_fill(~target, -100)
            return {**batch, "labels": labels, "decoder_attention_mask": target.long()}
        after_padding = ~mask.roll(1, 1) & (torch.arange(TOKENS) > 0)
        return {**batch, "labels": ids.masked_fill(~mask | after_padding, -100)}

    @property
    def generates(self) -> bool:
        return self.kind in ("decoder", "encoder_decoder", "speech")


def _tokens(length: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY - 1, (3, length))


def _padding_mask(padding: str) -> torch.Tensor:
    """Return a (3, TOKENS) boolean mask, True where there is a token."""
    position, lengths = torch.arange(TOKENS), torch.tensor([[TOKENS], [5], [7]])
    if padding == "left":
        return position >= TOKENS - lengths
    if padding == "holes":
        return (position < lengths) & ((position + lengths) % 3 != 0)
    return position < (lengths if padding == "right" else torch.full((3, 1), TOKENS))


def _encoder(model: str, **options: Any) -> Small:
    return Small(model, "encoder", {**ENCODER, "pad_token_id": PADDING, **options})


def _decoder(model: str, packs: bool = True, **options: Any) -> Small:
    return Small(model, "decoder", {**DECODER, **options}, packs)


def _encoder_decoder(model: str, **options: Any) -> Small:
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 40}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "decoder_start_token_id": 2}
    return Small(model, "encoder_decoder", {**layers, **sizes, **tokens, "forced_eos_token_id": None, **options})


_IMAGE = {**ENCODER, "image_size": 12, "patch_size": 4}
_WINDOW = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}

# Classes that compute attention themselves, instead of calling the chosen implementation.
REFUSING: dict[str, tuple[Small, str]] = {
    "DeBERTa": (_encoder("DebertaForMaskedLM"), "scores of content and position, gathered by relative distance"),
    "DeBERTa-v2": (_encoder("DebertaV2ForMaskedLM"), "scores of content and position, gathered by relative distance"),
    "XLM": (
        Small("XLMWithLMHeadModel", "encoder", {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "pad_index": PADDING}),
        "attention written out in the model",
    ),
}

MODELS: dict[str, Small] = {
    "BERT": _encoder("BertForMaskedLM"),
    "BERT decoder": Small(
        "BertLMHeadModel", "decoder", {**ENCODER, "is_decoder": True, "pad_token_id": 0, "eos_token_id": None}
    ),
    "RoBERTa": _encoder("RobertaForMaskedLM"),
    "DistilBERT": _encoder("DistilBertForMaskedLM", dim=32, hidden_dim=48, n_layers=2, n_heads=4),
    "ELECTRA": _encoder("ElectraForMaskedLM", embedding_size=32),
    "ModernBERT": _encoder("ModernBertForMaskedLM", global_attn_every_n_layers=2, local_attention=4),
    "GPT-2": Small(
        "GPT2LMHeadModel",
        "decoder",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "eos_token_id": None, "bos_token_id": 1, "pad_token_id": 0},
        True,
    ),
    "GPT-NeoX": _decoder("GPTNeoXForCausalLM"),
    "Llama": _decoder("LlamaForCausalLM"),
    "Qwen3": _decoder("Qwen3ForCausalLM", use_sliding_window=True, **_WINDOW),
    "Mistral": _decoder("MistralForCausalLM", sliding_window=4),
    "Gemma 2": _decoder("Gemma2ForCausalLM", query_pre_attn_scalar=8, attn_logit_softcapping=3.0, **_WINDOW),
    "Gemma 3": _decoder("Gemma3ForCausalLM", query_pre_attn_scalar=8, **_WINDOW),
    "Gemma 3, wide": _decoder("Gemma3ForCausalLM", **_WINDOW, head_dim=512, query_pre_attn_scalar=512),
    "DeepSeek-V3": _decoder(
        "DeepseekV3ForCausalLM",
        packs=False,
        num_key_value_heads=4,
        head_dim=64,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
    ),
    "gpt-oss": _decoder("GptOssForCausalLM", packs=False, num_local_experts=4, num_experts_per_tok=2, **_WINDOW),
    "Llama 4": _decoder(
        "Llama4ForCausalLM",
        intermediate_size_mlp=48,
        num_local_experts=2,
        attention_chunk_size=4,
        layer_types=["chunked_attention", "full_attention"],
        no_rope_layers=[1, 0],
    ),
    "Phi": _decoder("PhiForCausalLM"),
    "T5": Small(
        "T5ForConditionalGeneration",
        "encoder_decoder",
        {
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "pad_token_id": 0,
            "eos_token_id": None,
            "decoder_start_token_id": 2,
        },
    ),
    "BART": _encoder_decoder("BartForConditionalGeneration"),
    "Marian": _encoder_decoder("MarianMTModel"),
    "mBART": _encoder_decoder("MBartForConditionalGeneration"),
    "ViT": Small("ViTForImageClassification", "image", {**_IMAGE, "num_labels": 3}),
    "CLIP": Small(
        "CLIPModel",
        "image_text",
        {
            "text_config": {
                **ENCODER,
                "vocab_size": VOCABULARY,
                "max_position_embeddings": 20,
                "eos_token_id": VOCABULARY - 1,
            },
            "vision_config": _IMAGE,
            "projection_dim": 16,
        },
    ),
    "Whisper": Small(
        "WhisperForConditionalGeneration",
        "speech",
        {
            **_encoder_decoder("").options,
            "num_mel_bins": 8,
            "max_source_positions": SPEECH_FRAMES // 2,
            "max_target_positions": 40,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
    ),
}


EQUAL = 1e-5
OUTPUTS = ("loss", "logits", "logits_per_text", "text_embeds", "image_embeds")


def assert_equal(name: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Fail unless the two differ by at most 1e-5 of the largest element, or of 1 if that is larger."""
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=EQUAL * scale, msg=lambda text: f"{name}: {text}")


def results(model: PreTrainedModel, batch: dict[str, Any], implementation: str) -> dict[str, torch.Tensor]:
    """Return the loss, the outputs where there are labels, and the gradient of every parameter."""
    model.set_attn_implementation(implementation)
    assert model.config._attn_implementation == implementation
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    named = {name: output[name] for name in OUTPUTS if name in output}
    if "labels" in batch and batch["labels"].dim() == 2:
        named["logits"] = named["logits"][batch["labels"] != -100]
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return {name: value.detach().clone() for name, value in (named | gradients).items()}


def assert_same_training(model: PreTrainedModel, batch: dict[str, Any]) -> None:
    expected = results(model, batch, "eager")
    actual = results(model, batch, "fastformer")
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert_equal(name, actual[name], value)
