"""Model code gives the same results with torch.nn and with fastformer.nn, if only the package is changed."""

from __future__ import annotations

import math
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

import fastformer.nn

VOCABULARY, FEATURES, HEADS, INNER, PADDING = 29, 16, 4, 24, 0


def translation_model(nn: ModuleType) -> torch.nn.Module:
    """Build an encoder-decoder for translation on `nn.Transformer`, sequence first, as tutorials do."""

    class Positions(nn.Module):
        def __init__(self, features: int, dropout: float, longest: int = 50) -> None:
            super().__init__()
            self.dropout = nn.Dropout(dropout)
            frequency = torch.exp(torch.arange(0, features, 2) * (-math.log(1e4) / features))
            angle = torch.arange(longest)[:, None] * frequency
            self.register_buffer("table", torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[:, None])

        def forward(self, embedded: Tensor) -> Tensor:
            return self.dropout(embedded + self.table[: embedded.shape[0]])

    class Translator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transformer = nn.Transformer(
                d_model=FEATURES,
                nhead=HEADS,
                num_encoder_layers=2,
                num_decoder_layers=2,
                dim_feedforward=INNER,
                dropout=0.0,
            )
            self.source_embedding = nn.Embedding(VOCABULARY, FEATURES)
            self.target_embedding = nn.Embedding(VOCABULARY, FEATURES)
            self.positions = Positions(FEATURES, dropout=0.0)
            self.to_vocabulary = nn.Linear(FEATURES, VOCABULARY)
            for parameter in self.parameters():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)

        def embed(self, embedding: torch.nn.Embedding, tokens: Tensor) -> Tensor:
            return self.positions(embedding(tokens) * math.sqrt(FEATURES))

        def forward(self, source: Tensor, target: Tensor) -> Tensor:
            source_length, target_length = source.shape[0], target.shape[0]
            source_padding, target_padding = (source == PADDING).t(), (target == PADDING).t()
            decoded = self.transformer(
                self.embed(self.source_embedding, source),
                self.embed(self.target_embedding, target),
                torch.zeros(source_length, source_length, dtype=torch.bool),
                nn.Transformer.generate_square_subsequent_mask(target_length),
                None,
                source_padding,
                target_padding,
                source_padding,
            )
            return self.to_vocabulary(decoded)

        @torch.no_grad()
        def translate(self, source: Tensor, longest: int) -> Tensor:
            mask = torch.zeros(len(source), len(source), dtype=torch.bool)
            memory = self.transformer.encoder(self.embed(self.source_embedding, source), mask)
            target = torch.ones(1, source.shape[1], dtype=torch.long)
            while len(target) < longest:
                causal = self.transformer.generate_square_subsequent_mask(len(target)).type(torch.bool)
                embedded = self.embed(self.target_embedding, target)
                decoded = self.transformer.decoder(embedded, memory, causal)
                following = self.to_vocabulary(decoded[-1]).argmax(-1)
                target = torch.cat([target, following[None]])
            return target

    return Translator()


def language_model(nn: ModuleType) -> torch.nn.Module:
    """Build a causal language model on `nn.TransformerEncoder`, batch first."""

    class LanguageModel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(VOCABULARY, FEATURES)
            layer = nn.TransformerEncoderLayer(FEATURES, HEADS, INNER, dropout=0.0, activation="gelu", batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, num_layers=2, norm=nn.LayerNorm(FEATURES))
            self.head = nn.Sequential(nn.Dropout(0.0), nn.Linear(FEATURES, VOCABULARY))

        def forward(self, tokens: Tensor) -> Tensor:
            mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
            return self.head(self.encoder(self.embedding(tokens), mask))

    return LanguageModel()


def language_model_by_inheritance(nn: ModuleType) -> torch.nn.Module:
    """Build a causal language model as a subclass of `nn.Transformer` with another decoder, sequence first."""

    class LanguageModel(nn.Transformer):
        def __init__(self) -> None:
            super().__init__(FEATURES, HEADS, num_encoder_layers=2, dim_feedforward=INNER, dropout=0.0)
            self.embedding = nn.Embedding(VOCABULARY, FEATURES)
            self.decoder = nn.Linear(FEATURES, VOCABULARY)
            self.mask: Tensor | None = None
            nn.init.zeros_(self.decoder.bias)
            nn.init.uniform_(self.decoder.weight, -0.1, 0.1)

        def forward(self, tokens: Tensor) -> Tensor:
            if self.mask is None or len(self.mask) != len(tokens):
                self.mask = self.generate_square_subsequent_mask(len(tokens))
            embedded = self.embedding(tokens) * math.sqrt(FEATURES)
            return nn.functional.log_softmax(self.decoder(self.encoder(embedded, mask=self.mask)), dim=-1)

    return LanguageModel()


