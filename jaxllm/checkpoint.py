"""Checkpoints: Orbax writes the arrays, `jaxllm/manifest.py` hashes the files, and nothing counts before its manifest.

Orbax does not check what it reads (25 of 25 flipped bits were restored silently), so sizes and hashes are verified before
anything is read. What a kill left behind is removed when a `Checkpointer` opens. How a checkpoint lies on disk:
`jaxllm/manifest.py`.

We use Orbax's v0 classes (`AsyncCheckpointer`, `PyTreeCheckpointHandler`), because v1 still lives under
`experimental`. Orbax is imported inside functions, because that takes a second.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from etils import epath

from jaxllm import manifest, tree
from jaxllm.config import ConfigError
from jaxllm.files import is_remote, move, path_of
from jaxllm.manifest import read_meta, verify
from jaxllm.sharding import VOCAB_LEAVES

__all__ = ["Checkpointer", "Restored", "load_params", "read_meta", "verify"]

type PyTree = Any
type Say = Callable[[str], None]

_BARRIER_TIMEOUT_MS = 20 * 60 * 1000


class Restored(NamedTuple):
    """What came out of a checkpoint."""

    step: int
    state: PyTree
    meta: dict[str, Any]


class Checkpointer:
    """Saves and restores the state of one run in `folder`. Every process of the run makes one and calls it alike.

    Opening removes what killed saves left behind; only one run may have a folder open for saving at a time.

    Args:
      folder: local, gs:// or s3:// path, made where it does not exist.
      keep_last: how many of the newest checkpoints to keep, at least 1.
      keep_every: also keep each checkpoint whose step is a multiple of this; 0 keeps none.

    Raises:
      ConfigError: the folder cannot be made or written, or keep_last is less than 1.
    """

    def __init__(self, folder: epath.PathLike, keep_last: int = 2, keep_every: int = 0) -> None:
        if keep_last < 1 or keep_every < 0:
            raise ConfigError(f"keep_last is {keep_last} and keep_every is {keep_every}; they must be at least 1 and at least 0")
        path = path_of(folder)
        self.folder = epath.Path(path if is_remote(path) else path.absolute())
        self.keep_last, self.keep_every = keep_last, keep_every
        self._worker = ThreadPoolExecutor(1, "checkpoint")
        self._in_flight: Future[None] | None = None
        self._orbax: Any = None

        def make() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            manifest.clean(self.folder)

        _on_first(make, f"open the checkpoints in {self.folder}", self.folder)

    def save(self, step: int, state: PyTree, meta: Mapping[str, Any], *, num_vocab: int | None = None) -> None:
        """Start to save; returns once the arrays are out of the step's reach, so that they may be donated.

        A save in flight is waited for first. A step that is already saved is left as it is. The rest (writing,
        hashing, the manifest, deleting old checkpoints) happens in the background; `wait` before the process ends.

        Args:
          state: any pytree of `jax.Array`; on several hosts, of global arrays.
          meta: anything JSON can hold: position in the data, config, versions.
          num_vocab: logical vocabulary, if vocabulary leaves are padded to the mesh; lets `restore` pad them differently.

        Raises:
          ConfigError: no space, no permission; or what went wrong in the save before.
        """
        self.wait()
        folder = self._path(step)
        leaves = _leaves(state)
        specs = {path: _spec(leaf) for path, leaf in leaves.items()}
        text = json.dumps({"step": step, "num_vocab": num_vocab, "leaves": specs, "meta": meta}, indent=1)
        arrays = {path: jax.random.key_data(leaf) if _is_key(leaf) else leaf for path, leaf in leaves.items() if leaf.size}
        num_bytes = tree.num_bytes(arrays)
        if self._prepare(folder, num_bytes):
            return
        if self._orbax is None:
            commit = _commit_by_file() if is_remote(self.folder) else None
            self._orbax = _orbax().AsyncCheckpointer(_handler(), temporary_path_class=commit)
        try:
            self._orbax.save(folder / "arrays", args=_orbax().args.PyTreeSave(tree.from_items(list(arrays.items()))))
        except Exception as error:
            raise self._failed(step, num_bytes, error) from error
        self._in_flight = self._worker.submit(self._commit, step, text, num_bytes)

    def wait(self) -> None:
        """Block until the last save is complete on disk.

        Raises:
          ConfigError: what went wrong in the background (no space, no permission), once.
        """
        in_flight, self._in_flight = self._in_flight, None
        if in_flight is not None:
            in_flight.result()

    def check(self) -> None:
        """Raise what went wrong with the last save, if it has ended; else do nothing.

        Raises:
          ConfigError: as `wait`.
        """
        if self._in_flight is not None and self._in_flight.done():
            self.wait()

    def saved_steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        return manifest.saved_steps(self.folder)

    def restore(self, template: PyTree, step: int | None = None, say: Say = print) -> Restored | None:
        """The newest checkpoint that is whole, on the template's mesh; None if there is none at all.

        A damaged one is named, set aside as `corrupt-…`, and the one before it is used. All processes decide alike.

        Args:
          template: the state's structure with `jax.ShapeDtypeStruct` (or arrays) as leaves. Shapes and types must
            be those saved, except that vocabulary leaves may be padded differently; shardings are the template's.
          step: restore this one and no other.

        Raises:
          ConfigError: the template has another structure (with what differs), no such step, or every checkpoint is damaged.
        """
        self.wait()
        steps = _on_first(self.saved_steps, f"list the checkpoints in {self.folder}", self.folder)
        if step is not None and step not in steps:
            raise ConfigError(f"no checkpoint of step {step} in {self.folder}; there are {', '.join(map(str, steps)) or 'none'}")
        damaged = []
        for candidate in reversed(steps) if step is None else [step]:
            problems = _shared_problems(self._path(candidate))
            if not problems:
                return _restore(self._path(candidate), template)
            aside = self._set_aside(candidate)
            damaged.append(f"checkpoint {candidate} in {self.folder} is damaged ({manifest.few(problems)}); set aside as {aside}")
            if jax.process_index() == 0:
                say(damaged[-1])
        if damaged:
            start = "" if step else "; the same command now starts from the beginning, unless you put a good copy there"
            raise ConfigError(f"no whole checkpoint is left: {damaged[-1]}{start}")
        return None

    def read_meta(self, step: int) -> dict[str, Any]:
        """The `meta` that was given to `save`, without reading arrays."""
        return manifest.read_record(self._path(step))["meta"]

    def delete_after(self, step: int) -> None:
        """Delete every checkpoint with a later step: the run is about to be rewound to `step`."""
        self.wait()

        def delete() -> None:
            for later in self.saved_steps():
                if later > step:
                    manifest.remove(self._path(later))

        _on_first(delete, f"delete checkpoints in {self.folder}", self.folder)

    # ------------------------------------------------------------------------------------ inside

    def _path(self, step: int) -> epath.Path:
        return self.folder / f"{step:08d}"

    def _prepare(self, folder: epath.Path, num_bytes: int) -> bool:
        """Whether the step is saved already; else clear its folder and check that the arrays fit on the disk."""

        def prepare() -> bool:
            if manifest.is_complete(folder):
                return True
            if folder.exists():
                folder.rmtree()
            free = manifest.free_bytes(self.folder)
            if free is not None and free < num_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            folder.mkdir()
            return False

        return _on_first(prepare, f"save step {int(folder.name)} in {self.folder}", self.folder, num_bytes)

    def _commit(self, step: int, text: str, num_bytes: int) -> None:
        """In the background: wait for Orbax, write what makes the checkpoint count, then apply the policy."""
        folder = self._path(step)
        try:
            self._orbax.wait_until_finished()
            if jax.process_index() == 0:
                (folder / "meta.json").write_text(text)
            manifest.write(folder, jax.process_index(), jax.process_count())
            _orbax().multihost.get_barrier_sync_fn()(key=f"manifests_{step}", timeout_ms=_BARRIER_TIMEOUT_MS)
        except Exception as error:
            raise self._failed(step, num_bytes, error) from error
        try:
            for old in self.saved_steps()[: -self.keep_last] if jax.process_index() == 0 else ():
                if not self.keep_every or old % self.keep_every:
                    manifest.remove(self._path(old))
        except OSError as error:
            raise manifest.failure(f"delete old checkpoints in {self.folder}", self.folder, 0, error) from error

    def _failed(self, step: int, num_bytes: int, error: Exception) -> Exception:
        """Remove the partial save and say what was needed.

        Orbax raises at the first array that fails, while its threads still write the others: a file that appears beside
        the deletion makes it start again, and what comes later still counts for nothing and goes when the folder is opened.
        """
        partial = self._path(step)
        if jax.process_index() == 0 and not manifest.is_complete(partial):
            for _ in range(20):
                with contextlib.suppress(OSError):
                    partial.rmtree(missing_ok=True)
                if not partial.exists():
                    break
                time.sleep(0.1)
        return manifest.failure(f"save step {step} in {self.folder}", self.folder, num_bytes, error)

    def _set_aside(self, step: int) -> str:
        """Rename a damaged checkpoint, after all processes have looked at it."""

        def rename() -> str:
            names = (f"corrupt-{step:08d}{suffix}" for suffix in ("", *(f"-{i}" for i in range(2, 1000))))
            name = next(name for name in names if not (self.folder / name).exists())
            move(cast(Path, self._path(step)), cast(Path, self.folder / name))
            return name

        return _on_first(rename, f"set aside checkpoint {step} in {self.folder}", self.folder)


def load_params(
    folder: epath.PathLike, template: tree.Tree, branches: Sequence[str] = ("trainable", "frozen"), say: Say = print, left_out: str = ""
) -> Restored:
    """Params alone, from the newest whole checkpoint: to generate, evaluate, or start another run.

    Changes nothing on disk and needs no knowledge of the optimizer.

    Args:
      folder: a run directory, its `checkpoints` folder, or one checkpoint.
      template: nested dict of `jax.ShapeDtypeStruct`; floating types are cast to the template's.
      branches: the state's fields that hold params; each leaf comes from the first that has it
        (`('ema', 'trainable', 'frozen')` takes the averages).
      left_out: pattern of leaves that the checkpoint may hold besides.

    Raises:
      ConfigError: no checkpoint there, none that is whole, or other params (with what differs).
    """
    listed = _on_first(lambda: [os.fspath(path) for path in manifest.candidates(folder)], f"read {folder}", epath.Path(path_of(folder)))
    for candidate in map(epath.Path, listed):
        problems = _shared_problems(candidate)
        if not problems:
            return _restore(candidate, template, branches, left_out)
        if jax.process_index() == 0:
            say(f"checkpoint {candidate} is damaged ({manifest.few(problems)}); trying the one before")
    raise ConfigError(f"every checkpoint in {folder} is damaged; verify() lists what differs")


# ------------------------------------------------------------------------------------ leaves and Orbax


class _Spec(NamedTuple):
    """Shape and type name of a leaf: `float32`, `bfloat16`, `key<fry>`."""

    shape: tuple[int, ...]
    dtype: str


def _leaves(state: PyTree) -> dict[str, Any]:
    """Path to leaf, for any pytree; fields of named tuples count as keys."""
    pairs = jax.tree_util.tree_leaves_with_path(state)
    leaves = {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf for keys, leaf in pairs}
    assert len(leaves) == len(pairs), "two leaves of the state have the same path"
    return leaves


def _spec(leaf: Any) -> _Spec:
    return _Spec(tuple(leaf.shape), str(leaf.dtype))


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_impl(leaf: Any) -> Any:
    """The generator of a typed key array or its shape (`jax.random.key_impl` takes arrays and tracers only)."""
    found: list[Any] = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return found[0]


def _raw_template(leaf: Any) -> jax.ShapeDtypeStruct:
    """What is stored for a leaf of this shape, type and sharding: typed PRNG keys are stored as their uint32 data."""
    sharding = leaf.sharding
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    if _is_key(leaf):
        leaf = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


@cache
def _orbax() -> Any:
    """The module. It logs each background error with several tracebacks before it raises it; raising is enough."""
    import orbax.checkpoint

    _teach_s3()
    logging.getLogger("absl").addFilter(_not_from_orbax)
    logging.getLogger("asyncio").addFilter(lambda record: "never retrieved" not in record.getMessage())
    show = sys.unraisablehook

    def quiet(unraisable: Any) -> None:
        # After one failed write tensorstore calls back, once for each of the others, into an event loop that is gone.
        if str(unraisable.exc_value) != "Event loop is closed":
            show(unraisable)

    sys.unraisablehook = quiet
    return orbax.checkpoint


def _commit_by_file() -> Any:
    """Orbax's way to say that its arrays are whole where nothing can be renamed. Its default for gs://, but not for s3://."""
    from orbax.checkpoint._src.path import atomicity

    return atomicity.CommitFileTemporaryPath


