"""A study from the command line: what is listed, refused, stopped, killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxllm import cli, rundir
from jaxllm.config import ConfigError
from jaxllm.study import Arm, Column, Figure, Ordering, command, jobs, results, running
from tests.runs import ROOT, corpus
from tests.studies import BASE, rows_of, study, timeless, work_in


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work_in(tmp_path, monkeypatch)


# ----------------------------------------------------------------------------------------- the command line


STUDY = """
from dataclasses import replace
from jaxllm.config import ConfigError
from jaxllm.study import Arm, Study
from tests.tiny import config

base = replace(config, num_steps=4, save_every=2, model=replace(config.model, num_layers=1, residual_dropout=0.0),
               optim=replace(config.optim, ema_decay=None), remat='none', eval_batches=2)

def plain(config, *, precision):
    from jaxllm import pretrain
    return replace(pretrain.experiment(config, precision=precision), sample=None, finish=None)

def size(run):
    need = run.needs['one']
    return {'loss': 9.0, 'bits_per_byte': float(need.config.num_steps)}

PRESETS = {'small': Study(name='mine-small', title='Mine', arms=(
    Arm('one', base, build=plain, rates=(1e-3, 3e-3), seeds=(0, 1)),
    Arm('two', replace(base, seed=5), build=plain, seeds=(0,)),
    Arm('of one', measure=size, needs=('one',), seeds=(0, 1)),
))}

if __name__ == '__main__':
    from jaxllm.cli import experiment_main
    experiment_main(PRESETS)
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "mine.py").write_text(STUDY)
    monkeypatch.setenv("JAXLLM_TEST_TEXT", str(corpus(tmp_path)))
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path / "cache"))
    return "experiments/mine.py"


