"""Files and folders that appear under their final names whole, or not at all, and are on disk when they do.

A path may be in an object store (gs://…, s3://…): there is no rename and no appending there, but an object appears whole.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, cast

from jaxllm.config import ConfigError

STORES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
"""Scheme of an object store -> the package that reads and writes it, and its name in fsspec."""


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is in an object store.

    >>> is_remote("gs://bucket/run"), is_remote("runs/one"), is_remote("cache://models/one")
    (True, False, False)
    """
    return "://" in (text := os.fspath(path)) and not text.startswith(CACHED)


CACHED = "cache://"
"""Paths that begin so lie in `cache_home()`: models, data sets and tokenizers that one command makes and others start from."""


def cache_home() -> Path:
    """The folder of what is fetched, built and compiled: $JAXLLM_CACHE, or ~/.cache/jaxllm."""
    return Path(os.environ.get("JAXLLM_CACHE") or "~/.cache/jaxllm").expanduser()


def how_to_get(text: str | os.PathLike[str]) -> str:
    """'; …', how to bring what is missing at a `cache://` path; '' for any other."""
    parts = os.fspath(text).removeprefix(CACHED).split("/")
    if not os.fspath(text).startswith(CACHED) or len(parts) < 2:
        return ""
    if parts[1].startswith("base-"):
        return "; train it: jaxllm train configs/base.py"
    return f"; fetch it: python -m tools.fetch {parts[1]}"


def path_of(text: str | os.PathLike[str]) -> Path:
    """A path, local, in the cache (`cache://models/base-small`) or in an object store; the latter has the methods of a `Path`.

    Raises:
      ConfigError: a store that we do not know, or whose package is not installed.
    """
    text = os.fspath(text)
    if text.startswith(CACHED):
        return cache_home() / text.removeprefix(CACHED)
    if not is_remote(text):
        return Path(text)
    file_system(text)
    from etils import epath

    return cast(Path, epath.Path(text))


def file_system(text: str) -> Any:
    """The fsspec file system of a path in an object store. It asks the store each time: others write there too."""
    scheme = text.split("://")[0]
    if scheme not in STORES:
        raise ConfigError(
            f"'{text}' begins with {scheme}://; a path is local, or begins with {' or '.join(f'{name}://' for name in STORES)}"
        )
    package, name = STORES[scheme]
    try:
        importlib.import_module(package)
    except ImportError:
        raise ConfigError(f"'{text}' needs the package {package}, which is not installed: pip install {package}") from None
    import fsspec

    fsspec.config.conf.setdefault(name, {})["use_listings_cache"] = False
    return fsspec.filesystem(name)


def sync(path: str | os.PathLike[str]) -> None:
    """Force a local file or folder to disk (a folder: the names in it)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def files_in(folder: str | os.PathLike[str]) -> list[str]:
    """Names of all files in a folder and below, relative to it, sorted."""
    text = os.fspath(folder)
    if is_remote(text):
        inside = text.split("://")[1].rstrip("/") + "/"
        return sorted(name.removeprefix(inside) for name in file_system(text).find(text))
    return sorted(path.relative_to(text).as_posix() for path in Path(text).rglob("*") if path.is_file())


def listing(folder: Path) -> dict[str, tuple[int, float]]:
    """(bytes, seconds since 1970 when it was written) by name of all files in a folder and below, relative to it; a store is asked once."""
    if not is_remote(folder):
        about = {name: (folder / name).stat() for name in files_in(folder)}
        return {name: (stat.st_size, stat.st_mtime) for name, stat in about.items()}
    text = os.fspath(folder)
    inside = text.split("://")[1].rstrip("/") + "/"
    found = {}
    for name, about in file_system(text).find(text, detail=True).items():
        when = next((about[key] for key in ("LastModified", "updated", "mtime") if about.get(key)), 0.0)
        when = datetime.datetime.fromisoformat(when) if isinstance(when, str) else when
        found[name.removeprefix(inside)] = int(about["size"]), when.timestamp() if isinstance(when, datetime.datetime) else float(when)
    return found


def write_atomic(path: Path, data: bytes) -> None:
    """Write to a temporary name, fsync, rename: a reader sees the old file or the new one, never a part."""
    if is_remote(path):
        path.write_bytes(data)
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)  # the rename itself


PART_BYTES = 1 << 18
"""Of a numbered part, about."""
PART_SECONDS = 2.0
"""Between two writings of one object: stores refuse more than about one a second."""


def with_parts(path: Path) -> list[Path]:
    """The files that hold the lines of `path`, in order: itself, and its numbered parts `NAME.part-00001.SUFFIX` beside it."""
    parts = sorted(path.parent.glob(f"{path.stem}.part-*{path.suffix}"), key=lambda part: part.name)
    return [path, *parts] if path.exists() else parts


def next_part(path: Path) -> Path:
    """The part of `path` after the last one there."""
    last = max((int(part.stem.rpartition("-")[2]) for part in with_parts(path) if part != path), default=0)
    return path.with_name(f"{path.stem}.part-{last + 1:05d}{path.suffix}")


class PartWriter:
    """Appends to `path` where nothing can be appended to: in numbered parts, the newest of which is written anew as it grows.

    Writing happens in the background, every two seconds; `flush` waits until all is there.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._part = path, next_part(path)
        self._text, self._written = b"", 0
        self._last = -PART_SECONDS
        self._worker = ThreadPoolExecutor(1, "parts")
        self._in_flight: Future[Any] | None = None

    def append(self, line: bytes) -> None:
        """Add a line; raises what went wrong with an earlier one."""
        self._text += line
        if self._in_flight is not None and self._in_flight.done():
            self._settle()
        if self._in_flight is None and time.monotonic() - self._last >= PART_SECONDS:
            self._write()

    def flush(self) -> None:
        """Return when every line is in the store."""
        self._settle()
        if self._written < len(self._text):
            self._write()
            self._settle()

    def close(self) -> None:
        """`flush`, and no more."""
        try:
            self.flush()
        finally:
            self._worker.shutdown()

    def _write(self) -> None:
        self._in_flight = self._worker.submit(self._part.write_bytes, self._text)
        self._written, self._last = len(self._text), time.monotonic()

    def _settle(self) -> None:
        in_flight, self._in_flight = self._in_flight, None
        if in_flight is not None:
            in_flight.result()
            if self._written >= PART_BYTES:  # the next line begins a new part; what came since goes there
                self._text, self._written = self._text[self._written :], 0
                number = int(self._part.stem.rpartition("-")[2]) + 1
                self._part = self._path.with_name(f"{self._path.stem}.part-{number:05d}{self._path.suffix}")


