"""What is launched, wherever it runs: a configuration and its flags, checked here before anything is started."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxllm import cli, rundir
from jaxllm import config as configs
from jaxllm.config import ConfigError, TrainConfig
from jaxllm.flags import parse_flags

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)


@dataclass(frozen=True)
class Options:
    """What every target takes."""

    dry_run: bool = False
    """Print what would be run, and run nothing."""
    restarts: int = 0
    """How often a run that broke is started again, from its last checkpoint. A user's mistake (exit code 2) is not."""
    start_timeout: int = 300
    """Seconds within which all workers must have come up; then those that did end, naming those that did not."""
    secret: tuple[str, ...] = ()
    """Names of secrets that the workers need, e.g. WANDB_API_KEY. Values are never printed, written or put on a command line."""
    env: tuple[str, ...] = ()
    """NAME=VALUE …: further environment of the workers."""
    python: str = ""
    """The workers' Python. Empty: this one for `local` and `slurm`, `python3` elsewhere."""
    workdir: str = ""
    """The folder to start in, which the target's path is relative to. Empty: this one for `local` and `slurm`."""

    def __post_init__(self) -> None:
        check_counts(self, restarts=0, start_timeout=1)
        for name in self.secret:
            if not _NAME.fullmatch(name):
                raise ConfigError(
                    f"--secret takes names of environment variables, not '{name.split('=')[0]}=…'; the value stays where it is"
                )
        for pair in self.env:
            name, equals, _ = pair.partition("=")
            if not equals or not _NAME.fullmatch(name):
                raise ConfigError(f"--env takes NAME=VALUE, and was given '{pair}'")
            if _SECRET.search(name):
                raise ConfigError(f"--env {name}=… would write a secret down; pass it by name: --secret {name}")

    @property
    def environment(self) -> dict[str, str]:
        """`env` as a mapping."""
        return dict(pair.split("=", 1) for pair in self.env)


@dataclass(frozen=True)
class Job:
    """A run to be started: the words after `jaxllm train`, and what they mean."""

    target: str
    """configs/FILE.py[:NAME] or experiments/FILE.py:PRESET"""
    flags: tuple[str, ...]
    run_dir: str
    name: str
    """jaxllm-<config name>-<hash>: letters, digits and dashes."""
    config: TrainConfig
    """The configuration with the flags applied."""

    def command(self, python: str) -> list[str]:
        """What every worker runs."""
        return [python, "-m", "jaxllm.cli", "train", self.target, *self.flags]


def check(target: str, flags: Sequence[str]) -> Job:
    """The job, after reading the configuration and applying the flags as `jaxllm train` will.

    Raises:
      ConfigError: what `jaxllm train` would say.
    """
    config, _ = cli.load_target(target)
    config = parse_flags(config, flags, f"jaxllm train {target}")
    name = re.sub(r"[^a-z0-9]+", "-", f"jaxllm-{config.name}".lower())[:40].strip("-")
    return Job(target, tuple(flags), config.run_dir or str(rundir.locate(config)), f"{name}-{configs.config_hash(config)}", config)


def check_counts(options: object, **least: int) -> None:
    """Refuse numbers that are too small."""
    for name, smallest in least.items():
        if getattr(options, name) < smallest:
            raise ConfigError(f"--{name} is {getattr(options, name)}; it must be at least {smallest}")


def need(program: str, target: str) -> None:
    """Refuse a target whose front end is not installed."""
    if shutil.which(program) is None:
        raise ConfigError(
            f"`{program}` is not on PATH, and the target {target} runs it; run this where it is, or add --dry-run to see what it would do"
        )


def need_secrets(names: Sequence[str]) -> None:
    """Refuse secrets that are not in this environment."""
    for name in names:
        if not os.environ.get(name):
            raise ConfigError(f"--secret {name}: there is no such variable in this environment; export it first")


def need_shared(job: Job, hosts: int) -> None:
    """Refuse a run directory that the hosts of a pod cannot share."""
    if hosts > 1 and "://" not in job.run_dir and not job.run_dir.startswith("/"):
        raise ConfigError(
            f"the {hosts} hosts share no disk, and the run directory is {job.run_dir}; use --run_dir gs://BUCKET/{Path(job.run_dir).name}, "
            "or an absolute path that all of them mount"
        )


def quote(words: Sequence[str]) -> str:
    """The words as one would type them."""
    return shlex.join(words)


def here(options: Options) -> tuple[str, str]:
    """(python, folder) for targets whose workers see this machine's disk."""
    return options.python or sys.executable, str(Path(options.workdir).absolute()) if options.workdir else os.getcwd()
