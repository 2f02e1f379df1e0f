"""Which folders are checkpoints: a manifest of hashes from each process says so, and nothing counts before it.

    checkpoints/00000100/arrays/…               Orbax's store, written by all processes, asynchronously
    checkpoints/00000100/meta.json              step, logical vocabulary, shape and type of each leaf, the caller's data
    checkpoints/00000100/manifest-0-of-2.json   path, size and hash of every file that process 0 wrote; the last act of a save
    checkpoints/00000100/manifest-1-of-2.json   the same from process 1
    checkpoints/corrupt-00000080/…              found damaged, set aside, never deleted by us

A folder without a complete set of manifests is not a checkpoint: that is what a kill leaves behind at any moment of a
save or of a deletion, and `clean` removes it. The marker is a file rather than a rename, so that object stores (gs://)
work too. Here are files and folders alone: no arrays, no other processes, no Orbax.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import xxhash
from etils import epath

from jaxllm.config import ConfigError
from jaxllm.files import files_in, is_remote, path_of, sync

_MANIFEST = re.compile(r"manifest-(\d+)-of-(\d+)\.json")
_STEP = re.compile(r"\d{8,}")
_BLOCK_BYTES = 1 << 22
_HASH_THREADS = 4


def is_complete(folder: epath.Path) -> bool:
    """Whether every process's manifest is there. Names alone decide, so that a damaged manifest is found, not cleaned away."""
    found = [match for path in _inside(folder) if (match := _MANIFEST.fullmatch(path.name))]
    return any(len({m[1] for m in found if m[2] == num}) == int(num) for num in {m[2] for m in found})


def saved_steps(folder: epath.Path) -> list[int]:
    """Steps of the complete checkpoints in a `checkpoints` folder, oldest first."""
    return sorted(int(path.name) for path in _inside(folder) if _STEP.fullmatch(path.name) and is_complete(path))


def _inside(folder: epath.Path) -> list[epath.Path]:
    """What is in a folder; nothing where there is none, as in an object store before the first object."""
    return list(folder.iterdir()) if folder.is_dir() else []


def candidates(folder: epath.PathLike) -> list[epath.Path]:
    """Complete checkpoints, newest first, of a run directory, a `checkpoints` folder, or one checkpoint."""
    path = epath.Path(folder if is_remote(folder) else path_of(folder).expanduser().absolute())  # Orbax reads absolute paths only
    if is_complete(path):
        return [path]
    for root in (path / "checkpoints", path):
        if root.is_dir() and (steps := saved_steps(root)):
            return [root / f"{step:08d}" for step in reversed(steps)]
    what = "has no complete checkpoint" if path.exists() else "does not exist"
    raise ConfigError(f"{path} {what}; give a run directory, its checkpoints folder, or one checkpoint in it")


