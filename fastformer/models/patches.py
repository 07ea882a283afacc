"""The input block of a Vision Transformer."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import nn

from fastformer.models.configuration import FastformerConfig


class PatchEmbedding(nn.Module):
    """Square patches of an image as tokens, after a learned token for the whole image (Dosovitskiy et al. 2021)."""

    def __init__(self, config: FastformerConfig) -> None:
        super().__init__()
        assert config.image_size is not None and config.patch_size is not None and config.num_channels is not None
        self.image_size, self.num_channels = config.image_size, config.num_channels
        patches = (config.image_size // config.patch_size) ** 2
        self.tokens = 1 + patches
        self.projection = nn.Conv2d(config.num_channels, config.hidden_size, config.patch_size, config.patch_size)
        self.image = nn.Parameter(torch.zeros(config.hidden_size))
        self.position = nn.Embedding(self.tokens, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Map (batch, channels, height, width) to (batch, 1 + patches, hidden_size)."""
        expected = (self.num_channels, self.image_size, self.image_size)
        if tuple(pixel_values.shape[1:]) != expected:
            raise ValueError(
                f"pixel_values must be (batch, {', '.join(map(str, expected))}); got {tuple(pixel_values.shape)}"
            )
        projected = self.projection(pixel_values.to(self.projection.weight.dtype))
        patches = rearrange(projected, "batch hidden rows columns -> batch (rows columns) hidden")
        image = self.image.expand(len(patches), 1, -1)
        return self.dropout(torch.cat([image, patches], dim=1) + self.position.weight)
