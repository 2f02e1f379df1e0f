"""The run directory: where it is, what it was made with, and who may write to it.

runs/<name>-<8 hex of the config's hash>/
  config.json        the resolved config, its hash, the parent run, the precision that was chosen
  environment.json   versions, git commit, devices, mesh, kernels
  data.json          corpus hash and counts          tokenizer/   the tokenizer itself
  metrics.jsonl      one line per record             tensorboard/
  checkpoints/       by step, each with a manifest   samples.jsonl   results.json   report.html
  rewinds.json       batches that loss spikes made the run skip
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import jax

from jaxllm import config as configs
from jaxllm import manifest
from jaxllm.config import ConfigError, TrainConfig
from jaxllm.files import file_system, is_remote, next_part, path_of, remove_tree, write_atomic

PACKAGES = ("jaxllm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "sentencepiece", "tokenizers")


def locate(config: TrainConfig) -> Path:
    """The directory of this config's run: `run_dir`, or runs/<name>-<hash>."""
    return path_of(config.run_dir or f"runs/{config.name}-{configs.config_hash(config)}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object, or {} where there is no such file.

    Raises:
      ConfigError: the file is not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError as error:
        raise _damaged(path, error) from None
    if not isinstance(value, dict):
        raise _damaged(path, f"it holds a {type(value).__name__}, not an object")
    return value


def _damaged(path: Path, why: object) -> ConfigError:
    return ConfigError(f"{path} is damaged ({why}); move it away, and the same command writes it anew")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_atomic(path, (json.dumps(value, indent=1, default=str) + "\n").encode())


def recorded(config: TrainConfig) -> dict[str, Any]:
    """What `config.json` of this config's run says, or {} if the run has not begun.

    Raises:
      ConfigError: it is damaged.
    """
    path = locate(config) / "config.json"
    values = read_json(path)
    try:
        if values:
            configs.from_dict(TrainConfig, values["config"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from None
    return values


@contextmanager
def claim(config: TrainConfig) -> Iterator[Path]:
    """Make the run directory, or enter it again; hold it against a second process while it is in use.

    Raises:
      ConfigError: it belongs to another config (shows the difference), is in use, or cannot be written.
    """
    folder = locate(config)
    ours = False
    try:
        with ExitStack() as stack:
            if jax.process_index() == 0:
                new = not folder.exists()
                stack.enter_context(_lease(folder) if is_remote(folder) else _lock(folder))
                ours = new
            else:
                _make(folder)
            _check_same(config, folder)
            yield folder
    except ConfigError:
        if ours and not (folder / "config.json").exists():  # refused before it became a run
            remove_tree(folder)
        raise


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write the run directory {folder}: {error.strerror or error}; choose another with --run_dir") from None


def _in_use(folder: object) -> ConfigError:
    return ConfigError(f"another process is training in {folder}; stop it first, or choose another --run_dir")


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold a local folder: the lock goes when the process does, however it ends."""
    _make(folder)
    try:
        lock = open(folder / ".lock", "ab")  # noqa: SIM115
    except OSError as error:
        raise ConfigError(f"cannot write the run directory {folder}: {error.strerror}; choose another with --run_dir") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _in_use(folder) from None
        yield


@contextmanager
def _lease(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Hold a folder in an object store, which knows no locks: an object that is written anew as long as this process lives.

    One that a killed process left is recognised by its not changing. Of several processes that find none the first has it where the
    store can create conditionally; else, and where they find a dead one's, the last to write has it, and each looks again after a while.
    A process that was taken for dead, and was not, ends.
    """
    path, me, done = f"{os.fspath(folder)}/.lock", uuid.uuid4().hex, threading.Event()
    system = file_system(path)

    def read() -> str:
        try:
            return system.cat_file(path).decode()
        except FileNotFoundError:
            return ""

    def write(beat: int, **mode: str) -> None:
        system.pipe_file(path, f"{me} {beat}".encode(), **mode)

    def take() -> None:
        if before := read():
            print(
                f"note: {path} is there; looking for {LEASE_SECONDS:g} s whether another process still trains here",
                file=sys.stderr,
                flush=True,
            )
            deadline = time.monotonic() + LEASE_SECONDS
            while read() == before and time.monotonic() < deadline:
                time.sleep(LEASE_SECONDS / 30)
            if (now := read()) not in ("", before):
                raise _in_use(folder)
            before = now
        if not before:
            with suppress(Exception):  # it is there by now, or this store has no such thing
                write(0, mode="create")
        if read() == before:
            write(0)
        time.sleep(LEASE_SECONDS / 15)
        if not read().startswith(me):
            raise _in_use(folder)

    def renew() -> None:
        beat, ours = 0, True
        while ours and not done.wait(LEASE_SECONDS / 3):
            beat += 1
            with suppress(Exception):  # the next beat tries again
                if ours := read().startswith(me):
                    write(beat)
        if not ours:
            _end(
                f"{folder} is another process's now, or its .lock was removed: this one stood still for {LEASE_SECONDS:g} s and was "
                "taken for dead. It ends here, so that not two write to one run"
            )

    try:
        take()
    except ConfigError:
        raise
    except Exception as error:  # each store's package has errors of its own
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(
            f"cannot write the run directory {folder}: {why}; check that the bucket is there and that this machine may write to it"
        ) from None
    renewal = threading.Thread(target=renew, daemon=True)
    renewal.start()
    try:
        yield
    finally:
        done.set()
        renewal.join(LEASE_SECONDS / 3)
        with suppress(Exception):
            if read().startswith(me):
                system.rm_file(path)


def _end(message: str) -> None:
    """End this process, from any of its threads, before it writes any more; what is half-written has no manifest."""
    os.write(sys.stderr.fileno(), f"\nerror: {message}\n".encode())
    os._exit(1)


LEASE_SECONDS = 30.0
"""A lease that has not been renewed for this long is a dead process's."""


def record(config: TrainConfig, precision: str, folder: Path) -> None:
    """Write config.json: from here on the directory is this config's run. Of other runs' weights it keeps what it said at the start."""
    if jax.process_index() != 0:
        return
    before = read_json(folder / "config.json")
    known = {**before.get("teachers", {}), before.get("parent"): before.get("parent_fingerprint")}

    def fingerprint(path: str) -> str | None:
        return known[path] if path in known else manifest.fingerprint(path_of(path))

    write_json(
        folder / "config.json",
        {
            "name": config.name,
            "hash": configs.config_hash(config),
            "parent": config.init_from or None,
            "parent_fingerprint": fingerprint(config.init_from) if config.init_from else None,
            "teachers": {path: fingerprint(path) for path, _ in config.distill.teachers},
            "precision": precision,
            "config": configs.to_dict(config),
        },
    )


def root_of(folder: Path) -> Path:
    """The run directory that `folder` is, or is a part of (its checkpoints, one of them)."""
    parents = [folder, *(folder if is_remote(folder) else folder.absolute()).parents[:2]]
    return next((path for path in parents if (path / "config.json").exists() and (path / "checkpoints").is_dir()), folder)


def check_parent(record: dict[str, Any], init_from: str) -> None:
    """Refuse weights that are no longer those that the run of this `config.json` began from.

    Raises:
      ConfigError: says which run, and which weights they were.
    """
    was = record.get("parent_fingerprint")
    if not was or record.get("parent") != init_from:
        return
    now = manifest.fingerprint(path_of(init_from))
    if now != was:
        raise ConfigError(
            f"the run {record['name']} began from the weights {was} in {init_from}, and there are others now ({now}): its adapters and "
            "trained parts do not fit them; bring the old weights back, or train again"
        )


def check_teachers(config: TrainConfig) -> None:
    """Refuse to go on with a run whose teachers have become others.

    Raises:
      ConfigError: says which, and which weights they were.
    """
    for path, was in recorded(config).get("teachers", {}).items():
        now = manifest.fingerprint(path_of(path))
        if now != was:
            raise ConfigError(
                f"this run began with the teacher {was} in {path}, and there are other weights now ({now}); bring the old ones back, or "
                "start anew with another --run_dir"
            )


def _check_same(config: TrainConfig, folder: Path) -> None:
    old = recorded(config)
    if not old or config.on_config_change == "accept":
        return
    before = configs.hashed_values(configs.from_dict(TrainConfig, old["config"]))
    changed = configs.diff(before, configs.hashed_values(config))
    if not changed:
        return
    lines = "; ".join(f"{path}: {was} → {now}" for path, (was, now) in changed.items())
    raise ConfigError(
        f"{folder} was trained with another configuration ({lines}); use the old values, choose another --run_dir, "
        "or pass --on_config_change accept to go on with the new ones"
    )


def environment(config: TrainConfig, **more: Any) -> dict[str, Any]:
    """Versions, commit, devices, command: what somebody needs to run this again."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "command": command(),
        "python": platform.python_version(),
        "versions": versions,
        "git_commit": git_commit(),
        "devices": devices(),
        "cpu_count": os.cpu_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        **more,
    }


def devices() -> str:
    """How many of which kind, in how many processes."""
    device = jax.devices()[0]
    return f"{jax.device_count()} × {device.device_kind} ({device.platform}), {jax.process_count()} process(es)"


def command(num_steps: int | None = None) -> str:
    """The command line that started this process, as one would type it; with another number of steps, if given."""
    program, words = Path(sys.argv[0]), list(sys.argv[1:])
    if num_steps is not None:
        kept: list[str] = []
        for i, word in enumerate(words):
            name = word.split("=")[0].replace("-", "_")
            after = i > 0 and words[i - 1].replace("-", "_") == "__num_steps"
            if name != "__num_steps" and not after:
                kept.append(word)
        words = [*kept, "--num_steps", str(num_steps)]
    if program.parent.name == "experiments":
        start = f"python -m experiments.{program.stem}"
    else:
        start = "jaxllm" if program.stem in ("cli", "__main__") else program.name
    return " ".join([start, *(shlex.quote(word) for word in words)])


def git_commit() -> str:
    """The commit of the source tree, '-dirty' if it was changed, or 'none'."""
    here = Path(__file__).parent
    try:
        run = lambda *args: subprocess.run(["git", "-C", str(here), *args], capture_output=True, text=True, timeout=5, check=True).stdout
        return run("rev-parse", "HEAD").strip() + ("-dirty" if run("status", "--porcelain", "-uno").strip() else "")
    except (OSError, subprocess.SubprocessError):
        return "none"


def append_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """Append JSON lines in one write, after cutting off a line that a killed process left half-written; or as the next part."""
    text = b"".join(json.dumps(record).encode() + b"\n" for record in records)
    if is_remote(path):
        next_part(path).write_bytes(text)
        return
    with open(path, "ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(text)
