"""CUDA graphs capture forward and backward once, and replays with other inputs are right."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpu.judging import SEED, Call, assert_same, output_grads, results
from gpu.making import Maker, dry_with
from recorded_graphs import FakeRecorder
from torch import Tensor

import fastformer.nn
from fastformer.cuda_graphs import CudaRecorder
from fastformer.generation import Generator, SamplingParameters, generator, workspace
from fastformer.models import FastformerConfig, FastformerForCausalLM, FastformerForPreTraining
from fastformer.ops import append_to_cache, attention, decode_attention, layer_norm, rotary_frequencies, rotary_table
from fastformer.ops.attention import packed_mask

_WARM_UP = 3
Results = Callable[[], list[Tensor]]


def captured(function: Results, dry: bool) -> Results:
    """Capture the function and return its replay; in a dry run, without graphs, return the function itself.

    The function runs before the capture, on its own stream as PyTorch requires, so that its kernels are compiled.
    """
    if dry:
        return function
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function()

    def replay() -> list[Tensor]:
        graph.replay()
        return [output.clone() for output in outputs]

    return replay


def test_other_inputs(call: Call, dry: bool) -> None:
    if call.random:
        pytest.skip("dropout draws anew at each replay: see below")
    first, grads = call.inputs(torch.bfloat16), output_grads(call, torch.bfloat16)
    replay = captured(lambda: results(call.operator, first, grads), dry)
    replay()
    # The same values in another order, which cannot overflow either.
    others = [tensor.flatten().flip(0).view_as(tensor) for tensor in first]
    expected = results(call.operator, others, grads)
    for tensor, values in zip(first, others, strict=True):
        tensor.copy_(values)
    assert_same(replay(), expected)


def test_a_mask_that_is_packed_may_change(make: Maker, dry: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph packs the elements that a mask has at the replay, even if the mask was packed before."""
    monkeypatch.setattr(packed_mask, "_FEWEST_ELEMENTS", 1)
    size, head_dim = make.size(1000, 140), 20
    mask = make.booleans(1, 1, size, size, share=0.5)
    tensors = [make.normal(1, 2, size, head_dim).bfloat16().requires_grad_() for _ in range(3)]

    def step() -> list[Tensor]:
        output = attention(*tensors, mask=mask)
        return [output.detach(), *torch.autograd.grad(output.sum(), tensors)]

    step()
    replay = captured(step, dry)
    mask.copy_(mask.roll(7, -1))
    assert_same(replay(), step())


def test_dropout_is_drawn_anew(make: Maker, dry: bool) -> None:
    """Each replay drops other elements, and its backward the same ones as its forward."""
    x = torch.ones(make.size(256, 5), make.size(1024, 20), device=make.device, dtype=torch.bfloat16)
    nothing = torch.zeros_like(x)
    columns = (x.shape[1],)

    def step() -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        _, total = layer_norm(leaf, columns, residual=nothing, dropout_p=0.5)
        return [total.detach(), *torch.autograd.grad(total, leaf, x)]

    replay = captured(step, dry)
    replays = [replay() for _ in range(3)]
    for dropped, grad in replays:
        assert torch.equal(dropped, grad)
        assert 0.3 < (dropped == 0).float().mean().item() < 0.7
    assert not torch.equal(replays[0][0], replays[1][0]) and not torch.equal(replays[1][0], replays[2][0])


def test_graphed_layer(make: Maker, real_gpu: None) -> None:
    """`make_graphed_callables` works on a Transformer layer, forward and backward."""
    torch.manual_seed(SEED)
    options = {"batch_first": True, "device": make.device, "dtype": torch.bfloat16, "dropout": 0.0}
    layer = fastformer.nn.TransformerEncoderLayer(256, 4, 512, **options)
    inputs = [make.normal(4, 200, 256).bfloat16().requires_grad_() for _ in range(2)]
    expected = [results(layer, [x], [torch.ones_like(x)]) for x in inputs]
    graphed = torch.cuda.make_graphed_callables(layer, (inputs[0],))
    for x, wanted in zip(inputs, expected, strict=True):
        assert_same([tensor.clone() for tensor in results(graphed, [x], [torch.ones_like(x)])], wanted)


