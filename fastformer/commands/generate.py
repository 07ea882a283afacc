"""The command ``fastformer generate``: continue prompts, as text or as JSON lines."""

from __future__ import annotations

import json
import sys
import time
from argparse import ArgumentParser, BooleanOptionalAction, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastformer.arguments import CommandParser, check_text, chosen_device, whole_number
from fastformer.console import StatusLine
from fastformer.data.pretraining.tokenizer import load_tokenizer
from fastformer.generation.parameters import SamplingParameters
from fastformer.generation.prompts import SAMPLING_OPTIONS, read_prompts
from fastformer.generation.requests import Generation, Piece, collected

if TYPE_CHECKING:
    from fastformer.generation.batch import Statistics

_DESCRIPTION = """\
Continue prompts with a causal language model, or answer them with a sequence-to-sequence model. Prompts run together,
each at its own length: a finished prompt makes room for the next. DIR is a model with its tokenizer in Fastformer's
format; `fastformer convert` makes one from GPT-2, Llama, T5 and others. Without --temperature, the most probable token
is always taken.

examples:
  fastformer generate gpt2 --prompt "The capital of France is" --max_new_tokens 20
  fastformer generate gpt2 --prompt "Once upon a time" --temperature 0.8 --top_p 0.95 --seed 1 --stream
  fastformer generate llama --prompts questions.jsonl --stop "\\n\\n" --json > answers.jsonl
  fastformer generate gpt2-xl --draft gpt2 --draft_tokens 5 --prompt "Chapter 1"
  fastformer generate llama --prompts many.jsonl --slots 64 --page_size 16 --pages 4096 --device cuda --dtype bfloat16
  fastformer generate llama --prompt "Chapter 1" --no-cuda_graphs

Each line of --prompts is an object with the prompt and, optionally, sampling options for this prompt:
  {"prompt": "Translate to German: house", "temperature": 0.7, "seed": 3, "stop": ["."]}
"""

_DTYPES = ("float32", "float16", "bfloat16")


def main(arguments: list[str], begin: float) -> None:
    """Run ``fastformer generate`` with the arguments that follow.

    Raises:
        ValueError, OSError: the user's input is wrong.
    """
    options = _parser().parse_args(arguments)
    from transformers.utils import logging as transformers_logging

    from fastformer.generation.generator import Generator
    from fastformer.generation.loading import load_language_model

    transformers_logging.disable_progress_bar()
    prompts, parameters = _prompts(options)
    if options.stream and len(prompts) > 1 and not options.json:
        raise ValueError(f"--stream with {len(prompts)} prompts would mix their texts; add --json")
    device, dtype = chosen_device(options.device), options.dtype or "auto"
    generator = Generator(
        load_language_model(options.model, device, dtype),
        load_tokenizer(options.model),
        slots=options.slots,
        page_size=options.page_size,
        pages=options.pages,
        draft=None if options.draft is None else load_language_model(options.draft, device, dtype),
        draft_tokens=options.draft_tokens,
        cuda_graphs=options.cuda_graphs,
    )
    pieces = generator.stream(prompts, parameters)
    start = time.monotonic()
    if options.stream:
        _stream(pieces, options.json)
    else:
        generations = collected(_with_progress(pieces, len(prompts)), len(prompts))
        for prompt, generation in zip(prompts, generations, strict=True):
            _show(prompt, generation, options.json, alone=len(prompts) == 1)
    print(_summary(generator.statistics, len(prompts), time.monotonic() - start), file=sys.stderr)


