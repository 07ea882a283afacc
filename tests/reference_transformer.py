"""The Transformer as its papers define it: one sequence, float64, every option of the configuration."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from fastformer.models import FastformerConfig

ACTIVATIONS = {
    "relu": F.relu,
    "relu2": lambda x: F.relu(x) ** 2,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


class ReferenceTransformer:
    """The stack with the weights of `state`, whose names start with `prefix`."""

    def __init__(self, config: FastformerConfig, state: dict[str, Tensor], prefix: str, causal: bool) -> None:
        self.config, self.causal = config, causal
        self.weights = {
            name.removeprefix(prefix): weight.double() for name, weight in state.items() if name.startswith(prefix)
        }

    def linear(self, name: str, x: Tensor) -> Tensor:
        bias = self.weights.get(f"{name}.bias", torch.zeros((), dtype=torch.float64))
        return x @ self.weights[f"{name}.weight"].T + bias

    def norm(self, name: str, x: Tensor) -> Tensor:
        of_head = name.endswith(("query_norm", "key_norm"))
        if name == "embeddings.norm" or (self.config.norm == "layer" and not of_head):
            x = x - x.mean(-1, keepdim=True)
        x = x / (x.pow(2).mean(-1, keepdim=True) + self.config.layer_norm_eps).sqrt()
        return x * self.weights[f"{name}.weight"] + self.weights.get(f"{name}.bias", 0.0)

    def embed(self, words: Tensor, types: Tensor | None) -> Tensor:
        """Turn (tokens, hidden_size) word embeddings into the input of the first block."""
        config, x = self.config, words.double() * self.config.embedding_scale
        positions = torch.arange(len(x))
        if config.position_embedding == "learned":
            x = x + self.weights["embeddings.position.weight"][positions]
        elif config.position_embedding == "sinusoidal":
            rates = 10000.0 ** (-torch.arange(0, config.hidden_size, 2, dtype=torch.float64) / config.hidden_size)
            angles = positions[:, None] * rates
            x = x + torch.cat([angles.sin(), angles.cos()], dim=1)
        if config.type_vocab_size:
            x = (
                x
                + self.weights["embeddings.token_type.weight"][torch.zeros_like(positions) if types is None else types]
            )
        return self.norm("embeddings.norm", x) if config.embedding_norm else x

    def rotate(self, x: Tensor) -> Tensor:
        """Rotate (tokens, head_dim) by the position of each token."""
        half = x.shape[1] // 2
        theta = self.config.rope_parameters["rope_theta"]
        angles = torch.arange(len(x))[:, None] * theta ** (-torch.arange(half, dtype=torch.float64) / half)
        first, second = x[:, :half], x[:, half:]
        return torch.cat(
            [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], 1
        )

    def bias(self, head: int, distance: int) -> float:
        """Return the number added to a score, where `distance` is key position - query position."""
        config = self.config
        if config.position_embedding == "alibi":
            return -(2.0 ** (-8.0 * (head + 1) / config.num_attention_heads)) * abs(distance)
        if config.position_embedding != "relative":
            return 0.0
        buckets, bucket = config.relative_attention_num_buckets, 0
        if not self.causal:
            buckets //= 2
            bucket = buckets if distance > 0 else 0
        far, exact = abs(distance) if not self.causal else max(-distance, 0), buckets // 2
        if far >= exact:
            steps = math.log(far / exact) / math.log(config.relative_attention_max_distance / exact)
            far = min(exact + int(steps * (buckets - exact)), buckets - 1)
        return self.weights["relative_bias.table.weight"][bucket + far, head].item()

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, cross: bool) -> Tensor:
        """Attend with query (tokens, heads * head_dim), key and value (tokens, kv_heads * head_dim)."""
        config, size = self.config, self.config.size_per_head
        scale = 1.0 / math.sqrt(size) if config.attention_scale is None else config.attention_scale
        window = config.layer_types and config.layer_types[layer] == "sliding_attention" and not cross
        query, key, value = (
            rearrange(x, "tokens (heads dim) -> heads tokens dim", dim=size) for x in (query, key, value)
        )
        outputs = []
        for head in range(config.num_attention_heads):
            shared = head // (config.num_attention_heads // config.kv_heads)
            q, k, v = query[head], key[shared], value[shared]
            name = f"layers.{layer}.attention"
            if config.qk_norm and not cross:
                q, k = self.norm(f"{name}.query_norm", q), self.norm(f"{name}.key_norm", k)
            if config.position_embedding == "rotary" and not cross:
                q, k = self.rotate(q), self.rotate(k)
            scores = q @ k.T * scale
            for i in range(len(q)) if not cross else ():
                for j in range(len(k)):
                    scores[i, j] += self.bias(head, j - i)
                    hidden = (self.causal and j > i) or (window and abs(j - i) >= config.sliding_window)
                    scores[i, j] = -math.inf if hidden else scores[i, j]
            outputs.append(scores.softmax(-1) @ v)
        return torch.cat(outputs, dim=1)

    def self_attention(self, layer: int, x: Tensor) -> Tensor:
        config, size = self.config, self.config.size_per_head
        name = f"layers.{layer}.attention"
        sizes = [config.num_attention_heads * size, config.kv_heads * size, config.kv_heads * size]
        return self.linear(f"{name}.output", self.attend(layer, *self.linear(f"{name}.qkv", x).split(sizes, 1), False))

    def cross_attention(self, layer: int, x: Tensor, encoded: Tensor) -> Tensor:
        name = f"layers.{layer}.cross_attention"
        key, value = self.linear(f"{name}.key_value", encoded).chunk(2, dim=1)
        return self.linear(f"{name}.output", self.attend(layer, self.linear(f"{name}.query", x), key, value, True))

    def feed_forward(self, layer: int, x: Tensor) -> Tensor:
        name, act = f"layers.{layer}.feed_forward", ACTIVATIONS[self.config.hidden_act]
        up = self.linear(f"{name}.up", x)
        return self.linear(f"{name}.down", act(self.linear(f"{name}.gate", x)) * up if self.config.gated else act(up))

    def __call__(
        self, words: Tensor, layers: int, types: Tensor | None = None, encoded: Tensor | None = None
    ) -> Tensor:
        """Return the last hidden states (tokens, hidden_size) for word embeddings (tokens, hidden_size)."""
        x = self.embed(words, types)
        for layer in range(layers):
            sublayers = {"attention": lambda x, i=layer: self.self_attention(i, x)}
            if encoded is not None:
                sublayers["cross_attention"] = lambda x, i=layer: self.cross_attention(i, x, encoded)
            sublayers["feed_forward"] = lambda x, i=layer: self.feed_forward(i, x)
            for name, sublayer in sublayers.items():
                norm = f"layers.{layer}.{name}_norm"
                if self.config.norm_placement == "pre":
                    x = x + sublayer(self.norm(norm, x))
                else:
                    x = self.norm(norm, x + sublayer(x))
        return self.norm("norm", x) if self.config.norm_placement == "pre" else x
