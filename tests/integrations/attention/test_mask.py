"""Masks kept as structure mean what transformers' own dense masks mean, and models can use them in the same ways."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hugging_face_models import MODELS
from transformers import masking_utils
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

import fastformer
from fastformer.integrations.attention.forward import attention_forward
from fastformer.integrations.attention.mask import AttentionMask, MaskStructure, attention_mask

PATTERNS = {
    "causal": lambda: causal_mask_function,
    "bidirectional": lambda: bidirectional_mask_function,
    "sliding": lambda: sliding_window_causal_mask_function(3),
    "sliding both ways": lambda: sliding_window_bidirectional_mask_function(2),
    "chunked": lambda: chunked_causal_mask_function(4, torch.zeros(3, dtype=torch.long)),
}
# Each geometry is (queries, keys, q_offset, kv_offset). They are those of no cache, a growing cache, a static cache
# being filled, and a sliding cache.
GEOMETRIES = [(6, 6, 0, 0), (2, 8, 6, 0), (1, 8, 7, 0), (3, 12, 0, 0), (2, 12, 5, 0), (2, 5, 9, 6), (3, 4, 8, 4)]


@pytest.fixture(autouse=True)
def operator(device: torch.device) -> Iterator[None]:
    """Ask for a backend in every test. Otherwise SDPA would serve these small calls on a CPU."""
    with fastformer.backend("torch" if device.type == "cpu" else "triton"):
        yield


PADDING = {
    "none": None,
    "all tokens": [20, 20, 20],
    "right": [20, 2, 5],
    "left": [-20, -6, -8],
    "static cache": [6, 6, 6],
}


def padding_mask(lengths: list[int] | None, length: int) -> torch.Tensor | None:
    """Return a boolean mask of shape (3, length), which is true for each row's real tokens.

    A positive number n stands for the first n tokens, a negative number -n for the last n tokens.
    """
    if lengths is None:
        return None
    place = torch.arange(length)
    return torch.stack([place < n if n > 0 else place >= max(0, length + n) for n in lengths])


def own_mask(*arguments: Any, **options: Any) -> torch.Tensor:
    return attention_mask(*arguments, **options, device=torch.get_default_device())


def transformers_mask(*arguments: Any, **options: Any) -> torch.Tensor:
    """Return the elements of transformers' mask, also where transformers would leave out a causal mask."""
    mask = masking_utils.sdpa_mask(*arguments, **options, allow_is_causal_skip=False, device=torch.get_default_device())
    assert mask is not None
    return mask


def attend(mask: torch.Tensor | None, queries: int, keys: int) -> torch.Tensor:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, queries, 8), torch.randn(3, 2, keys, 8), torch.randn(3, 2, keys, 8)
    return attention_forward(torch.nn.Module(), 3 * q, k, v, mask)[0]


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_structure_is_the_dense_mask(pattern: str, geometry: tuple[int, ...], padding: str) -> None:
    queries, keys, q_offset, kv_offset = geometry
    valid = padding_mask(PADDING[padding], q_offset + queries)
    arguments = (3, queries, keys, q_offset, kv_offset, PATTERNS[pattern](), valid)
    mask = own_mask(*arguments)
    dense = transformers_mask(*arguments)
    assert isinstance(mask, AttentionMask)
    torch.testing.assert_close(attend(mask, queries, keys), attend(dense, queries, keys))
    assert torch.equal(mask.dense, dense)


@pytest.mark.parametrize("pattern", ["causal", "sliding", "chunked"])
def test_documents_are_the_dense_mask(pattern: str) -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 7], [0, 0, 1, 2, 3, 4, 5, 0]])
    function = PATTERNS[pattern]()
    if hasattr(masking_utils, "remap_positions_for_packed_sequence"):
        function = masking_utils.remap_positions_for_packed_sequence(function, positions)
    ids = masking_utils.find_packed_sequence_indices(positions)
    function = masking_utils.and_masks(function, masking_utils.packed_sequence_mask_function(ids))
    mask = own_mask(3, 8, 8, mask_function=function)
    dense = transformers_mask(3, 8, 8, mask_function=function)
    assert isinstance(mask, AttentionMask)
    assert (mask.structure is not None) == (pattern != "chunked")
    torch.testing.assert_close(attend(mask, 8, 8), attend(dense, 8, 8))
    assert torch.equal(mask.dense, dense)


