"""Run directories in object stores, through real clients against local servers: S3 (moto) and Google's (gcp-storage-emulator).

Each is skipped where its packages are missing: s3fs, moto[s3], flask and flask-cors; gcsfs and gcp-storage-emulator.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from jaxllm import files, metrics, rundir
from jaxllm.checkpoint import Checkpointer, verify
from jaxllm.config import ConfigError, DistillConfig, OptimConfig, TrainConfig
from jaxllm.files import PartWriter, file_system, files_in, listing, local_copies, path_of, with_parts, write_atomic, written_here
from tests.runs import SIGKILL, TINY, Run, corpus, losses, train

SERVERS = {
    "s3": (("s3fs", "moto"), ["moto_server", "-p", "{port}"]),
    "gs": (
        ("gcsfs", "gcp_storage_emulator"),
        ["gcp-storage-emulator", "start", "--host", "127.0.0.1", "--port", "{port}", "--in-memory", "--default-bucket", "bucket"],
    ),
}


@pytest.fixture(scope="module", params=SERVERS)
def bucket(request: pytest.FixtureRequest) -> Iterator[str]:
    """An empty bucket of a local server, as gs://bucket or s3://bucket."""
    packages, command = SERVERS[request.param]
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        pytest.skip(f"{' and '.join(missing)} not installed; the first lines of this file say how")
    program = Path(sys.executable).parent / command[0]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    environment = {
        "s3": {"AWS_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", "AWS_DEFAULT_REGION": "us-east-1"},
        "gs": {
            "STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address, "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x",
            "FSSPEC_GCS_TOKEN": "anon", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        },
    }[request.param]  # fmt: skip
    server = subprocess.Popen([program, *(word.format(port=port) for word in command[1:])], stdout=-3, stderr=-3)
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        deadline = time.monotonic() + 60
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert server.poll() is None and time.monotonic() < deadline, f"{command[0]} does not start"
            time.sleep(0.1)
        if request.param == "s3":
            file_system("s3://bucket").mkdir("bucket")
        yield f"{request.param}://bucket"
    finally:
        server.terminate()
        server.wait()
        os.environ.clear()
        os.environ.update(before)


# ------------------------------------------------------------------------------------------------ paths


def test_a_local_path_stays_what_it_is():
    assert path_of("runs/one") == Path("runs/one") and isinstance(path_of("runs/one"), Path)
    assert rundir.locate(TrainConfig(name="x", run_dir="a/b")) == Path("a/b")


def test_an_unknown_store_and_a_missing_package_are_refused(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match=r"begins with hdfs://; a path is local, or begins with gs:// or s3://"):
        path_of("hdfs://host/run")
    monkeypatch.setitem(files.STORES, "gs", ("no_such_package", "gcs"))
    with pytest.raises(ConfigError, match=r"needs the package no_such_package, .* pip install no_such_package"):
        path_of("gs://bucket/run")


def test_files_appear_and_are_listed(bucket: str, tmp_path: Path):
    run = path_of(f"{bucket}/one")
    assert not run.exists() and rundir.read_json(run / "config.json") == {}
    rundir.write_json(run / "config.json", {"a": 1})
    rundir.write_json(run / "config.json", {"a": 2})
    assert rundir.read_json(run / "config.json") == {"a": 2}
    with written_here(run / "tokenizer") as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "model").write_bytes(b"123")
    assert files_in(run) == ["config.json", "tokenizer/deep/model"]
    size, when = listing(run)["tokenizer/deep/model"]
    assert size == 3 and abs(when - time.time()) < 300
    files.move(run / "tokenizer", run / "moved")
    assert files_in(run) == ["config.json", "moved/deep/model"]
    files.remove_tree(run)
    assert not run.exists()