_S3_ENVIRONMENT = {"endpoint": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"), "aws_region": ("AWS_REGION", "AWS_DEFAULT_REGION")}
"""What Amazon's own tools read, and TensorStore does not."""


@cache
def _teach_s3() -> None:
    """Let arrays go to and come from s3://, which Orbax (0.12) takes for a local path, although TensorStore has a driver for it."""
    from orbax.checkpoint._src.path import gcs_utils
    from orbax.checkpoint._src.serialization import tensorstore_utils

    normalize, kvstore = tensorstore_utils._normalize_path, gcs_utils.get_kvstore_for_gcs
    tensorstore_utils._normalize_path = lambda path: (
        normalize(path).replace("s3:/", "s3://") if path.startswith("s3://") else normalize(path)
    )
    tensorstore_utils._use_gcs_driver = lambda directory: directory.startswith(("gs://", "s3://"))

    def for_store(path: str) -> dict[str, Any]:
        if not path.startswith("s3://"):
            return kvstore(path)
        bucket, _, inside = path.removeprefix("s3://").partition("/")
        spec: dict[str, Any] = {"driver": "s3", "bucket": bucket, "path": f"{inside.rstrip('/')}/"}
        for field, names in _S3_ENVIRONMENT.items():
            if found := next((os.environ[name] for name in names if os.environ.get(name)), None):
                spec[field] = found
        if os.environ.get("AWS_ACCESS_KEY_ID"):
            spec["aws_credentials"] = {"type": "environment"}  # or it looks for files first, and says that there are none
        return spec

    gcs_utils.get_kvstore_for_gcs = for_store


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname


def _handler() -> Any:
    """Orbax's handler for arrays alone.

    Replica-parallel writing is off: it slices every replicated leaf on its device, one compilation per shape and
    device (25 leaves on 8 devices: the first save blocked for 14.6 s; without it, 0.1 s). Compression is off: on
    2 cores zstd took 0.7 to 2.1 s of CPU time from training per 256 MiB, and saved 15 % (without it, 0.15 s).
    """
    ocp = _orbax()
    arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=False, enable_write_sharding_file=False)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False)


