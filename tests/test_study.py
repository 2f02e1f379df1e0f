"""Studies: which runs they consist of, in which order they run, and what becomes of those that fail."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import field, replace
from pathlib import Path
from typing import Any

import pytest

from jaxllm import rundir
from jaxllm.config import ConfigError, ModelConfig, OptimConfig, TrainConfig
from jaxllm.loop import TrainingFailed
from jaxllm.study import Arm, Row, Run, Study, jobs, results, running, single, table
from tests.studies import BASE, Trainer, go, of_kind, study, work_in


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work_in(tmp_path, monkeypatch)


# ------------------------------------------------------------------------------------------- searching


def test_a_search_finds_the_best_rate_and_its_run_counts_as_that_seeds() -> None:
    trainer = Trainer(lambda config: abs(config.optim.lr - 0.02) + config.seed)
    rows = go(study(Arm("a", BASE, rates=(0.01, 0.02, 0.03))), trainer)
    assert of_kind(rows, "search") == [("a", 0, 0.01), ("a", 0, 0.02), ("a", 0, 0.03)]
    assert of_kind(rows, "run") == [("a", 0, 0.02), ("a", 1, 0.02), ("a", 2, 0.02)]
    assert trainer.trained == ["a-lr0.01-seed0", "a-lr0.02-seed0", "a-lr0.03-seed0", "a-lr0.02-seed1", "a-lr0.02-seed2"]
    assert [row["metrics"]["loss"] for row in rows if row["kind"] == "run"] == [0.0, 1.0, 2.0]


def test_the_search_has_a_seed_of_its_own() -> None:
    trainer = Trainer(lambda config: config.optim.lr if config.seed == 5 else -config.optim.lr)
    rows = go(study(Arm("a", BASE, rates=(0.1, 0.2), seeds=(0, 5)), search_seed=5), trainer)
    assert of_kind(rows, "search") == [("a", 5, 0.1), ("a", 5, 0.2)] and of_kind(rows, "run") == [("a", 0, 0.1), ("a", 5, 0.1)]
    assert len(trainer.trained) == 3


def test_of_equal_rates_the_first_is_taken() -> None:
    rows = go(study(Arm("a", BASE, rates=(0.02, 0.01), seeds=(1,))), Trainer(lambda config: 1.0))
    assert of_kind(rows, "run") == [("a", 1, 0.02)]


def test_an_arm_may_take_the_best_rate_of_another() -> None:
    trainer = Trainer(lambda config: abs(config.optim.lr - 0.02))
    of = study(Arm("few examples", BASE, rate_of="a", seeds=(0, 1)), Arm("a", BASE, rates=(0.01, 0.02, 0.03), seeds=(0,)))
    rows = go(of, trainer)
    assert of_kind(rows, "run") == [("a", 0, 0.02), ("few examples", 0, 0.02), ("few examples", 1, 0.02)]
    assert "At the rate of a: few examples." in table.searches(of, rows)


def test_what_a_row_holds() -> None:
    (row,) = go(study(Arm("a", BASE, seeds=(3,))), Trainer())
    assert row["date"][:2] == "20" and row.pop("date") and row.pop("commit") and row.pop("device") and row.pop("jax")
    assert 0 <= row.pop("seconds") < 60
    assert row.pop("config") == jobs.jobs_of(study(Arm("a", BASE, seeds=(3,))), Arm("a", BASE, seeds=(3,)), [])[0].fingerprint
    assert row == {
        "study": "s", "arm": "a", "kind": "run", "seed": 3, "lr": 0.001, "train_seconds": 2.0, "tokens": 1_000_000, "steps": 5,
        "num_params": 100, "num_trained": 10, "precision": "float32", "metrics": {"loss": 3.001},
    }  # fmt: skip


def test_the_second_call_runs_nothing_and_a_third_only_what_is_new() -> None:
    trainer, arms = Trainer(), (Arm("a", BASE, rates=(0.1, 0.2)), Arm("b", BASE))
    first = go(study(*arms), trainer)
    done = len(trainer.trained)
    assert go(study(*arms), trainer) == first and len(trainer.trained) == done == 7
    longer = go(study(arms[0], replace(arms[1], seeds=(0, 1, 2, 3))), trainer)
    assert longer[:-1] == first and trainer.trained[done:] == ["b-lr0.001-seed3"]


def test_the_criterion_may_be_a_measured_number_and_the_losing_rates_are_measured_only_then() -> None:
    measured: list[tuple[float, int]] = []

    def measure(run: Run) -> dict[str, float]:
        assert run.config is not None
        measured.append((run.config.optim.lr, run.seed))
        return {"errors": -run.config.optim.lr}

    arm = Arm("a", BASE, rates=(0.1, 0.2), seeds=(0, 1), measure=measure)
    rows = go(study(arm), Trainer())
    assert measured == [(0.1, 0), (0.1, 1)], "the winner and the other seed"
    assert ["errors" in row["metrics"] for row in rows] == [False, False, True, True]
    measured.clear()
    rows = go(study(arm, name="t", criterion="errors"), Trainer())
    assert measured == [(0.1, 0), (0.2, 0), (0.2, 1)]
    assert of_kind(rows, "run")[-1] == ("a", 1, 0.2)


def test_a_criterion_that_no_run_has_stops_the_study_after_one_search() -> None:
    trainer = Trainer()
    with pytest.raises(ConfigError, match="chooses rates by 'los', which no run of 'a' has; did you mean 'loss'"):
        go(study(Arm("a", BASE, rates=(0.1, 0.2)), Arm("b", BASE), criterion="los"), trainer)
    assert len(trainer.trained) == 2


def test_data_may_vary_with_the_seed() -> None:
    arm = Arm("a", BASE, vary=lambda config, seed: replace(config, name=f"part-{seed}"), rates=(0.5,))
    found = jobs.jobs_of(study(arm), arm, [])
    assert [(job.config.name, job.config.seed, job.config.optim.lr) for job in found if job.config] == [
        ("part-0", 0, 0.5), ("part-1", 0, 0.5), ("part-2", 0, 0.5),
    ]  # fmt: skip
    assert len({job.fingerprint for job in found}) == 3


# -------------------------------------------------------------------------------------------- failures


def diverging(config: TrainConfig) -> float:
    if config.optim.lr > 0.15:
        raise TrainingFailed("loss not finite at step 3")
    return config.optim.lr


def test_a_rate_that_diverges_is_a_result_and_is_not_tried_again() -> None:
    trainer = Trainer(diverging)
    rows = go(study(Arm("a", BASE, rates=(0.1, 0.2))), trainer)
    assert [row.get("failed") for row in rows] == [None, "loss not finite at step 3", None, None, None]
    go(study(Arm("a", BASE, rates=(0.1, 0.2))), trainer)
    assert len(trainer.trained) == 4
    assert "| a | **0.100** | diverged |" in table.searches(study(Arm("a", BASE, rates=(0.1, 0.2))), rows)


def test_an_arm_that_fails_says_why_and_the_others_go_on() -> None:
    bad, good = replace(BASE, optim=OptimConfig(lr=0.5)), Arm("good", BASE, seeds=(0,))
    rows = go(study(Arm("bad", bad, seeds=(0,)), good), Trainer(diverging), status=1)
    assert [(row["arm"], "failed" in row) for row in rows] == [("bad", True), ("good", False)]
    rows = go(study(Arm("bad", bad, seeds=(0,)), good), Trainer(diverging), status=1)
    assert len(rows) == 2


def test_a_mistake_is_tried_again_by_the_next_call_but_not_by_this_one() -> None:
    def refuse(config: TrainConfig) -> float:
        raise ConfigError("no such file")

    def crash(config: TrainConfig) -> float:
        raise KeyError("x")

    arm = study(Arm("a", BASE, seeds=(0,)))
    assert [row["failed"] for row in go(arm, Trainer(refuse), status=1)] == ["no such file"]
    assert [row["failed"] for row in go(arm, Trainer(crash), status=1)][1:] == ["KeyError: 'x'"]
    rows = go(arm, Trainer())
    assert [row.get("metrics") for row in rows] == [None, None, {"loss": 0.001}]
    assert "| a | 0.001 | 1 |" in table.table(arm, rows)


def test_where_every_rate_fails_the_seeds_do_not_run() -> None:
    trainer = Trainer(diverging)
    of = study(Arm("a", BASE, rates=(0.2, 0.3)), Arm("of a", measure=lambda run: {}, needs=("a",)), Arm("b", BASE, seeds=(0,)))
    rows = go(of, trainer, status=1)
    assert trainer.trained == ["a-lr0.2-seed0", "a-lr0.3-seed0", "b-lr0.001-seed0"] and len(rows) == 3
    lines = running.failures(of, of.arms, rows)
    assert len(lines) == 6 and all("not run, because no rate of a search before it trained" in line for line in lines)


def test_a_full_disk_ends_the_study_and_records_nothing() -> None:
    def full(config: TrainConfig) -> float:
        raise OSError(28, "No space left on device", "x")

    with pytest.raises(OSError, match="No space"):
        go(study(Arm("a", BASE), Arm("b", BASE)), Trainer(full))
    assert not Path("docs/results/s.jsonl").exists()


def test_a_number_that_is_not_finite_is_null_and_never_the_best() -> None:
    of = study(Arm("a", BASE, rates=(0.1, 0.2), seeds=(0,)))
    rows = go(of, Trainer(lambda config: math.nan if config.optim.lr < 0.15 else 1.0))
    assert [row["metrics"]["loss"] for row in rows] == [None, 1.0, 1.0]
    assert "| a | not finite | **1.000** |" in table.searches(of, rows)


# ------------------------------------------------------------------------------------------ what is needed


def test_derived_arms_measure_the_runs_of_their_seed() -> None:
    seen: list[Run] = []

    def measure(run: Run) -> dict[str, float]:
        seen.append(run)
        return {"loss": 10 + run.seed}

    rows = go(study(Arm("1 bit", measure=measure, needs=("float",)), Arm("float", BASE, rates=(0.1, 0.2))), Trainer())
    assert of_kind(rows, "derived") == [("1 bit", seed, None) for seed in (0, 1, 2)]
    for seed, run in enumerate(seen):
        need = run.needs["float"]
        assert (run.seed, need.seed, run.config) == (seed, seed, None) and run.run_dir.is_dir()
        assert need.config is not None and (need.config.optim.lr, need.config.seed) == (0.1, seed)
        assert rundir.read_json(need.run_dir / "results.json")["loss"] == 0.1 + seed
        assert need.config.run_dir == str(need.run_dir)
        assert need.metrics["loss"] == 0.1 + seed and not run.metrics


def test_an_arm_may_start_from_anothers_run_and_three_seeds_from_one() -> None:
    def prepare(run: Run) -> TrainConfig:
        assert run.config is not None
        return replace(run.config, init_from=str(run.needs["teacher"].run_dir))

    started: list[tuple[str, str]] = []

    def loss(config: TrainConfig) -> float:
        started.append((Path(config.run_dir).name[:7], config.init_from))
        return config.optim.lr

    of = study(Arm("student", BASE, rates=(0.1, 0.2), needs=("teacher",), prepare=prepare), Arm("teacher", BASE, seeds=(7,)))
    rows = go(of, Trainer(loss))
    (teacher,) = {start for name, start in started if name == "student"}
    assert Path(teacher).name.startswith("teacher-lr0.001-seed7-") and len(started) == 1 + 4
    assert of_kind(rows, "run") == [("teacher", 7, 0.001), *(("student", seed, 0.1) for seed in (0, 1, 2))]
    other = study(of.arms[0], replace(of.arms[1], config=replace(BASE, num_steps=6)))
    assert not {row["config"] for row in rows} & {job.fingerprint for arm in other.arms for job in jobs.jobs_of(other, arm, rows)}


def test_a_run_that_is_needed_and_gone_is_made_again_without_a_second_row() -> None:
    arms = (Arm("a", BASE, seeds=(0,)), Arm("b", measure=lambda run: {"loss": 2.0}, needs=("a",), seeds=(0,)))
    go(study(arms[0]), Trainer())
    (folder,) = Path("runs/s").iterdir()
    folder.rename("away")
    trainer = Trainer()
    rows = go(study(*arms), trainer)
    assert len(rows) == 2 and trainer.trained == ["a-lr0.001-seed0"] and folder.exists()


def test_an_arm_whose_need_failed_fails_too() -> None:
    bad = Arm("bad", replace(BASE, optim=OptimConfig(lr=0.5)), seeds=(0,))
    rows = go(study(bad, Arm("of it", measure=lambda run: {}, needs=("bad",), seeds=(0,))), Trainer(diverging), status=1)
    assert rows[1]["failed"] == "it needs bad lr 0.5 seed 0, which failed (loss not finite at step 3)"


# ------------------------------------------------------------------------------------------- fingerprints


def test_the_fingerprint_is_of_what_decides_a_rows_numbers() -> None:
    def fingerprint(config: TrainConfig, **more: Any) -> str | None:
        arm = Arm(**({"name": "a", "config": config, "seeds": (0,)} | more))
        return jobs.jobs_of(study(arm), arm, [])[0].fingerprint

    same = [BASE, replace(BASE, save_every=7, log_every=3, run_dir="elsewhere", keep_last=5)]
    assert len({fingerprint(config) for config in same}) == 1
    others = [
        BASE, replace(BASE, num_steps=6), replace(BASE, eval_batches=3), replace(BASE, init_from="x"), replace(BASE, remat="none"),
        replace(BASE, optim=OptimConfig(lr=2e-3)), replace(BASE, model=ModelConfig(num_layers=3)),
    ]  # fmt: skip
    found = [fingerprint(config) for config in others] + [fingerprint(BASE, seeds=(1,)), fingerprint(BASE, name="b")]
    assert len(set(found)) == len(others) + 2


def test_a_field_that_is_added_later_changes_no_fingerprint() -> None:
    from dataclasses import make_dataclass

    newer = make_dataclass("Newer", [("later", int, field(default=3))], bases=(TrainConfig,), frozen=True)
    assert jobs.described(newer(num_steps=5)) == jobs.described(TrainConfig(num_steps=5)) == {"num_steps": 5}
    assert jobs.described(newer(later=4)) == {"later": 4}


def test_committed_rows_have_the_fingerprints_of_their_jobs() -> None:
    from experiments.gqa_uptrain import small

    rows = results.read(Path(__file__).parent.parent / "docs" / "results" / f"{small.name}.jsonl")
    here = {job.fingerprint for arm in small.arms for job in jobs.jobs_of(small, arm, rows)}
    assert here & {row["config"] for row in rows}, "no row is known any more: what goes into a fingerprint has changed"


# ---------------------------------------------------------------------------------- signals, time, precision


def test_a_signal_while_measuring_or_finishing_is_heard() -> None:
    from jaxllm import hosts

    def stopped(of: Study, trainer: Any) -> tuple[int, list[str], list[Row]]:
        said: list[str] = []
        with results.held(Path("docs/results/s.jsonl"), said.append) as held:
            return running.run_missing(of, of.arms, held, said.append, trainer), said, list(held.rows)

    def measure(run: Run) -> Mapping[str, float]:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
        return {}

    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    status, said, rows = stopped(study(Arm("a", BASE, measure=measure)), Trainer())
    assert (status, rows) == (130, []) and "To go on: " in said[-1]

    class Finishing(Trainer):
        def __call__(self, *words: Any, **more: Any) -> single.Trained:
            with hosts.Signals() as signals:
                signals.phase = "finishing"
                os.kill(os.getpid(), signal.SIGTERM)
                return super().__call__(*words, **more)

    status, said, rows = stopped(study(Arm("a", BASE)), Finishing())
    assert (status, len(rows)) == (143, 1) and "To go on: " in said[-1]
    ended = lambda config, build, say, precision: single.Trained(143, "float32", 0, {}, Path("x"))
    assert stopped(study(Arm("b", BASE)), ended)[0] == 143
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers


def test_seconds_are_those_of_all_sessions() -> None:
    folder = Path("run")
    before = running.Clock(folder)
    before.keep()
    assert not folder.exists(), "a run that is refused leaves no folder"
    folder.mkdir()
    rundir.write_json(folder / "seconds.json", {"seconds": 1000.0})
    clock = running.Clock(folder)
    clock.keep()
    assert 1000 <= rundir.read_json(folder / "seconds.json")["seconds"] <= clock.seconds() < 1060


def test_all_arms_have_the_precision_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(BASE, precision="auto")
    rows: list[Row] = [{"precision": "bfloat16_matmul", "device": rundir.devices()}]
    assert running.choose_precision(config, rows) == ("bfloat16_matmul", "that of the study's other runs")
    assert running.choose_precision(BASE, rows)[0] == "float32", "asked for"
    monkeypatch.setattr(running.pretrain, "choose_precision", lambda config: ("float32", "timed"))
    assert running.choose_precision(config, [{"precision": "bfloat16", "device": "TPU"}]) == ("float32", "timed")
