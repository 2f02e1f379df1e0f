"""Real processes, killed from outside, on real file systems: nothing that was saved is lost, nothing half-saved counts."""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.checkpoint import Checkpointer, verify
from jaxllm.config import ConfigError, MeshConfig

NUM_KILLS = 24


def state_of(step: int) -> dict[str, Any]:
    """What the checkpoint of a step must hold."""
    value = jnp.arange(500, dtype=jnp.float32) * step
    return {"step": jnp.int32(step), "w": value, "moments": {"w": value.astype(jnp.bfloat16)}}


def assert_holds(state: dict[str, Any], step: int) -> None:
    for given, expected in zip(jax.tree.leaves(state), jax.tree.leaves(state_of(step)), strict=True):
        assert given.dtype == expected.dtype and np.asarray(given).tobytes() == np.asarray(expected).tobytes()


# ------------------------------------------------------------------------------------------- kill -9


def save_forever(folder: str, pipe: Connection) -> None:
    """A run: resume, then save step after step as fast as it goes; says each step that `wait` has called complete."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    ck = Checkpointer(folder, keep_last=2, keep_every=10)
    restored = ck.restore(state_of(0))
    step = restored.step if restored else 0
    if restored:
        assert_holds(restored.state, step)
    pipe.send(step)
    while True:
        step += 1
        ck.save(step, state_of(step), {"position": step})
        ck.wait()
        pipe.send(step)


@pytest.mark.fault
def test_kill_9_at_any_moment_of_a_save(tmp_path: Path) -> None:
    """After each of 24 kills the newest checkpoint is whole, holds its step's values, and is no older than was promised."""
    processes = multiprocessing.get_context("forkserver")  # imports once, so that a run starts in a fraction of a second
    processes.set_forkserver_preload(["jax", "orbax.checkpoint", "jaxllm.checkpoint"])
    rng, promised, leftovers = random.Random(0), 0, 0
    for _ in range(NUM_KILLS):
        receiver, sender = processes.Pipe(duplex=False)
        run = processes.Process(target=save_forever, args=(str(tmp_path), sender), daemon=True)
        run.start()
        sender.close()
        assert receiver.poll(60), "the run did not start"
        resumed = receiver.recv()
        assert resumed >= promised
        for _ in range(rng.randrange(3)):
            assert receiver.poll(60)
            promised = receiver.recv()
        time.sleep(rng.random() * 0.08)
        run.kill()
        run.join()
        while receiver.poll():
            try:
                promised = receiver.recv()
            except EOFError:
                break
        complete = [path.name for path in tmp_path.iterdir() if any(path.glob("manifest-*-of-1.json"))]
        leftovers += len(list(tmp_path.iterdir())) - len(complete)
        assert verify(tmp_path) == [] if promised else True
        if promised:
            assert max(map(int, complete)) >= promised
    assert promised > NUM_KILLS / 2, "the runs made no progress"
    assert leftovers > 0, "no kill fell into a save: the test shows nothing"
    ck = Checkpointer(tmp_path, keep_last=2, keep_every=10)
    assert {path.name for path in tmp_path.iterdir()} == {f"{step:08d}" for step in ck.saved_steps()}
    for step in ck.saved_steps():
        restored = ck.restore(state_of(0), step=step)
        assert restored is not None and restored.meta == {"position": step}
        assert_holds(restored.state, step)


def delete_slowly(folder: Path) -> None:
    """In a process of its own: delete a checkpoint that has very many files."""
    print("ready", flush=True)
    sys.stdin.readline()
    Checkpointer(folder).delete_after(0)


def test_kill_9_while_an_old_checkpoint_is_deleted(tmp_path: Path) -> None:
    """A checkpoint of which a file is gone does not count: its manifest goes first."""
    ck = Checkpointer(tmp_path)
    ck.save(1, state_of(1), {})
    ck.wait()
    folder = tmp_path / "00000001"
    for number in range(20_000):
        (folder / "arrays" / f"filler-{number}").touch()
    size = len(os.listdir(folder / "arrays"))
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    run = subprocess.Popen([sys.executable, __file__, "delete", str(tmp_path)], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert run.stdin and run.stdout and run.stdout.readline() == b"ready\n"
    run.stdin.write(b"\n")
    run.stdin.flush()
    deadline = time.monotonic() + 60
    while len(os.listdir(folder / "arrays")) == size and time.monotonic() < deadline:
        pass
    run.kill()
    run.wait()
    left = len(os.listdir(folder / "arrays"))
    assert 0 < left < size, "the kill did not fall into the deletion: the test shows nothing"
    assert not list(folder.glob("manifest-*"))
    ck = Checkpointer(tmp_path)
    assert ck.saved_steps() == [] and list(tmp_path.iterdir()) == [] and ck.restore(state_of(0)) is None


# --------------------------------------------------------------------------------- no space, no permission


def save_without_room(folder: Path, kind: str) -> None:
    """In a process of its own: one good save, one that cannot work, one good save again."""
    ck = Checkpointer(folder)
    ck.save(1, state_of(1), {})
    ck.wait()
    if kind == "too big":
        size = 1 << 22
    elif kind == "just too big":  # passes the check beforehand; the disk fills up while Orbax writes
        size = shutil.disk_usage(folder).free - 4096
    else:
        size = 1 << 20
    if kind == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, resource.RLIM_INFINITY))
    if kind == "permission":
        folder.chmod(0o555)
        if os.getuid() == 0:
            os.seteuid(65534)
    try:
        ck.save(2, {"w": jax.random.bits(jax.random.key(0), (size,), jnp.uint8)}, {})
        assert kind != "too big", "known beforehand, and yet it began to write"
        ck.wait()
    except ConfigError as error:
        print(f"ConfigError: {error}")
    if kind == "permission":
        os.seteuid(os.getuid())
        folder.chmod(0o755)
    if kind == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert sorted(path.name for path in folder.iterdir()) == ["00000001"], "partial files are left"
    restored = ck.restore(state_of(0))
    assert restored is not None
    assert_holds(restored.state, 1)
    ck.save(3, state_of(3), {})
    ck.wait()
    assert ck.saved_steps() == [1, 3] and verify(folder) == []


