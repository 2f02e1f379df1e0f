"""Who may import whom: the dependency rules of docs/architecture.md, read off the imports with `ast`."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

BASE = {"config", "tree", "contract"}
EVERYTHING = {"*"}

# Room of jaxllm/ -> rooms that it may import besides itself. A room is a module or a package.
ROOMS: dict[str, set[str]] = {
    "__init__": set(),
    "config": set(),
    "files": {"config"},
    "chips": {"config"},
    "flops": {"config"},
    "tree": {"config"},
    "contract": {"config"},
    "sharding": {"config", "tree"},
    "models": BASE | {"sharding"},
    "losses": BASE | {"sharding"},
    "surgery": BASE | {"sharding"},
    "optim": BASE | {"sharding", "adafactor"},
    "adafactor": BASE | {"sharding"},
    "data": BASE | {"sharding", "files"},
    "checkpoint": BASE | {"sharding", "manifest", "files"},
    "checkpoint_slices": {"config", "tree", "manifest"},
    "manifest": {"config", "tree", "files"},
    "align": BASE | {"data"},
    "interop": BASE | {"files"},
    "evals": BASE | {"models", "data"},
    "step": BASE | {"losses.core", "optim", "sharding"},
    "loop": {
        "chips",
        "flops",
        "config",
        "contract",
        "step",
        "data",
        "checkpoint",
        "files",
        "metrics",
        "rundir",
        "hosts",
        "spike",
        "sharding",
        "optim",
        "tree",
        "profiler",
    },
    "plan": BASE | {"step", "sharding", "optim", "files", "chips", "flops"},
    "metrics": {"config", "files"},
    "rundir": {"config", "files", "manifest"},
    "hosts": {"config"},
    "spike": {"config"},
    "profiler": set(),
    "report": {"config", "files", "metrics", "report_figures", "__init__"},  # reads files only
    "report_figures": {"metrics"},
    "pretrain": EVERYTHING,
    "pretrained": EVERYTHING,
    "generate": EVERYTHING,
    "evaluate": EVERYTHING,
    "measures": EVERYTHING,
    "students": EVERYTHING,
    "distill": EVERYTHING,
    "fusing": BASE | {"align", "data", "evals", "files"},
    "teach": EVERYTHING,
    "study": {
        "config",
        "files",
        "flags",
        "metrics",
        "report_figures",
        "tree",
        "sharding",
        "optim",
        "step",
        "data",
        "rundir",
        "hosts",
        "loop",
        "pretrain",
    },
    "cli": EVERYTHING,
    "flags": {"config"},
    "__main__": {"cli"},
}

# Who alone may import a package. A name without a slash is a room of jaxllm.
OUTSIDE: dict[str, set[str]] = {
    "flax": {"models"},
    "orbax": {"checkpoint"},
    "tyro": {"flags", "experiments/", "tools/"},
    "torch": {"tools/", "tests/"},
}

NOT_IMPORTED = {
    "cli": {"__main__", "experiments/", "tools/"},
    "pretrain": {"study", "cli", "pretrained", "measures", "distill", "experiments/", "tools/", "tests/"},
    "study": {"cli", "measures", "students", "experiments/", "tools/", "tests/"},
    "pretrained": {"generate", "evaluate", "measures", "students", "distill", "teach", "cli", "experiments/", "tools/", "tests/"},
    "generate": {"evaluate", "measures", "cli", "experiments/", "tools/", "tests/"},
    "evaluate": {"cli", "measures", "experiments/", "tools/", "tests/"},
    "measures": {"experiments/", "tools/", "tests/"},
    "students": {"experiments/", "tools/", "tests/"},
    "distill": {"pretrain", "experiments/", "tools/", "tests/"},
    "fusing": {"experiments/", "tools/", "tests/"},
    "teach": {"cli", "experiments/", "tools/", "tests/"},
}
"""Room -> who alone may import it, whatever else is allowed."""


def imports(source: str, package: str) -> set[str]:
    """Dotted names that a module imports, at any depth of its code; `from a import b` gives both a and a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) + 1 - node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def room_of(path: str) -> str:
    """'jaxllm/data/rows.py' -> 'data'; 'experiments/lora.py' -> 'experiments/'."""
    top, _, rest = path.partition("/")
    return rest.split("/")[0].removesuffix(".py") if top == "jaxllm" else f"{top}/"


def violations(path: str, source: str) -> list[str]:
    """One line for each import of the module at `path` that the rules forbid."""
    room, found = room_of(path), []
    package = path.rsplit("/", 1)[0].replace("/", ".")
    for name in sorted(imports(source, package)):
        top, _, rest = name.partition(".")
        if top in OUTSIDE and room not in OUTSIDE[top]:
            found.append(f"{path} imports {name}: only {', '.join(sorted(OUTSIDE[top])) or 'nobody'} may")
        if top == "experiments" and room not in ("experiments/", "tests/"):
            found.append(f"{path} imports {name}: nothing imports experiments")
        elif top == "experiments" and room == "experiments/" and rest and rest.split(".")[0] != Path(path).stem:
            found.append(f"{path} imports {name}: no experiment imports another")
        if top in ("tests", "tools", "configs") and path.startswith("jaxllm/"):
            found.append(f"{path} imports {name}: the library does not import {top}")
        if top == "jaxllm":
            found += _ours(path, room, rest)
    return found