def twins(build) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Build the model in torch.nn and in fastformer.nn, from the same seed."""
    models = []
    for package in (torch.nn, fastformer.nn):
        torch.manual_seed(0)
        models.append(build(package))
    return models[0], models[1]


def train(model: torch.nn.Module, nn: ModuleType, inputs: tuple[Tensor, ...], labels: Tensor) -> list[float]:
    """Train for five steps, as tutorials do, and return the losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    criterion = nn.CrossEntropyLoss(ignore_index=PADDING)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = criterion(model(*inputs).reshape(-1, VOCABULARY), labels.reshape(-1))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.quick
@pytest.mark.filterwarnings("ignore:Support for mismatched", "ignore:enable_nested_tensor")
def test_translation_model() -> None:
    theirs, ours = twins(translation_model)
    source, target = torch.randint(1, VOCABULARY, (9, 3)), torch.randint(1, VOCABULARY, (7, 3))
    source[6:, 1] = target[5:, 2] = PADDING
    expected = theirs(source, target[:-1])
    torch.testing.assert_close(ours(source, target[:-1]), expected)
    inputs, labels = (source, target[:-1]), target[1:]
    expected_losses = train(theirs, torch.nn, inputs, labels)
    assert expected_losses[-1] < expected_losses[0] - 0.1
    assert train(ours, fastformer.nn, inputs, labels) == pytest.approx(expected_losses, rel=1e-4)
    assert torch.equal(ours.eval().translate(source[:, :1], 12), theirs.eval().translate(source[:, :1], 12))


@pytest.mark.parametrize("build", [language_model, language_model_by_inheritance])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_language_model(build) -> None:
    theirs, ours = twins(build)
    tokens = torch.randint(1, VOCABULARY, (8, 8))
    torch.testing.assert_close(ours(tokens), theirs(tokens))
    labels = tokens.roll(-1, 0)
    expected_losses = train(theirs, torch.nn, (tokens,), labels)
    assert expected_losses[-1] < expected_losses[0] - 0.1
    assert train(ours, fastformer.nn, (tokens,), labels) == pytest.approx(expected_losses, rel=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(tokens), theirs.eval()(tokens), rtol=1e-4, atol=1e-4)


def test_other_names_are_torch_nns() -> None:
    assert fastformer.nn.Module is torch.nn.Module
    assert fastformer.nn.functional.gelu is torch.nn.functional.gelu
    assert fastformer.nn.functional.layer_norm is fastformer.layer_norm
    assert {"gelu", "layer_norm"} <= set(dir(fastformer.nn.functional))
    # PyTorch's module is not hidden by one of Fastformer.
    assert fastformer.nn.attention is torch.nn.attention
    assert {"Linear", "MultiheadAttention", "functional"} <= set(dir(fastformer.nn))
    with pytest.raises(AttributeError, match=r"neither 'fastformer.nn' nor 'torch.nn' has an attribute 'Nothing'"):
        _ = fastformer.nn.Nothing


def test_no_name_of_torch_nn_is_hidden_but_by_its_twin() -> None:
    shared = {name for name in set(dir(torch.nn)) & set(vars(fastformer.nn)) if not name.startswith("__")}
    for name in shared:
        theirs, ours = getattr(torch.nn, name), getattr(fastformer.nn, name)
        assert ours is theirs or f"`torch.nn.{name}`" in ours.__doc__, name


@pytest.mark.quick
def test_functions_equal_pytorchs() -> None:
    x, weight, bias = torch.randn(3, 5, 8), torch.randn(8), torch.randn(8)
    ours, theirs = fastformer.nn.functional, torch.nn.functional
    torch.testing.assert_close(ours.layer_norm(x, [8], weight, bias, 0.1), theirs.layer_norm(x, [8], weight, bias, 0.1))
    torch.testing.assert_close(ours.rms_norm(x, [5, 8]), theirs.rms_norm(x, [5, 8]))
    call = {"attn_mask": torch.rand(5, 5) < 2, "scale": 0.3}
    expected = theirs.scaled_dot_product_attention(x, x, x, **call)
    torch.testing.assert_close(ours.scaled_dot_product_attention(x, x, x, **call), expected)


def test_imports_no_transformers() -> None:
    check = "import sys, fastformer.nn; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0
