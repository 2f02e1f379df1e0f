"""Runs what a study's results file does not hold yet: one job after another, each a run of its own that resumes by itself."""

from __future__ import annotations

import datetime
import errno
import gc
import math
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import jax

from jaxllm import config as configs
from jaxllm import pretrain, rundir
from jaxllm.config import ConfigError, Precision, TrainConfig
from jaxllm.data.ramp import Ramp
from jaxllm.loop import TrainingFailed
from jaxllm.metrics import duration
from jaxllm.study import single
from jaxllm.study.jobs import Job, Key, folder_of, jobs_of, key_of, settled
from jaxllm.study.results import Results
from jaxllm.study.values import Arm, Row, Run, Study

type Say = Callable[[str], None]
type Train = Callable[..., single.Trained]

NOT_METRICS = {"num_params", "tokens_seen", "wall_seconds", "steps"}
"""Numbers of `results.json` that stand in a row beside its metrics."""
_NOT_ITS_OWN = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EPIPE}
"""Errors that the next arm would meet too."""


class Stopped(SystemExit):
    """A signal ended a run, which is saved; the code is 128 + the signal."""


@dataclass(frozen=True)
class Context:
    """What stays the same from job to job."""

    study: Study
    results: Results
    say: Say
    train: Train
    commit: str
    overrides: Sequence[str]


def run_missing(
    study: Study, arms: Sequence[Arm], results: Results, say: Say = print, train: Train = single.train, overrides: Sequence[str] = ()
) -> int:
    """Run every job of `arms` that `results` does not hold, and append its row.

    An arm that fails leaves a row that says why, and the others go on. A run that diverged stays so; any other failure is tried
    again by the next call.

    Args:
      arms: in an order in which each comes after what it needs.
      overrides: the flags that changed the study's configs, kept in the rows.

    Returns:
      0, 1 where an arm failed, or 128 + the signal that stopped it.

    Raises:
      ConfigError: a criterion that no run has.
    """
    context = Context(study, results, say, train, rundir.git_commit(), overrides)
    tried: set[Key] = set()
    with _signals() as received:
        try:
            while (job := next_job(study, arms, results.rows, tried)) is not None:
                tried.add(job.key)
                say(f"\n{job}")
                row = carry_out(context, job)
                results.append(row)
                say(f"{job}: {outcome(study, row)}")
                say(progress(study, arms, results.rows))
                jax.clear_caches()  # each arm compiles its own programs; those of the last would stay for good
                gc.collect()
                if code := received():
                    raise SystemExit(code)
        except Stopped as stop:  # the loop has said how to go on
            return int(stop.code or 0)
        except SystemExit as stop:
            say(f"stopped; what is finished is in {results.path}. To go on: {rundir.command()}")
            return int(stop.code or 0)
    return 1 if failures(study, arms, results.rows) else 0


def next_job(study: Study, arms: Sequence[Arm], rows: Sequence[Row], tried: set[Key]) -> Job | None:
    """The first job that has no row that stands, was not tried in this call, and whose learning rate is known."""
    there = settled(rows)
    missing = (job for arm in arms for job in jobs_of(study, arm, rows) if job.fingerprint and job.key not in there)
    return next((job for job in missing if job.key not in tried), None)


def failures(study: Study, arms: Sequence[Arm], rows: Sequence[Row]) -> list[str]:
    """One line for each job without a result. A rate of a search that diverged is a result: it is not the best."""
    last = {key_of(row): row for row in rows}
    lines = []
    for job in (job for arm in arms for job in jobs_of(study, arm, rows)):
        row = last.get(job.key) if job.fingerprint else None
        if job.fingerprint is None:
            lines.append(f"{job}: not run, because no rate of a search before it trained")
        elif row is None:
            lines.append(f"{job}: not run")
        elif row.get("failed") and (job.kind != "search" or row.get("retry")):
            lines.append(f"{job}: {row['failed']}")
    return lines


# ------------------------------------------------------------------------------------------- one job