def fingerprint(folder: epath.PathLike) -> str:
    """8 hex digits over the manifests of the newest checkpoint in `folder`: every byte of the weights, as it was saved."""
    digest = hashlib.sha256()
    for path in sorted(path_of(candidates(folder)[0]).glob("manifest-*.json")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def remove(folder: epath.Path) -> None:
    """Delete a checkpoint, manifests first: killed in between, it no longer counts."""
    for path in sorted(_inside(folder)):
        if _MANIFEST.fullmatch(path.name):
            path.unlink()
    folder.rmtree()


def clean(folder: epath.Path) -> None:
    """Remove what killed saves and deletions left: steps without a complete set of manifests."""
    for path in _inside(folder):
        if _STEP.fullmatch(path.name) and path.is_dir() and not is_complete(path):
            path.rmtree()


def _digest(path: epath.Path) -> tuple[int, str]:
    """(size in bytes, xxh3-128) of a file."""
    hasher, size = xxhash.xxh3_128(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            hasher.update(block)
            size += len(block)
    return size, hasher.hexdigest()


def write(folder: epath.Path, process: int, num_processes: int) -> None:
    """Hash the files that this process wrote (Orbax names them after it; all others are process 0's) and say so, atomically."""
    arrays = [f"arrays/{name}" for name in files_in(folder / "arrays")]
    names = [name for name in arrays if int((re.search(r"process_(\d+)", name) or (0, 0))[1]) == process]
    names += ["meta.json"] if process == 0 else []
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        files = dict(zip(names, pool.map(_digest, [folder / name for name in names]), strict=True))
    text = json.dumps(files, indent=1)
    target = folder / f"manifest-{process}-of-{num_processes}.json"
    if is_remote(folder):
        target.write_text(text)  # an object appears whole or not at all
        return
    temporary = folder / f"{target.name}.tmp"
    temporary.write_text(text)
    folders = {parent for name in names for parent in (folder / name).parents if parent.is_relative_to(folder)}
    for path in [*(folder / name for name in names), temporary, *folders, folder.parent]:
        sync(path)
    temporary.rename(target)
    sync(folder)


def find_problems(folder: epath.Path, share: slice = slice(None), only: str | None = None) -> list[str]:
    """What differs from the manifests.

    Args:
      share: which of the sorted files to hash, so that processes can divide them.
      only: look at this file alone.
    """
    problems: list[str] = []
    expected: dict[str, tuple[int, str]] = {}
    for path in sorted(_inside(folder)):
        if _MANIFEST.fullmatch(path.name):
            try:
                expected |= {name: (int(size), str(digest)) for name, (size, digest) in json.loads(path.read_text()).items()}
            except (ValueError, TypeError, AttributeError):
                problems.append(f"{path.name} is damaged")

    def check(name: str) -> str | None:
        size, digest = expected[name]
        try:
            given = _digest(folder / name)
        except OSError as error:
            return f"{name} is missing" if isinstance(error, FileNotFoundError) else f"{name} cannot be read ({error})"
        if given[0] != size:
            return f"{name} has {given[0]:,} bytes instead of {size:,}"
        return None if given[1] == digest else f"{name} has changed since it was written (its hash differs)"

    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        names = [name for name in sorted(expected) if only in (None, name)][share]
        return problems + [problem for problem in pool.map(check, names) if problem]


def read_record(folder: epath.Path) -> dict[str, Any]:
    """The whole meta.json of one checkpoint (`meta` in it is the caller's), after verifying that file alone."""
    if not is_complete(folder):
        raise ConfigError(f"{folder} is not a complete checkpoint")
    if problems := find_problems(folder, only="meta.json"):
        raise ConfigError(f"checkpoint {folder} is damaged: {few(problems)}")
    return json.loads((folder / "meta.json").read_text())


def read_meta(folder: epath.PathLike) -> tuple[int, dict[str, Any]]:
    """(step, meta) of the newest checkpoint of a run directory, a `checkpoints` folder, or one checkpoint."""
    record = read_record(candidates(folder)[0])
    return record["step"], record["meta"]


def verify(folder: epath.PathLike) -> list[str]:
    """Everything that is wrong with the checkpoints in `folder` (as for `load_params`); empty when all are whole."""
    return [f"{candidate}: {problem}" for candidate in candidates(folder) for problem in find_problems(candidate)]


# -------------------------------------------------------------------------------------------- errors


def failure(doing: str, folder: epath.Path, num_bytes: int, error: Exception) -> Exception:
    """The error to raise when `doing` failed: one line with the folder, bytes needed and free, and the fix."""
    text = str(error)
    free = free_bytes(folder)
    room = f"; it needs {num_bytes:,} bytes and {'an unknown number' if free is None else f'{free:,}'} are free" if num_bytes else ""
    if re.search("ENOSPC|No space left|EDQUOT|quota exceeded", text):
        return ConfigError(f"cannot {doing}: the disk is full{room}. Free some space, or use another folder. Earlier checkpoints are whole")
    if re.search("EFBIG|File too large", text):
        fix = "Raise the limit on file sizes (`ulimit -f`), or use another folder. Earlier checkpoints are whole"
        return ConfigError(f"cannot {doing}: the file would be larger than the system allows{room}. {fix}")
    if isinstance(error, PermissionError) or re.search("EACCES|EPERM|EROFS|Permission denied|Read-only", text):
        return ConfigError(f"cannot {doing}: no permission to write there. Make {folder} writable, or use another folder")
    if isinstance(error, OSError):
        return ConfigError(f"cannot {doing}: {text}. Use another folder")
    return RuntimeError(f"cannot {doing}: {text.splitlines()[0] if text else type(error).__name__}{room}")


def free_bytes(folder: epath.Path) -> int | None:
    """Bytes free where `folder` is or would be; None where the file system does not tell."""
    existing = next((path for path in (folder, *folder.parents) if path.exists()), None)
    return shutil.disk_usage(existing).free if existing is not None and not is_remote(folder) else None


def few(lines: Sequence[str], most: int = 6) -> str:
    """The first lines as one, and how many more there are."""
    more = f"; and {len(lines) - most} more" if len(lines) > most else ""
    return "; ".join(lines[:most]) + more
