"""``import fastformer`` is enough, before or after transformers, and imports neither transformers nor torch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hugging_face_models import MODELS, REFUSING
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    FalconConfig,
    FalconModel,
)

import fastformer  # noqa: F401  # the import registers the attention

MODEL = """
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
model = LlamaForCausalLM._from_config(config, attn_implementation="fastformer")
model.set_attn_implementation("eager")
model.set_attn_implementation("fastformer")
print(model.config._attn_implementation, type(model.model(input_ids=torch.ones(1, 3, dtype=torch.long))[0]).__name__)
"""


def python(code: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_import_needs_neither_torch_nor_transformers() -> None:
    assert python("import sys, fastformer; print({'torch', 'transformers'} & set(sys.modules))") == "set()"


@pytest.mark.parametrize(
    "imports",
    [
        "import fastformer; import torch",
        "import torch; from transformers import LlamaModel; import fastformer",
    ],
)
def test_order_of_imports(imports: str) -> None:
    assert python(imports + MODEL) == "fastformer Tensor"


def test_transformers_alone_imports_nothing_of_ours() -> None:
    code = "import sys, fastformer, transformers; print([m for m in sys.modules if m.startswith('fastformer.ops')])"
    assert python(code) == "[]"


@pytest.mark.quick
def test_from_pretrained(tmp_path: Path) -> None:
    model = MODELS["Llama"].build()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="fastformer").eval()
    assert loaded.config._attn_implementation == "fastformer"
    ids = torch.randint(3, 60, (2, 7))
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=1e-5)


def test_warns_where_it_has_no_effect(tmp_path: Path) -> None:
    # Neither model can be switched: DeBERTa, and Falcon, which has its own dictionary of attention classes.
    falcon = FalconModel(FalconConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=50))
    for model in (REFUSING["DeBERTa"][0].build().base_model, falcon):
        model.save_pretrained(tmp_path)
        warning = f'{type(model).__name__} computes attention itself: attn_implementation="fastformer"'
        with pytest.warns(UserWarning, match=warning):
            loaded = AutoModel.from_pretrained(tmp_path, attn_implementation="fastformer")
        assert loaded.config._attn_implementation != "fastformer"
    MODELS["BERT"].build().save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AutoModel.from_pretrained(tmp_path, attn_implementation="fastformer")


@pytest.fixture
def saved_bert(tmp_path: Path) -> Path:
    """Save a small BERT and its tokenizer in the form of a downloaded model."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", ",", "my", "dog", "is", "cute"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    BertForSequenceClassification(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.quick
def test_classification_step_of_the_bert_example(saved_bert: Path) -> None:
    losses = {}
    for implementation in ("eager", "fastformer"):
        tokenizer = BertTokenizer.from_pretrained(saved_bert)
        model = BertForSequenceClassification.from_pretrained(saved_bert, attn_implementation=implementation)
        optimizer = torch.optim.AdamW(model.eval().parameters(), lr=1e-2)
        inputs = tokenizer("Hello, my dog is cute", return_tensors="pt")
        assert tokenizer.unk_token_id not in inputs["input_ids"]
        labels = torch.tensor([1]).unsqueeze(0)
        losses[implementation] = []
        for _ in range(3):
            loss = model(**inputs, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[implementation].append(loss.item())
    assert losses["fastformer"] == pytest.approx(losses["eager"], abs=1e-5)
    assert losses["fastformer"][-1] < losses["fastformer"][0]


def test_from_config() -> None:
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, vocab_size=50)
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="fastformer")
    assert model.config._attn_implementation == "fastformer"


def test_stacks_with_a_copy_of_the_configuration() -> None:
    """T5's encoder and decoder, each with a copy of the configuration, are switched too.

    In some releases, transformers itself forgets these copies.
    """
    model = MODELS["T5"].build()
    for implementation in ("fastformer", "eager"):
        model.set_attn_implementation(implementation)
        configs = [model.config, model.encoder.config, model.decoder.config]
        assert [config._attn_implementation for config in configs] == [implementation] * 3


def test_ci_runs_the_oldest_releases_that_are_allowed() -> None:
    root = Path(__file__).parents[3]
    for package in ("torch", "triton", "transformers"):
        oldest = re.search(rf'"{package}>=([\d.]+),', (root / "pyproject.toml").read_text())
        assert oldest is not None
        assert f" {package}=={oldest[1]}.0 " in (root / ".ci/run").read_text()
