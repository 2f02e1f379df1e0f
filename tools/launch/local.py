"""`python -m tools.launch local`: N processes on this machine, each with its own share of the devices."""

from __future__ import annotations

import glob
import math
import os
import re
import shlex
import socket
from dataclasses import dataclass
from typing import Any

from jaxllm.config import ConfigError, TrainConfig
from tools.launch.job import Job, Options, check_counts, here, need_secrets
from tools.launch.workers import Say, Team, Worker, repeat


@dataclass(frozen=True)
class Local(Options):
    """Processes on this machine."""

    processes: int = 1
    """How many."""
    devices: int = 0
    """CPU devices that each pretends to have; 0 takes the accelerators."""
    gpus: int = 0
    """GPUs of each process, counted through; 0 leaves them all to it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, processes=1, devices=0, gpus=0)
        if self.devices and self.gpus:
            raise ConfigError("--devices are CPU devices and --gpus are GPUs; give one of them")
        if self.processes > 1 and not self.devices and not self.gpus:
            raise ConfigError(
                f"{self.processes} processes would all take the same accelerators; give each its own: --gpus 1, or --devices 4 (CPU)"
            )
        here = len(glob.glob("/dev/nvidia[0-9]*"))
        if self.gpus * self.processes > here and not self.dry_run:
            fix = f"use --processes {here // self.gpus}" if here >= self.gpus else "use --devices N for CPU devices"
            raise ConfigError(
                f"{self.processes} processes × {self.gpus} GPUs are {self.processes * self.gpus}, and this machine has {here}; {fix}"
            )


def run(options: Local, job: Job, say: Say) -> int:
    """Start the processes, and again as often as `options.restarts` allows; the exit status."""
    need_secrets(options.secret)
    check_divides(options, job.config)
    python, folder = here(options)
    command = job.command(python)
    if options.dry_run:
        for i, settings in enumerate(environments(options)):
            hidden = [f"{name}=$" + name for name in options.secret]
            words = [f"{name}={shlex.quote(value)}" for name, value in settings.items()]
            say(f"[worker {i}] cd {shlex.quote(folder)} && {' '.join([*words, *hidden, shlex.join(command)])}")
        return 0
    os.chdir(folder)

    def start(attempt: int) -> int:
        workers = [
            Worker(f"worker {i}", lambda seen: command, os.environ | {"PYTHONUNBUFFERED": "1"} | settings)
            for i, settings in enumerate(environments(options))
        ]
        team = Team(workers, say)
        return team.run()

    return repeat(start, options.restarts, say)


def check_divides(options: Local, config: TrainConfig) -> None:
    """Refuse a mesh or a batch that these processes' devices cannot hold, before any of them is started.

    Updates that an experiment makes of one batch are known only to it, and are checked when it starts.

    Raises:
      ConfigError: what every process would say once it is up.
    """
    num_devices = options.processes * (options.devices or options.gpus)
    if not num_devices:  # whatever accelerators there are, which only JAX can count
        return
    from jax.sharding import AbstractMesh, AxisType

    from jaxllm import sharding
    from jaxllm.plan.gpus import mesh_sizes

    sizes = {axis: getattr(config.mesh, axis) for axis in sharding.AXES}
    whole = -1 in sizes.values() or options.processes > 1  # one process may leave devices out
    if whole or math.prod(sizes.values()) > num_devices:
        sizes = mesh_sizes(config.mesh, num_devices)
    mesh: Any = AbstractMesh(tuple(sizes.values()), sharding.AXES, axis_types=(AxisType.Auto,) * 3)
    try:
        sharding.check_fit(config.model, config.data, config.optim, mesh)
    except ConfigError as error:
        raise ConfigError(f"{options.processes} processes × {options.devices or options.gpus} devices: {error}") from error


def environments(options: Local) -> list[dict[str, str]]:
    """What each process's environment has besides this one's. The coordinator's port is free now, and new at each call."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    every = dict(options.environment)
    if options.devices:
        flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
        every["JAX_PLATFORMS"] = "cpu"
        every["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={options.devices}".strip()
    if options.processes > 1:
        every |= {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": str(options.processes),
            "JAXLLM_START_TIMEOUT": str(options.start_timeout),
        }
    found = []
    for i in range(options.processes):
        own = {"JAX_PROCESS_ID": str(i)} if options.processes > 1 else {}
        if options.gpus:
            own["CUDA_VISIBLE_DEVICES"] = ",".join(str(i * options.gpus + k) for k in range(options.gpus))
        found.append(every | own)
    return found
