"""Hugging Face's models work on a GPU: compiled by Inductor, and in generation with a static cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from gpu.making import Maker
from torch import Tensor, nn

import fastformer
from fastformer.generation import Generator, SamplingParameters
from fastformer.models.conversion import from_hugging_face

pytestmark = pytest.mark.slow
SEED = 1
# A standard deviation of the weights that makes attention far from uniform.
_WIDE = 0.1


def bert(make: Maker) -> transformers.PreTrainedModel:
    config = transformers.BertConfig(**sizes(make), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return transformers.BertForMaskedLM(config)


def llama(make: Maker) -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(**sizes(make), num_key_value_heads=2, eos_token_id=None, bos_token_id=None)
    return transformers.LlamaForCausalLM(config)


def sizes(make: Maker) -> dict[str, Any]:
    hidden = make.size(256, 32)
    return {
        "vocab_size": make.size(1000, 64),
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": _WIDE if not make.dry else 0.3,
    }


def batch_of(make: Maker) -> dict[str, Tensor]:
    """Return sequences padded on the right, without labels on the padding."""
    tokens = make.size(200, 9)
    lengths = make.tensor([tokens, tokens // 2, tokens - 3], torch.int64)
    real = torch.arange(tokens, device=make.device) < lengths[:, None]
    ids = make.integers(make.size(1000, 64) - 1, 3, tokens) + 1
    return {"input_ids": ids, "attention_mask": real.long(), "labels": ids.masked_fill(~real, -100)}


def loss_and_gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    grads = {n.removeprefix("_orig_mod."): p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Fail unless equal up to the order of float32 sums in about ten operations: about a hundred roundings."""
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        allowed = 1000 * torch.finfo(torch.float32).eps * max(1.0, wanted.abs().max().item())
        error = (actual[name] - wanted).abs().max().item()
        assert error <= allowed, f"{name}: differs by {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("build", [bert, llama])
def test_compiled(build: Callable[[Maker], transformers.PreTrainedModel], accelerated: bool, make: Maker) -> None:
    """A model compiled as one graph gives the same, forward and backward; a dry run only traces the code."""
    torch.manual_seed(SEED)
    model, batch = build(make).to(make.device), batch_of(make)
    model.set_attn_implementation("eager")
    expected = loss_and_gradients(model, batch)
    if accelerated:
        fastformer.accelerate(model)
    else:
        model.set_attn_implementation("fastformer")
    assert_close(loss_and_gradients(model, batch), expected)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager" if make.dry else "inductor")
    assert_close(loss_and_gradients(compiled, batch), expected)


def test_generation(make: Maker) -> None:
    """Greedy tokens are the same with a static cache, whose steps transformers compiles, and in our own generator."""
    torch.manual_seed(SEED)
    model, new = llama(make).to(make.device).eval(), 8
    ids = make.integers(make.size(1000, 64) - 1, 2, make.size(50, 6)) + 1
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    model.set_attn_implementation("eager")
    expected = model.generate(ids, **options)
    model.set_attn_implementation("fastformer")
    torch._dynamo.reset()
    assert torch.equal(model.generate(ids, **options, cache_implementation="static"), expected)
    ours = Generator(from_hugging_face(model).to(make.device))
    generated = ours.generate(ids.tolist(), SamplingParameters(max_new_tokens=new))
    assert [each.tokens for each in generated] == expected[:, -new:].tolist()
