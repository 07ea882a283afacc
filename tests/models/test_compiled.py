"""A compiler sees what it can fuse in a model; attention, dropout's flags and the loss stay operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

from fastformer.models import FastformerConfig, FastformerForCausalLM, FastformerForMaskedLM

pytestmark = pytest.mark.cpu

SHAPE = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
LLAMA = {
    "stack": "decoder",
    "norm": "rms",
    "norm_placement": "pre",
    "gated": True,
    "hidden_act": "silu",
    "position_embedding": "rotary",
    "qk_norm": True,
}


def bert() -> torch.nn.Module:
    return FastformerForMaskedLM(FastformerConfig(**SHAPE, attention_probs_dropout_prob=0.0))


def llama() -> torch.nn.Module:
    return FastformerForCausalLM(FastformerConfig(**SHAPE, **LLAMA, attention_probs_dropout_prob=0.0))


def loss_and_gradients(model: torch.nn.Module, run: Callable[..., Any]) -> tuple[torch.Tensor, dict[str, Any]]:
    torch.manual_seed(1)
    ids = torch.randint(1, 50, (14,))
    boundaries = torch.tensor([0, 9, 14], dtype=torch.int32)
    loss = run(input_ids=ids, cu_seqlens=boundaries, max_seqlen=9, labels=ids).loss
    model.zero_grad()
    loss.backward()
    return loss.detach(), {name: each.grad for name, each in model.named_parameters()}


@pytest.mark.parametrize("make", [bert, llama])
def test_operators_of_a_training_step(make: Callable[[], torch.nn.Module]) -> None:
    torch.manual_seed(0)
    model = make().train()
    operators: set[str] = set()

    def keep(graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        targets = [str(node.target) for node in graph.graph.nodes]
        operators.update(target.split(".")[1] for target in targets if target.startswith("fastformer."))
        return graph

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    torch.testing.assert_close(loss_and_gradients(model, compiled), loss_and_gradients(model, model))
    # The gradients of the embedding's tables are sums in a fixed order, which the compiler's are not on a GPU.
    embedding = {"embedding", "embedding_backward"}
    assert operators == {"attention", "attention_backward", "linear_cross_entropy", "dropout_flags", *embedding}
