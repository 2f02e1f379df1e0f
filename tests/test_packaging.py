"""What a user installs: dependencies that are declared and pinned, a wheel that holds what it should, files that name no machine."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def names(requirements: list[str]) -> set[str]:
    """Distribution names, spelt as an index spells them."""
    return {canonicalize_name(Requirement(r).name) for r in requirements}


CORE = names(PROJECT["dependencies"])
OPTIONAL = {name for extra, requirements in EXTRAS.items() if extra != "test" for name in names(requirements)} - {"jaxllm"}


def tracked() -> list[str]:
    """Files that git knows, relative to the repository."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout: which files are committed is not known")
    return [name for name in listing.stdout.split("\0") if name and (ROOT / name).exists()]


# ------------------------------------------------------------------------------------- dependencies


def third_party(source: str) -> tuple[set[str], set[str]]:
    """(needed when the module is imported, needed by a function only): top-level names of packages that are neither Python's nor ours."""
    at_once: set[str] = set()
    later: set[str] = set()

    def visit(node: ast.AST, into: set[str]) -> None:
        if isinstance(node, ast.Import):
            into.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            into.add(node.module.split(".")[0])
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "import_module":
            into.update(str(a.value).split(".")[0] for a in node.args if isinstance(a, ast.Constant))
        for child in ast.iter_child_nodes(node):
            visit(child, later if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) else into)

    visit(ast.parse(source), at_once)
    ours = {"jaxllm", *sys.stdlib_module_names}
    return at_once - ours, later - ours


INSTALLED = metadata.packages_distributions()


def distributions(module: str) -> set[str]:
    """Distributions that bring a module; one that is not installed is taken by the module's own name."""
    return {canonicalize_name(d) for d in INSTALLED.get(module, [module])}


def undeclared(source: str) -> list[str]:
    """One line for each import that `pip install jaxllm`, or an extra where a function imports it, would not bring."""
    at_once, later = third_party(source)
    wrong = [f"{m}: add it to [project.dependencies]" for m in sorted(at_once) if not distributions(m) & CORE]
    return wrong + [f"{m}: add it to an extra" for m in sorted(later) if not distributions(m) & (CORE | OPTIONAL)]


MODULES = sorted((ROOT / "jaxllm").rglob("*.py"))


def test_every_import_is_declared():
    found = [f"{path.relative_to(ROOT)} imports {line}" for path in MODULES for line in undeclared(path.read_text())]
    assert len(MODULES) > 30 and not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "import pytest",
        "from hypothesis import given",
        "import wandb",  # an extra is not there for everybody
        "try:\n    import datasets\nexcept ImportError:\n    pass",
        "class A:\n    import tensorflow_datasets",
        "def f():\n    import pytest",
        "def f():\n    return importlib.import_module('torch')",
    ],
)
def test_an_undeclared_import_is_found(source: str):
    assert undeclared(source)


@pytest.mark.parametrize(
    "source", ["import jax.numpy as jnp", "from absl import logging", "def f():\n    import wandb", "import json\nfrom . import tree"]
)
def test_a_declared_import_passes(source: str):
    assert not undeclared(source)


def test_every_dependency_is_imported():
    imported = {d for path in MODULES for group in third_party(path.read_text()) for module in group for d in distributions(module)}
    assert not CORE - imported, f"declared and never imported: {sorted(CORE - imported)}"


# --------------------------------------------------------------------------------------------- pins


def pins() -> dict[str, str]:
    """Distribution -> version, from constraints.txt, where a line is a comment or `name==version`."""
    found: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            match = re.fullmatch(r"([a-z0-9][a-z0-9-]*)==([0-9][A-Za-z0-9.+!]*)", line)
            assert match, f"constraints.txt: '{line}' is no name==version"
            assert match[1] not in found, f"constraints.txt: {match[1]} is pinned twice"
            found[match[1]] = match[2]
    return found


def closure(requirements: list[str]) -> dict[str, list[Requirement]]:
    """Distribution -> everything asked of it, for these requirements and theirs, as far as they are installed."""
    asked: dict[str, list[Requirement]] = {}
    queue = [(Requirement(r), "") for r in requirements]
    seen: set[tuple[str, str]] = set()
    while queue:
        requirement, extra = queue.pop()
        name = canonicalize_name(requirement.name)
        if (requirement.marker and not requirement.marker.evaluate({"extra": extra})) or name == "jaxllm":
            continue
        asked.setdefault(name, []).append(requirement)
        for wanted in ("", *requirement.extras):
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                try:
                    queue += [(Requirement(r), wanted) for r in metadata.requires(name) or []]
                except metadata.PackageNotFoundError:
                    continue
    return asked


