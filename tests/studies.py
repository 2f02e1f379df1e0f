"""What the tests of studies share: a trainer that only writes numbers, and rows made by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from jaxllm import config as configs
from jaxllm import rundir
from jaxllm.config import OptimConfig, TrainConfig
from jaxllm.study import Arm, Column, Row, Study, jobs, results, running, single

BASE = TrainConfig(precision="float32", num_steps=5, optim=OptimConfig(lr=1e-3))


def work_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results, runs and README under `folder`; no collection of a whole suite's objects after each of many jobs."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(running.gc, "collect", lambda: 0)


@dataclass
class Trainer:
    """In place of the loop: a run directory with the loss that a function says."""

    loss: Callable[[TrainConfig], float] = lambda config: config.optim.lr + config.seed
    tokens: float = 1e6
    trained: list[str] = field(default_factory=list)

    def __call__(self, config: TrainConfig, build: Any, say: Any, precision: Any) -> single.Trained:
        folder = rundir.locate(config)
        self.trained.append(f"{folder.name.rpartition('-')[0]}")
        folder.mkdir(parents=True, exist_ok=True)
        rundir.write_json(folder / "config.json", {"precision": "float32", "config": configs.to_dict(config)})
        say("a line")
        made = {
            "num_params": 100, "tokens_seen": self.tokens, "wall_seconds": 2.0, "steps": config.num_steps, "go_on": "",
            "loss": self.loss(config), "baselines": [],
        }  # fmt: skip
        rundir.write_json(folder / "results.json", made)
        return single.Trained(0, "float32", 10, made, folder)


def study(*arms: Arm, **more: Any) -> Study:
    return Study(**({"name": "s", "title": "T", "arms": arms, "columns": (Column("loss"),)} | more))


def go(of: Study, trainer: Trainer, status: int = 0) -> list[Row]:
    """Run what is missing; the rows of the file."""
    path = Path("docs/results/s.jsonl")
    with results.held(path, lambda line: None) as held:
        said: list[str] = []
        got = running.run_missing(of, of.in_order([arm.name for arm in of.arms]), held, said.append, trainer)
        assert got == status, "\n".join(said)
    return results.read(path)


def of_kind(rows: list[Row], kind: str) -> list[tuple[Any, ...]]:
    return [(row["arm"], row["seed"], row["lr"]) for row in rows if row["kind"] == kind]


def rows_of(of: Study, **losses: list[float]) -> list[Row]:
    """The rows of arms that had these losses at seeds 0, 1, …"""
    same = {
        "study": "s",
        "commit": "c" * 40,
        "date": "2026-11-21T20:00:00+00:00",
        "device": "1 × cpu",
        "jax": "0.12",
        "precision": "float32",
    }
    return [
        same
        | {"arm": name, "kind": job.kind, "seed": job.seed, "lr": job.lr, "config": job.fingerprint, "metrics": {"loss": values[job.seed]}}
        | {"seconds": 10.0 + job.seed, "tokens": 300_000 if job.config else 0, "num_trained": 1234}
        for name, values in losses.items()
        for job in jobs.jobs_of(of, of.arm(name), [])
    ]


def timeless(rows: list[Row]) -> list[Row]:
    return [{name: value for name, value in row.items() if name not in ("date", "seconds", "train_seconds", "commit")} for row in rows]
