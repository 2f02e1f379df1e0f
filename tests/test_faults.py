"""Nothing is lost: real `jaxllm train` processes, real files, killed from outside. No function is patched."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import socket
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from jaxllm import manifest
from tests.runs import SIGINT, SIGKILL, SIGTERM, TINY, Run, corpus, digest, losses, train, train_until

pytestmark = pytest.mark.fault

MESHES = {"one device": (1, ()), "eight devices": (8, ("--mesh.data", "4", "--mesh.model", "2"))}
STREAM = ("--data.sources.0.kind", "hf_stream", "--data.sources.0.field", "text")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def unbroken(text: Path) -> dict[str, Path]:
    """Unbroken runs of 30 steps, made once: by mesh name."""
    runs = {}
    for name, (devices, flags) in MESHES.items():
        runs[name] = text.parent / f"unbroken-{devices}"
        train("--run_dir", str(runs[name]), *flags, text=text, devices=devices)
    return runs


def same(a: Path, b: Path) -> None:
    """Identical bits of the last checkpoint, and of every loss on the way."""
    assert digest(a) == digest(b)
    assert losses(a) == losses(b)


def whole(run_dir: Path) -> dict[str, bytes]:
    """Every file of the checkpoints that count, by its content."""
    folders = [Path(os.fspath(folder)) for folder in manifest.candidates(run_dir)]
    return {str(p): hashlib.sha256(p.read_bytes()).digest() for folder in folders for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("mesh", MESHES)
def test_stopping_twice_changes_no_bit(text: Path, unbroken: dict[str, Path], tmp_path: Path, mesh: str) -> None:
    devices, flags = MESHES[mesh]
    args = ("--run_dir", str(tmp_path / "run"), *flags)
    for line, number, status in ((r"step +7/", SIGTERM, 143), (r"step +18/", SIGINT, 130)):
        got, output = train_until(line, number, *args, text=text, devices=devices)
        assert got == status, output
        assert "saved. To go on: " in output
    output = train(*args, text=text, devices=devices)
    assert "resuming from step" in output
    same(tmp_path / "run", unbroken[mesh])
    assert "this run is finished" in train(*args, text=text, devices=devices)


def test_another_mesh_goes_on_with_the_same_losses(text: Path, unbroken: dict[str, Path], tmp_path: Path) -> None:
    """Begun on eight devices, ended on one."""
    devices, flags = MESHES["eight devices"]
    args = ("--run_dir", str(tmp_path / "run"))
    assert train_until(r"step +9/", SIGTERM, *args, *flags, text=text, devices=devices)[0] == 143
    train(*args, text=text)
    ours, theirs = losses(tmp_path / "run"), losses(unbroken["eight devices"])
    assert ours.keys() == theirs.keys()
    for step, values in ours.items():
        assert values == pytest.approx(theirs[step], rel=1e-5)


def test_a_streamed_epoch_resumes_to_the_same_bits(text: Path, tmp_path: Path) -> None:
    stream = tmp_path / "stream.jsonl"
    paragraphs = [p for p in text.read_text().split("\n\n") if p.strip()]
    stream.write_text("".join(json.dumps({"text": p}) + "\n" for p in paragraphs))
    flags = (*STREAM, "--data.sources.0.path", str(stream), "--data.held_out_fraction", "0.05")
    train("--run_dir", str(tmp_path / "whole"), *flags, text=text)
    args = ("--run_dir", str(tmp_path / "run"), *flags)
    for line in (r"step +6/", r"step +17/"):
        assert train_until(line, SIGTERM, *args, text=text)[0] == 143
    train(*args, text=text)
    same(tmp_path / "run", tmp_path / "whole")


def test_killed_twenty_times_ends_with_the_same_bits(text: Path, tmp_path: Path) -> None:
    """kill -9 at random moments: every other one while it trains, where a save every second step makes many fall into a save, the
    rest anywhere from the start of the process on, while it restores."""
    args = ("--num_steps", "300", "--save_every", "2", "--run_dir")
    train(*args, str(tmp_path / "whole"), text=text)
    chance, run_dir = random.Random(0), tmp_path / "run"
    for kill in range(20):
        run = Run("train", TINY, *args, str(run_dir), text=text)
        if kill % 2:
            time.sleep(chance.uniform(0.0, 8.0))
        else:
            run.wait_for(r"step +\d+/|this run is finished")
            time.sleep(chance.uniform(0.0, 1.0))
        run.kill(SIGKILL)
        assert run.finish() == -SIGKILL, f"the run ended before kill {kill + 1}; give it more steps"
    train(*args, str(run_dir), text=text)
    same(run_dir, tmp_path / "whole")


def test_a_second_signal_ends_at_once_and_harms_nothing(text: Path, unbroken: dict[str, Path], tmp_path: Path) -> None:
    args = ("--run_dir", str(tmp_path / "run"))
    run = Run("train", TINY, *args, text=text)
    run.wait_for(r"step +8/")
    run.kill(SIGTERM)
    run.kill(SIGTERM)
    assert run.finish(60) == 143
    train(*args, text=text)
    same(tmp_path / "run", unbroken["one device"])


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_a_damaged_newest_checkpoint_is_set_aside(text: Path, unbroken: dict[str, Path], tmp_path: Path, damage: str) -> None:
    args = ("--run_dir", str(tmp_path / "run"))
    train_until(r"step +13/", SIGTERM, *args, text=text)
    newest = max((tmp_path / "run" / "checkpoints").glob("0*"))
    victim = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(victim.read_bytes())
    if damage == "truncated":
        victim.write_bytes(content[:-1])
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    else:
        victim.unlink()
    output = train(*args, text=text)
    assert f"checkpoint {int(newest.name)}" in output and "damaged" in output and "set aside" in output
    assert list(newest.parent.glob("corrupt-*"))
    same(tmp_path / "run", unbroken["one device"])


def test_a_full_disk_leaves_earlier_checkpoints_whole(text: Path, unbroken: dict[str, Path], tmp_path: Path) -> None:
    args = ("--run_dir", str(tmp_path / "run"))
    train_until(r"step +8/", SIGTERM, *args, text=text)
    before = whole(tmp_path / "run")

    def limit() -> None:  # no file may grow past 16 kB: the arrays do not fit, the log does
        resource.setrlimit(resource.RLIMIT_FSIZE, (16_384, 16_384))

    run = Run("train", TINY, *args, text=text, preexec=limit)
    assert run.finish() in (1, 2), run.output
    assert "bytes" in run.output and "free" in run.output
    assert "Traceback" not in run.output
    assert whole(tmp_path / "run") == before
    train(*args, text=text)
    same(tmp_path / "run", unbroken["one device"])


def test_not_a_number_stops_with_step_batch_and_checkpoint(text: Path, tmp_path: Path) -> None:
    output = train("--run_dir", str(tmp_path / "run"), "--optim.lr", "1e30", "--optim.clip_norm", "None", text=text, status=1)
    line = next(line for line in output.splitlines() if "not finite" in line)
    assert "at step" in line and "batch id" in line and "last good checkpoint" in line
    assert "Traceback" not in output


def test_a_spike_rewinds_and_skips_and_the_rerun_is_the_same(text: Path, tmp_path: Path) -> None:
    """A burst of noise in the middle of an unshuffled corpus is the spike: a model of text predicts random bytes badly."""
    noise = "\n\n".join("".join(chr(random.Random(i).randrange(0x4E00, 0x9FFF)) for _ in range(200)) for i in range(12))
    noisy = corpus(tmp_path, middle=b"\n\n" + noise.encode() + b"\n\n")
    flags = (
        "--data.packing", "concatenate", "--data.shuffle", "False", "--num_steps", "330", "--save_every", "10", "--spike.enabled", "True",
        "--spike.window", "20", "--spike.rewind_steps", "5", "--spike.skip_batches", "30", "--keep_last", "3",
    )  # fmt: skip
    output = train("--run_dir", str(tmp_path / "whole"), *flags, text=noisy)
    assert "the loss spiked at step" in output and "skipping batches" in output
    newest = max((tmp_path / "whole" / "checkpoints").glob("0*"))
    assert '"skipped"' in "".join(p.read_text() for p in newest.glob("*.json"))
    spiked = int(output.split("the loss spiked at step ")[1].split(":")[0])
    number, _ = train_until(rf"step +{spiked + 3}/", SIGKILL, "--run_dir", str(tmp_path / "run"), *flags, text=noisy)
    assert number == -SIGKILL
    train("--run_dir", str(tmp_path / "run"), *flags, text=noisy)
    same(tmp_path / "run", tmp_path / "whole")


def test_another_config_is_refused_with_the_difference(text: Path, tmp_path: Path) -> None:
    args = ("--run_dir", str(tmp_path / "run"))
    train_until(r"step +6/", SIGTERM, *args, text=text)
    output = train(*args, "--optim.lr", "1e-3", text=text, status=2)
    assert "optim.lr: 0.003 → 0.001" in output and "on_config_change accept" in output
    train(*args, "--optim.lr", "1e-3", "--on_config_change", "accept", text=text)


# ------------------------------------------------------------------------------------ several processes


def several(text: Path, *arguments: str, devices: int = 4, each: Sequence[dict[str, str]] = ({}, {})) -> list[Run]:
    """One process for each entry of `each`, which adds to its environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(len(each))}
    return [
        Run("train", TINY, *arguments, text=text, devices=devices, env=shared | {"JAX_PROCESS_ID": str(i)} | own)
        for i, own in enumerate(each)
    ]


