"""The experiment files: each has presets that train, one loss, and a command that does what `jaxllm train` does."""

from __future__ import annotations

import inspect
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from experiments import pretrain
from jaxllm import cli, optim, sharding, tree
from jaxllm.config import MeshConfig, TrainConfig, config_hash
from jaxllm.data.ramp import Ramp
from jaxllm.step import state_factory
from jaxllm.study import Arm, Study
from tests.runs import ROOT, corpus, losses

FILE = str(ROOT / "experiments" / "pretrain.py")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus(tmp_path_factory.mktemp("corpus"))


@pytest.mark.whole
def test_debug_learns(text: Path, tmp_path: Path) -> None:
    source = {"kind": "text", "path": str(text), "document": "paragraph"}  # smaller than the preset's, and tokenised at once
    words = ["debug", "--log_every", "1", *(word for name, value in source.items() for word in (f"--data.sources.0.{name}", value))]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "JAXLLM_CACHE": str(tmp_path / "cache"), "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
    }  # fmt: skip
    command = [sys.executable, "-m", "experiments.pretrain", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "held-out bits per byte" in done.stdout and "to go on: python -m experiments.pretrain debug" in done.stdout
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("pretrain-debug-")
    curve = losses(run)
    start, end = (math.fsum(curve[k][0] for k in steps) / 5 for steps in (range(1, 6), range(36, 41)))
    assert start > 5.0 and end < 0.75 * start, (start, end)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # this process has imported it
def test_both_commands_train_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[TrainConfig, str]] = []
    monkeypatch.setattr(cli, "run", lambda config, build: asked.append((config, inspect.getsource(build))) or 0)
    monkeypatch.setattr(sys, "argv", ["experiments/pretrain.py", "debug", "--num_steps", "5"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("experiments.pretrain", run_name="__main__")
    assert not stop.value.code
    assert cli.main(["train", f"{FILE}:debug", "--num_steps", "5"]) == 0
    assert asked[0] == asked[1] and asked[0][0].num_steps == 5 and "pretrain.experiment(" in asked[0][1]


def test_the_paper_preset_is_palm_8b_in_shapes_and_schedule() -> None:
    config = pretrain.PRESETS["paper"]
    mesh = sharding.make_mesh(config.mesh)
    assert dict(mesh.shape) == {"slice": 1, "data": 2, "model": 4}
    _, template, _ = state_factory(pretrain.build(config, precision="bfloat16"), mesh)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(template))
    params = tree.count(template.trainable)
    assert abs(params - 8.63e9) < 0.005e9
    assert template.trainable["embed"]["tokens"].shape == (256_000, 4096)
    # Adafactor without factoring: a second moment and a momentum for every parameter.
    moments = [leaf for leaf in jax.tree.leaves(template.opt_state) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * params
    whole = max(jax.tree.leaves(template.trainable), key=lambda leaf: leaf.size)
    assert whole.size == 8 * math.prod(whole.sharding.shard_shape(whole.shape)), "the largest leaf lies on all eight devices"

    rate = optim.schedule(config.optim, config.num_steps)
    assert [round(float(rate(k)), 6) for k in (1, 10_000, 40_000)] == [0.01, 0.01, 0.005]
    ramp = Ramp(config.data)
    assert [ramp.batch_size(k) for k in (0, 99_999, 100_000)] == [256, 256, 512]
    assert ramp.first_row(100_000) * 2048 == pytest.approx(52.4e9, rel=1e-3)
    assert ramp.first_row(config.num_steps) * 2048 == pytest.approx(775.9e9, rel=1e-3)


@pytest.mark.parametrize("name", pretrain.PRESETS)
def test_each_preset_fits_its_mesh_and_itself(name: str) -> None:
    config = pretrain.PRESETS[name]
    mesh = sharding.make_mesh(config.mesh if name != "paper_540b" else MeshConfig(slice=2, data=2, model=2))  # 6,144 chips: make compile
    sharding.check_fit(config.model, config.data, config.optim, mesh)
    assert config.model.vocab_size == (259 if config.data.tokenizer.kind == "bytes" else config.data.tokenizer.vocab_size)
    assert config.model.max_length >= config.data.sequence_length
    assert config.model.logit_scale == config.model.width**-0.5 and config.model.ff_width == 4 * config.model.width
    assert cli.load_target(f"{FILE}:{name}")[0] == config


def test_presets_are_runs_of_their_own() -> None:
    assert len({(config.name, config_hash(config)) for config in pretrain.PRESETS.values()}) == len(pretrain.PRESETS)
    assert cli.load_target(FILE)[0].name == "pretrain-small", "without a preset, `small`"


# -------------------------------------------------------------------------- the command of an experiment


def test_the_files_own_build_is_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text(
        "from jaxllm.config import ConfigError, TrainConfig\nPRESETS = {'small': TrainConfig()}\n"
        "def build(config, *, precision):\n    raise ConfigError(f'built here with {precision} and {config.num_steps} steps')\n"
    )
    assert cli.main(["train", str(tmp_path / "mine.py"), "--precision", "float32", "--num_steps", "7"]) == 2
    assert capsys.readouterr().err == "jaxllm: built here with float32 and 7 steps\n"


def test_presets_are_listed_and_a_wrong_one_gets_the_nearest(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def command(*words: str) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", ["experiments/pretrain.py", *words])
        with pytest.raises(SystemExit) as stop:
            cli.experiment_main({"debug": TrainConfig(name="d")}, pretrain.build)
        out, err = capsys.readouterr()
        return stop.value.code, out + err

    assert command() == (
        2,
        "usage: python -m experiments.pretrain PRESET [--FIELD VALUE …]\n\nPRESET is one of debug; after it, --help lists every field\n",
    )
    assert command("debgu") == (2, "jaxllm: no preset 'debgu'; did you mean 'debug'? presets: debug\n")
    status, said = command("debug", "--optim.lrr", "3")
    assert status == 2 and "`python -m experiments.pretrain debug --help` lists them all" in said
    assert command("debug", "--help")[0] == 0


def test_a_file_of_studies_lists_them_and_writes_their_page(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    small = Study(name="mine-small", title="T", arms=(Arm("a", TrainConfig()),))

    def command(*words: str) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", ["experiments/mine.py", *words])
        with pytest.raises(SystemExit) as stop:
            cli.experiment_main({"small": small, "paper": TrainConfig()})
        out, err = capsys.readouterr()
        return stop.value.code, out + err

    status, said = command("--help")
    assert status == 0 and "PRESET is one of small, paper" in said and "For mine-small:\n  --only REGEX" in said
    assert "python -m experiments.mine page: write docs/results/mine.md" in said
    assert command("page") == (2, "jaxllm: there are no results in docs/results for mine-small; run one first\n")
    assert command("pag") == (2, "jaxllm: no preset 'pag'; did you mean 'page'? presets: small, paper\n")
    status, said = command("small", "--list")
    assert status == 0 and said.startswith("T\n0 of 3 runs done") and said.count("next") == 3
    status, said = command("small", "--help")
    assert status == 0 and "[--only REGEX]" in said and "--model.num_layers INT" in said


def test_each_files_presets_load_and_no_two_studies_share_a_results_file() -> None:
    names = [
        value.name
        for path in sorted((ROOT / "experiments").glob("*.py"))
        for value in getattr(cli.load_file(path), "PRESETS", {}).values()
        if isinstance(value, Study)
    ]
    assert len(set(names)) == len(names), names