def _ours(path: str, room: str, rest: str) -> list[str]:
    target = rest.split(".")[0] or "__init__"
    if not (ROOT / "jaxllm" / target).is_dir() and not (ROOT / "jaxllm" / f"{target}.py").exists():
        target = "__init__"  # a name defined in jaxllm/__init__.py
    if target in NOT_IMPORTED and room not in {*NOT_IMPORTED[target], target, "tests/"}:
        return [f"{path} imports jaxllm.{rest}: nothing but {', '.join(sorted(NOT_IMPORTED[target])) or 'a console script'} may"]
    if not path.startswith("jaxllm/") or target == room or not rest:
        return []
    allowed = ROOMS.get(room)
    if allowed is None:
        return [f"{path} is in no room of the design: add it to ROOMS with what it may import"]
    if allowed == EVERYTHING or target in allowed or any(rest == a or rest.startswith(f"{a}.") for a in allowed if "." in a):
        return []
    if any(a.startswith(f"{rest}.") for a in allowed):  # the `a` of `from a import b`, judged as a.b
        return []
    return [f"{path} imports jaxllm.{rest}: {room} may import {', '.join(sorted(allowed)) or 'nothing of ours'}"]


MODULES = sorted(
    str(path.relative_to(ROOT)) for top in ("jaxllm", "experiments", "configs", "tools") for path in (ROOT / top).rglob("*.py")
)


@pytest.mark.parametrize("path", MODULES)
def test_imports_only_what_its_room_may(path: str):
    assert not violations(path, (ROOT / path).read_text())


PLANTED = [
    ("jaxllm/tree.py", "from jaxllm import sharding"),
    ("jaxllm/config/model.py", "import jaxllm.tree"),
    ("jaxllm/contract.py", "from jaxllm.models.transformer import decoder"),
    ("jaxllm/sharding.py", "from jaxllm.contract import LM"),
    ("jaxllm/models/heads.py", "from jaxllm.losses.core import Mean"),
    ("jaxllm/models/heads.py", "from ..losses import core"),
    ("jaxllm/losses/tokens.py", "def f():\n    from jaxllm.models import transformer"),
    ("jaxllm/surgery/resize.py", "from jaxllm.models.layers import Norm"),
    ("jaxllm/data/rows.py", "from jaxllm import optim"),
    ("jaxllm/checkpoint.py", "from jaxllm.data import rows"),
    ("jaxllm/manifest.py", "from jaxllm import sharding"),
    ("jaxllm/manifest.py", "from jaxllm.checkpoint import Checkpointer"),
    ("jaxllm/manifest.py", "import orbax.checkpoint"),
    ("jaxllm/step.py", "from jaxllm.losses.tokens import next_token"),
    ("jaxllm/step.py", "from jaxllm.losses import tokens"),
    ("jaxllm/step.py", "from jaxllm import checkpoint"),
    ("jaxllm/loop.py", "from jaxllm.models import generate"),
    ("jaxllm/loop.py", "from jaxllm import pretrain"),
    ("jaxllm/metrics.py", "from jaxllm import tree"),
    ("jaxllm/rundir.py", "from jaxllm import sharding"),
    ("jaxllm/interop/layout.py", "from jaxllm import sharding"),
    ("jaxllm/report.py", "from jaxllm import step"),
    ("jaxllm/report_figures.py", "from jaxllm.report import Run"),
    ("jaxllm/step.py", "from jaxllm.cli import main"),
    ("jaxllm/pretrain.py", "from jaxllm import cli"),
    ("jaxllm/pretrain.py", "import experiments.lora"),
    ("jaxllm/cli.py", "from configs import models"),
    ("jaxllm/nowhere.py", "from jaxllm import config"),
    ("jaxllm/losses/vocab.py", "import flax.linen as nn"),
    ("jaxllm/loop.py", "import orbax.checkpoint as ocp"),
    ("jaxllm/config/model.py", "import tyro"),
    ("jaxllm/interop/layout.py", "import torch"),
    ("experiments/lora.py", "from experiments.bitnet import real"),
    ("experiments/lora.py", "from . import bitnet"),
    ("experiments/lora.py", "import flax"),
    ("tools/convert.py", "from experiments import lora"),
    ("configs/models.py", "from jaxllm.pretrain import run"),
]


@pytest.mark.parametrize("path, source", PLANTED)
def test_a_planted_violation_is_found(path: str, source: str):
    assert violations(path, source)


ALLOWED = [
    ("jaxllm/contract.py", "from jaxllm.config import ModelConfig"),
    ("jaxllm/models/heads.py", "from flax import linen\nfrom jaxllm.models.layers import Norm\nfrom . import attention"),
    ("jaxllm/step.py", "from jaxllm.losses.core import Mean\nfrom jaxllm.losses import core"),
    ("jaxllm/flags.py", "import tyro\nfrom jaxllm.config import nearest"),
    ("jaxllm/checkpoint.py", "import orbax.checkpoint\nfrom jaxllm import manifest"),
    ("experiments/lora.py", "import tyro\nfrom jaxllm import pretrain\nfrom jaxllm.models import heads\nfrom configs import models"),
    ("tools/convert.py", "import torch\nfrom jaxllm.interop import layout"),
]


@pytest.mark.parametrize("path, source", ALLOWED)
def test_what_is_allowed_passes(path: str, source: str):
    assert not violations(path, source)


def test_every_room_of_the_table_but_those_to_come_exists():
    rooms = {room_of(path) for path in MODULES if path.startswith("jaxllm/")}
    assert set(ROOMS) - rooms <= {"plan", "surgery"}
