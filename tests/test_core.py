"""The core runs where no extra is installed; operators and modules run even without transformers."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from environments import ROOT, Environment

from fastformer import cli
from fastformer.extras import EXTRAS, require

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

pytestmark = pytest.mark.cpu

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CORE = ("torch", "triton", "einops", "numpy", "transformers")
# Modules that need an extra.
BESIDE_THE_CORE = re.compile(
    r"fastformer\.(training\.[\w.]+|commands\.(pretrain|finetune|predict)|kernel_reports\.picture|models\.conversion\.tensorflow_process"
    r"|benchmarking\.(studies\.\w+|training|fits|pictures))"
)
# Packages that come with a declared package, here by the name of that package.
COMPANIONS = {
    "huggingface_hub": "transformers",
    "jinja2": "torch",
    "safetensors": "transformers",
    "typing_extensions": "torch",
    "yaml": "jsonargparse",
}
# Benchmarks measure these packages where they are installed.
PEERS = {"flash_attn", "liger_kernel", "xformers"}


def name_of(requirement: str) -> str:
    """Return the name of a distribution; a variant for the CPU counts as the distribution itself."""
    return re.split(r"[^\w.-]", requirement)[0].replace("_", "-").removesuffix("-cpu")


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("core") / "environment", CORE)


@pytest.fixture(scope="module")
def without_transformers(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    packages = [*(name for name in CORE if name != "transformers"), "pytest", "pytest-timeout", "hypothesis"]
    return Environment(tmp_path_factory.mktemp("torch") / "environment", packages)


# --- What is declared -------------------------------------------------------------------------------------------------


def test_core_is_five_packages() -> None:
    assert {name_of(requirement) for requirement in PROJECT["dependencies"]} == set(CORE)


def test_messages_know_the_extras_of_the_project() -> None:
    """Messages know every extra except those of tests, benchmarks and the site, which no command imports."""
    distributions = importlib.metadata.packages_distributions()
    declared = {
        extra: {name_of(requirement) for requirement in requirements}
        for extra, requirements in PROJECT["optional-dependencies"].items()
        if extra not in ("test", "dev", "bench", "docs")
    }
    known = {
        extra: {name_of(distributions.get(package, [package])[0]) for package in packages}
        for extra, packages in EXTRAS.items()
    }
    assert known == {extra: names - {"fastformer"} for extra, names in declared.items()}


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{path}: a relative import"
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("folder", ["fastformer", "kernels/fastformer_kernels"])
def test_every_package_imported_is_declared(folder: str) -> None:
    declared = {*CORE, *(package for packages in EXTRAS.values() for package in packages), *COMPANIONS, *PEERS}
    ours = {"fastformer", "fastformer_kernels"}
    undeclared = {
        f"{path}: {package}"
        for path in (ROOT / folder).rglob("*.py")
        for package in {*imports(path)} - sys.stdlib_module_names - ours - declared
    }
    assert not undeclared


# --- Without extras ---------------------------------------------------------------------------------------------------


def test_environment_has_no_extra(core: Environment) -> None:
    code = "import importlib.util as u, sys; print([name for name in sys.argv[1:] if u.find_spec(name)])"
    found = core.run("-c", code, "lightning", "jsonargparse", "datasets", "matplotlib", "sklearn", "peft", "captum")
    assert found.stdout == "[]\n"


def test_modules_import_without_extras(core: Environment) -> None:
    code = (
        "import importlib, pkgutil, fastformer\n"
        "for module in pkgutil.walk_packages(fastformer.__path__, 'fastformer.'):\n"
        "    try: importlib.import_module(module.name)\n"
        "    except ModuleNotFoundError as error: print(module.name, error.name)\n"
    )
    run = core.run("-c", code)
    assert run.returncode == 0, run.stderr
    failed = dict(line.split() for line in run.stdout.splitlines())
    assert not {module: package for module, package in failed.items() if not BESIDE_THE_CORE.fullmatch(module)}
    assert {package.partition(".")[0] for package in failed.values()} <= {
        each for known in EXTRAS.values() for each in known
    }
    assert "fastformer.commands.pretrain" in failed


def test_operators_modules_and_models_run_without_extras(core: Environment) -> None:
    code = (
        "import torch, fastformer, fastformer.nn, fastformer.models as models\n"
        "q = torch.randn(2, 4, 9, 16, requires_grad=True)\n"
        "fastformer.attention(q, q, q, causal=True).sum().backward()\n"
        "fastformer.nn.TransformerEncoderLayer(32, 4, 64)(torch.randn(2, 9, 32)).sum().backward()\n"
        "model = models.FastformerForMaskedLM(models.preset('bert-tiny'))\n"
        "model(torch.arange(9)[None]).logits.sum().backward()\n"
    )
    run = core.run("-c", code)
    assert run.returncode == 0, run.stderr


def test_commands_run_without_extras(core: Environment, tmp_path: Path) -> None:
    commands = [
        "doctor",
        "kernels report --operators merge_attention --arch sm_80 --dtypes bfloat16 --layouts aligned",
        "numerics --operators softmax --dtypes float32",
        "models bert-tiny",
        f"hub export {tmp_path}/kernel",
        f"bench gpu --dry-run --steps environment --out {tmp_path}/gpu",
        "tune --help",
    ]
    code = (
        "import sys; from fastformer import cli\n"
        "for command in sys.argv[1:]:\n"
        "    print(command, file=sys.stderr)\n"
        "    assert cli.main(command.split()) == 0\n"
    )
    run = core.run("-c", code, *commands, TRITON_INTERPRET="0", FASTFORMER_CACHE=str(tmp_path))
    assert run.returncode == 0, run.stderr
    assert "usage: fastformer tune" in run.stdout


@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [
        ("pretrain", "lightning", "train"),
        ("finetune classify", "lightning", "train"),
        ("predict {folder} --data x --out y", "jsonargparse", "train"),
        ("evaluate {folder}/predictions.jsonl --task classify", "sklearn", "train"),
        ("numerics --operators softmax --dtypes float32 --picture {folder}/picture.png", "matplotlib", "interpret"),
    ],
)
def test_command_says_which_extra_is_missing(
    command: str, package: str, extra: str, core: Environment, tmp_path: Path
) -> None:
    (tmp_path / "predictions.jsonl").write_text('{"prediction": "a", "reference": "a"}\n')
    arguments = command.format(folder=tmp_path).split()
    run = core.run("-m", "fastformer.cli", *arguments)
    expected = f'fastformer {arguments[0]} needs {package}, which is not installed: pip install "fastformer[{extra}]"'
    assert (run.returncode, run.stderr.strip()) == (2, expected)


def test_package_asked_for_says_which_extra_has_it() -> None:
    with pytest.raises(
        ModuleNotFoundError, match=r'tensorflow is not installed: pip install "fastformer\[tensorflow\]"'
    ):
        require("tensorflow")


@pytest.mark.parametrize("missing", ["fastformer.absent", "pytest.absent", "torch.absent", "scipy.absent", "absent"])
def test_our_own_faults_are_not_disguised(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    faulty = ModuleType("faulty")
    exec(f"def main(arguments, begin): import {missing}", faulty.__dict__)
    monkeypatch.setitem(sys.modules, "fastformer.commands.faulty", faulty)
    monkeypatch.setitem(cli.COMMANDS, "faulty", "")
    with pytest.raises(ModuleNotFoundError, match="No module named"):
        cli.main(["faulty"])


# --- Without transformers ---------------------------------------------------------------------------------------------


def test_operators_and_modules_run_without_transformers(without_transformers: Environment) -> None:
    code = (
        "import importlib, importlib.util, pkgutil, torch, fastformer.ops, fastformer.nn\n"
        "assert not importlib.util.find_spec('transformers')\n"
        "for package in (fastformer.ops, fastformer.nn):\n"
        "    for module in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "        importlib.import_module(module.name)\n"
        "print(fastformer.softmax(torch.zeros(1, 4)), fastformer.nn.RMSNorm(4)(torch.ones(1, 4)))\n"
    )
    run = without_transformers.run("-c", code)
    assert run.returncode == 0, run.stderr


def test_their_tests_import_without_transformers(without_transformers: Environment) -> None:
    run = without_transformers.run(
        "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "tests/ops", "tests/nn"
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr
    assert "skipped" not in run.stdout.splitlines()[-1]
