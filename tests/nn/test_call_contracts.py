"""A layer calls its parts, and a stack its layers, with the same arguments as its twin in torch.nn.

Hooks, subclasses, wrapped forwards and users' modules that were written for torch.nn then do the same here.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.backends.common import aot_autograd

import fastformer
import fastformer.nn as fnn

SIZE, HEADS, BATCH, TARGET, SOURCE = 16, 4, 2, 5, 7
CAUSAL = torch.nn.Transformer.generate_square_subsequent_mask(TARGET, device="cpu")
PADDING = torch.arange(TARGET, device="cpu") >= torch.tensor([[TARGET], [3]], device="cpu")
SOURCE_PADDING = torch.arange(SOURCE, device="cpu") >= torch.tensor([[4], [SOURCE]], device="cpu")

Calls = list[tuple[str, tuple[Any, ...], dict[str, Any]]]

pytestmark = pytest.mark.cpu


def layers(kind: str, activation: Callable | str = "gelu", norm_first: bool = False) -> tuple[nn.Module, nn.Module]:
    """Return torch.nn's layer and ours with equal parameters, in training, where PyTorch cannot skip the parts."""
    made = []
    for library in (nn, fnn):
        torch.manual_seed(0)
        layer = getattr(library, kind)(
            SIZE, HEADS, 32, dropout=0.0, activation=copy.deepcopy(activation), batch_first=True, norm_first=norm_first
        )
        made.append(layer.train())
    made[1].load_state_dict(made[0].state_dict())
    return made[0], made[1]


def inputs(kind: str) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    target, source = torch.randn(BATCH, TARGET, SIZE), torch.randn(BATCH, SOURCE, SIZE)
    return (target, source) if "Decoder" in kind else (target,)


def masks(kind: str, form: str) -> dict[str, Any]:
    """Return the arguments for the causal mask and the padding: booleans, numbers, or none."""
    if form == "none":
        return {}
    as_given = {"mask": CAUSAL, "padding": PADDING, "memory": SOURCE_PADDING}
    if form == "boolean":
        as_given["mask"] = CAUSAL.isinf()
    else:
        for name in ("padding", "memory"):
            as_given[name] = torch.zeros(as_given[name].shape).masked_fill(as_given[name], float("-inf"))
    if "Encoder" in kind:
        name = "mask" if kind == "TransformerEncoder" else "src_mask"
        return {name: as_given["mask"], "src_key_padding_mask": as_given["padding"]}
    return {
        "tgt_mask": as_given["mask"],
        "tgt_key_padding_mask": as_given["padding"],
        "memory_key_padding_mask": as_given["memory"],
    }


def listen(module: nn.Module, name: str, calls: Calls) -> None:
    """Record each call of the submodule `name` in `calls`."""
    module.get_submodule(name).register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((name, args, kwargs)), with_kwargs=True
    )


def assert_same_calls(actual: Calls, expected: Calls) -> None:
    assert [(name, len(args), sorted(kwargs)) for name, args, kwargs in actual] == [
        (name, len(args), sorted(kwargs)) for name, args, kwargs in expected
    ]
    for (name, args, kwargs), (_, their_args, their_kwargs) in zip(actual, expected, strict=True):
        given = [*enumerate(args), *sorted(kwargs.items())]
        theirs = [*enumerate(their_args), *sorted(their_kwargs.items())]
        for (argument, value), (_, their_value) in zip(given, theirs, strict=True):
            where = f"{argument} of {name}"
            if isinstance(their_value, torch.Tensor):
                torch.testing.assert_close(value, their_value, msg=lambda text, where=where: f"{where}: {text}")
            else:
                assert value is their_value, where


def parts(kind: str) -> list[str]:
    """Return the submodules that torch.nn's layer calls; it does not call out_proj, but reads its weight."""
    layer, _ = layers(kind, activation=nn.GELU())
    return [name for name, _ in layer.named_modules() if name and "out_proj" not in name]


KINDS = ("TransformerEncoderLayer", "TransformerDecoderLayer")


