"""A small, randomly initialised model of any transformers class, made by the names in its configuration."""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

VOCABULARY = 96
PADDING, BEGIN, END, OTHER, FIRST_WORD = range(5)
MOST_PARAMETERS = 20_000_000

# Patterns of a configuration's names for sizes, and the largest value each size gets. The first match counts.
_SIZES = [
    (r"vocab_size|_vocab$", VOCABULARY),
    (r"(key_value|kv|key|value)_heads$|num_query_groups", 2),
    (r"heads?$|n_head$", 4),
    (r"head_?dim|d_kv$|kv_channels|head_size$|d_head$|rotary_dim|query_pre_attn_scalar", 8),
    (r"lora_rank|_rank$", 16),
    (r"experts_per_tok|top_?k$|topk|n_group|topk_group", 2),
    (r"experts$|num_local_experts", 4),
    (r"layers|n_layer$|num_blocks|num_layers_per_stack|depths?$", 2),
    (r"positions$|position_embeddings$|n_ctx$|max_seq_len$|context_length$|max_length$", 96),
    (r"sliding_window|local_attention|attention_window|window_size$|chunk_size$|chunk_length$", 4),
    (r"intermediate_size|ffn_dim|d_ff$|ffn_hidden_size|d_inner$|dff$|dim_ff$|feed_forward_size", 48),
    (r"hidden_size|hidden_dim|d_model$|n_embd$|(^|_|emb)dim$|embedding_size|embedding_dim|lru_width", 32),
    (r"^(image_size)$", 32),
    (r"^(patch_size)$", 8),
    (r"state_size|d_state$", 8),
]
# Settings that generic size rules cannot find: how the parts of some architectures fit together.
_PARTICULAR: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm3": {"num_hidden_layers": 4},
    "qwen3_next": {"num_hidden_layers": 4},
    "qwen3_5_text": {"num_hidden_layers": 4},
    "qwen3_5_moe_text": {"num_hidden_layers": 4},
    "qwen4_exp": {"num_hidden_layers": 4},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "ministral": {"head_dim": 8},
    "musicgen_decoder": {"num_codebooks": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "dots3_note": {"num_key_value_heads": 4},
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 16, "attn_layer_indices": [1]},
    "cohere_compass": {"layer_types": ["sliding_attention", "full_attention"]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "esm": {"vocab_size": VOCABULARY, "mask_token_id": OTHER},
    "esmc": {"num_key_value_heads": 4, "vocab_size": VOCABULARY},
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 16, "layer_types": ["mamba", "attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "nemotron": {"num_key_value_heads": 2},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds": False},
    "dory": {"num_hidden_layers": 3, "n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1},
    "ernie4_5_moe": {"moe_k": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "longcat_flash": {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "head_dim": 8, "qk_head_dim": 16},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "mobilebert": {"true_hidden_size": 32, "intra_bottleneck_size": 32, "use_bottleneck": False},
    "xlnet": {"d_head": 8},
    "xmod": {"default_language": "en_XX"},
}
_SPECIAL_TOKENS = {"pad": PADDING, "bos": BEGIN, "eos": END, "decoder_start": BEGIN}


def small_model(model_class: type[PreTrainedModel], seed: int = 0) -> PreTrainedModel:
    """Make a model of this class with eager attention, in evaluation mode.

    Its weights are so large that attention is not uniform.

    Raises:
        ValueError: its configuration stays large. The class itself may raise other errors for the small one.
    """
    assert model_class.config_class is not None
    config = small_config(model_class.config_class)
    with torch.device("meta"):
        size = sum(weight.numel() for weight in model_class._from_config(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size:,} parameters after making every size known by its name small")
    torch.manual_seed(seed)
    config = small_config(model_class.config_class)
    model = model_class._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.copy_(torch.randn_like(weight) * 1.2 / weight.shape[1] ** 0.5)
    return model


def small_config(config_class: type[PreTrainedConfig], **options: Any) -> PreTrainedConfig:
    """Make the configuration small: every size known by its name, in its parts too."""
    return config_class(**{**_small_options(config_class), **options})


def _small_options(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    default = config_class()
    options: dict[str, Any] = {}
    for name, value in default.to_dict().items():
        if name in config_class.sub_configs:
            part = getattr(default, name)
            if isinstance(part, PreTrainedConfig):
                options[name] = {**_small_options(type(part)), "model_type": part.model_type}
        elif name == "pad_token_id":
            options[name] = PADDING
        elif type(value) is not int:
            continue
        elif name.endswith("_token_id") or name in ("pad_index", "bos_index", "eos_index"):
            options[name] = _SPECIAL_TOKENS.get(re.sub("_token_id|_index", "", name), OTHER)
        else:
            small = next((size for pattern, size in _SIZES if re.search(pattern, name)), value)
            if small < value:
                options[name] = small
    if "kv_lora_rank" in options and "num_key_value_heads" in options:
        options["num_key_value_heads"] = options["num_attention_heads"]
    return {**options, **_PARTICULAR.get(default.model_type, {})}
