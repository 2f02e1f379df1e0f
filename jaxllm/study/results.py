"""A results file: one JSON line for each run, appended whole or not at all, by one process at a time."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxllm.config import ConfigError
from jaxllm.files import sync
from jaxllm.study.values import Row

FIELDS = {"study": str, "arm": str, "kind": str, "seed": int, "config": str}
"""What every row has, and of which type; `lr` too, a number or null, and `metrics`, or `failed` with why."""


@dataclass
class Results:
    """A results file that this process holds."""

    path: Path
    rows: list[Row]
    descriptor: int

    def append(self, row: Row) -> None:
        """Add a row, on disk when this returns; on an error the file is as it was."""
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        size = os.fstat(self.descriptor).st_size
        try:
            while line:
                line = line[os.write(self.descriptor, line) :]
            os.fsync(self.descriptor)
        except OSError as error:
            os.ftruncate(self.descriptor, size)
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        self.rows.append(row)


@contextmanager
def held(path: Path, say: Callable[[str], None] = print) -> Iterator[Results]:
    """The results file, made if need be and held against a second process. A last line that a crash cut off is set aside.

    Raises:
      ConfigError: another process holds it, it cannot be written, or a line of it is broken.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as error:
        raise ConfigError(f"cannot write the results file {path} ({error.strerror}); name another with --out") from None
    with open(descriptor, "ab", buffering=0):  # closes it, and with that lets go of the lock
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another process is writing to {path}; wait for it, or name another file with --out") from None
        try:
            _set_torn_line_aside(path, descriptor, say)
            yield Results(path, read(path), descriptor)
        finally:
            if not os.fstat(descriptor).st_size:  # nothing came of it
                path.unlink(missing_ok=True)


def read(path: Path) -> list[Row]:
    """The rows of a results file; [] where there is none. A last line without an end is still being written, and is left out.

    Raises:
      ConfigError: a line that is no row, with its number.
    """
    try:
        *lines, _torn = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    return [_row(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def _row(line: bytes, where: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise _broken(where, f"it is not JSON ({error})") from None
    if not isinstance(row, dict):
        raise _broken(where, "it is not an object")
    for name, kind in FIELDS.items():
        if not isinstance(row.get(name), kind):
            raise _broken(where, f"its '{name}' is {row.get(name)!r}")
    if not isinstance(row.get("lr"), int | float | None) or "lr" not in row:
        raise _broken(where, f"its 'lr' is {row.get('lr')!r}")
    if not isinstance(row.get("failed"), str) and not _is_numbers(row.get("metrics")):
        raise _broken(where, f"its 'metrics' are {row.get('metrics')!r}")
    return row


def _is_numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(x, int | float | None) for x in value.values())


def _broken(where: str, why: str) -> ConfigError:
    return ConfigError(f"{where} is not a result: {why}; restore the file, or remove that line")


def _set_torn_line_aside(path: Path, descriptor: int, say: Callable[[str], None]) -> None:
    """Move a last line without an end to FILE.torn: it is there before it is cut off here."""
    raw = path.read_bytes()
    whole = raw.rfind(b"\n") + 1
    if whole == len(raw):
        return
    aside = path.with_name(f"{path.name}.torn")
    with open(aside, "ab") as file:
        file.write(raw[whole:] + b"\n")
    sync(aside)
    os.ftruncate(descriptor, whole)
    os.fsync(descriptor)
    say(f"note: the last line of {path} was cut off by a crash; it is set aside in {aside}, and its run is looked at again")