def move(folder: Path, target: Path) -> None:
    """Give a folder another name; in an object store by copying, so that whoever is killed in between loses nothing."""
    if not is_remote(folder):
        folder.rename(target)
        return
    system = file_system(os.fspath(folder))
    for name in files_in(folder):
        system.cp_file(f"{os.fspath(folder)}/{name}", f"{os.fspath(target)}/{name}")
    system.rm(os.fspath(folder), recursive=True)


def remove_tree(folder: Path) -> None:
    """Remove a folder and all in it, if it is there; what cannot be removed stays."""
    if not is_remote(folder):
        shutil.rmtree(folder, ignore_errors=True)
    elif folder.exists():
        cast(Any, folder).rmtree()


@contextmanager
def written_here(folder: Path) -> Iterator[Path]:
    """A local folder to write into: `folder` itself, or for an object store a temporary one that is uploaded at the end."""
    if not is_remote(folder):
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory() as text:
        yield Path(text)
        for path in sorted(Path(text).rglob("*")):
            if path.is_file():
                (folder / path.relative_to(text).as_posix()).write_bytes(path.read_bytes())


def local_copies(pattern: str, cache: Path, say: Callable[[str], None] = lambda line: None) -> list[Path]:
    """The objects that a file, a folder or a glob in an object store means, copied into `cache`, sorted; [] where there are none.

    A copy is named by what the store says of its object, so that it is made once, and again when the object changes.
    """
    system = file_system(pattern)
    found = system.glob(pattern) if re.search(r"[*?\[]", pattern) else [pattern]
    names = sorted({name for path in found for name in (system.find(path) if system.isdir(path) else [path]) if system.exists(name)})
    copies = []
    for name in names:
        about = system.info(name)
        version = next((str(about[key]) for key in ("ETag", "etag", "md5Hash", "generation", "mtime") if about.get(key)), "")
        key = hashlib.sha256(f"{name}|{about['size']}|{version}".encode()).hexdigest()[:16]
        target = cache / "remote" / key / PurePosixPath(name).name
        if not target.exists():
            say(f"data: copying {name} ({about['size']:,} bytes)")
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
            try:
                system.get_file(name, str(partial))
                sync(partial)
                partial.rename(target)
            finally:
                partial.unlink(missing_ok=True)
        copies.append(target)
    return copies


@contextmanager
def new_folder(target: Path, num_bytes: int) -> Iterator[Path]:
    """An empty folder to write into, renamed to `target` at the end; on an error it is removed, and killed it stays under another name.

    What a killed process left of an earlier attempt is removed first.

    Args:
      target: must not exist, or be an empty folder.
      num_bytes: what is going to be written, at least.

    Raises:
      ConfigError: something is there already, the disk is too small or full, or may not be written.
    """
    target = target.expanduser().absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists already; name a folder that does not, or remove it first")
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _clean(target)
        free = shutil.disk_usage(target.parent).free
        if free < num_bytes:
            raise ConfigError(f"cannot write {target}: it needs {num_bytes:,} bytes and {free:,} are free; free some space or name another")
        partial.mkdir()
        yield partial
        partial.rename(target)
        sync(target.parent)
    except OSError as error:
        if error.filename is not None and not Path(str(error.filename)).absolute().is_relative_to(target.parent):
            raise  # about something that was read
        raise ConfigError(
            f"cannot write {target}: {(error.strerror or str(error)).lower()} (it needs {num_bytes:,} bytes); "
            "free some space, or name another folder"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _clean(target: Path) -> None:
    """Remove what processes that are gone left of `target`."""
    for path in target.parent.glob(f".{target.name}.*.partial"):
        pid = re.fullmatch(r".*\.(\d+)\.partial", path.name)
        if pid is not None and not _alive(int(pid[1])):
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()