def _parser() -> ArgumentParser:
    parser = CommandParser(
        prog="fastformer generate", description=_DESCRIPTION, formatter_class=RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", type=Path, metavar="DIR", help="the model and its tokenizer")
    add("--prompt", action="append", default=[], metavar="TEXT", help="a prompt; may be given several times")
    add("--prompts", type=Path, metavar="FILE", help="JSON lines with prompts")
    add("--stream", action="store_true", help="print text as it comes")
    add("--json", action="store_true", help="print JSON lines: one for each prompt or, with --stream, for each piece")
    sampling = parser.add_argument_group("sampling").add_argument
    default = SamplingParameters()
    sampling(
        "--max_new_tokens",
        type=whole_number(1),
        metavar="N",
        help=f"the most new tokens (default: {default.max_new_tokens})",
    )
    sampling("--temperature", type=float, metavar="T", help="divides the logits; 0: the most probable (default: 0)")
    sampling("--top_k", type=whole_number(1), metavar="K", help="draw from the K most probable tokens")
    sampling("--top_p", type=float, metavar="P", help="draw from the most probable tokens that reach P together")
    sampling("--min_p", type=float, metavar="P", help="draw from tokens of at least P times the highest probability")
    sampling("--repetition_penalty", type=float, metavar="X", help="divides logits of earlier tokens (default: 1)")
    sampling(
        "--seed",
        type=whole_number(0, 2**63 - 1),
        metavar="N",
        help="seed of each prompt's draws (default: random)",
    )
    sampling("--stop", action="append", metavar="TEXT", help="stop before this text; may be given several times")
    sampling("--logprobs", action="store_true", default=None, help="with --json: the log-probability of each token")
    running = parser.add_argument_group("running").add_argument
    running(
        "--slots", type=whole_number(1, 2**16), default=8, metavar="N", help="sequences at once (default: %(default)s)"
    )
    running("--page_size", type=whole_number(1, 2**20), metavar="N", help="keep keys and values in pages of N tokens")
    running("--pages", type=whole_number(1), metavar="N", help="number of pages (default: enough for any case)")
    running("--draft", type=Path, metavar="DIR", help="a small model that drafts tokens for the model to check")
    running(
        "--draft_tokens",
        type=whole_number(1, 2**16),
        default=4,
        metavar="N",
        help="number of tokens to draft at a time (default: %(default)s)",
    )
    running(
        "--cuda_graphs",
        action=BooleanOptionalAction,
        help="launch the kernels of a step together, or never (default: on a GPU, if possible)",
    )
    running("--device", help="cpu or cuda (default: the GPU if there is one)")
    running("--dtype", choices=_DTYPES, help="of weights and cache (default: as saved)")
    return parser


def _prompts(options: Namespace) -> tuple[list[str], list[SamplingParameters]]:
    """Return the prompts of the command line, then those of the file, and the sampling parameters of each."""
    given = {name: value for name in SAMPLING_OPTIONS if (value := getattr(options, name, None)) is not None}
    common = SamplingParameters(**given)
    if common.logprobs and not options.json:
        raise ValueError("--logprobs needs --json")
    for number, prompt in enumerate(options.prompt, start=1):
        check_text(prompt, f"--prompt {number}")
    for text in options.stop or ():
        check_text(text, "--stop")
    found = [(prompt, common) for prompt in options.prompt]
    if options.prompts is not None:
        found += read_prompts(options.prompts, common)
    if not found:
        where = "" if options.prompts is None else f" in {options.prompts}"
        raise ValueError(f"there is no prompt{where}; give --prompt or --prompts")
    return [prompt for prompt, _ in found], [parameters for _, parameters in found]


def _with_progress(pieces: Iterable[Piece], prompts: int) -> Iterator[Piece]:
    """Yield the pieces, and show how many tokens and finished prompts there are."""
    tokens = finished = 0
    with StatusLine() as line:
        for piece in pieces:
            yield piece
            tokens += len(piece.tokens)
            finished += piece.finish_reason is not None
            line.show(f"{tokens:,} tokens; {finished:,} of {prompts:,} finished")


def _stream(pieces: Iterator[Piece], as_json: bool) -> None:
    for piece in pieces:
        if as_json:
            print(json.dumps(_without_nothing(piece._asdict()), ensure_ascii=False), flush=True)
        else:
            print(piece.text, end="" if piece.finish_reason is None else "\n", flush=True)


def _show(prompt: str, generation: Generation, as_json: bool, alone: bool) -> None:
    if as_json:
        print(json.dumps({"prompt": prompt} | _without_nothing(vars(generation)), ensure_ascii=False))
    elif alone:
        print(generation.text)
    else:
        print(f"--- {prompt}\n{generation.text}")


def _without_nothing(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _summary(statistics: Statistics, prompts: int, seconds: float) -> str:
    summary = (
        f"{prompts} {'prompt' if prompts == 1 else 'prompts'}, {statistics.prompt_tokens:,} tokens; "
        f"{statistics.new_tokens:,} new tokens in {seconds:.1f} s, {statistics.new_tokens / seconds:,.0f} tokens/s"
    )
    if statistics.drafted:
        summary += f"; {statistics.accepted / statistics.drafted:.0%} of the drafted tokens were accepted"
    return summary