def test_a_function_that_is_not_of_transformers_is_evaluated() -> None:
    def even(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (query + key) % 2 == 0

    for function in (even, functools.partial(even), masking_utils.or_masks(causal_mask_function, even)):
        mask = own_mask(3, 6, 6, mask_function=function)
        dense = transformers_mask(3, 6, 6, mask_function=function)
        assert isinstance(mask, AttentionMask)
        assert mask.structure is None
        torch.testing.assert_close(attend(mask, 6, 6), attend(dense, 6, 6))


@pytest.mark.parametrize("block", ["or_mask_function", "and_mask_function", "block_sequence_ids"])
def test_overlays_of_multimodal_models(block: str) -> None:
    """Tokens of a block, such as those of an image, see each other in both directions."""
    model = MODELS["Gemma 3"].build()
    ids = torch.tensor([[-1, 0, 0, 0, -1, 1, 1, -1]]).expand(3, -1)

    def same(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (ids[batch, query] == ids[batch, key]) & (ids[batch, query] >= 0)

    overlay = {block: ids if block == "block_sequence_ids" else same}
    arguments = {"inputs_embeds": torch.zeros(3, 8, 32), "attention_mask": padding_mask([8, 6, 7], 8), **overlay}
    parameters = inspect.signature(masking_utils.create_sliding_window_causal_mask).parameters
    arguments |= {next(name for name in ("cache", "past_key_values") if name in parameters): None}
    masks = {}
    for implementation in ("sdpa", "fastformer"):
        model.set_attn_implementation(implementation)
        masks[implementation] = masking_utils.create_sliding_window_causal_mask(model.config, **arguments)
    torch.testing.assert_close(attend(masks["fastformer"], 8, 8), attend(masks["sdpa"], 8, 8))


@pytest.mark.parametrize("use_vmap", [False, True])
@pytest.mark.parametrize("padding", [None, [200, 150, 260], [-200, -150, -260]])
@pytest.mark.parametrize("elements", [1 << 24, 1])
def test_a_function_of_many_tokens_becomes_a_block_mask(
    padding: list[int] | None, elements: int, use_vmap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[fastformer.BlockMask.__module__], "_PIECE_ELEMENTS", elements)
    image = torch.arange(260).repeat(3, 1) // 90

    def same(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return image[batch, query] == image[batch, key]

    function = masking_utils.or_masks(causal_mask_function, same)
    arguments = (3, 200, 260, 60, 0, function, padding_mask(padding, 260))
    mask, dense = own_mask(*arguments, use_vmap=use_vmap), transformers_mask(*arguments, use_vmap=use_vmap)
    assert isinstance(mask, AttentionMask)
    assert mask.structure is not None and mask.structure.block_mask is not None
    image.zero_()  # The mask has read it.
    torch.testing.assert_close(attend(mask, 200, 260), attend(dense, 200, 260))
    assert torch.equal(mask.dense, dense)
    for more in ({"indices": torch.randint(260, (3, 200, 50))}, {"output_attentions": True}):
        torch.manual_seed(0)
        tensors = [torch.randn(3, 2, tokens, 8) for tokens in (200, 260, 260)]
        results = [attention_forward(torch.nn.Module(), *tensors, each, **more) for each in (mask, dense)]
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_layers_share_one_block_mask(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model with an overlay of its own computes the mask once, and nothing else than with its dense mask."""
    built = []
    from_pieces = fastformer.BlockMask.from_pieces.__func__
    monkeypatch.setattr(
        fastformer.BlockMask, "from_pieces", classmethod(lambda *args: built.append(from_pieces(*args)) or built[-1])
    )
    ids = (torch.arange(300) // 50)[None]
    model = MODELS["Gemma 3"].build()
    create = masking_utils.create_causal_mask

    def with_overlay(*args: Any, **kwargs: Any) -> Any:
        return create(*args, **kwargs, or_mask_function=lambda b, h, q, k: ids[b, q] == ids[b, k])

    monkeypatch.setattr(sys.modules[type(model).__module__], "create_causal_mask", with_overlay)
    tokens = torch.randint(1, 30, (1, 300))
    outputs = {}
    for implementation in ("eager", "fastformer"):
        model.set_attn_implementation(implementation)
        with fastformer.backend(backend):
            outputs[implementation] = model(input_ids=tokens).logits
    assert len(built) == 1
    torch.testing.assert_close(outputs["fastformer"], outputs["eager"], atol=1e-5, rtol=1e-5)


NO_DENSE_MASK = [
    *[
        (name, padding)
        for name in ("BERT", "ModernBERT", "Llama", "Mistral", "Gemma 2", "gpt-oss")
        for padding in ("none", "left", "right")
    ],
    *[(name, padding) for name in ("T5", "BART") for padding in ("none", "right")],
    ("Llama 4", "none"),
    ("Llama 4", "right"),
    ("Whisper", "none"),
    ("Mistral", "documents"),
    ("Llama", "documents"),
]


@pytest.mark.parametrize(("name", "padding"), NO_DENSE_MASK)
def test_no_dense_mask_is_built(name: str, padding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a dense mask is built")

    monkeypatch.setattr(masking_utils, "sdpa_mask", refuse)
    monkeypatch.setattr(MaskStructure, "elements", refuse)
    model = MODELS[name].build()
    model.set_attn_implementation("fastformer")
    batch = MODELS[name].batch("none" if padding == "documents" else padding)
    if padding == "documents":
        del batch["attention_mask"]
        batch |= {"position_ids": torch.tensor([[*range(4), *range(5)]]).expand(3, -1), "use_cache": False}
    model(**batch).loss.backward()


def causal(padding: list[int] | None = None) -> tuple[AttentionMask, torch.Tensor]:
    arguments = (3, 6, 6, 0, 0, causal_mask_function, padding_mask(padding, 6))
    mask = own_mask(*arguments)
    assert isinstance(mask, AttentionMask)
    return mask, transformers_mask(*arguments)


@pytest.mark.parametrize(
    "change",
    [
        lambda mask: mask[:, :, :, :4],
        lambda mask: mask[:, 0],
        lambda mask: mask[..., -1:, :],
        lambda mask: mask.expand(3, 2, 6, 6),
        lambda mask: ~mask,
        lambda mask: mask & torch.eye(6, dtype=torch.bool),
        lambda mask: torch.eye(6, dtype=torch.bool) | mask,
        lambda mask: mask.masked_fill(torch.eye(6, dtype=torch.bool), False),
        lambda mask: torch.where(mask, 1.5, -2.0),
        lambda mask: torch.ones(3, 1, 6, 6).masked_fill(mask, 3.0),
        lambda mask: torch.cat([mask, torch.ones(3, 1, 6, 2, dtype=torch.bool)], -1),
        lambda mask: mask.to(torch.bool),
        lambda mask: mask.any(-1),
        lambda mask: mask.long(),
        lambda mask: mask.repeat_interleave(2, 0),
        lambda mask: mask.transpose(-1, -2).contiguous(),
        lambda mask: mask.clone().detach(),
        lambda mask: mask.sum(),
        lambda mask: torch.nn.functional.scaled_dot_product_attention(*torch.ones(3, 3, 1, 6, 4).cumsum(-2), mask),
    ],
)
def test_a_model_may_treat_it_as_a_boolean_tensor(change: Any) -> None:
    mask, dense = causal([6, 3, 4])
    actual, expected = change(mask), change(dense)
    actual = actual.dense if isinstance(actual, AttentionMask) else actual
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda mask, scores: scores + mask,
        lambda mask, scores: mask + scores,
        lambda mask, scores: scores.add_(mask),
        lambda mask, scores: scores[..., :4] + mask[:, :, :, :4],
        lambda mask, scores: scores + mask[:, 0].unsqueeze(1),
        lambda mask, scores: scores + mask.to(scores.dtype),
    ],
)
def test_added_to_scores_it_is_additive(change: Any) -> None:
    mask, _ = causal([6, 3, 4])
    additive = masking_utils.eager_mask(
        3, 6, 6, attention_mask=padding_mask([6, 3, 4], 6), device=torch.get_default_device()
    )
    scores = torch.randn(3, 1, 6, 6)
    torch.testing.assert_close(change(mask, scores.clone()), change(additive, scores.clone()))


@pytest.mark.parametrize(
    "change",
    [
        lambda mask: (1.0 - mask) * -1e4,
        lambda mask: mask * 0.5,
        lambda mask: mask * torch.ones(6),
        lambda mask: mask[:, :, :3] * torch.ones(6),
        lambda mask: mask * -10000,
        lambda mask: mask == 0.0,
        lambda mask: mask < 0,
    ],
)
def test_arithmetic_that_would_take_it_for_numbers_is_refused(change: Any) -> None:
    mask, _ = causal()
    with pytest.raises(ValueError, match="would use an attention mask as numbers 0 and 1"):
        change(mask)


@pytest.mark.parametrize(
    "write",
    [
        lambda mask: mask.__setitem__((..., 0), False),
        lambda mask: mask[:, :, 2:].logical_not_(),
        lambda mask: mask.masked_fill_(torch.eye(6, dtype=torch.bool), False),
        lambda mask: mask.__iand__(torch.eye(6, dtype=torch.bool)),
        lambda mask: mask[0].copy_(torch.eye(6, dtype=torch.bool)),
        lambda mask: mask.fill_(True),
        lambda mask: torch.logical_not(torch.ones(3, 1, 6, 6, dtype=torch.bool), out=mask),
        lambda mask: torch.bitwise_and(mask, torch.eye(6, dtype=torch.bool), out=mask),
    ],
)
def test_writing_to_it_counts(write: Any) -> None:
    mask, dense = causal([6, 3, 4])
    assert mask.structure is not None
    write(mask)
    write(dense)
    assert mask.structure is None
    torch.testing.assert_close(mask.dense, dense)
    torch.testing.assert_close(attend(mask, 6, 6), attend(dense, 6, 6))


def test_positions_without_documents_are_evaluated() -> None:
    if not hasattr(masking_utils, "remap_positions_for_packed_sequence"):
        pytest.skip("this release of transformers does not remap positions")
    positions = torch.tensor([[0, 0, 1, 1, 2, 2]]).expand(3, -1)
    function = masking_utils.remap_positions_for_packed_sequence(causal_mask_function, positions)
    mask = own_mask(3, 6, 6, mask_function=function)
    dense = transformers_mask(3, 6, 6, mask_function=function)
    torch.testing.assert_close(attend(mask, 6, 6), attend(dense, 6, 6))