def test_all_that_is_installed_is_pinned_and_every_pin_is_allowed():
    asked, pinned = closure([*PROJECT["dependencies"], *EXTRAS["test"], *EXTRAS["tfds"], *EXTRAS["stream"]]), pins()
    assert len(asked) > 60
    assert not set(asked) - set(pinned), f"constraints.txt does not pin {sorted(set(asked) - set(pinned))}"
    ours = [Requirement(r) for r in PROJECT["dependencies"] + [r for extra in EXTRAS.values() for r in extra]]
    wrong = [str(r) for r in ours if r.name in pinned and not r.specifier.contains(pinned[canonicalize_name(r.name)])]
    assert not wrong, f"constraints.txt pins another version than pyproject.toml admits: {wrong}"


def test_the_extras_that_the_readme_promises():
    assert set(EXTRAS) == {
        "cuda",
        "tpu",
        "plan",
        "tfds",
        "stream",
        "wandb",
        "hub",
        "eval",
        "experiments",
        "align",
        "quantise",
        "gcs",
        "s3",
        "test",
    }


# -------------------------------------------------------------------------------------------- wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from this tree with the backend that is installed: nothing is downloaded."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", str(folder), str(ROOT)]
    subprocess.run(command, check=True, timeout=120)
    (built,) = folder.glob("jaxllm-*.whl")
    return built


def test_the_wheel_holds_the_library_the_configs_and_the_licence(wheel: Path):
    inside = set(zipfile.ZipFile(wheel).namelist())
    info = next(name.split("/")[0] for name in inside if name.endswith(".dist-info/METADATA"))
    assert {"jaxllm/py.typed", f"{info}/licenses/LICENSE", f"{info}/entry_points.txt", "jaxllm/_init/configs/quickstart.py"} <= inside
    for name in tracked():
        top = name.split("/")[0]
        if top in ("jaxllm", "configs", "experiments"):
            assert (name if top == "jaxllm" else f"jaxllm/_init/{name}") in inside, f"{name} is not in the wheel"
    assert {name.split("/")[0] for name in inside} == {"jaxllm", info}  # no tests, no tools
    assert not [name for name in inside if "__pycache__" in name or "test" in Path(name).name]


def test_a_pip_user_gets_the_configs_from_init(wheel: Path, tmp_path: Path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    run = f"import sys; sys.path.insert(0, {str(site)!r}); import jaxllm.cli; print(jaxllm.__file__); sys.exit(jaxllm.cli.main())"
    done = subprocess.run([sys.executable, "-c", run, "init", "mine"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert str(site / "jaxllm") in done.stdout, "another jaxllm than the wheel's was run"
    for folder in ("configs", "experiments"):
        ours = {p.name: p.read_text() for p in (ROOT / folder).glob("*.py")}
        assert ours and ours == {p.name: p.read_text() for p in (tmp_path / "mine" / folder).glob("*.py")}


# ----------------------------------------------------------------------------------------- the make


def test_a_missing_python_is_said_in_one_line(tmp_path: Path):
    command = ["make", "-s", "PYTHON=python-that-is-not-here", f"VENV={tmp_path / 'venv'}", "quickstart"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    said = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert done.returncode == 2 and len(said) == 1 and "install Python 3.12" in said[0], done.stderr
    assert not (tmp_path / "venv").exists()


# --------------------------------------------------------------------------------- what files name

NAMES_A_MACHINE = re.compile(r"(?<![\w.])/(root|home|work)/|https?://[^ ]*/(simple|packages)/|file:/{3}")


def test_no_committed_file_names_a_machine_or_an_index():
    found = []
    for name in tracked():
        text = (ROOT / name).read_bytes().decode(errors="replace")
        found += [f"{name}:{n}: {line[:120]}" for n, line in enumerate(text.splitlines(), 1) if NAMES_A_MACHINE.search(line)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "parts", [("", "root", "x"), ("", "home", "me", "x"), ("see ", "work", "x"), ("https:", "", "host", "simple", "x")]
)
def test_a_planted_address_is_found(parts: tuple[str, ...]):
    assert NAMES_A_MACHINE.search("/".join(parts))
    assert not NAMES_A_MACHINE.search("configs/work/home.py, ../shared/data, https://arxiv.org/abs/2204.02311")
