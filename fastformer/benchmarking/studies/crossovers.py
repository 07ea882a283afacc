"""Crossovers of two ways of computing, by length, padding, vocabulary, depth and size of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from fastformer_kernels.plans import SAVED_PASSES, Operation, default_plan
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastformer.benchmarking.measurement import OURS, TIME, Measurement, Metric
from fastformer.benchmarking.study import Case, Peer, Setting, TimedStudy
from fastformer.benchmarking.timing import Run
from fastformer.benchmarking.training_steps import Shape, training_step
from fastformer.models import PRESETS, FastformerConfig, FastformerModel, preset
from fastformer.ops import attention, feed_forward, linear_cross_entropy
from fastformer.planning.gpus import GIB, GPUS, GPUS_PER_NODE
from fastformer.planning.needs import Setup, plan

NAME = "crossovers"
_HEADS, _HEAD_DIM = 4, 64
_HIDDEN = _HEADS * _HEAD_DIM


def cases(setting: Setting) -> list[Case]:
    return [
        *_by_length(setting),
        *_by_padding(setting),
        *_by_vocabulary(setting),
        *_with_recomputation(setting),
    ]


# --- Attention by length ----------------------------------------------------------------------------------------------

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def _by_length(setting: Setting) -> Iterator[Case]:
    """Yield cases with a fixed number of tokens, in sequences of equal length without padding."""
    tokens, lengths = (512, (32,)) if setting.quick else (4096, (32, 64, 128, 512, 1024, 2048))
    for length in lengths:
        at = partial(_case, axis="tokens of a sequence", at=length, work={"tokens": tokens})
        packed = partial(_packed_attention, setting.device, tokens, length)
        dense = partial(_dense_attention, setting.device, tokens, length)
        peers = {
            OURS: packed,
            "fastformer, dense": partial(dense, attention),
            "SDPA flash": partial(dense, partial(_sdpa, SDPBackend.FLASH_ATTENTION)),
            "SDPA math": partial(dense, partial(_sdpa, SDPBackend.MATH)),
        }
        yield at("attention", peers, agree=_equal_losses)
        parts = {"attention": packed, "feed-forward": partial(_feed_forward, setting.device, tokens)}
        yield at("the parts of a block", parts)


def _case(
    curve: str,
    peers: Mapping[str, Callable[[], Run]],
    axis: str,
    at: float,
    work: dict[str, float],
    agree: Callable[[dict[str, object]], None] | None = None,
    memory: bool = False,
) -> Case:
    name = f"{curve}, {at:,.4g} {axis}"
    return Case(name, {peer: Peer(run) for peer, run in peers.items()}, work, agree, curve, axis, at, memory)


def _heads(device: torch.device, tokens: int, length: int) -> Tensor:
    """Queries, keys and values, each (sequences, length, heads, head_dim)."""
    torch.manual_seed(0)
    return torch.randn(3, tokens // length, length, _HEADS, _HEAD_DIM, device=device, requires_grad=True)


def _packed_attention(device: torch.device, tokens: int, length: int) -> Run:
    heads = _heads(device, tokens, length)
    attend = _packed([length] * (tokens // length), device)
    return _forward_and_backward(lambda: attend(*heads.flatten(1, 2)), [heads])


def _dense_attention(device: torch.device, tokens: int, length: int, attend: Attend) -> Run:
    heads = _heads(device, tokens, length)
    return _forward_and_backward(lambda: attend(*heads.transpose(2, 3)), [heads])


def _packed(lengths: Sequence[int], device: torch.device) -> Attend:
    boundaries, longest = _boundaries(lengths, device), max(lengths)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        attended: Any = attention(query, key, value, cu_seqlens_q=boundaries, max_seqlen_q=longest)
        return attended

    return attend


def _sdpa(backend: SDPBackend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(query, key, value)


def _feed_forward(device: torch.device, tokens: int) -> Run:
    torch.manual_seed(0)
    leaves = [torch.randn(tokens, _HIDDEN), torch.randn(4 * _HIDDEN, _HIDDEN) / 16, torch.randn(_HIDDEN, 4 * _HIDDEN)]
    leaves = [leaf.to(device).requires_grad_() for leaf in leaves]
    return _forward_and_backward(lambda: feed_forward(leaves[0], leaves[1], leaves[2]), leaves)


def _forward_and_backward(forward: Callable[[], Tensor], leaves: Sequence[Tensor]) -> Run:
    """A run that computes the mean square of the result of `forward`, and its gradients."""

    def run() -> float:
        for leaf in leaves:
            leaf.grad = None
        loss = forward().square().mean()
        loss.backward()
        return loss.item()

    return run


def _boundaries(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


def _equal_losses(losses: dict[str, object]) -> None:
    for peer, loss in losses.items():
        torch.testing.assert_close(loss, losses[OURS], rtol=1e-4, atol=0, msg=f"{peer}: {loss}, not {losses[OURS]}")


# --- Padding ----------------------------------------------------------------------------------------------------------


def _by_padding(setting: Setting) -> Iterator[Case]:
    """Yield cases of a padded batch of fixed size with fewer and fewer tokens in it, packed and padded."""
    sequences, longest, factors = (4, 64, (2,)) if setting.quick else (16, 256, (1, 1.1, 1.25, 1.5, 2, 4))
    for factor in factors:
        # If u is spread evenly over (0, 1), the powers u^(factor - 1) have the mean 1 / factor.
        spread = [(place + 0.5) / sequences for place in range(sequences)]
        lengths = [max(1, round(longest * share ** (factor - 1))) for share in spread]
        at = partial(
            _case,
            axis="padded tokens for each real one",
            at=sequences * longest / sum(lengths),
            work={"tokens": sum(lengths)},
        )
        arguments = (setting.device, lengths, longest)
        peers = {OURS: partial(_attention_packed, *arguments), "SDPA, padded": partial(_attention_padded, *arguments)}
        yield at("attention of padded batches", peers, agree=_equal_losses)
        peers = {OURS: partial(_encoder_packed, *arguments), "PyTorch, padded": partial(_encoder_padded, *arguments)}
        yield at("an encoder of padded batches", peers)


def _real(lengths: Sequence[int], longest: int, device: torch.device) -> Tensor:
    """A boolean mask of the places of the padded batch that have a token."""
    return torch.arange(longest, device=device) < torch.tensor(lengths, device=device)[:, None]


def _attention_packed(device: torch.device, lengths: Sequence[int], longest: int) -> Run:
    heads = _heads(device, len(lengths) * longest, longest).detach()
    tokens = heads[:, _real(lengths, longest, device)].requires_grad_()
    attend = _packed(lengths, device)
    return _forward_and_backward(lambda: attend(*tokens), [tokens])


def _attention_padded(device: torch.device, lengths: Sequence[int], longest: int) -> Run:
    heads = _heads(device, len(lengths) * longest, longest)
    real = _real(lengths, longest, device)

    def forward() -> Tensor:
        query, key, value = heads.transpose(2, 3)
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=real[:, None, None])
        return output.transpose(1, 2)[real]

    return _forward_and_backward(forward, [heads])


def _encoder_packed(device: torch.device, lengths: Sequence[int], longest: int) -> Run:
    config = FastformerConfig(
        hidden_size=_HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=_HEADS,
        intermediate_size=4 * _HIDDEN,
        vocab_size=2,
        hidden_dropout_prob=0.0,
        max_position_embeddings=longest,
    )
    with device:
        model = FastformerModel(config).train()
    embeddings = torch.randn(sum(lengths), _HIDDEN, device=device)
    boundaries = _boundaries(lengths, device)

    def forward() -> Tensor:
        output = model(inputs_embeds=embeddings, cu_seqlens=boundaries, max_seqlen=longest)
        return output["last_hidden_state"]

    return _forward_and_backward(forward, list(model.parameters()))


def _encoder_padded(device: torch.device, lengths: Sequence[int], longest: int) -> Run:
    layer = nn.TransformerEncoderLayer(_HIDDEN, _HEADS, 4 * _HIDDEN, 0.0, "gelu", batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).to(device).train()
    embeddings = torch.randn(len(lengths), longest, _HIDDEN, device=device)
    real = _real(lengths, longest, device)
    padding = None if real.all() else ~real
    return _forward_and_backward(
        lambda: model(embeddings, src_key_padding_mask=padding)[real], list(model.parameters())
    )


# --- The vocabulary, and recomputation --------------------------------------------------------------------------------


def _by_vocabulary(setting: Setting) -> Iterator[Case]:
    tokens, sizes = (128, (512,)) if setting.quick else (1024, (64, 256, 1024, 4096, 16384, 32768))
    for size in sizes:
        peers = {
            OURS: partial(_projection_loss, setting.device, tokens, size, linear_cross_entropy),
            "PyTorch, all logits": partial(_projection_loss, setting.device, tokens, size, _logits_loss),
        }
        yield _case("the loss of a vocabulary", peers, "words", size, {"tokens": tokens}, _equal_losses)


def _logits_loss(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(input, weight), target)


def _projection_loss(
    device: torch.device, tokens: int, words: int, loss: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Run:
    torch.manual_seed(0)
    leaves = [torch.randn(tokens, _HIDDEN), torch.randn(words, _HIDDEN) * 0.02]
    leaves = [leaf.to(device).requires_grad_() for leaf in leaves]
    target = torch.randint(words, (tokens,), device=device)

    def run() -> float:
        for leaf in leaves:
            leaf.grad = None
        value = loss(leaves[0], leaves[1], target)
        value.backward()
        return value.item()

    return run


def _with_recomputation(setting: Setting) -> Iterator[Case]:
    tokens, layers = (128, (2,)) if setting.quick else (2048, (2, 8))
    for number in layers:
        shape = Shape("BERT-like", number, _HIDDEN, tokens, length=64, vocabulary=1024)
        peers = {
            OURS: partial(training_step, shape, setting.device),
            "blocks computed again": partial(training_step, shape, setting.device, recomputation=True),
        }
        work: dict[str, float] = {"tokens": tokens}
        yield _case("a training step", peers, "layers", number, work, _equal_losses, memory=not setting.quick)


# --- GPUs, by their data sheets ---------------------------------------------------------------------------------------

_MEMORY = Metric("memory of a GPU", "GiB")
_PASSES = Metric("beyond what both do", "passes over the result")
_SIZES = ("gpt3-small", "gpt3-medium", "gpt3-xl", "gpt3-2.7b", "gpt3-6.7b", "gpt3-13b")
_OUTPUT: Operation = "output_forward"
_DEPTHS = (256, 512, 1024, 2048, 4096, 8192)


def modelled(setting: Setting, _: Sequence[Measurement]) -> Iterator[Measurement]:
    """Yield the crossovers on GPUs, computed by rules and plans."""
    yield from _strategies(_SIZES[:1] if setting.quick else _SIZES)
    for architecture in ("sm_80", "sm_90", "sm_100", "gfx942"):
        yield from _feed_forward_plans(architecture)


def _strategies(names: Sequence[str]) -> Iterator[Measurement]:
    """Yield memory and communication of DDP and FSDP2 on a node of H100s, by the planner.

    Each GPU has one example of 2,048 tokens at a time.
    """
    gpu = GPUS["h100"]
    for name in names:
        for peer, strategy in (("DDP", "ddp"), ("FSDP2", "fsdp")):
            setup = Setup(gpu, devices=GPUS_PER_NODE, strategy=strategy, length=2048, batch_size=1)
            planned = plan(preset(name), PRESETS[name].model, setup)
            at = partial(_modelled, axis="million parameters", at=planned.parameters / 1e6)
            if peer == "DDP":
                yield at(f"{name} on 8 H100s", "an H100's memory", _MEMORY, planned.available / GIB)
            yield at(f"{name} on 8 H100s", peer, _MEMORY, planned.memory.total / GIB)
            yield at(f"{name} on 8 H100s, exchange of data", peer, TIME, planned.communication)


def _feed_forward_plans(architecture: str) -> Iterator[Measurement]:
    """Yield the rule of `fastformer_kernels.plans`: with depth, a fused product loses what it saves in passes."""
    passes = SAVED_PASSES[_OUTPUT]
    deepest = max(
        depth
        for depth in range(128, 2 * _DEPTHS[-1], 128)
        if default_plan(architecture, _OUTPUT, "16-bit", 4096, depth) == "fused"
    )
    for depth in _DEPTHS:
        at = partial(_modelled, f"output projection on {architecture}, depth {depth:,}", axis="depth", at=depth)
        yield at("fused", _PASSES, passes * depth / deepest)
        yield at("library", _PASSES, passes)


def _modelled(case: str, peer: str, metric: Metric, value: float, axis: str, at: float) -> Measurement:
    curve = case.split(", ")[0] if metric == _PASSES else "a GPT-3 on 8 H100s"
    return Measurement(NAME, case, peer, metric, [value], {}, curve, axis, at, modelled=True)


STUDY = TimedStudy(
    name=NAME,
    title="where one way of computing overtakes another",
    cases=cases,
    rounds=3,
    memory="everything",
    conclusions=modelled,
    note="""\
Forward and backward, float32. Attention has 4 heads of 64 features and, in the curves by length, 4,096 tokens. Padded
batches have 16 sequences of up to 256 tokens. Losses have 1,024 tokens of 256 features. Dashed lines, and rows marked
"modelled", are computed for GPUs. `fastformer plan` gives the memory of one GPU of eight, and the exchange of data
without overlap. The rule of `fastformer_kernels.plans`, which holds until `fastformer tune` has measured, gives the
output projection of a feed-forward network.
""",
)