def test_two_processes_train_like_one_and_stop_at_the_same_step(text: Path, unbroken: dict[str, Path], tmp_path: Path) -> None:
    _, flags = MESHES["eight devices"]
    args = ("--run_dir", str(tmp_path / "run"), *flags)
    runs = several(text, *args)
    runs[0].wait_for(r"step +9/")
    runs[1].kill(SIGTERM)  # a signal to the second one alone
    assert [run.finish() for run in runs] == [143, 143], runs[0].output + runs[1].output
    assert "stopped after step" in runs[0].output
    runs = several(text, *args)
    assert [run.finish() for run in runs] == [0, 0], runs[0].output + runs[1].output
    ours, theirs = losses(tmp_path / "run"), losses(unbroken["eight devices"])
    assert ours.keys() == theirs.keys()
    for step, values in ours.items():
        assert values == pytest.approx(theirs[step], rel=1e-5)


def test_a_killed_process_ends_the_others(text: Path, tmp_path: Path) -> None:
    runs = several(text, "--run_dir", str(tmp_path / "run"), "--num_steps", "100000", "--mesh.data", "8")
    runs[0].wait_for(r"step +5/")
    runs[1].kill(SIGKILL)
    start = time.monotonic()
    assert runs[0].finish(120) != 0
    assert time.monotonic() - start < 100


def test_a_failing_process_tells_the_others_why(text: Path, tmp_path: Path) -> None:
    """The second process alone cannot write its cache."""
    elsewhere = {"JAXLLM_CACHE": "/proc/jaxllm"}
    good, bad = several(text, "--run_dir", str(tmp_path / "run"), "--mesh.data", "8", each=({}, elsewhere))
    assert bad.finish(120) == 2 and "/proc/jaxllm" in bad.output
    assert good.finish(120) != 0
    assert "process 1 failed" in good.output and "/proc/jaxllm" in good.output


def test_no_permission_is_said_before_training(text: Path, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        target = Path("/proc/jaxllm-run")  # root may write anywhere else
    else:
        target = tmp_path / "locked" / "run"
        target.parent.mkdir(mode=0o500)
    output = train("--run_dir", str(target), text=text, status=2)
    assert "cannot write the run directory" in output and "Traceback" not in output
