"""The runs that a study consists of, and the name under which each is known for good.

An arm with several learning rates trains each of them with the search seed, at full length; its seeds then run at the best. So the
list of jobs depends on the rows that are there: a job whose rate is not known yet has no fingerprint.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxllm.config import NOT_HASHED, ConfigError, TrainConfig, chosen_values, nearest
from jaxllm.files import path_of
from jaxllm.study.values import Arm, Row, Study

type Key = tuple[str, str, int, float | None, str | None]
"""(kind, arm, seed, learning rate, fingerprint)"""


@dataclass(frozen=True)
class Job:
    """One line of the results file, to be."""

    arm: Arm
    kind: Literal["search", "run", "derived"]
    seed: int
    lr: float | None
    """None: nothing is trained, or the search is not finished."""
    config: TrainConfig | None
    """With seed and rate, before `Arm.prepare`."""
    fingerprint: str | None
    """None: not known before the search, its own or that of an arm it needs, is finished."""
    needs: tuple[Job, ...] = ()

    @property
    def key(self) -> Key:
        """What makes two rows the same."""
        return self.kind, self.arm.name, self.seed, self.lr, self.fingerprint

    def __str__(self) -> str:
        rate = "" if self.config is None else f"  lr {self.lr:g}" if self.lr else "  best lr"
        return f"{self.arm.name}{rate}  seed {self.seed}"


def key_of(row: Row) -> Key:
    """The key of the job that a row is the result of."""
    return row["kind"], row["arm"], row["seed"], row["lr"], row["config"]


def settled(rows: Iterable[Row]) -> dict[Key, Row]:
    """The rows that stand, by key; of several with one key the last. One that failed by a mistake, not by diverging, does not stand."""
    found = {key_of(row): row for row in rows}
    return {key: row for key, row in found.items() if not row.get("retry")}


def jobs_of(study: Study, arm: Arm, rows: Iterable[Row]) -> list[Job]:
    """All jobs of an arm as far as `rows` tell: first its search, then its seeds at the best rate."""
    there = settled(rows)
    return [*_search(study, arm, there), *(_at(study, arm, seed, there) for seed in arm.seeds)]


def best_rate(study: Study, arm: Arm, rows: Iterable[Row]) -> float | None:
    """The rate that the arm's seeds run at: the best by the study's criterion, or None while rates are missing or where all failed.

    Raises:
      ConfigError: a row of the search without the criterion.
    """
    return _best(study, arm, settled(rows))


def _best(study: Study, arm: Arm, there: dict[Key, Row]) -> float | None:
    if arm.config is None:
        return None
    if arm.rate_of:
        return _best(study, study.arm(arm.rate_of), there)
    search = _search(study, arm, there)
    if not search:
        return arm.rates[0] if arm.rates else arm.config.optim.lr
    if any(job.fingerprint is None or job.key not in there for job in search):
        return None
    best, lowest = None, math.inf
    for job in search:
        row = there[job.key]
        if row.get("failed"):
            continue
        if study.criterion not in row["metrics"]:
            near = nearest(study.criterion, row["metrics"]) or f"; it has {', '.join(row['metrics'])}"
            raise ConfigError(f"study '{study.name}' chooses rates by '{study.criterion}', which no run of '{arm.name}' has{near}")
        value = row["metrics"][study.criterion]
        if value is not None and value < lowest:
            best, lowest = job.lr, value
    return best


def _search(study: Study, arm: Arm, there: dict[Key, Row]) -> list[Job]:
    if arm.config is None or len(arm.rates) < 2:
        return []
    needs = tuple(needed(study, arm, study.search_seed, there))
    return [_job(study, arm, "search", study.search_seed, rate, needs) for rate in arm.rates]


def _at(study: Study, arm: Arm, seed: int, there: dict[Key, Row]) -> Job:
    """The job of an arm at one seed, and what it needs."""
    needs = tuple(needed(study, arm, seed, there))
    return _job(study, arm, "derived" if arm.config is None else "run", seed, _best(study, arm, there), needs)


def needed(study: Study, arm: Arm, seed: int, there: dict[Key, Row]) -> list[Job]:
    """The jobs of the arms that one needs, of the same seed, or of the only one they have."""
    others = [study.arm(name) for name in arm.needs]
    return [_at(study, other, seed if seed in other.seeds else other.seeds[0], there) for other in others]


def _job(study: Study, arm: Arm, kind: Any, seed: int, lr: float | None, needs: tuple[Job, ...]) -> Job:
    config, text = _config_at(arm, seed, lr)
    known = (arm.config is None or lr is not None) and all(job.fingerprint is not None for job in needs)
    return Job(arm, kind, seed, lr, config, _fingerprint(study, arm, text, needs) if known else None, needs)


@functools.lru_cache(maxsize=4096)
def _config_at(arm: Arm, seed: int, lr: float | None) -> tuple[TrainConfig | None, str]:
    """(an arm's config at a seed and a rate, what decides its numbers as JSON); asked for often, and not quick."""
    if arm.config is None:
        return None, f"seed {seed}"
    config = arm.vary(arm.config, seed)
    if lr is not None:
        config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=lr))
    return config, json.dumps(described(config), sort_keys=True)


# ---------------------------------------------------------------------------------------- fingerprint


def _fingerprint(study: Study, arm: Arm, config: str, needs: tuple[Job, ...]) -> str:
    values = [study.name, arm.name, config, *(job.fingerprint for job in needs)]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:8]


def described(config: TrainConfig) -> dict[str, Any]:
    """What of a config decides a row's numbers, as JSON values: every field that differs from its class's default.

    Unlike the hash of a run directory it holds num_steps and eval_batches: a study's run is of one length, and a row is its end.

    >>> described(TrainConfig(seed=1, save_every=7, num_steps=50))
    {'num_steps': 50, 'seed': 1}
    """
    return chosen_values(config, {*NOT_HASHED} - {"num_steps", "eval_batches"})


def folder_of(study: Study, job: Job) -> Path:
    """The run directory of a job whose fingerprint is known: runs/STUDY/ARM-lrRATE-seedSEED-FINGERPRINT; `run_dir` replaces runs/STUDY."""
    assert job.fingerprint is not None, f"{job} has no folder before its learning rate is known"
    configs = [job.config] if job.config else [arm.config for arm in study.arms if arm.config is not None]
    root = next((config.run_dir for config in configs if config.run_dir), f"runs/{study.name}")
    rate = "" if job.lr is None else f"-lr{job.lr:g}"
    return path_of(root) / f"{job.arm.slug}{rate}-seed{job.seed}-{job.fingerprint}"