@pytest.mark.parametrize("form", ["none", "boolean", "numbers"])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize(("kind", "part"), [(kind, part) for kind in KINDS for part in [*parts(kind), "all"]])
def test_hooks_of_a_layers_parts_see_the_same(kind: str, part: str, norm_first: bool, form: str) -> None:
    calls: list[Calls] = []
    outputs = []
    for layer in layers(kind, activation=nn.GELU(), norm_first=norm_first):
        calls.append([])
        for name in parts(kind) if part == "all" else [part]:
            listen(layer, name, calls[-1])
        outputs.append(layer(*inputs(kind), **masks(kind, form)))
    assert calls[0]
    assert_same_calls(calls[1], calls[0])
    torch.testing.assert_close(outputs[1], outputs[0])


def stacks(kind: str, change: Callable[[nn.Module], None]) -> list[nn.Module]:
    made = []
    for library, layer in zip((nn, fnn), layers(f"{kind}Layer"), strict=True):
        options = {"enable_nested_tensor": False} if "Encoder" in kind else {}
        stack = getattr(library, kind)(layer, 2, **options)
        for each in stack.layers:
            change(each)
        made.append(stack.train())
    return made


def own_forward(layer: nn.Module) -> None:
    """Wrap the forward of the layer, as libraries do that move weights between devices."""
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: forward(*args, **kwargs)  # type: ignore[method-assign]


@pytest.mark.parametrize("form", ["none", "boolean", "numbers"])
@pytest.mark.parametrize("kind", ["TransformerEncoder", "TransformerDecoder"])
def test_hooks_of_a_stacks_layers_see_the_same(kind: str, form: str) -> None:
    calls: list[Calls] = []
    outputs = []
    for stack in stacks(kind, own_forward):
        calls.append([])
        for name in ("layers.0", "layers.0.self_attn", "layers.1"):
            listen(stack, name, calls[-1])
        outputs.append(stack(*inputs(kind), **masks(kind, form)))
    assert_same_calls(calls[1], calls[0])
    torch.testing.assert_close(outputs[1], outputs[0])


class OwnAttention(nn.Module):
    """An attention written for torch.nn's layers, which uses masks of numbers, or only is_causal."""

    batch_first = True

    def __init__(self, reads: str) -> None:
        super().__init__()
        self.reads = reads

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, None]:
        assert not need_weights
        scores = query @ key.mT
        if self.reads == "mask" and attn_mask is not None:
            scores = scores + attn_mask
        elif self.reads == "is_causal" and is_causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
        return scores.softmax(-1) @ value, None


@pytest.mark.parametrize("form", ["boolean", "numbers"])
@pytest.mark.parametrize("reads", ["mask", "is_causal"])
def test_attention_of_a_users_own_keeps_its_causal_mask(reads: str, form: str) -> None:
    def change(layer: nn.Module) -> None:
        layer.self_attn = OwnAttention(reads)

    kind = "TransformerEncoder"
    theirs, ours = stacks(kind, change)
    (x,) = inputs(kind)
    mask = {"mask": masks(kind, form)["mask"]}
    torch.testing.assert_close(ours(x, **mask), theirs(x, **mask))
    later = x.clone()
    later[:, -1] += 1.0
    torch.testing.assert_close(ours(later, **mask)[:, :-1], ours(x, **mask)[:, :-1], rtol=0, atol=0)


@pytest.mark.parametrize("reads", ["mask", "is_causal"])
def test_block_of_a_users_own_keeps_its_causal_mask(reads: str) -> None:
    """A subclass with its own `_sa_block`, PyTorch's name of a block, gets the causal mask."""

    def block(self: nn.Module, x: torch.Tensor, mask: Any, padding: Any, is_causal: bool = False) -> torch.Tensor:
        return OwnAttention(reads)(x, x, x, attn_mask=mask, need_weights=False, is_causal=is_causal)[0]

    def change(layer: nn.Module) -> None:
        layer.__class__ = type("Own", (type(layer),), {"_sa_block": block})

    for kind in ("TransformerEncoder", "TransformerDecoder"):
        theirs, ours = stacks(kind, change)
        given = {name: value for name, value in masks(kind, "numbers").items() if "padding" not in name}
        torch.testing.assert_close(ours(*inputs(kind), **given), theirs(*inputs(kind), **given))