def test_decode_steps(make: Maker, dry: bool) -> None:
    """A step that appends, attends and advances the lengths is right in replays, while the cache grows."""
    batch, heads, kv_heads, head_dim, capacity, steps = 3, 8, 2, make.size(128, 8), make.size(2048, 32), 5
    cos, sin = rotary_table(rotary_frequencies(head_dim), capacity, device=make.device)
    new = [make.normal(batch, h, 1, head_dim).bfloat16() for h in (heads, kv_heads, kv_heads)]
    start = [make.normal(batch, kv_heads, capacity, head_dim).bfloat16() for _ in range(2)]
    begin = make.tensor([1, capacity // 2, capacity - _WARM_UP - steps], torch.int32)

    def state() -> tuple[list[Tensor], Tensor]:
        return [cache.clone() for cache in start], begin.clone()

    def step(caches: list[Tensor], lengths: Tensor) -> list[Tensor]:
        query, key, value = new
        query = append_to_cache(key, value, *caches, lengths=lengths, query=query, cos=cos, sin=sin)
        lengths += 1
        return [decode_attention(query, *caches, lengths=lengths)]

    caches, lengths = state()
    replay = captured(lambda: step(caches, lengths), dry)
    for tensor, values in zip([*caches, lengths], [*start, begin], strict=True):
        tensor.copy_(values)
    others = state()
    for _ in range(steps):
        assert_same(replay(), step(*others), exactly=True)
    assert torch.equal(lengths, others[1])
    assert_same(caches, others[0], exactly=True)


@pytest.mark.parametrize("draft", [False, True])
@pytest.mark.parametrize("page_size", [None, 16])
def test_generation(
    page_size: int | None, draft: bool, make: Maker, dry: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A generator gives the same with and without recorded steps, while sequences, some sampled, come and go."""
    if dry:
        monkeypatch.setattr(workspace, "CudaRecorder", FakeRecorder)
        monkeypatch.setattr(generator, "why_no_graph", lambda model, device: None)
    torch.manual_seed(SEED)
    hidden = make.size(256, 16)
    sizes = {"hidden_size": hidden, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 2 * hidden}
    sizes |= {"vocab_size": 100, "initializer_range": 0.2}  # no two tokens have almost the same probability
    config = FastformerConfig(stack="decoder", position_embedding="rotary", **sizes)
    model = FastformerForCausalLM(config).to(make.device).eval()
    prompts = [[1 + number] * (1 + 3 * number % 5) for number in range(make.size(40, 5))]
    parameters = [
        SamplingParameters(max_new_tokens=2 + 7 * number % make.size(60, 6), seed=number, temperature=1.0, top_k=9)
        if number % 3
        else SamplingParameters(max_new_tokens=3 + number % 11, eos_token_ids=range(5))
        for number in range(len(prompts))
    ]
    options = {"slots": make.size(8, 3), "page_size": page_size, "draft": model if draft else None}
    expected = Generator(model, pack_weights=False, cuda_graphs=False, **options).generate(prompts, parameters)
    recorded = Generator(model, pack_weights=False, cuda_graphs=None if dry else True, **options)
    for _ in range(2):
        assert recorded.generate(prompts, parameters) == expected


@pytest.mark.parametrize("accumulate", dry_with([2], [1, 2]))
def test_training_step(accumulate: int, make: Maker, dry: bool) -> None:
    """Graphs give the same losses and gradients for several batches, dropout, mixed precision, clipping and AdamW."""
    from fastformer.training.cuda_graphs import RecordedSteps
    from fastformer.training.pretraining import MaskedLanguageModeling

    hidden = make.size(256, 16)
    sizes = {"hidden_size": hidden, "num_attention_heads": 2, "intermediate_size": 2 * hidden}
    sizes |= {"num_hidden_layers": make.size(3, 1), "vocab_size": make.size(5000, 50)}
    config = FastformerConfig(attention_probs_dropout_prob=0.1, **sizes)
    kinds = [16] * 4 if dry else [1280, 2560, 2560, 1280, 2560, 1280, 2560, 2560]
    batches = [masked_batch(make, tokens) for tokens in kinds]

    def trained(recorded: bool) -> list[Tensor]:
        torch.manual_seed(SEED)
        module = MaskedLanguageModeling()
        module.model = FastformerForPreTraining(config).to(make.device).train()
        module._trainer = SimpleNamespace(accumulate_grad_batches=accumulate, distributed_sampler_kwargs=None)
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
        steps = RecordedSteps(module, FakeRecorder() if dry else CudaRecorder(make.device))
        found = []
        for number, batch in enumerate(batches):
            counts = torch.full((2,), 10.0, device=make.device)
            torch.manual_seed(number)
            with torch.autocast(make.device.type, dtype=torch.bfloat16):
                if recorded:
                    loss, _ = steps.run(dict(batch), counts, counts * accumulate, number % accumulate == 0)
                else:
                    loss, _ = module.objective(dict(batch), counts, counts * accumulate)
            if recorded:
                steps.hand_over()
            else:
                (loss / accumulate).backward()
            found += [loss.detach(), *(parameter.grad.clone() for parameter in module.parameters())]
            if number % accumulate == accumulate - 1:
                torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        return found

    assert_same(trained(recorded=True), trained(recorded=False))


def masked_batch(make: Maker, tokens: int) -> dict[str, Any]:
    """Return four sequences, with tokens to predict among the first ten."""
    labels = torch.full((tokens,), -100, device=make.device)
    labels[:10] = make.integers(50, 10)
    return {
        "input_ids": make.integers(50, tokens),
        "token_type_ids": torch.zeros(tokens, dtype=torch.int64, device=make.device),
        "position_ids": torch.arange(tokens, device=make.device) % (tokens // 4),
        "cu_seqlens": make.ends([tokens // 4] * 4),
        "max_seqlen": tokens // 4,
        "labels": labels,
        "masked_positions": torch.arange(10, device=make.device),
        "next_sentence_label": make.integers(2, 4),
    }