def run_alone(*args: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__, *args]
    return subprocess.run(command, env=env, text=True, capture_output=True, timeout=120, **kwargs)


def assert_clear(done: subprocess.CompletedProcess[str], folder: Path, *parts: str) -> None:
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("ConfigError")]
    assert len(lines) == 1 and str(folder) in lines[0], done.stdout
    for part in parts:
        assert re.search(part, lines[0]), lines[0]
    assert "Traceback" not in done.stderr


def test_a_limit_on_file_sizes(tmp_path: Path) -> None:
    done = run_alone("save", str(tmp_path), "limit")
    assert_clear(done, tmp_path, "larger than the system allows", "needs 1,048,576 bytes", r"[\d,]+ are free", "ulimit -f")


def test_no_permission(tmp_path: Path) -> None:
    done = run_alone("save", str(tmp_path), "permission")
    assert_clear(done, tmp_path, "no permission to write", "Make .* writable, or use another folder")


@pytest.mark.parametrize("kind", ["too big", "just too big"])
def test_a_full_disk(tmp_path: Path, kind: str) -> None:
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path)], capture_output=True).returncode:
        pytest.skip("cannot mount a small tmpfs here; test_a_limit_on_file_sizes covers a failed write")
    try:
        folder = tmp_path / "checkpoints"
        folder.mkdir()
        done = run_alone("save", str(folder), kind)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    assert_clear(done, folder, "the disk is full", r"needs [\d,]+ bytes and [\d,]+ are free", "Free some space")


# ----------------------------------------------------------------------------------------- two processes


def one_of_two(process: int, port: int, folder: Path, act: str) -> None:
    """One of two processes with four devices each: save twice, or restore."""
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, process)
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from jaxllm import sharding

    mesh = sharding.make_mesh(MeshConfig(data=4, model=2))

    def make(step: int) -> dict[str, Any]:
        place = {"w": P("data", "model"), "b": P(), "key": P()}
        values = lambda: {
            "w": jax.random.normal(jax.random.key(step), (16, 8)),
            "b": jnp.arange(5, dtype=jnp.bfloat16) * step,
            "key": jax.random.key(step),
        }
        return jax.jit(values, out_shardings={name: NamedSharding(mesh, spec) for name, spec in place.items()})()

    with jax.set_mesh(mesh):
        ck = Checkpointer(folder)
        if act == "save":
            for step in (1, 2):
                ck.save(step, make(step), {"position": step})
            ck.wait()
            assert (folder / "00000002" / f"manifest-{1 - process}-of-2.json").exists(), "`wait` returns when all are complete"
            return
        expected = make(1)
        restored = ck.restore(expected, say=lambda line: print(f"process {process} says {line}"))
        assert restored is not None and restored.step == 1 and restored.meta == {"position": 1}
        for name, leaf in restored.state.items():
            assert leaf.sharding.is_equivalent_to(expected[name].sharding, leaf.ndim)
            raw = jax.random.key_data if name == "key" else lambda x: x
            for given, wanted in zip(raw(leaf).addressable_shards, raw(expected[name]).addressable_shards, strict=True):
                assert np.asarray(given.data).tobytes() == np.asarray(wanted.data).tobytes(), name
        try:
            ck.restore({"w": expected["w"]})
        except ConfigError as error:
            assert "surplus b" in str(error)


def run_two(folder: Path, act: str) -> str:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    commands = [[sys.executable, __file__, "two", str(process), str(port), str(folder), act] for process in (0, 1)]
    runs = [subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for command in commands]
    try:
        outputs = [run.communicate(timeout=120)[0] for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [0, 0], "\n".join(outputs)
    return "\n".join(outputs)


@pytest.mark.fault
def test_two_processes_save_together_and_agree_on_damage(tmp_path: Path) -> None:
    """Each writes its manifest; one finds a bit that the other's file lost, and both go back to the checkpoint before."""
    run_two(tmp_path, "save")
    assert verify(tmp_path) == []
    manifests = [(tmp_path / "00000002" / f"manifest-{process}-of-2.json").read_text() for process in (0, 1)]
    assert "process_1" in manifests[1] and "process_1" not in manifests[0] and "meta.json" not in manifests[1]
    written = [path for path in (tmp_path / "00000002" / "arrays" / "ocdbt.process_1").rglob("*") if path.is_file()]
    victim = max(written, key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[-10] ^= 1
    victim.write_bytes(content)
    said = [line for line in run_two(tmp_path, "restore").splitlines() if "says" in line]
    assert len(said) == 1 and said[0].startswith("process 0 says") and victim.name in said[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000001", "corrupt-00000002"]
    (tmp_path / "00000001" / "manifest-1-of-2.json").unlink()
    assert Checkpointer(tmp_path).saved_steps() == [], "half of the manifests is no checkpoint"


if __name__ == "__main__":
    if sys.argv[1] == "delete":
        delete_slowly(Path(sys.argv[2]))
    elif sys.argv[1] == "save":
        save_without_room(Path(sys.argv[2]), sys.argv[3])
    else:
        one_of_two(int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), sys.argv[5])