def carry_out(context: Context, job: Job) -> Row:
    """The row of a job: trained, measured, or why not.

    Raises:
      Stopped: by a signal; the run is saved.
      OSError: a disk that is full, which would stop every other arm too.
    """
    twin = settled(context.results.rows).get(("search", *job.key[1:]))
    if job.kind == "run" and twin and not twin.get("failed") and (job.arm.measure is None or twin.get("measured")):
        return {name: value for name, value in twin.items() if name != "measured"} | {"kind": "run"}
    folder = folder_of(context.study, job)
    clock = Clock(folder)
    try:
        numbers = _numbers(context, job, folder, clock, twin)
    except TrainingFailed as error:
        numbers = {"failed": str(error)}
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _NOT_ITS_OWN:
            raise
        if not isinstance(error, ConfigError):
            traceback.print_exc(file=sys.stderr)
        kind = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
        numbers = {"failed": kind + " ".join(str(error).split()), "retry": True}
    finally:
        clock.keep(0.0)
    return {
        "study": context.study.name,
        "arm": job.arm.name,
        "kind": job.kind,
        "seed": job.seed,
        "lr": job.lr,
        "config": job.fingerprint,
        **({"overrides": list(context.overrides)} if context.overrides else {}),
        "commit": context.commit,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(clock.seconds(), 1),
        "device": rundir.devices(),
        "jax": jax.__version__,
        **numbers,
    }


def _numbers(context: Context, job: Job, folder: Path, clock: Clock, twin: Row | None) -> dict[str, Any]:
    """What is particular to a job's row: its training, its metrics."""
    run = _with_needs(context, job, folder)
    row: dict[str, Any] = {"tokens": 0, "steps": 0, "metrics": {}}
    if job.config is not None:
        if twin and is_complete(folder, job.config.num_steps):
            names = ("train_seconds", "tokens", "steps", "num_params", "num_trained", "precision", "parent", "metrics")
            row = {name: twin[name] for name in names if name in twin}
            run = replace(run, config=_as_trained(job.config, folder))
        else:
            run = replace(run, config=_prepared(job, run))
            row = _train(context, job, run, clock)
    # The rates that lose need no more than the criterion.
    enough = job.kind == "search" and context.study.criterion in row["metrics"]
    if job.arm.measure is not None and not enough:
        row["metrics"] = row["metrics"] | _finite(job.arm.measure(run))
        row |= {"measured": True} if job.kind == "search" else {}
    return row


def plain(config: TrainConfig, *, precision: Precision) -> Any:
    """`pretrain.experiment` without what no table shows: samples, and what simpler predictors make of the held-out text."""
    return replace(pretrain.experiment(config, precision=precision), sample=None, finish=None)


def _train(context: Context, job: Job, run: Run, clock: Clock) -> dict[str, Any]:
    assert run.config is not None

    def say(line: str) -> None:
        clock.keep()
        context.say(f"  {line}")

    precision = choose_precision(run.config, context.results.rows)
    trained = context.train(run.config, job.arm.build or plain, say=say, precision=precision)
    if trained.exit_code:
        clock.keep(0.0)
        raise Stopped(trained.exit_code)
    results = trained.results
    return {
        "train_seconds": round(results["wall_seconds"], 1),
        "tokens": int(results["tokens_seen"]),
        "steps": results["steps"],
        "num_params": results["num_params"],
        "num_trained": trained.num_trained,
        "precision": trained.precision,
        **({"parent": parent} if (parent := rundir.recorded(run.config).get("parent_fingerprint")) else {}),
        "metrics": _finite({name: value for name, value in results.items() if name not in NOT_METRICS}),
    }


def choose_precision(config: TrainConfig, rows: Sequence[Row]) -> tuple[Precision, str]:
    """(precision, why): as `pretrain.choose_precision`, but timed once for all arms, so that none has another than its rivals."""
    if config.precision == "auto" and not rundir.recorded(config):
        device = rundir.devices()
        before = next((row["precision"] for row in rows if row.get("precision") and row.get("device") == device), None)
        if before is not None:
            return before, "that of the study's other runs"
    return pretrain.choose_precision(config)


def is_complete(folder: Path, num_steps: int) -> bool:
    """Whether a run directory holds a run of that length to its end."""
    return rundir.read_json(folder / "results.json").get("steps") == num_steps


def _finite(values: Mapping[str, Any]) -> dict[str, float | None]:
    """Those that are numbers; one that is not finite is None."""
    numbers = {name: float(value) for name, value in values.items() if hasattr(value, "__float__") and not isinstance(value, bool)}
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}


# -------------------------------------------------------------------------------------- what it needs


def _with_needs(context: Context, job: Job, folder: Path) -> Run:
    """A job's `Run`, with those of the jobs that it needs, whose run directories are there when this returns."""
    config = None if job.config is None else replace(job.config, run_dir=str(folder))
    needs = {need.arm.name: _there(context, need) for need in job.needs}
    if job.config is None:
        folder.mkdir(parents=True, exist_ok=True)
    return Run(config, folder, job.seed, needs, say=context.say)