def _restore(folder: epath.Path, template: PyTree, branches: Sequence[str] | None = None, left_out: str = "") -> Restored:
    """Read the leaves that `template` asks for, after comparing all of them with what was saved.

    Args:
      branches: as in `load_params`; None reads the whole state under its own paths.
    """
    record = manifest.read_record(folder)
    saved = {path: _Spec(tuple(shape), dtype) for path, (shape, dtype) in record["leaves"].items()}
    origin = {path: path for path in saved}
    if branches is not None:
        inside = [(path.removeprefix(f"{branch}/"), path) for branch in branches for path in saved if path.startswith(f"{branch}/")]
        origin = dict(reversed(inside))  # the first branch that has a leaf wins
        origin = {path: source for path, source in origin.items() if not re.fullmatch(left_out, path)}
    wanted = _leaves(template)
    given = {path: saved[source] for path, source in origin.items()}
    if lines := _differences({path: _spec(leaf) for path, leaf in wanted.items()}, given, record["num_vocab"], branches is not None):
        fix = "Use the config that it was made with, or another run directory"
        raise ConfigError(f"checkpoint {folder} is of another architecture or optimizer; in it: {manifest.few(lines)}. {fix}")
    raw = {path: _raw_template(leaf) for path, leaf in wanted.items()}
    arrays = _read_arrays(folder / "arrays", {origin[path]: leaf for path, leaf in raw.items() if leaf.size})
    leaves = []
    for path, leaf in wanted.items():
        empty = not raw[path].size
        array = jax.device_put(np.zeros(raw[path].shape, raw[path].dtype), raw[path].sharding) if empty else arrays[origin[path]]
        leaves.append(jax.random.wrap_key_data(array, impl=_key_impl(leaf)) if _is_key(leaf) else array)
    return Restored(record["step"], jax.tree.unflatten(jax.tree.structure(template), leaves), record["meta"])