def test_data_are_copied_once_and_again_when_they_change(bucket: str, tmp_path: Path):
    for name, text in (("a.txt", b"one"), ("sub/b.txt", b"two"), ("c.md", b"three")):
        write_atomic(path_of(f"{bucket}/data/{name}"), text)
    said: list[str] = []
    copies = local_copies(f"{bucket}/data/*.txt", tmp_path, said.append)
    assert [path.read_bytes() for path in copies] == [b"one"] and len(said) == 1
    assert local_copies(f"{bucket}/data/*.txt", tmp_path, said.append) == copies and len(said) == 1
    assert [path.name for path in local_copies(f"{bucket}/data", tmp_path)] == ["a.txt", "c.md", "b.txt"]
    write_atomic(path_of(f"{bucket}/data/a.txt"), b"ONE")
    assert local_copies(f"{bucket}/data/a.txt", tmp_path)[0].read_bytes() == b"ONE"
    assert local_copies(f"{bucket}/data/nothing*", tmp_path) == []


# -------------------------------------------------------------------------------------------- the record


def weights(folder: Path, text: str) -> str:
    """What a fingerprint reads of a checkpoint; its path."""
    (folder / "checkpoints" / "00000001").mkdir(parents=True, exist_ok=True)
    (folder / "checkpoints" / "00000001" / "manifest-0-of-1.json").write_text(text)
    return str(folder)


def test_a_run_that_goes_on_keeps_the_record_of_weights_that_have_changed_or_gone(tmp_path: Path):
    parent, teacher = weights(tmp_path / "parent", "a"), weights(tmp_path / "teacher", "b")
    config = TrainConfig(run_dir=str(tmp_path / "run"), init_from=parent, distill=DistillConfig(teachers=((teacher, 1.0),)))
    with rundir.claim(config) as folder:
        rundir.record(config, "float32", folder)
        first = rundir.recorded(config)
        weights(tmp_path / "parent", "trained on")
        rundir.record(config, "float32", folder)
        assert rundir.recorded(config) == first and len({first["parent_fingerprint"], first["teachers"][teacher]} - {None}) == 2
        files.remove_tree(tmp_path / "parent")
        rundir.record(config, "float32", folder)
        assert rundir.recorded(config) == first
        with pytest.raises(ConfigError, match="there are others now"):
            weights(tmp_path / "parent", "trained on")
            rundir.check_parent(first, parent)


def test_a_field_that_was_not_recorded_then_counts_as_its_default(tmp_path: Path):
    config = TrainConfig(run_dir=str(tmp_path / "run"))
    with rundir.claim(config) as folder:
        rundir.record(config, "float32", folder)
    old = rundir.recorded(config)
    del old["config"]["bitnet"], old["config"]["optim"]["noise_scale"], old["config"]["data"]["sources"][0]["loss_on"]
    rundir.write_json(folder / "config.json", old)
    with rundir.claim(config):
        pass
    changed = replace(config, optim=OptimConfig(num_microbatches=2, noise_scale=True))
    with pytest.raises(ConfigError, match=r"optim\.noise_scale: False → True"), rundir.claim(changed):
        pass


def test_metrics_go_into_numbered_parts_and_come_back_in_order(bucket: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files, "PART_BYTES", 200)
    monkeypatch.setattr(files, "PART_SECONDS", 0.0)
    run = path_of(f"{bucket}/metrics")
    with metrics.Writer(run, active=True) as writer:
        for step in range(20):
            writer.write(step, {"loss": float(step)})
            if step % 6 == 5:
                writer.flush()
        writer.flush()
        assert [record["step"] for record in metrics.read(run)] == list(range(20))
    assert len(with_parts(run / "metrics.jsonl")) > 2
    with metrics.Writer(run, active=True) as writer:  # another process goes on, from step 7
        beside = writer.cut_back(7)
        writer.write(8, {"loss": -1.0})
    assert [(r["step"], r["loss"]) for r in metrics.read(run)] == [*((i, float(i)) for i in range(8)), (8, -1.0)]
    assert beside is not None and beside.read_text().count("\n") == 12
    rundir.append_lines(run / "samples.jsonl", [{"step": 1}])
    rundir.append_lines(run / "samples.jsonl", [{"step": 2}, {"step": 3}])
    assert [record["step"] for record in metrics.read_lines(run / "samples.jsonl")] == [1, 2, 3]


