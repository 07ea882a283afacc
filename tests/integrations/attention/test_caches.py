"""Hugging Face's caches may change while a mask still exists: several tokens at once come behind the first ones.

The tests run in the default backend too. There, a model's own SDPA reads the elements of a mask after the cache was
updated.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import pytest
import torch
from hugging_face_models import MODELS, PADDING, TOKENS, VOCABULARY, assert_equal
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache, masking_utils
from transformers.cache_utils import QuantizedLayer

import fastformer
from fastformer.integrations.attention.mask import AttentionMask, attention_mask

FAMILIES = [name for name, small in MODELS.items() if small.kind == "decoder"]
LENGTH = 12
PIECES = [(0, 5), (5, 8), (8, 9), (9, 12)]
GENERATION = {
    "max_new_tokens": 6,
    "min_new_tokens": 6,
    "do_sample": False,
    "disable_compile": True,
    "return_dict_in_generate": True,
    "output_logits": True,
}


@pytest.fixture(params=["default", "operator"], autouse=True)
def operator(request: pytest.FixtureRequest, device: torch.device) -> Iterator[None]:
    if request.param == "default":
        yield
        return
    with fastformer.backend("torch" if device.type == "cpu" else "triton"):
        yield


class Stream:
    """A stand-in for the CUDA stream in which an offloaded cache copies, on a machine without a GPU."""

    def wait_stream(self, other: Stream) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass


class Quantized(QuantizedLayer):
    """A cache layer that keeps a value smaller where it cannot keep it exactly.

    It does not round to steps: a step can make two close numbers far apart.
    """

    def _quantize(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        return tensor * 0.75

    def _dequantize(self, q_tensor: torch.Tensor) -> torch.Tensor:
        return q_tensor.clone()


def cache_of(kind: str, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> Cache:
    if "offloaded" in kind and not torch.cuda.is_available():
        monkeypatch.setattr(torch, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "default_stream", lambda device: Stream())
    if kind == "quantized":
        return Cache(layers=[Quantized(residual_length=4) for _ in range(model.config.num_hidden_layers)])
    options = {"config": model.config, "offloading": "offloaded" in kind}
    return StaticCache(max_cache_len=16, **options) if "static" in kind else DynamicCache(**options)


def tokens(padding: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the tokens of three rows, a mask of the real ones, and their positions."""
    torch.manual_seed(3)
    lengths = torch.tensor([[LENGTH], [LENGTH - 4], [LENGTH - 2]])
    real = torch.arange(LENGTH) >= (LENGTH - lengths if padding else 0)
    real = real.expand(3, -1).long()
    ids = torch.randint(3, VOCABULARY, (3, LENGTH)).where(real.bool(), PADDING)
    return ids, real, (real.cumsum(1) - 1).clamp(min=0)


def in_both(model: PreTrainedModel, run: Callable[[], torch.Tensor]) -> None:
    """Check that `run` gives the same in eager attention and in ours.

    Skip the test if transformers itself fails with this kind of cache.
    """
    model.set_attn_implementation("eager")
    try:
        expected = run()
    except (RuntimeError, TypeError, ValueError) as error:
        pytest.skip(f"transformers' eager attention fails: {error}")
    model.set_attn_implementation("fastformer")
    assert_equal("logits", run(), expected)


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("kind", ["dynamic", "static", "offloaded dynamic", "offloaded static", "quantized"])
@pytest.mark.parametrize("name", FAMILIES)
def test_prompt_in_pieces_and_after_a_reset(
    name: str, kind: str, padding: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MODELS[name].build()
    ids, real, positions = tokens(padding)

    def run() -> torch.Tensor:
        cache, found = cache_of(kind, model, monkeypatch), []
        for _ in range(2 if "static" in kind else 1):
            for start, stop in PIECES:
                each = slice(start, stop)
                output = model(
                    ids[:, each],
                    attention_mask=real[:, :stop],
                    position_ids=positions[:, each],
                    past_key_values=cache,
                    use_cache=True,
                )
                found.append(output.logits[real[:, each].bool()])
            cache.reset()
        return torch.cat(found)

    with torch.no_grad():
        in_both(model, run)


def generate(model: PreTrainedModel, rows: int, **options: Any) -> torch.Tensor:
    ids, real, _ = tokens(padding=rows > 1)
    inputs = {"inputs": ids[:rows, -TOKENS:], "attention_mask": real[:rows, -TOKENS:]}
    return torch.stack(model.generate(**inputs, **GENERATION, **options).logits)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", FAMILIES)
def test_prefill_in_chunks(name: str, cache: str | None) -> None:
    model = MODELS[name].build()
    in_both(model, lambda: generate(model, rows=3, prefill_chunk_size=4, cache_implementation=cache))


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", FAMILIES)
def test_assistant_model(name: str, cache: str | None) -> None:
    """An assistant model drafts tokens; the model checks them together, and the cache forgets some of them."""
    model = MODELS[name].build()
    assistant = copy.deepcopy(model)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))

    def run() -> torch.Tensor:
        assistant.set_attn_implementation(model.config._attn_implementation)
        return generate(model, rows=1, assistant_model=assistant, cache_implementation=cache)

    in_both(model, run)


@pytest.mark.parametrize("kind", ["dynamic", "static", "quantized"])
@pytest.mark.parametrize("name", FAMILIES)
def test_prefix_that_is_continued(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt continues a prefix that the cache already holds, such as a system's prompt."""
    model = MODELS[name].build()
    ids, _, _ = tokens(padding=False)

    def run() -> torch.Tensor:
        cache = cache_of(kind, model, monkeypatch)
        with torch.no_grad():
            model(ids[:1, :6], past_key_values=cache, use_cache=True)
        options = {**GENERATION, "max_new_tokens": 4, "min_new_tokens": 4}
        return torch.stack(model.generate(ids[:1], past_key_values=cache, **options).logits)

    in_both(model, run)


def even(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return (query + key) % 2 == 0


@pytest.mark.parametrize(
    "function",
    [
        masking_utils.causal_mask_function,
        masking_utils.sliding_window_causal_mask_function(3),
        masking_utils.or_masks(masking_utils.causal_mask_function, even),
    ],
)
def test_mask_of_a_cache_that_moves_on(function: Callable) -> None:
    """A mask keeps its meaning when a static cache adds in place to the tensor that counts its tokens."""
    written = torch.tensor(5)
    real = torch.arange(8).expand(3, -1) >= torch.tensor([[0], [2], [4]])
    expected = masking_utils.sdpa_mask(3, 3, 10, written.clone(), 0, function, real.clone(), allow_is_causal_skip=False)
    mask = attention_mask(3, 3, 10, written, 0, function, real, device=torch.get_default_device())
    written.add_(3)
    real.fill_(False)
    assert isinstance(mask, AttentionMask)
    assert torch.equal(mask.dense, expected)
    if mask.structure is not None:
        assert torch.equal(mask.structure.elements(3, 3, 10, mask.device), expected)
