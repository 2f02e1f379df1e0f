"""What is computed once and kept: folders that are whole or absent, and content hashes of files.

A folder is built under a temporary name, synced to disk and renamed, so a killed or concurrent build
leaves nothing half-written. Processes of one machine that want the same folder wait for the one
that builds it. `sums.json` in it holds the size and hash of every file; a folder that has changed since
is built again, which gives the same bits.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import fcntl
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import xxhash

from jaxllm.config import ConfigError, DataConfig
from jaxllm.files import cache_home, sync, write_atomic

_BLOCK_BYTES = 1 << 22
_HASHED_BLOCKS = 256
_SUMS = "sums.json"
_RACY_SECONDS = 2.0
_REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}


def root(config: DataConfig) -> Path:
    """The cache's folder: `data.cache_dir`, else $JAXLLM_CACHE, else ~/.cache/jaxllm.

    Raises:
      ConfigError: it cannot be written.
    """
    path = Path(config.cache_dir).expanduser() if config.cache_dir else cache_home()
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".probe-{uuid.uuid4().hex}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"the cache folder {path} cannot be written ({error.strerror}); set data.cache_dir to one that can") from None
    return path


def key(*parts: object) -> str:
    """32 hex digits that name a combination of JSON values.

    >>> key('a', 1) == key('a', 1) != key('a', 2)
    True
    """
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True).encode())


def folder(target: Path, build: Callable[[Path], object], say: Callable[[str], None] = lambda line: None) -> Path:
    """`target`, made by `build(an empty folder)` if it is not there yet, or has been damaged.

    Raises:
      ConfigError: the disk is full or refuses.
    """
    if target.exists() and _damage(target) is None:
        return target
    with _saying_why(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target.with_name(f".{target.name}.lock")) as alone:
            if target.exists():
                if (damage := _damage(target)) is None:
                    return target
                say(f"data: {target} is damaged ({damage}); making it again")
                target.rename(target.with_name(f".{target.name}.tmp-{uuid.uuid4().hex}"))
            if alone:  # what a killed build left behind
                for stale in target.parent.glob(f".{target.name}.tmp-*"):
                    shutil.rmtree(stale, ignore_errors=True)
            temporary = target.with_name(f".{target.name}.tmp-{uuid.uuid4().hex}")
            temporary.mkdir()
            try:
                build(temporary)
                sums = {path.name: [path.stat().st_size, _digest(path)] for path in sorted(temporary.iterdir())}
                (temporary / _SUMS).write_text(json.dumps(sums))
                for path in [*temporary.iterdir(), temporary]:
                    sync(path)
                with contextlib.suppress(FileExistsError):  # another machine on a shared disk was first
                    _rename(temporary, target)
                sync(target.parent)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return target


def remembered(file: Path, name: str, count: Callable[[], Sequence[int]]) -> list[int]:
    """What `file`, a few numbers for each of many names, has for `name`; counted and put there if it has nothing, or was damaged.

    Raises:
      ConfigError: the disk is full or refuses.
    """
    if name in (known := _numbers(file)):
        return known[name]
    numbers = list(count())
    with _saying_why(file), _lock(file.with_name(f".{file.name}.lock")) as alone:
        if alone:
            known = _numbers(file) | {name: numbers}
            write_atomic(file, json.dumps({"numbers": known, "key": key(known)}).encode())
    return numbers


def _numbers(file: Path) -> dict[str, list[int]]:
    try:
        kept = json.loads(file.read_bytes())
        return kept["numbers"] if kept["key"] == key(kept["numbers"]) else {}
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return {}


@contextlib.contextmanager
def _saying_why(target: Path) -> Iterator[None]:
    """A disk that is full or refuses, as a ConfigError."""
    try:
        yield
    except OSError as error:
        if error.errno not in _REFUSALS and error.errno is not None:
            raise
        why = error.strerror or f"File too large, or the disk is full: {error}"  # NumPy's short write has no number
        raise ConfigError(
            f"cannot write {error.filename or target} ({why}); free some space or set data.cache_dir to another disk"
        ) from error


def _damage(target: Path) -> str | None:
    """What in a finished folder is not as it was written, or None. Folders inside it answer for themselves."""
    try:
        sums = json.loads((target / _SUMS).read_text())
        for name, (size, digest) in sums.items():
            found = (target / name).stat().st_size
            if found != size:
                return f"{name} has {found:,} bytes instead of {size:,}"
            if _digest(target / name) != digest:
                return f"the contents of {name} have changed"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, TypeError, AttributeError):
        return f"{_SUMS} is not what was written"
    return None


def _digest(path: Path) -> str:
    """xxh3-128 of a file; of one over 1 GiB, of 256 blocks of 4 MiB spread over it, so that a start never reads for minutes."""
    hasher, size = xxhash.xxh3_128(), path.stat().st_size
    blocks = -(-size // _BLOCK_BYTES)
    with path.open("rb") as file:
        for i in range(min(blocks, _HASHED_BLOCKS)):
            file.seek((i if blocks <= _HASHED_BLOCKS else i * (blocks - 1) // (_HASHED_BLOCKS - 1)) * _BLOCK_BYTES)
            hasher.update(file.read(_BLOCK_BYTES))
    return hasher.hexdigest()


def _rename(temporary: Path, target: Path) -> None:
    try:
        temporary.rename(target)
    except OSError as error:
        if target.exists():
            raise FileExistsError from error
        raise


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Hold the file's lock; False where the file system has none. It ends with the process, however that dies."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            alone = True
        except OSError:
            alone = False
        yield alone
    finally:
        os.close(descriptor)


def fingerprint(paths: Sequence[Path], cache: Path, *, text: bool) -> str:
    """A hash of the files' contents, remembered by their names, sizes and times.

    Args:
      text: also check that every file is UTF-8 text without NUL bytes.

    Raises:
      ConfigError: a file that cannot be read, or is not text; with its name and the byte where it goes wrong.
    """
    stats = [path.stat() for path in paths]
    identity = [[str(path.resolve()), stat.st_size, stat.st_mtime_ns] for path, stat in zip(paths, stats, strict=True)]
    memo = cache / "files" / key("v1", identity, text)
    if memo.exists() and _damage(memo) is None:
        return (memo / "hash").read_text()
    digest = xxhash.xxh3_128()
    for path in paths:
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        for block in _blocks(path, text=text):
            digest.update(block)
    # A file written within the clock's grain could change again without a new time: not remembered.
    if time.time() - max((stat.st_mtime for stat in stats), default=0.0) >= _RACY_SECONDS:
        folder(memo, lambda to: (to / "hash").write_text(digest.hexdigest()))
    return digest.hexdigest()


def _blocks(path: Path, *, text: bool) -> Iterator[bytes]:
    decoder, offset = codecs.getincrementaldecoder("utf-8")(), 0
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                if text:
                    if (at := block.find(b"\0")) >= 0:
                        raise _not_text(path, f"a NUL byte at offset {offset + at}")
                    decoder.decode(block)
                yield block
                offset += len(block)
        if text:
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise _not_text(path, f"bytes near offset {offset + error.start} are not UTF-8") from None
    except OSError as error:
        raise ConfigError(
            f"data file {path} cannot be read ({error.strerror}); check its permissions or leave it out of the path"
        ) from None


def _not_text(path: Path, why: str) -> ConfigError:
    return ConfigError(f"data file {path} is not text: {why}; convert it to UTF-8, or narrow the path, e.g. to '{path.parent}/*.txt'")
