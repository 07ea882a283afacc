"""Small random models of every class that Fastformer converts, and batches for them."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from transformers import PreTrainedModel

from fastformer.models.conversion.architecture import Architecture, Head
from fastformer.models.conversion.models import ARCHITECTURES

VOCABULARY, LONGEST, PAD = 61, 24, 60
LENGTHS, TARGETS = (11, 4, 8), 5

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": LONGEST,
    "pad_token_id": PAD,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_BART = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": LONGEST,
    "pad_token_id": PAD,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": 1,
    "scale_embedding": True,
}
_LLAMA = {**_SIZES, "num_key_value_heads": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": {**_SIZES, "type_vocab_size": 3},
    "roberta": {**_SIZES, "pad_token_id": 1, "eos_token_id": 2, "max_position_embeddings": LONGEST + 2},
    "distilbert": {
        "vocab_size": VOCABULARY,
        "dim": 32,
        "hidden_dim": 40,
        "n_layers": 2,
        "n_heads": 4,
        "max_position_embeddings": LONGEST,
        "pad_token_id": PAD,
    },
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": LONGEST,
        "pad_token_id": PAD,
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
    "gpt_neo": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "max_position_embeddings": LONGEST,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 3,
        "pad_token_id": PAD,
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
    "llama": _LLAMA,
    "qwen2": {**_LLAMA, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {**_LLAMA, "head_dim": 16, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "mistral": {**_LLAMA, "sliding_window": 4},
    "t5": {
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "d_kv": 16,
        "d_ff": 40,
        "num_layers": 2,
        "num_decoder_layers": 3,
        "num_heads": 4,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 10,
        "pad_token_id": PAD,
        "decoder_start_token_id": PAD,
    },
    "bart": _BART,
    "mbart": _BART,
    "marian": _BART,
    "vit": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 40,
        "image_size": 12,
        "patch_size": 4,
    },
}
EVERY_HEAD = [(name, head) for name, architecture in ARCHITECTURES.items() for head in architecture.heads]
HEAD_NAMES = [head.theirs.__name__ for _, head in EVERY_HEAD]


def find_head(class_name: str) -> tuple[Architecture, Head]:
    """Find the head whose Hugging Face class has this name, and its architecture."""
    name, head = EVERY_HEAD[HEAD_NAMES.index(class_name)]
    return ARCHITECTURES[name], head


def random_model(class_name: str, **options: Any) -> PreTrainedModel:
    """Make a model with random weights, biases and norms, so large that attention is far from uniform."""
    architecture, head = find_head(class_name)
    labels = 2 if class_name.endswith("QuestionAnswering") else 3
    config = architecture.config_class(**{**CONFIGS[architecture.name], "num_labels": labels, **options})
    torch.manual_seed(0)
    model = head.theirs(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:  # not Marian's sinusoidal positions: parameters that are not trained
            is_norm = parameter.dim() == 1 and name.endswith("weight")
            torch.nn.init.normal_(parameter, mean=0.5 if is_norm else 0.0, std=0.3)
    for name, parameter in model.named_parameters():
        if name.endswith(("SelfAttention.q.weight", "EncDecAttention.q.weight")):
            parameter.data *= config.d_kv**-0.5  # T5's scores have no scale
        elif name in ("cls.predictions.bias", "lm_head.bias") and not config.tie_word_embeddings:
            parameter.data.zero_()  # not used
        elif name.endswith("embed_tokens.weight") and config.is_encoder_decoder and not config.tie_word_embeddings:
            parameter.data.copy_(model.get_input_embeddings().weight.data)
        elif name.endswith("embed_positions.weight") and parameter.requires_grad:
            parameter.data[:2] = 0.0  # rows of BART's table before the first position
        elif name.endswith("position_embeddings.weight") and architecture.name == "roberta":
            parameter.data[: config.pad_token_id + 1] = 0.0
    for name, buffer in model.named_buffers():
        if name == "final_logits_bias":
            torch.nn.init.normal_(buffer, std=0.3)
    return model


def batch_for(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return a batch for the model: sequences of several lengths, padded on the right, or images."""
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 12, 12)}
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS).unsqueeze(1)
    ids = torch.randint(3, VOCABULARY - 1, mask.shape).masked_fill(~mask, model.config.pad_token_id)
    batch = {"input_ids": ids, "attention_mask": mask.long()}
    if model.config.model_type == "bert":
        batch["token_type_ids"] = torch.randint(0, model.config.type_vocab_size, mask.shape)
    if "decoder_input_ids" in signature(model.forward).parameters:
        batch["decoder_input_ids"] = torch.randint(3, VOCABULARY - 1, (len(LENGTHS), TARGETS))
        batch["decoder_input_ids"][:, 0] = model.config.decoder_start_token_id
    return batch
