"""The command ``fastformer explain``: attention maps and token attributions of a text, as pictures and JSON."""

from __future__ import annotations

import json
from argparse import RawDescriptionHelpFormatter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import fastformer.models
from fastformer.arguments import CommandParser, check_text, whole_number
from fastformer.data.pretraining.tokenizer import load_tokenizer
from fastformer.explanation.attention_maps import ATTENTIONS, attention_maps, draw_attention
from fastformer.explanation.attributions import draw_attributions, token_attributions
from fastformer.extras import require
from fastformer.files import OVERWRITE_HELP, atomic_file, check_out
from fastformer.models.loading import load_whole_model
from fastformer.planning.model_work import known_model

_DESCRIPTION = """\
Show how a model uses a text. Attention maps show which tokens the chosen heads of the chosen layers attend to, from the
fused attention. Token attributions show how much each token adds to the logit of a class, of a masked token or of the
next token (integrated gradients; needs captum, the extra "interpret").

examples:
  fastformer explain runs/pretrain/model --text "This returns a [MASK]." --layers 0,1 --heads 0 --out explained
  fastformer explain runs/classifier --text "A fine film." --attributions --out explained
  fastformer explain runs/t5 --text "translate: Hello" --target_text "Hallo" --attention cross --out explained

writes attention.png and attention.json, and attributions.png and attributions.json, into the folder --out.
"""


def main(arguments: list[str], begin: float) -> None:
    """Run ``fastformer explain`` with the arguments that follow."""
    parser = CommandParser(
        prog="fastformer explain", description=_DESCRIPTION, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, metavar="DIR", help="a model and its tokenizer in Hugging Face's format")
    parser.add_argument("--text", required=True, help="the model's input")
    parser.add_argument("--layers", type=numbers, metavar="N,...", help="draw these, from 0 (default: all)")
    parser.add_argument("--heads", type=numbers, metavar="N,...", help="draw these, from 0 (default: all)")
    parser.add_argument("--attention", choices=ATTENTIONS, help="attention of an encoder-decoder (default: encoder)")
    parser.add_argument("--target_text", help="the input of an encoder-decoder's decoder")
    parser.add_argument("--attributions", action="store_true", help="also attribute a logit to the tokens")
    parser.add_argument(
        "--target", type=int, metavar="N", help="class or token id of the logit (default: the most probable)"
    )
    parser.add_argument(
        "--steps", type=whole_number(1, 2**20), default=50, help="steps of the attributions' integral (default: 50)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for pictures and JSON")
    parser.add_argument("--overwrite", action="store_true", help=OVERWRITE_HELP)
    options = parser.parse_args(arguments)
    require("matplotlib")
    if options.attributions:
        require("captum")
    check_text(options.text, "--text")
    check_text(options.target_text or "", "--target_text")
    if not options.model.is_dir():
        raise ValueError(f"DIR must be a model's folder; got {options.model}")
    if options.target is not None and not options.attributions:
        raise ValueError("--target needs --attributions")
    written = ["attention", *(["attributions"] if options.attributions else [])]
    check_out(
        [options.out / f"{name}.{kind}" for name in written for kind in ("png", "json")],
        options.overwrite,
    )
    _, kind = known_model(str(options.model))
    tokenizer = load_tokenizer(options.model)
    model = load_whole_model(getattr(fastformer.models, kind), options.model).eval()
    if torch.cuda.is_available():
        model = model.cuda()
    try:
        maps = attention_maps(
            model,
            tokenizer,
            options.text,
            options.layers,
            options.heads,
            attention=options.attention,
            target_text=options.target_text,
        )
        found = None
        if options.attributions:
            found = token_attributions(model, tokenizer, options.text, options.target, options.steps)
    except IndexError as error:
        raise ValueError(str(error)) from error
    draw_attention(maps, options.out / "attention.png")
    _write_json({**asdict(maps), "weights": maps.weights.tolist()}, options.out / "attention.json")
    if found is not None:
        draw_attributions(found, options.out / "attributions.png")
        _write_json(asdict(found), options.out / "attributions.json")
        print(f"{found.label}: logit {found.output:.3f}, without the text {found.baseline:.3f}")
        for token, score in zip(found.tokens, found.scores, strict=True):
            print(f"{score:+9.3f}  {token}")
    files = ", ".join(f"{name}.png, {name}.json" for name in written)
    print(f"{files} in {options.out}")


def numbers(text: str) -> list[int]:
    """Parse an option's value such as 0,3. argparse's errors show the name of this function."""
    return [int(each) for each in text.split(",")]


def _write_json(data: dict[str, Any], path: Path) -> None:
    with atomic_file(path) as file:
        file.write(json.dumps(data).encode() + b"\n")
