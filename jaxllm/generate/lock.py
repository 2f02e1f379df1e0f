"""One process at a time for a file that is going to be written."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from jaxllm.config import ConfigError


@contextlib.contextmanager
def hold(path: Path) -> Iterator[None]:
    """Hold `path`, in a folder that is made if it is not there, against other processes on any machine that shares it.

    The lock is the system's, on a file `.NAME.lock` beside it, and goes when its process does, however that ends: a file that a
    killed one left is no obstacle. What is made here goes again, the folder too where nothing came into it.

    Raises:
      ConfigError: another process holds it (says which); the folder cannot be made or written.
    """
    made = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
    place = path.with_name(f".{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _take(place, path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {(error.strerror or str(error)).lower()}; choose another --out") from None
    try:
        yield
    finally:
        place.unlink(missing_ok=True)  # while it is held, so that it is nobody else's
        os.close(file)
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _take(place: Path, path: Path) -> int:
    while True:
        file = os.open(place, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if place.exists() and os.path.samestat(os.fstat(file), place.stat()):  # else its last holder has just removed it
                os.ftruncate(file, 0)
                os.write(file, f"process {os.getpid()} on {platform.node()}".encode())
                return file
        except BlockingIOError:
            holder = os.pread(file, 200, 0).decode(errors="replace") or "another process"
            os.close(file)
            raise ConfigError(f"{holder} is writing {path}; wait for it, or choose another --out") from None
        except OSError:
            os.close(file)
            raise
        os.close(file)
