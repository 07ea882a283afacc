"""No operator, training step or step of generation makes the host wait for the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from gpu.judging import Call, output_grads, results
from gpu.making import Maker
from torch import Tensor

from fastformer.generation.cached_model import CachedModel
from fastformer.models import FastformerConfig, FastformerForCausalLM, FastformerForMaskedLM
from fastformer.ops import attention
from fastformer.ops.attention import packed_mask


@contextmanager
def no_waiting(dry: bool) -> Iterator[None]:
    """Make PyTorch raise an error where the host would wait."""
    if dry:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_check_itself(real_gpu: None) -> None:
    number = torch.ones((), device="cuda")
    with no_waiting(dry=False), pytest.raises(RuntimeError, match="synchroniz"):
        number.item()


def test_operators(call: Call, dry: bool) -> None:
    """No operator makes the host wait after its first call, which compiles."""
    inputs, grads = call.inputs(torch.bfloat16), output_grads(call, torch.bfloat16)
    results(call.operator, inputs, grads)
    with no_waiting(dry):
        results(call.operator, inputs, grads)


def test_packing_a_mask(make: Maker, dry: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_mask, "_FEWEST_ELEMENTS", 1)
    size = make.size(1000, 140)
    query, key, value = (make.normal(1, 2, size, 20).bfloat16().requires_grad_() for _ in range(3))
    mask = make.booleans(1, 1, size, size, share=0.5)
    attention(query, key, value, mask=mask)
    with no_waiting(dry):
        attention(query, key, value, mask=~mask)


def configuration(make: Maker, **options: object) -> FastformerConfig:
    hidden = make.size(256, 16)
    sizes = {"hidden_size": hidden, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 2 * hidden}
    return FastformerConfig(vocab_size=make.size(1000, 30), max_position_embeddings=128, **sizes, **options)


def masked_batch(make: Maker, vocabulary: int) -> dict[str, Tensor | int]:
    """Return packed sequences, with the positions of the words to predict."""
    lengths = [make.size(100, 7), 1, make.size(77, 5)]
    total = sum(lengths)
    labels = make.integers(vocabulary, total)
    masked = torch.arange(0, total, 3, device=make.device)
    unmasked = torch.ones(total, dtype=torch.bool, device=make.device).index_fill_(0, masked, False)
    return {
        "input_ids": make.integers(vocabulary, total),
        "cu_seqlens": make.ends(lengths),
        "max_seqlen": max(lengths),
        "labels": labels.masked_fill(unmasked, -100),
        "masked_positions": masked,
    }


def test_training_step(make: Maker, dry: bool) -> None:
    """A training step never waits, with mixed precision, dropout, clipping and the optimizer included."""
    torch.manual_seed(0)
    config = configuration(make, attention_probs_dropout_prob=0.1)
    model = FastformerForMaskedLM(config).to(make.device).train()
    batch = masked_batch(make, config.vocab_size)
    optimizer = torch.optim.AdamW(model.parameters(), fused=not dry)

    def step() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(make.device.type, dtype=torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    first = step()
    with no_waiting(dry):
        later = [step() for _ in range(3)]
    assert torch.isfinite(first) and all(torch.isfinite(loss) for loss in later)


@pytest.mark.parametrize("page_size", [None, 4])
def test_decode_step(page_size: int | None, make: Maker, dry: bool) -> None:
    torch.manual_seed(0)
    model = FastformerForCausalLM(configuration(make, stack="decoder")).to(make.device).eval()
    pages = None if page_size is None else 2 * 32 // page_size
    cached = CachedModel(model, slots=2, capacity=32, page_size=page_size, pages=pages)
    for slot in range(2):
        cached.cache.reserve(slot, 32)
    lengths = make.tensor([3, 2], torch.int32)
    with torch.inference_mode():
        logits = cached.prefill([[5, 6, 7], [8, 9]], 0)
        tokens = logits.argmax(-1)[:, None]
        cached.decode(tokens, lengths)
        with no_waiting(dry):
            for _ in range(3):
                logits = cached.decode(tokens, lengths)[:, -1]
                tokens, lengths = logits.argmax(-1)[:, None], lengths + 1
    assert torch.isfinite(logits).all()