def test_lines_that_come_during_a_write_are_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Local files stand for objects; each write takes a while, and the parts are small."""
    monkeypatch.setattr(files, "PART_BYTES", 30)
    monkeypatch.setattr(files, "PART_SECONDS", 0.0)
    write = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", lambda self, text: (time.sleep(0.002), write(self, text))[1])
    writer = PartWriter(tmp_path / "log.jsonl")
    for number in range(100):
        writer.append(b"%d\n" % number)
    writer.close()
    text = b"".join(path.read_bytes() for path in with_parts(tmp_path / "log.jsonl"))
    assert text == b"".join(b"%d\n" % number for number in range(100))


# ------------------------------------------------------------------------------------------ checkpoints


def state(step: int) -> dict[str, Any]:
    return {"w": jnp.arange(12.0).reshape(3, 4) + step, "key": jax.random.key(step)}


def test_checkpoints_are_saved_verified_and_set_aside(bucket: str):
    checkpoints = Checkpointer(f"{bucket}/run/checkpoints", keep_last=2)
    for step in (1, 2, 3):
        checkpoints.save(step, state(step), {"step": step})
        checkpoints.wait()
    assert checkpoints.saved_steps() == [2, 3] and verify(f"{bucket}/run") == []
    restored = checkpoints.restore(state(0))
    assert restored is not None and restored.step == 3 and restored.meta == {"step": 3}
    assert np.array_equal(restored.state["w"], state(3)["w"])
    folder = path_of(f"{bucket}/run/checkpoints/00000003")
    name = max((name for name in files_in(folder) if name.startswith("arrays")), key=lambda name: listing(folder)[name][0])
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    write_atomic(folder / name, bytes(content))
    said: list[str] = []
    restored = Checkpointer(f"{bucket}/run/checkpoints").restore(state(0), say=said.append)
    assert restored is not None and restored.step == 2 and name in said[0]
    assert {name.split("/")[0] for name in files_in(folder.parent)} == {"00000002", "corrupt-00000003"}
    next(path for path in (folder.parent / "00000002").iterdir() if path.name.startswith("manifest")).unlink()
    assert Checkpointer(f"{bucket}/run/checkpoints").saved_steps() == [], "without its manifest it does not exist"
    assert {name.split("/")[0] for name in files_in(folder.parent)} == {"corrupt-00000003"}


# ------------------------------------------------------------------------------------------------ leases


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> MemoryFileSystem:
    """A store in this process's memory."""
    monkeypatch.setitem(files.STORES, "memory", ("fsspec", "memory"))
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(rundir, "LEASE_SECONDS", 1.5)
    return MemoryFileSystem()


LOCK = "memory://bucket/run/.lock"


@pytest.mark.parametrize(
    "store, before",
    [("creates conditionally", ""), ("does not", ""), ("ignores the condition", ""), ("does not", "somebody who was killed 3")],
)
def test_of_two_that_start_at_once_one_trains(memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch, store: str, before: str):
    plain, read = MemoryFileSystem.pipe_file, MemoryFileSystem.cat_file
    together, starting = threading.Barrier(2), threading.local()

    def pipe_file(self: Any, path: str, value: bytes, mode: str = "overwrite") -> None:
        if mode == "create" and store == "does not":
            raise NotImplementedError
        plain(self, path, value, mode if store == "creates conditionally" else "overwrite")

    def cat_file(self: Any, path: str) -> Any:
        found = read(self, path) if memory.exists(path) else None
        if not hasattr(starting, "read"):  # the first look of each
            starting.read = together.wait(10)
        if found is None:
            raise FileNotFoundError(path)
        return found

    if before:
        memory.pipe_file(LOCK, before.encode())
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", pipe_file)
    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)

    def start(number: int) -> str:
        try:
            with rundir._lease("memory://bucket/run"):
                time.sleep(0.3)
        except ConfigError as error:
            return str(error)
        return "trained"

    with ThreadPoolExecutor(2) as pool:
        told = sorted(pool.map(start, range(2)))
    assert told == ["another process is training in memory://bucket/run; stop it first, or choose another --run_dir", "trained"]
    assert not memory.exists(LOCK)


