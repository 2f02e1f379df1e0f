"""The one training loop: resume, step, log, evaluate, save; stop on a signal, rewind on a spike.

The host runs one step ahead of what it has read: step k + 1 is dispatched before the metrics of step k
are fetched, so that data, logging and progress cost no device time. Whatever looks at the state itself
(saving, evaluating, sampling, the end) first settles every step in flight.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax

from jaxllm import chips, flops, hosts, metrics, optim, rundir, sharding, spike, tree
from jaxllm import config as configs
from jaxllm.checkpoint import Checkpointer
from jaxllm.config import ConfigError
from jaxllm.data.batch import Item, Position, to_global
from jaxllm.files import is_remote, written_here
from jaxllm.profiler import Profiler
from jaxllm.step import BASE, Experiment, Frozen, TrainState, frozen_base, program, student_params

type Say = Callable[[str], None]

REWINDS = "rewinds.json"
"""In the run directory: what was skipped, and the steps that were restarted from. A checkpoint does not know of later rewinds."""


class TrainingFailed(RuntimeError):
    """Training cannot go on. The message says where it was and what is safe."""


@dataclass(frozen=True)
class Ending:
    """How a call of `run` ended."""

    run_dir: Path
    step: int
    exit_code: int
    """0, or 128 + the signal that stopped it."""


@dataclass(frozen=True)
class InFlight:
    """A step that was dispatched and whose numbers have not been read."""

    step: int
    item: Item
    metrics: dict[str, Any]
    stop: Any
    data_seconds: float


def run(experiment: Experiment, precision: str, say: Say = print, more_environment: dict[str, Any] | None = None) -> Ending:
    """Train `experiment` from wherever its run directory has got to, until the last step or a signal.

    The same call resumes: the state, the data position and the randomness are the checkpoint's, so the bits
    at the end are those of an unbroken run.

    Args:
      precision: what the experiment's LM was built with; recorded, so that resuming uses it again.
      say: where progress goes.
      more_environment: further entries of `environment.json`.

    Raises:
      ConfigError: something that cannot run, found before anything is compiled.
      TrainingFailed: a loss that is not finite, or a disk that is full.
    """
    config = experiment.config
    say = hosts.only_first(say)
    mesh = sharding.make_mesh(config.mesh)
    notes = sharding.check_fit(config.model, config.data, config.optim, mesh, updates_per_batch=experiment.updates_per_batch)
    with ExitStack() as stack:
        stack.enter_context(hosts.fail_together())
        signals = stack.enter_context(hosts.Signals())
        run_dir = stack.enter_context(rundir.claim(config))
        say(f"run directory: {run_dir}")
        hosts.check_shared(run_dir)
        for note in notes:
            say(f"note: {note}")
        writer = stack.enter_context(metrics.Writer(run_dir, wandb_project=config.wandb_project, config=configs.to_dict(config)))
        stack.enter_context(jax.set_mesh(mesh))
        session = Session(experiment, mesh, run_dir, writer, signals, say)
        try:
            found = session.find_start()  # the last thing that can refuse; from here on the directory is this config's
            rundir.record(config, precision, run_dir)
            session.describe(precision, more_environment or {})
            session.start(*found)
            signals.phase = "training"
            return session.train()
        finally:
            session.profiler.stop()
            with suppress(Exception):  # a save in flight is worth finishing; what went wrong has been said already
                session.checkpoints.wait()


class Session:
    """One process's share of one run: the objects that live as long as it, and the state that changes."""

    def __init__(
        self, experiment: Experiment, mesh: jax.sharding.Mesh, run_dir: Path, writer: metrics.Writer, signals: hosts.Signals, say: Say
    ) -> None:
        self.experiment, self.config, self.mesh, self.run_dir = experiment, experiment.config, mesh, run_dir
        self.writer, self.signals, self.say = writer, signals, say
        config = self.config
        self.dataset = experiment.load_data(config.data, seed=config.seed, say=say)
        if self.dataset.tokenizer.num_vocab > config.model.vocab_size:
            raise ConfigError(
                f"the tokenizer has {self.dataset.tokenizer.num_vocab} tokens, and model.vocab_size is {config.model.vocab_size}; "
                f"use --model.vocab_size {self.dataset.tokenizer.num_vocab} or a smaller tokenizer"
            )
        self.step_fn, self.make_state, self.template = program(experiment, mesh)
        self.vote = hosts.Vote(mesh)
        keep = config.keep_last
        if config.spike.enabled:  # a rewind needs a checkpoint from before the spike
            keep = max(keep, math.ceil(config.spike.rewind_steps / config.save_every) + 1)
        self.checkpoints = Checkpointer(run_dir / "checkpoints", keep, config.keep_every)
        self.rows = partial(sharding.host_rows, mesh)

        self.state: TrainState
        self.frozen: Frozen = {}
        self.position = Position()
        self.restarts: list[int] = []
        """The step of each rewind so far."""
        self.done_steps = 0
        self.tokens_seen = 0.0
        self.recent_losses: deque[float] = deque(maxlen=config.spike.window)
        self.laps = metrics.Laps()
        profile = Path(f"{run_dir.name}-profile") if is_remote(run_dir) else run_dir / "profile"
        self.profiler = Profiler(profile, config.profile_steps, lambda: jax.block_until_ready(self.state), say)
        self.compiled_sizes: set[int] = set()
        """Batch sizes that this process has compiled the step for."""

    # ------------------------------------------------------------------------------ start and resume

    def describe(self, precision: str, more: dict[str, Any]) -> None:
        """Write down, and say, what this run is: everything somebody needs to run it again."""
        config, mesh = self.config, self.mesh
        shapes = self.experiment.lm.param_shapes
        self.num_params = tree.count(shapes)
        self.peak, source = self._peak(precision)
        model = config.model
        frozen, others = tree.count(optim.split(config.optim, shapes)[1]), self.experiment.other_flops_per_token
        self.per_token = flops.of_token(
            model, self.num_params, config.data.sequence_length, num_frozen=frozen, others=others, remat=config.remat
        )
        mesh_text = " × ".join(f"{axis} {mesh.shape[axis]}" for axis in sharding.AXES)
        plan = self._batch_plan()
        for line in (
            f"{self.num_params:,} parameters on {mesh_text}; {plan[0]}",
            *plan[1:],
            optim.describe(config.optim, shapes, num_steps=config.num_steps),
            f"peak {self.peak / 1e9:,.0f} GFLOP/s ({source}); {self.per_token.model / 1e6:,.1f} MFLOP per token "
            f"= 6 × {self.num_params:,}{f' - 2 × {frozen:,} frozen' if frozen else ''} + 12 × L {model.num_layers} "
            f"× N·H {model.num_heads * model.head_size} × T {config.data.sequence_length}, attention counted as T × T"
            + (f", + {others / 1e6:,.1f} of other models" if others else ""),
        ):
            self.say(line)
        if jax.process_index() == 0:
            environment = rundir.environment(
                config, mesh=mesh_text, precision=precision, corpus=self.dataset.fingerprint,
                tokenizer=self.dataset.tokenizer.fingerprint, peak_flops=self.peak, peak_source=source, batch_plan=plan, **more,
            )  # fmt: skip
            rundir.write_json(self.run_dir / "environment.json", environment)
            rundir.write_json(self.run_dir / "data.json", self.dataset.describe())
            with written_here(self.run_dir / "tokenizer") as folder:
                self.dataset.tokenizer.save(folder)

    def _peak(self, precision: str) -> tuple[float, str]:
        """(FLOP/s of all devices, where the number is from); a measured one stays that of the run's first start."""
        device, operand = jax.devices()[0], "float32" if precision == "float32" else "bfloat16"
        known = chips.peak_flops(device.device_kind, operand)
        if known is not None:
            return known[0] * self.mesh.size, known[1]
        on_cpu = device.platform == "cpu"  # all fake devices share one machine
        source = f"{operand} matmul measured here" + ("" if on_cpu else f", × {self.mesh.size}")
        before = rundir.read_json(self.run_dir / "environment.json")
        if before.get("peak_source") == source and before.get("devices") == rundir.devices():
            return float(before["peak_flops"]), source
        return flops.measured_peak(operand) if on_cpu else flops.measured_peak(operand, size=8192) * self.mesh.size, source

    def _batch_plan(self) -> list[str]:
        """One line for each phase of the batch ramp, with the arithmetic."""
        data, micro = self.config.data, self.config.optim.num_microbatches * self.experiment.updates_per_batch
        rows = data.batch_size // micro
        phases = [*data.batch_ramp, (None, data.batch_size)]
        return [
            f"batch {size} rows × {data.sequence_length} = {size * data.sequence_length:,} tokens"
            + (f" = {size // rows} × {rows} rows" if micro > 1 else "")
            + (f" for {steps:,} steps" if steps is not None else "")
            for steps, size in phases
        ]

    def find_start(self) -> tuple[Any, Any]:
        """(the newest good checkpoint or None, the given weights where they are needed). Compiles nothing.

        Raises:
          ConfigError: a checkpoint of another architecture, or of another corpus.
        """
        restored = self.checkpoints.restore(self.template, say=self.say)
        if restored is not None and restored.step > self.config.num_steps:
            raise ConfigError(
                f"this run has trained {restored.step:,} steps and num_steps is {self.config.num_steps:,}, and a run does not go back; "
                f"use --num_steps {restored.step} or more, or another --run_dir"
            )
        if restored is not None and restored.meta["corpus"] != self.dataset.fingerprint:
            raise ConfigError(
                f"the corpus is not the one this run was trained on (was {restored.meta['corpus']}, is {self.dataset.fingerprint}); "
                "restore the data, or choose another --run_dir"
            )
        first = self.experiment.initial_params
        needed = restored is None or self.config.optim.freeze  # checkpoints hold no frozen leaves
        return restored, None if first is None or not needed else first(self.mesh)

    def start(self, restored: Any, params: Any) -> None:
        """Take up the checkpoint, or start from the given weights or the seed."""
        self.frozen = frozen_base(self.experiment, self.mesh, params)
        if self.experiment.load_frozen is not None:
            others = self.experiment.load_frozen(self.mesh)
            if BASE in others:
                raise ConfigError(f"Experiment.load_frozen has '{BASE}', the name of the student's own frozen part; use another")
            self.frozen |= others
        if restored is None:
            self.state = self.make_state(params)
            self.writer.cut_back(0)
            if jax.process_index() == 0:
                metrics.cut_lines(self.run_dir / "samples.jsonl", 0)
                (self.run_dir / REWINDS).unlink(missing_ok=True)
            return
        rewinds = rundir.read_json(self.run_dir / REWINDS)
        if rewinds.get("config") == configs.config_hash(self.config):  # with another one, a checkpoint may fare better
            self.restarts = rewinds["restarts"]
        self._take(restored, rewinds.get("skipped", ()))
        self.say(f"resuming from step {self.done_steps:,} in {self.run_dir}")
        planned = restored.meta["config"]["num_steps"]
        if planned != self.config.num_steps:
            rates = [float(optim.schedule(self.config.optim, steps)(self.done_steps)) for steps in (planned, self.config.num_steps)]
            if rates[0] != rates[1]:
                self.say(
                    f"note: up to here the learning rate followed a schedule of {planned:,} steps, from here on that of "
                    f"{self.config.num_steps:,}: at step {self.done_steps:,} it goes from {rates[0]:.3g} to {rates[1]:.3g}"
                )
        self.writer.event(self.done_steps, "resume", f"resumed from the checkpoint of step {self.done_steps}")

    def _take(self, restored: Any, skipped: Iterable[Sequence[int]]) -> None:
        """Take up a checkpoint. `skipped`: what rewinds have skipped, which it may be older than; all of it comes after."""
        meta = restored.meta
        self.state, self.done_steps = restored.state, restored.step
        self.position = Position.from_json(meta["position"])
        for first, last in skipped:
            self.position = self.position.skip(first, last)
        self.tokens_seen = meta["tokens_seen"]
        self.laps = metrics.Laps(meta["train_seconds"])
        self.recent_losses = deque(meta["recent_losses"], maxlen=self.config.spike.window)
        self.writer.cut_back(self.done_steps)
        if jax.process_index() == 0:
            metrics.cut_lines(self.run_dir / "samples.jsonl", self.done_steps)

    # ------------------------------------------------------------------------------------------ train

    def train(self) -> Ending:
        """Steps until the last one, a signal, or an error; rewinds as often as the loss spikes."""
        if self.done_steps >= self.config.num_steps and rundir.read_json(self.run_dir / "results.json").get("steps") == self.done_steps:
            self.say(f"this run is finished: {self.done_steps:,} steps. To go on: {self.go_on()}")
            return Ending(self.run_dir, self.done_steps, 0)
        exit_code = 0
        while self.done_steps < self.config.num_steps and not exit_code:
            exit_code, spiked = self._train_until_interrupted()
            if spiked is not None:
                self._rewind(spiked)
        seconds = self.laps.total_seconds
        self._save()
        self._flush()
        self.signals.phase = "finishing"
        if exit_code:
            self.say(f"stopped after step {self.done_steps:,}, saved. To go on: {rundir.command()}")
        else:
            self._finish(seconds)
        return Ending(self.run_dir, self.done_steps, exit_code)

    def _train_until_interrupted(self) -> tuple[int, InFlight | None]:
        """(exit code of a signal or 0, the step whose loss spiked or None). Settles everything before it returns."""
        config, pending = self.config, deque[InFlight]()
        items: Iterator[Item] = self.dataset.read(self.position, self.rows)
        self.laps = metrics.Laps(self.laps.total_seconds)
        for _ in range(config.num_steps - self.done_steps):
            start = time.perf_counter()
            item = next(items)
            batch = to_global(item.batch, self.mesh, self.dataset.batch_size(item.batch_id))
            data_seconds = time.perf_counter() - start
            self.profiler.before(self.done_steps + 1)
            size = self.dataset.batch_size(item.batch_id)
            with self._compiling(size):
                self.state, numbers = self.step_fn(self.state, self.frozen, batch)
            self.done_steps += 1
            self.checkpoints.check()
            self.position = item.next_position
            pending.append(InFlight(self.done_steps, item, numbers, self.vote(self.signals.code), data_seconds))
            boundary = self._is_boundary(self.done_steps)
            stop, spiked = 0, None
            while len(pending) > (0 if boundary else 1) and not stop and spiked is None:
                stop, spiked = self._settle(pending.popleft())
            if spiked is not None:
                return 0, spiked
            if stop or (self.signals.code and jax.process_count() == 1):
                for flight in pending:
                    _, spiked = self._settle(flight)
                    if spiked is not None:
                        return 0, spiked
                return int(stop) or self.signals.code, None
            if boundary:
                with self.laps.excluded():
                    self._at_boundary()
        return 0, None

    @contextmanager
    def _compiling(self, size: int) -> Iterator[None]:
        """The first call for a batch size compiles: say how long that took, and keep it out of tokens/s and the ETA."""
        if size in self.compiled_sizes:
            yield
            return
        self.compiled_sizes.add(size)
        start = time.perf_counter()
        with self.laps.excluded():
            yield
        self.say(f"compiled for batches of {size} rows in {time.perf_counter() - start:.1f} s")

    def _is_boundary(self, step: int) -> bool:
        """Whether something looks at the state after this step."""
        config = self.config
        every = (config.save_every, config.eval_every, config.sample_every)
        return step == config.num_steps or any(n and step % n == 0 for n in every)

    def _at_boundary(self) -> None:
        config, step = self.config, self.done_steps
        last = step == config.num_steps
        if step % config.save_every == 0 and not last:
            self._save()
        if config.eval_every and step % config.eval_every == 0 and not last:
            self._evaluate()
        if config.sample_every and step % config.sample_every == 0 and not last:
            self._sample()

    def _settle(self, flight: InFlight) -> tuple[int, InFlight | None]:
        """Read one step's numbers: log them, and say whether to stop (a signal's exit code) or rewind (the step)."""
        values = {name: float(value) for name, value in jax.device_get(flight.metrics).items()}
        stop, step, loss, tokens = int(flight.stop), flight.step, values["loss"], values.pop("tokens")
        if spike.is_spike(self.config.spike, self.recent_losses, loss):
            return stop, flight
        bad = [name for name in ("loss", "grad_norm") if not math.isfinite(values[name])]
        if bad:
            self.writer.write(step, values | {"tokens": self.tokens_seen + tokens})
            saved = self.checkpoints.saved_steps()
            raise TrainingFailed(
                f"{' and '.join(bad)} not finite at step {step} (batch id {flight.item.batch_id}); the last good checkpoint is "
                f"{f'step {saved[-1]}' if saved else 'none'}. Lower --optim.lr, or rewind and skip such batches with "
                "--spike.enabled True"
            )
        self.recent_losses.append(loss)
        self.tokens_seen += tokens
        self.laps.add(tokens, flight.data_seconds)
        if step % self.config.log_every == 0 or step == self.config.num_steps or step == 1:
            self._log(step, values)
        return stop, None

    def _log(self, step: int, values: dict[str, float]) -> None:
        rates = self.laps.end()
        speed = rates["tokens_per_second"]
        rates |= {
            "mfu": flops.utilisation(speed * self.per_token.model, 1.0, self.peak),
            "hfu": flops.utilisation(speed * self.per_token.executed, 1.0, self.peak),
            "memory_bytes": memory_bytes(),
        }
        eta = (self.config.num_steps - step) * rates["step_seconds"]
        self.writer.write(step, values | rates | {"tokens": self.tokens_seen})
        self.say(metrics.progress(step, self.config.num_steps, values | rates, None if step == 1 else eta))

    # ----------------------------------------------------------------------- save, rewind, evaluate, end

    def _save(self) -> None:
        """Hand the state over to be saved; returns once it is copied off the device."""
        if self.done_steps in self.checkpoints.saved_steps():
            return
        meta = {
            "step": self.done_steps,
            "position": self.position.to_json(),
            "corpus": self.dataset.fingerprint,
            "tokens_seen": self.tokens_seen,
            "train_seconds": self.laps.total_seconds,
            "recent_losses": list(self.recent_losses),
            "num_vocab": self.config.model.vocab_size,
            "config": configs.to_dict(self.config),
            "versions": {name: sys.modules[name].__version__ for name in ("jax", "flax", "optax") if name in sys.modules},
        }
        self.writer.flush()  # what led up to a checkpoint is there before the checkpoint is
        self.checkpoints.save(self.done_steps, self.state, meta, num_vocab=self.config.model.vocab_size)

    def _flush(self) -> None:
        self.checkpoints.wait()

    def _rewind(self, spiked: InFlight) -> None:
        """Back to a checkpoint before the spike, with the batches around it on the skip list.

        A kill before the list is on disk is followed by the same steps, the same spike and the same rewind.
        """
        self._flush()
        config, saved = self.config.spike, self.checkpoints.saved_steps()
        step = spike.restart_step(config, saved, spiked.step)
        if step is None:
            raise TrainingFailed(
                f"the loss spiked at step {spiked.step} (batch id {spiked.item.batch_id}), and no checkpoint before it "
                "can be rewound to; save earlier with --save_every"
            )
        if self.restarts.count(step) >= spike.MAX_RESTARTS:
            raise TrainingFailed(
                f"the loss spiked again at step {spiked.step} (batch id {spiked.item.batch_id}), after {spike.MAX_RESTARTS} rewinds to the "
                f"checkpoint of step {step}, each of which skipped more batches: it is not they. Lower --optim.lr or raise "
                "--spike.threshold, with --on_config_change accept"
            )
        restored = self.checkpoints.restore(self.template, step=step, say=self.say)
        assert restored is not None
        self.checkpoints.delete_after(step)
        self._take(restored, self.position.skipped)
        first, last = spike.skip_range(config, self.position.batch_id, spiked.item.batch_id)
        self.position = self.position.skip(first, last)
        self.restarts.append(step)
        if jax.process_index() == 0:
            rewinds = {"config": configs.config_hash(self.config), "restarts": self.restarts, "skipped": self.position.skipped}
            rundir.write_json(self.run_dir / REWINDS, rewinds)
        message = f"the loss spiked at step {spiked.step}: back to step {step}, skipping batches {first}–{last - 1}"
        self.say(message)
        self.writer.event(step, "spike", message)

    def _evaluate(self) -> dict[str, Any]:
        if self.experiment.evaluate is None:
            return {}
        params = student_params(self.state, self.frozen)
        numbers = self.experiment.evaluate(params, self.dataset, self.mesh, self.config.eval_batches)
        if not numbers:
            self.say("note: nothing was evaluated; where that is for want of held-out text, raise data.held_out_fraction, or cut it finer")
            return {}
        self.writer.write(self.done_steps, numbers, kind="eval")
        shown = {label: numbers[name] for label, name in (("held_out_loss", "loss"), ("bits_per_byte",) * 2) if name in numbers}
        line = metrics.progress(self.done_steps, self.config.num_steps, shown)
        others = () if "bits_per_byte" in numbers else (f"  {name} {float(value):.4g}" for name, value in numbers.items() if name != "loss")
        self.say(line + "".join(others))
        return numbers

    def _sample(self) -> None:
        if self.experiment.sample is None:
            return
        samples = self.experiment.sample(student_params(self.state, self.frozen), self.dataset, self.mesh)
        if jax.process_index() == 0:
            rundir.append_lines(self.run_dir / "samples.jsonl", [{"step": self.done_steps, **sample} for sample in samples])
        for sample in samples[:2]:
            self.say(f"  {sample['prompt']!r} → {sample['completion'][:100]!r}")

    def _finish(self, train_seconds: float) -> None:
        """The last evaluation and samples, and `results.json`: the run is complete where its `steps` are those asked for."""
        evaluation = self._evaluate()
        self._sample()
        results = {
            "num_params": self.num_params,
            "tokens_seen": self.tokens_seen,
            "wall_seconds": train_seconds,
            "steps": self.done_steps,
            "go_on": self.go_on(),
            **evaluation,
        }
        if self.experiment.finish is not None and evaluation:
            results |= self.experiment.finish(self.dataset, evaluation)
        if jax.process_index() == 0:
            rundir.write_json(self.run_dir / "results.json", results)

    def go_on(self) -> str:
        """The command that trains this run for as many steps again."""
        return rundir.command(2 * max(self.done_steps, self.config.num_steps))


def memory_bytes() -> float:
    """Peak memory of the first local device, or of this process where the device does not say."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return float(stats.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