def _there(context: Context, job: Job) -> Run:
    """The run of a job that another needs. Where only its row is left, it is run again; the row stays as it is."""
    row = settled(context.results.rows).get(job.key)
    if row is None or row.get("failed"):
        why = f", which failed ({row['failed']})" if row else ", which failed"
        raise ConfigError(f"it needs {job}{why}")
    folder = folder_of(context.study, job)
    gone = not folder.exists() if job.config is None else not is_complete(folder, job.config.num_steps)
    run = _with_needs(context, job, folder)
    if gone:
        context.say(f"  {folder} is not here any more: once again, {job}")
        if job.config is None:
            assert job.arm.measure is not None
            job.arm.measure(run)
        else:
            _train(context, job, replace(run, config=_prepared(job, run)), Clock(folder))
    return replace(run, metrics=row["metrics"], config=None if job.config is None else _as_trained(job.config, folder))


def _prepared(job: Job, run: Run) -> TrainConfig:
    """The config to train: the arm's own function may have changed it, but not where it runs."""
    assert run.config is not None
    return run.config if job.arm.prepare is None else replace(job.arm.prepare(run), run_dir=str(run.run_dir))


def _as_trained(config: TrainConfig, folder: Path) -> TrainConfig:
    """The config that a run directory records."""
    return configs.from_dict(type(config), rundir.read_json(folder / "config.json")["config"])


# ------------------------------------------------------------------------------------------ progress


class Clock:
    """Seconds of wall-clock time that a job has taken, those of earlier processes included; kept in its folder as it goes."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "seconds.json"
        self._start = time.perf_counter() - rundir.read_json(self._path).get("seconds", 0.0)
        self._kept = -math.inf

    def seconds(self) -> float:
        """So far."""
        return time.perf_counter() - self._start

    def keep(self, every_seconds: float = 5.0) -> None:
        """Write it down, unless that was done less than so long ago; a killed process loses that much."""
        if self._path.parent.exists() and time.perf_counter() - self._kept >= every_seconds:
            rundir.write_json(self._path, {"seconds": self.seconds()})
            self._kept = time.perf_counter()


def outcome(study: Study, row: Row) -> str:
    """A row in one line."""
    if row.get("failed"):
        return f"failed: {row['failed']}"
    shown = {column.metric: column.digits for column in study.columns} | {study.criterion: 3}
    numbers = [f"{name} {row['metrics'][name]:.{digits}f}" for name, digits in shown.items() if row["metrics"].get(name) is not None]
    return f"{', '.join(numbers)} ({duration(row['seconds'])})"


def progress(study: Study, arms: Sequence[Arm], rows: Sequence[Row]) -> str:
    """How many jobs are done, and what is left.

    The time is that of what has run here, by tokens; an arm that has not run is taken to be as fast as the others.
    """
    there = settled(rows)
    jobs = [job for arm in arms for job in jobs_of(study, arm, rows)]
    missing = [job for job in jobs if job.key not in there]
    done = f"{len(jobs) - len(missing)} of {len(jobs)} runs done"
    if not missing:
        return done
    seconds = [_expected_seconds(study, job, [*there.values()]) for job in missing]
    known = [value for value in seconds if value is not None]
    return f"{done}, {f'about {duration(sum(known))} left' if len(known) == len(seconds) else 'time left unknown before one has run'}"


def _expected_seconds(study: Study, job: Job, rows: Sequence[Row]) -> float | None:
    if job.config is None:
        took = [row["seconds"] for row in rows if row["arm"] == job.arm.name]
        return took[-1] if took else 0.0
    searched = len(job.arm.rates) > 1 and job.kind == "run" and job.seed == study.search_seed
    if searched:  # one of the search's runs is this one
        return 0.0
    trained = [row for row in rows if row.get("tokens")]
    own = [row for row in trained if row["arm"] == job.arm.name] or trained
    if not own:
        return None
    return sum(row["seconds"] for row in own) / sum(row["tokens"] for row in own) * num_tokens(job.config)


def num_tokens(config: TrainConfig) -> int:
    """Tokens of all batches of a run, padding included."""
    return Ramp(config.data).first_row(config.num_steps) * config.data.sequence_length


@contextmanager
def _signals() -> Iterator[Callable[[], int]]:
    """SIGTERM and SIGINT end the study; the loop hears them itself while it trains.

    The loop finishes its evaluation when one comes then, and returns as if none had come. So each is also written into a
    socket: the function that is yielded says which came, as 128 + its number, or 0.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    reader, writer = socket.socketpair()
    with reader, writer:
        reader.setblocking(False)
        writer.setblocking(False)
        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        old = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)

        def received() -> int:
            try:
                numbers = reader.recv(4096)
            except BlockingIOError:
                return 0
            return next((128 + number for number in numbers if number in before), 0)

        try:
            yield received
        finally:
            signal.set_wakeup_fd(old)
            for number, handler in before.items():
                signal.signal(number, handler)