@pytest.mark.parametrize("now", ["another 0", ""])
def test_one_that_was_taken_for_dead_ends_and_leaves_the_other_its_lease(
    memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch, now: str
):
    ended: list[str] = []

    def wait_for(happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 10
        while not happened():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    monkeypatch.setattr(rundir, "_end", ended.append)
    monkeypatch.setattr(rundir, "LEASE_SECONDS", 0.5)
    with rundir._lease("memory://bucket/run"):
        wait_for(lambda: memory.cat_file(LOCK).endswith(b" 1"))
        memory.rm_file(LOCK)
        if now:
            memory.pipe_file(LOCK, now.encode())
        wait_for(lambda: bool(ended))
    assert len(ended) == 1 and "memory://bucket/run is another process's now" in ended[0]
    assert (memory.cat_file(LOCK).decode() if memory.exists(LOCK) else "") == now


def test_a_process_that_is_refused_leaves_the_folder_to_its_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = TrainConfig(run_dir=str(tmp_path / "run"))
    with rundir.claim(config) as folder:
        monkeypatch.setattr(Path, "exists", lambda self: False)  # the other has looked before it was made
        with pytest.raises(ConfigError, match="another process is training"), rundir.claim(config):
            pass
        monkeypatch.undo()
        assert (folder / ".lock").exists()


def test_one_process_at_a_time_and_a_dead_one_is_followed(bucket: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rundir, "LEASE_SECONDS", 1.5)
    config = TrainConfig(name="lease", run_dir=f"{bucket}/lease")
    with rundir.claim(config) as folder:
        rundir.record(config, "float32", folder)
        with pytest.raises(ConfigError, match="another process is training"), rundir.claim(config):
            pass
    assert not (folder / ".lock").exists()
    (folder / ".lock").write_text("somebody who was killed 3")
    start = time.monotonic()
    with rundir.claim(config):
        assert time.monotonic() - start > 1.4


def test_a_bucket_that_is_not_there_is_said_in_one_line(bucket: str):
    config = TrainConfig(name="x", run_dir=f"{bucket}-not-there/run")
    with (
        pytest.raises(ConfigError, match=r"cannot write the run directory .*check that the bucket is there") as error,
        rundir.claim(config),
    ):
        pass
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------- a whole run


# Not on gs://: the emulator answers some of many concurrent conditional writes wrongly ("Malformed StorageGeneration").
@pytest.mark.fault
@pytest.mark.parametrize("bucket", ["s3"], indirect=True)
def test_a_run_in_a_store_is_killed_and_ends_with_the_same_losses(bucket: str, tmp_path: Path):
    """Data, run directory and checkpoints in the store; `kill -9` in the middle; beside it an unbroken local run."""
    text = corpus(tmp_path)
    flags = ("--num_steps", "24", "--save_every", "4", "--run_dir")
    train(*flags, str(tmp_path / "local"), text=text)
    write_atomic(path_of(f"{bucket}/text/corpus.txt"), text.read_bytes())
    remote = {"JAXLLM_TEST_TEXT": f"{bucket}/text/*.txt"}
    run = Run("train", TINY, *flags, f"{bucket}/whole", text=text, env=remote)
    run.wait_for(r"step +15/")
    run.kill(SIGKILL)
    assert run.finish() == -SIGKILL
    output = train(*flags, f"{bucket}/whole", text=text, env=remote)
    assert "resuming from step" in output
    records = [record for record in metrics.read(f"{bucket}/whole") if record["kind"] == "train"]
    assert {record["step"]: (record["loss"], record["grad_norm"]) for record in records} == losses(tmp_path / "local")
    there = files_in(path_of(f"{bucket}/whole"))
    assert {"config.json", "results.json", "report.html", "environment.json"} <= set(there) and ".lock" not in there