def _differences(wanted: dict[str, _Spec], saved: dict[str, _Spec], num_vocab: int | None, cast: bool) -> list[str]:
    """What keeps `saved` from being restored as `wanted`.

    Vocabulary leaves may be padded otherwise, as long as both hold the logical vocabulary. With `cast`, floating
    types may differ.
    """
    saved = dict(saved)
    for path in wanted.keys() & saved.keys():
        want, have = wanted[path].shape, saved[path].shape
        padded = num_vocab is not None and bool(want and have) and want[1:] == have[1:] and min(want[0], have[0]) >= num_vocab
        if padded and tree.match([(VOCAB_LEAVES, True)], path):
            saved[path] = saved[path]._replace(shape=want)
    lines = tree.structure_diff(wanted, saved)
    for path in wanted.keys() & saved.keys():
        want_type, have_type = wanted[path].dtype, saved[path].dtype
        floating = all("float" in name for name in (want_type, have_type))
        if want_type != have_type and not (cast and floating):
            lines.append(f"{path} has type {have_type}, expected {want_type}")
    return lines


def _read_arrays(folder: epath.Path, templates: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Path to array, each on its template's sharding, zero-padded or cut to its template's shape."""
    ocp = _orbax()
    args = {
        path: ocp.ArrayRestoreArgs(sharding=leaf.sharding, dtype=leaf.dtype, global_shape=leaf.shape, strict=False)
        for path, leaf in templates.items()
    }
    request = ocp.args.PyTreeRestore(
        item=tree.from_items(list(templates.items())), restore_args=tree.from_items(list(args.items())), partial_restore=True
    )
    return dict(tree.items(ocp.Checkpointer(_handler()).restore(folder, args=request)))


# ------------------------------------------------------------------------------------------ processes


def _from_all[T](value: T) -> list[T]:
    """The JSON value of every process, the same list on each; also a barrier. Trivial with one process."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    text = json.dumps(value).encode()
    longest = int(multihost_utils.process_allgather(np.int32(len(text))).max())
    rows = multihost_utils.process_allgather(np.frombuffer(text.ljust(longest), np.uint8))
    return [json.loads(row.tobytes()) for row in rows]


def _shared_problems(folder: epath.Path) -> list[str]:
    """`manifest.find_problems`, each process hashing a share of the files; the verdict of all, on all."""
    own = manifest.find_problems(folder, slice(jax.process_index(), None, jax.process_count()))
    return list(dict.fromkeys(problem for problems in _from_all(own) for problem in problems))


def _on_first[T](act: Callable[[], T], doing: str, folder: epath.Path, num_bytes: int = 0) -> T:
    """`act()` on process 0; its result (JSON), or its error as a ConfigError, on every process."""
    reply: dict[str, Any] = {}
    if jax.process_index() == 0:
        try:
            reply = {"value": act()}
        except OSError as error:
            reply = {"error": str(manifest.failure(doing, folder, num_bytes, error))}
        except ConfigError as error:
            reply = {"error": str(error)}
    reply = _from_all(reply)[0]
    if "error" in reply:
        raise ConfigError(reply["error"])
    return reply["value"]