def called(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    status = cli.main([*words])
    out, err = capsys.readouterr()
    return status, out + err


def test_list_says_what_would_run_and_runs_nothing(mine: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = called(capsys, "train", f"{mine}:small", "--list")
    assert status == 0 and not Path("docs").exists() and not Path("runs").exists()
    assert said.splitlines() == [
        "Mine",
        "0 of 7 runs done, time left unknown before one has run; results: docs/results/mine-small.jsonl",
        "  next    search   one  lr 0.001  seed 0  2,048 tokens",
        "  next    search   one  lr 0.003  seed 0  2,048 tokens",
        "  next    run      one  best lr  seed 0  2,048 tokens",
        "  next    run      one  best lr  seed 1  2,048 tokens",
        "  next    run      two  lr 0.003  seed 0  2,048 tokens",
        "  next    derived  of one  seed 0  nothing to train",
        "  next    derived  of one  seed 1  nothing to train",
    ]
    said = called(capsys, "train", mine, "--list", "--only", "of.*", "--num_steps", "6", "--out=x.jsonl")[1]
    assert "two" not in said and "lr 0.003  seed 0  3,072 tokens" in said and "results: x.jsonl" in said
    said = called(capsys, "train", mine, "--list", "--optim.lr", "0.5", "--seed", "9")[1]
    assert [line.split("  ")[-2:] for line in said.splitlines()[2:]] == [
        ["seed 9", "2,048 tokens"], ["seed 9", "2,048 tokens"], ["seed 9", "nothing to train"],
    ]  # fmt: skip
    assert said.count("lr 0.5") == 2


def test_a_rate_or_a_seed_among_the_flags_is_the_only_one_tried() -> None:
    of = study(
        Arm("a", BASE, rates=(0.1, 0.2)), Arm("b", BASE, rate_of="a"), Arm("of a", measure=lambda run: {}, needs=("a",)),
        Arm("given", measure=lambda run: {}, seeds=(0,)),
    )  # fmt: skip
    assert command.overridden(of, [], "p") is of
    one = command.overridden(of, ["--seed", "9", "--num-steps=7"], "p")
    assert [arm.seeds for arm in one.arms] == [(9,), (9,), (9,), (0,)] and one.search_seed == 9
    assert [arm.config and arm.config.num_steps for arm in one.arms] == [7, 7, None, None]
    assert (one.arms[0].rates, one.arms[1].rate_of) == ((0.1, 0.2), "a")
    one = command.overridden(of, ["--optim.lr", "0.3"], "p")
    assert [(arm.rates, arm.rate_of) for arm in one.arms] == [((), "")] * 4 and one.search_seed == 0
    assert {job.lr for arm in one.arms for job in jobs.jobs_of(one, arm, [])} == {0.3, None}


def test_the_time_left_goes_by_tokens() -> None:
    of = study(Arm("x", BASE, seeds=(0, 1)), Arm("y", replace(BASE, num_steps=10), seeds=(0,)))
    rows = [row | {"tokens": running.num_tokens(BASE), "seconds": 100.0} for row in rows_of(of, x=[1.0, 1.0])[:1]]
    assert running.progress(of, of.arms, rows) == "1 of 3 runs done, about 5 min 0 s left"
    assert running.progress(of, of.arms[:1], rows) == "1 of 2 runs done, about 1 min 40 s left"
    of = study(Arm("x", BASE, rates=(1e-3, 2e-3), seeds=(0, 1)))
    (row,) = rows_of(study(Arm("x", BASE, seeds=(0,))), x=[1.0])
    first = jobs.jobs_of(of, of.arms[0], [])[0]
    row |= {"kind": "search", "config": first.fingerprint, "tokens": running.num_tokens(BASE), "seconds": 100.0}
    left = "1 of 4 runs done, about 3 min 20 s left"  # the other rate and seed 1: one of the search's runs is that of seed 0
    assert running.progress(of, of.arms, [row]) == left


def test_several_processes_are_refused(mine: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    status, said = called(capsys, "train", mine)
    assert status == 2 and "a study runs in one process, and there are several" in said and not Path("docs").exists()


@pytest.mark.parametrize(
    "words, why",
    [
        (("--only", "oen"), "--only 'oen' matches no arm; did you mean 'one'? arms: one, two, of one"),
        (("--only", "("), "--only '(' is not a regular expression"),
        (("--optim.lrr", "1"), "no option --optim.lrr; did you mean '--optim.lr'?"),
        (("--num_steps", "0"), "num_steps is 0; it must be at least 1"),
        (("--only",), "--only takes a text, and was given nothing"),
        (("--out", "/proc/x.jsonl"), "cannot write the results file /proc/x.jsonl"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(mine: str, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], why: str) -> None:
    status, said = called(capsys, "train", mine, *words)
    assert status == 2 and said.startswith("jaxllm: ") and said.count("\n") == 1 and why in said, said


ARM = Arm("a", BASE)


@pytest.mark.parametrize(
    "make, why",
    [
        (lambda: study(ARM, ARM), "has two arms named 'a'"),
        (lambda: study(Arm("a b", BASE), Arm("a-b", BASE)), "would have one name"),
        (lambda: study(), "has no arms"),
        (lambda: study(ARM, name="a/b"), "a study's name is 'a/b'"),
        (lambda: Arm("a/b", BASE), "an arm's name is 'a/b'"),
        (lambda: Arm("a"), "neither a config to train nor a measure"),
        (lambda: Arm("a", measure=lambda run: {}, rates=(1.0, 2.0)), "trains nothing"),
        (lambda: Arm("a", BASE, rates=(1.0,), rate_of="b"), "has rates of its own and takes that of 'b'"),
        (lambda: study(ARM, Arm("b", BASE, rate_of="aa")), "takes the rate of 'aa', which is no other arm that trains; did you mean 'a'"),
        (lambda: Arm("a", BASE, seeds=[0]), "holds a value that may change (unhashable type: 'list'); write tuples, not lists"),  # type: ignore[arg-type]
        (lambda: Arm("a", BASE, seeds=()), "give at least one, each once"),
        (lambda: Arm("a", BASE, seeds=(1, 1)), "give at least one, each once"),
        (lambda: Arm("a", BASE, rates=(0.1, -1.0)), "they are positive and finite"),
        (lambda: study(ARM, Arm("b", measure=lambda run: {}, needs=("c",))), "needs 'c', which is no other arm; there are a"),
        (lambda: study(Arm("ab", BASE, needs=("abc",)), Arm("abd", BASE)), "did you mean 'abd'"),
        (lambda: study(Arm("a", BASE, needs=("b",)), Arm("b", BASE, needs=("a",))), "arms need each other: a → b → a"),
        (lambda: study(Arm("a", BASE, seeds=(0, 1)), Arm("b", BASE, needs=("a",))), "which has no seed 2"),
        (lambda: study(ARM, orderings=(Ordering("a", "<", "aa"),)), "names the arm 'aa'; did you mean 'a'"),
        (
            lambda: study(ARM, Arm("b", BASE), orderings=(Ordering("a", "<", "b", "los"),)),
            "is by 'los', which is none of its columns; did you mean",
        ),
        (lambda: Ordering("a", "=<", "b"), "relation is '=<'; choose one of <, <="),  # type: ignore[arg-type]
        (lambda: Column("a", better="low"), "did you mean 'lower'"),  # type: ignore[arg-type]
        (lambda: Figure("a b", "", lambda rows: ""), "a figure's name is 'a b'"),
    ],
)
def test_a_study_that_cannot_be_is_refused(make: Callable[[], Any], why: str) -> None:
    with pytest.raises(ConfigError) as refused:
        make()
    assert why in str(refused.value) and "\n" not in str(refused.value)


def test_a_study_is_planned_by_its_first_arm(mine: str, capsys: pytest.CaptureFixture[str]) -> None:
    config, build = cli.load_target(f"{mine}:small")
    assert config.num_steps == 4 and build.__name__ == "plain" and cli.build_name(f"{mine}:small", build) == f"{mine}:plain"
    status, said = called(capsys, "plan", mine, "--gpus", "h100:1x1")
    assert status == 0 and "float32" in said
    with pytest.raises(ConfigError, match="must be a function of the file"):
        cli.build_name(mine, lambda config, precision: None)


# ------------------------------------------------------------------------------------------ real processes


class Command:
    """`python -m experiments.mine …` in a process of its own."""

    def __init__(self, *words: str, source: Path) -> None:
        environment = os.environ | {
            "PYTHONPATH": f"{source}:{ROOT}", "JAXLLM_TEST_TEXT": str(source / "corpus.txt"), "JAXLLM_CACHE": str(source / "cache"),
            "XLA_FLAGS": "--xla_force_host_platform_device_count=1", "PYTHONUNBUFFERED": "1",
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-m", "experiments.mine", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=environment, cwd=Path.cwd(),
        )  # fmt: skip
        self.lines: list[str] = []

    def until(self, words: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            if words in line:
                return
        raise AssertionError(f"it ended without '{words}':\n" + "\n".join(self.lines))

    def finish(self) -> int:
        assert self.process.stdout is not None
        self.lines += [line.rstrip("\n") for line in self.process.stdout]
        return self.process.wait(120)


@pytest.mark.fault
def test_a_study_stops_on_a_signal_and_goes_on_where_it_was(mine: str, tmp_path: Path) -> None:
    words = ("small", "--only", "of one", "--optim.lr", "3e-3", "--seed", "0", "--num_steps", "40")
    first = Command(*words, source=tmp_path)
    first.until("step   3/40")
    first.process.send_signal(signal.SIGTERM)
    assert first.finish() == 143, first.lines
    assert first.lines[-1].endswith(
        f"To go on: python -m experiments.mine {' '.join(words).replace('of one', chr(39) + 'of one' + chr(39))}"
    )
    assert not Path("docs/results/mine-small.jsonl").exists(), "an empty file is no result"
    second = Command(*words, source=tmp_path)
    assert second.finish() == 0, second.lines
    assert any("resuming from step" in line for line in second.lines)
    one, of_one = results.read(Path("docs/results/mine-small.jsonl"))
    assert (one["arm"], one["steps"], one["overrides"]) == ("one", 40, list(words[3:])) and of_one["metrics"]["bits_per_byte"] == 40.0
    assert 15_000 < one["tokens"] <= 40 * 512 and one["num_trained"] == one["num_params"] > 10_000 and one["precision"] == "float32"
    assert one["seconds"] > one["train_seconds"] > 0
    (folder,) = (path for path in Path("runs/mine-small").iterdir() if path.name.startswith("one-lr0.003-seed0-"))
    saved = rundir.read_json(folder / "results.json")
    assert one["metrics"]["loss"] == saved["loss"] and one["train_seconds"] == pytest.approx(saved["wall_seconds"], abs=0.1)
    assert rundir.read_json(folder / "seconds.json")["seconds"] == pytest.approx(one["seconds"], abs=5)
    assert any(line.startswith("| one | **") for line in second.lines)


@pytest.mark.fault
def test_a_study_that_is_killed_has_the_rows_of_an_unbroken_one(mine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for moment in ("step  3/4", "1 of 7 runs done", "step  4/4  held-out", "two  lr 0.003  seed 0: loss"):
        broken = Command("small", source=tmp_path)
        broken.until(moment)
        broken.process.kill()
        assert broken.finish() == -signal.SIGKILL
    path = Path("docs/results/mine-small.jsonl")
    with open(path, "ab") as file:
        file.write(b'{"study": "mine-sm')
    last = Command("small", source=tmp_path)
    assert last.finish() == 0 and "0 s left" not in last.lines[1], last.lines
    rows = results.read(path)
    (tmp_path / "unbroken").mkdir()
    monkeypatch.chdir(tmp_path / "unbroken")
    unbroken = Command("small", source=tmp_path)
    assert unbroken.finish() == 0, unbroken.lines
    assert timeless(rows) == timeless(results.read(path)) and len(rows) == 7
    assert [line for line in last.lines if line.startswith("| o")] and Path("runs").is_dir()