@pytest.mark.parametrize("kind", KINDS)
def test_attention_maps_by_the_usual_recipes(kind: str) -> None:
    """A wrapped forward, a partial one and a hook that ask for the weights get attention maps."""

    def wrapped(attention: nn.Module) -> None:
        forward = attention.forward
        attention.forward = lambda *args, **kwargs: forward(*args, **{**kwargs, "need_weights": True})  # type: ignore

    def partial(attention: nn.Module) -> None:
        attention.forward = functools.partial(attention.forward, average_attn_weights=False)  # type: ignore
        wrapped(attention)

    def hook(attention: nn.Module) -> None:
        attention.register_forward_pre_hook(lambda _, a, k: (a, {**k, "need_weights": True}), with_kwargs=True)

    for recipe in (wrapped, partial, hook):
        maps: list[list[torch.Tensor]] = []

        def keep(_: nn.Module, __: Any, output: Any, maps: list[list[torch.Tensor]] = maps) -> None:
            maps[-1].append(output[1])

        for layer in layers(kind):
            maps.append([])
            for name in ("self_attn", "multihead_attn"):
                if hasattr(layer, name):
                    recipe(getattr(layer, name))
                    getattr(layer, name).register_forward_hook(keep)
            layer(*inputs(kind), **masks(kind, "numbers"))
        assert maps[0]
        for ours, theirs in zip(maps[1], maps[0], strict=True):
            torch.testing.assert_close(ours, theirs)


class Doubled(nn.GELU):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    "activation", [Doubled(), functools.partial(F.gelu, approximate="tanh"), nn.GELU("tanh"), nn.SiLU(), nn.Tanh()]
)
def test_activations_are_what_they_are(activation: Any) -> None:
    theirs, ours = layers("TransformerEncoderLayer", activation=activation)
    torch.testing.assert_close(ours(*inputs("")), theirs(*inputs("")))


class DoubledNorm(fnn.LayerNorm):
    def forward(self, input: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return 2 * super().forward(input)


@pytest.mark.parametrize("norm_first", [False, True])
def test_norm_of_a_subclass_has_one_argument(norm_first: bool) -> None:
    theirs, ours = layers("TransformerEncoderLayer", norm_first=norm_first)
    for layer in (theirs, ours):
        layer.norm1, layer.norm2 = DoubledNorm(SIZE), DoubledNorm(SIZE)
    torch.testing.assert_close(ours(*inputs("")), theirs(*inputs("")))


@pytest.mark.parametrize("part", ["word", "position", "token_type", "norm", "dropout"])
def test_parts_of_an_embedding_are_called(part: str) -> None:
    torch.manual_seed(0)
    embedding = fnn.TransformerEmbedding(20, SIZE, 10, token_types=2, dropout=0.0)
    ids = torch.randint(20, (2, 5))
    expected = embedding(ids)
    calls: Calls = []
    listen(embedding, part, calls)
    torch.testing.assert_close(embedding(ids), expected)
    assert len(calls) == 1


def test_another_module_in_place_of_an_embeddings_dropout() -> None:
    embedding = fnn.TransformerEmbedding(20, SIZE, 10, dropout=0.5)
    embedding.dropout = nn.Identity()
    ids = torch.randint(20, (2, 5))
    torch.testing.assert_close(embedding(ids), embedding.eval()(ids))


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_layers_are_fused(kind: str) -> None:
    """A compiled layer uses our attention; what the compiler fuses by itself is an operator only if it is asked for."""
    _, layer = layers(kind)
    operators: list[str] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Callable:
        operators.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    for backend, expected in (("auto", {"attention"}), ("torch", {"attention", "norm", "feed_forward"})):
        torch._dynamo.reset()
        operators.clear()
        compiled = torch.compile(layer, backend=aot_autograd(fw_compiler=keep), fullgraph=True)
        with torch.no_grad(), fastformer.backend(backend):
            torch.testing.assert_close(compiled(*inputs(kind)), layer(*inputs(kind)))
        assert {name.split(".")[1] for name in operators if name.startswith("fastformer.")} == expected


def test_signature_of_attention_is_pytorchs() -> None:
    """Arguments have the positions and defaults of PyTorch's, for code that passes them by position."""
    ours, theirs = (inspect.signature(library.MultiheadAttention.forward).parameters for library in (fnn, nn))
    assert list(ours) == list(theirs)
    assert [each.default for each in ours.values()] == [each.default for each in theirs.values()]
