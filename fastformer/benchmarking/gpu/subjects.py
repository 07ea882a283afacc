"""Models of published shapes that are trained on random tokens: ours, and Hugging Face's of the same shape."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

import fastformer.models
from fastformer.models import FastformerConfig, preset
from fastformer.planning.model_work import meta_model

_MASKED_SHARE = 0.15


@dataclass(frozen=True)
class Subject:
    """Training of a published shape on random tokens, in sequences of equal length without padding.

    Attributes:
        name: the name of the model.
        tokens: tokens of a step.
        length: tokens of each sequence.
        dry: whether the model is tiny.
    """

    name: str
    tokens: int
    length: int
    dry: bool

    @property
    def masked(self) -> bool:
        """Whether the model predicts masked tokens from both sides, rather than each token from the earlier ones."""
        return self.name == "bert-base"

    @cached_property
    def config(self) -> FastformerConfig:
        tiny = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
        options: dict[str, Any] = {**tiny, "vocab_size": 100} if self.dry else {}
        return preset(self.name, **options, max_position_embeddings=max(self.length, 512))

    @property
    def predicted(self) -> int:
        """The number of tokens in a sequence that the head predicts."""
        return round(_MASKED_SHARE * self.length) if self.masked else self.length

    @property
    def flop_per_token(self) -> float:
        """The operations per token: 6 x parameters + 12 x layers x width x length.

        The parameters of the head count only for the share of tokens that it predicts.
        """
        width, layers = self.config.hidden_size, self.config.num_hidden_layers
        blocks = layers * (4 * width**2 + 2 * width * self.config.intermediate_size)
        head = self.config.vocab_size * width + (width**2 if self.masked else 0)
        return 6 * (blocks + head * self.predicted / self.length) + 12 * layers * width * self.length

    def hugging_face(self, attention: str, device: torch.device) -> PreTrainedModel:
        """Hugging Face's model, with the same dropout as ours: of hidden states, not of attention weights."""
        config = self.config
        sizes: dict[str, Any] = {"vocab_size": config.vocab_size, "attn_implementation": attention}
        torch.manual_seed(0)
        with device:
            if self.masked:
                return BertForMaskedLM(
                    BertConfig(
                        num_hidden_layers=config.num_hidden_layers,
                        hidden_size=config.hidden_size,
                        num_attention_heads=config.num_attention_heads,
                        intermediate_size=config.intermediate_size,
                        hidden_dropout_prob=config.hidden_dropout_prob,
                        attention_probs_dropout_prob=0.0,
                        **sizes,
                    )
                )
            return GPT2LMHeadModel(
                GPT2Config(
                    n_layer=config.num_hidden_layers,
                    n_embd=config.hidden_size,
                    n_head=config.num_attention_heads,
                    resid_pdrop=config.hidden_dropout_prob,
                    embd_pdrop=config.hidden_dropout_prob,
                    attn_pdrop=0.0,
                    bos_token_id=0,
                    eos_token_id=0,
                    **sizes,
                )
            )

    def ours(self, device: torch.device) -> PreTrainedModel:
        kind = "FastformerForMaskedLM" if self.masked else "FastformerForCausalLM"
        if device.type == "meta":
            return meta_model(self.config, kind, "bf16-mixed")
        torch.manual_seed(0)
        with device:
            return getattr(fastformer.models, kind)(self.config)

    def padded(self, device: torch.device) -> dict[str, Any]:
        """The batch in the form of Hugging Face's models."""
        ids = torch.randint(5, self.config.vocab_size, (self.tokens // self.length, self.length), device=device)
        labels = ids
        if self.masked:
            labels = torch.full_like(ids, -100)
            labels[:, : self.predicted] = ids[:, : self.predicted]
        return {"input_ids": ids, "labels": labels}

    def packed(self, device: torch.device) -> dict[str, Any]:
        """The batch in the form of our models."""
        ids = torch.randint(5, self.config.vocab_size, (self.tokens,), device=device)
        boundaries = torch.arange(0, self.tokens + 1, self.length, dtype=torch.int32, device=device)
        batch = {"input_ids": ids, "labels": ids, "cu_seqlens": boundaries, "max_seqlen": self.length}
        if self.masked:
            firsts = boundaries[:-1, None].long() + torch.arange(self.predicted, device=device)
            batch["masked_positions"] = firsts.flatten()
        return batch
