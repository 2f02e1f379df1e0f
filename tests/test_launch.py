"""`python -m tools.launch`: what it would run, what it refuses, and what it does with workers that end in every way.

The generated scripts run here against stand-ins for the front ends (tests/frontends.py), with a shell script in the place
of Python; tests/test_launch_runs.py trains through them.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import frontends
from tests.runs import ROOT, TINY
from tools.launch import gke, workers
from tools.launch.__main__ import TARGETS, _fields, main, split
from tools.launch.workers import Team, Worker, repeat

SHARED = ("--run_dir", "gs://bucket/run")


@pytest.fixture(autouse=True)
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXLLM_TEST_TEXT", str(tmp_path / "corpus.txt"))


# ------------------------------------------------------------------------------------ what it would run

DRY = {
    "local": ("--processes", "2", "--devices", "4"),
    "slurm": ("--nodes", "2", "--gpus", "8", "--time", "24:00:00", "--sbatch", "constraint=h100"),
    "tpu-vm": ("--tpu", "one", "two", "--hosts", "2", "--zone", "z", *SHARED),
    "gke": ("--image", "repo/jaxllm:1", "--slices", "2", "--hosts", "4", "--chips", "4", "--selector", "topology=4x4", *SHARED),
}


@pytest.mark.parametrize("target", TARGETS)
def test_a_dry_run_says_what_would_run_and_never_a_secret(target: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_API_KEY", "hunter2")
    monkeypatch.setenv("PATH", "/nowhere")  # no front end is needed
    words = [target, TINY, *DRY[target], "--secret", "WANDB_API_KEY", "--num_steps", "7", "--env", "LANG=C", "--dry-run"]
    assert main(words) == 0
    output = capsys.readouterr().out
    assert "hunter2" not in output and "WANDB_API_KEY" in output and "LANG" in output
    assert f"-m jaxllm.cli train {TINY}" in output and "--num_steps 7" in output
    expected = {
        "local": ["JAX_PROCESS_ID=0", "JAX_PROCESS_ID=1", "JAX_NUM_PROCESSES=2", "device_count=4"],
        "slurm": ["#SBATCH --nodes=2\n", "--ntasks-per-node=8\n", "--gpus-per-node=8\n", "--time=24:00:00\n", "--constraint=h100\n"],
        "tpu-vm": ["ssh one", "ssh two", "--worker=1", "MEGASCALE_NUM_SLICES=2", "MEGASCALE_SLICE_ID=1", "secrets versions access"],
        "gke": ['"google.com/tpu": "4"', '"topology": "4x4"', '"JAX_NUM_PROCESSES"', "exclusive-topology", "secretKeyRef", '"replicas": 2'],
    }
    for part in expected[target]:
        assert part in output
    if target == "local":
        assert len(set(re.findall(r"127\.0\.0\.1:\d+", output))) == 1


def test_no_option_of_a_target_is_a_field_of_a_run():
    from jaxllm.config import TrainConfig

    assert not {name for kind, _ in TARGETS.values() for name in _fields(kind)} & set(_fields(TrainConfig))


def test_options_go_to_the_target_and_flags_to_the_run():
    own, flags = split("local", ["--processes", "2", "--optim.lr", "1e-3", "--dry-run", "--mesh.rules", "a", "b,c", "--env", "A=1", "B=2"])
    assert own == ["--processes", "2", "--dry-run", "True", "--env", "A=1", "B=2"]
    assert flags == ["--optim.lr", "1e-3", "--mesh.rules", "a", "b,c"]


# ---------------------------------------------------------------------------------------- what it refuses

REFUSED = [
    (["locl", TINY], r"no target 'locl'; did you mean 'local'\? targets: local, slurm, tpu-vm, gke"),
    (["local"], "needs a configuration next"),
    (["local", "--processes", "2"], "needs a configuration next"),
    (["local", "nowhere.py"], "no file nowhere.py"),
    (["local", TINY, "--proceses", "2"], "no option --proceses; did you mean '--processes'"),
    (["local", TINY, "--nodes", "2"], "--nodes is an option of slurm, not of local"),
    (["local", TINY, "--processes", "0"], "--processes is 0; it must be at least 1"),
    (["local", TINY, "--processes", "two"], "--processes takes a whole number, and was given two"),
    (["local", TINY, "--processes", "2"], "give each its own: --gpus 1, or --devices 4"),
    (["local", TINY, "--devices", "2", "--gpus", "1"], "give one of them"),
    (["local", TINY, "--gpus", "1000"], "this machine has"),
    (
        ["local", TINY, "--processes", "2", "--devices", "3"],
        r"2 processes × 3 devices: a batch of 8 rows .* multiple of 6: 6 or 12",
    ),
    (["local", TINY, "--processes", "2", "--devices", "4", "--mesh.model", "3"], r"does not multiply to 8 chips; nearest that do: \("),
    (["local", TINY, "--devices", "4", "--mesh.data", "8", "--dry-run"], r"\(1, 8, 1\) does not multiply to 4"),
    (["local", TINY, "--restarts", "-1"], "--restarts is -1; it must be at least 0"),
    (["local", TINY, "--optim.lr", "-1"], "optim.lr is -1"),
    (["local", TINY, "--env", "WANDB_API_KEY=abc"], "pass it by name: --secret WANDB_API_KEY"),
    (["local", TINY, "--env", "LANG"], "--env takes NAME=VALUE"),
    (["local", TINY, "--secret", "NOT_THERE_XYZ"], "no such variable in this environment"),
    (["slurm", TINY], "`sbatch` is not on PATH.*--dry-run"),
    (["slurm", TINY, "--sbatch", "x=1", "--gpus", "-1"], "--gpus is -1; it must be at least 0"),
    (["tpu-vm", TINY], "needs the TPU's name: --tpu NAME"),
    (["tpu-vm", TINY, "--tpu", "a"], "`gcloud` is not on PATH.*--dry-run"),
    (["tpu-vm", TINY, "--tpu", "a", "--hosts", "2", "--dry-run"], "the 2 hosts share no disk.*--run_dir gs://BUCKET/tiny-"),
    (["gke", TINY], "needs an image"),
    (["gke", TINY, "--image", "i", "--hosts", "2", "--dry-run"], "the 2 hosts share no disk"),
    (["gke", TINY, "--image", "i"], "`kubectl` is not on PATH.*--dry-run"),
    (["gke", TINY, "--image", "i", "--chips", "4", "--gpus", "8"], "give one of them"),
    (["gke", TINY, "--image", "i", "--selector", "x"], "--selector takes KEY=VALUE"),
]


@pytest.mark.parametrize("words, expected", REFUSED, ids=lambda value: " ".join(value[:4])[-40:] if isinstance(value, list) else "")
def test_a_mistake_is_one_line_and_exit_code_2(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(expected, error), error


def test_one_process_may_leave_devices_out_and_several_may_not():
    words = ["--devices", "4", "--mesh.data", "2", "--dry-run"]
    assert main(["local", TINY, *words]) == 0
    assert main(["local", TINY, *words, "--processes", "2"]) == 2


def test_a_secret_given_by_value_is_refused_and_not_repeated(capsys: pytest.CaptureFixture[str]):
    assert main(["local", TINY, "--secret", "WANDB_API_KEY=hunter2"]) == 2
    error = capsys.readouterr().err
    assert "takes names" in error and "hunter2" not in error


# ------------------------------------------------------------------------------------------- supervision


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "FOLLOW_SECONDS", 0.5)
    monkeypatch.setattr(workers, "TERM_SECONDS", 0.5)


def team(*scripts: str) -> tuple[Team, list[str]]:
    lines: list[str] = []
    return Team([Worker(f"worker {i}", lambda seen, s=script: ["bash", "-c", s]) for i, script in enumerate(scripts)], lines.append), lines


def test_lines_carry_their_worker_and_all_must_end_well():
    these, lines = team("echo one; sleep 0.2; echo three >&2", "echo two")
    assert these.run() == 0
    assert sorted(line for line in lines if "process" not in line) == ["[worker 0] one", "[worker 0] three", "[worker 1] two"]


@pytest.mark.parametrize(
    "scripts, status, named",
    [
        (("sleep 100", "exit 1"), 1, "worker 1 ended with exit status 1; ending worker 0"),
        (("sleep 100", "kill -9 $$"), 137, "worker 1 was killed by SIGKILL; ending worker 0"),
        (("trap '' TERM; while :; do sleep 0.1; done", "exit 3"), 3, "worker 1 ended with exit status 3; ending worker 0"),
        (("sleep 100 & wait", "exit 1"), 1, "worker 1 ended"),
        (("sleep 0.3; exit 2", "exit 1"), 2, "worker 1 ended with exit status 1"),
        (("sleep 0.3; kill -9 $$", "exit 1"), 137, "worker 1 ended with exit status 1"),
    ],
)
def test_one_that_breaks_ends_the_others_soon(impatient: None, scripts: tuple[str, ...], status: int, named: str):
    these, lines = team(*scripts)
    start = time.monotonic()
    assert these.run() == status
    assert time.monotonic() - start < 5
    assert any(named in line for line in lines), lines
    assert all(running.process.poll() is not None for running in these.running)


def test_a_signal_to_the_launcher_reaches_every_worker():
    these, _ = team(*["trap 'echo saving; exit 143' TERM; echo up; while :; do sleep 0.05; done"] * 2)
    threading.Timer(0.7, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    assert these.run() == -143


def test_a_broken_run_starts_again_but_no_mistake_and_no_stopped_one():
    said: list[str] = []
    statuses = iter([1, 137, 0])
    assert repeat(lambda attempt: next(statuses), 5, said.append) == 0 and len(said) == 2
    for first, expected in ((2, 2), (-143, 143), (0, 0)):
        assert repeat(lambda attempt, first=first: first, 5, pytest.fail) == expected
    assert repeat(lambda attempt: 1, 2, lambda line: None) == 1


# ------------------------------------------------------------------------------ the generated scripts, run


WORKER = """#!/bin/bash
n=${JAX_PROCESS_ID:-${SLURM_PROCID:-?}}
echo "worker $n of ${JAX_NUM_PROCESSES:-${SLURM_NTASKS:-?}} says ${LANG_OF_TEST:-nothing}, secret of ${#MY_SECRET} letters, in $PWD: $*"
%s
"""


@pytest.fixture
def fronts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Stand-ins on PATH; the folder of what they know."""
    monkeypatch.setenv("PATH", f"{frontends.install(tmp_path / 'bin')}:{os.environ['PATH']}")
    monkeypatch.setenv("FRONTENDS", str(tmp_path))
    monkeypatch.setenv("FRONTENDS_PATIENCE", "1")
    monkeypatch.setattr(gke, "POLL_SECONDS", 0.2)
    monkeypatch.setenv("MY_SECRET", "hunter2")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    about = {"tpus": {"one": 2, "two": 2}, "machine": {}, "port": port, "secrets": {"MY_SECRET": "hunter2"}}
    (tmp_path / "tpus.json").write_text(json.dumps(about))
    (tmp_path / "secrets.json").write_text(json.dumps(about["secrets"]))
    yield tmp_path


def launch(folder: Path, target: str, body: str, *words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """(exit status, output) of a launch whose workers run `body` in the shell."""
    python = folder / "python"
    python.write_text(WORKER % body)
    python.chmod(0o755)
    front = {
        "local": ("--processes", "2", "--devices", "1"),
        "slurm": ("--nodes", "2"),
        "tpu-vm": ("--tpu", "one", "two", "--zone", "z"),
        "gke": ("--image", "i", "--hosts", "2"),
    }[target]
    flags = ("--python", str(python), "--workdir", str(folder), "--run_dir", str(folder / "run"), "--env", "LANG_OF_TEST=a b")
    where = os.getcwd()
    try:
        status = main([target, TINY, *front, *flags, "--secret", "MY_SECRET", *words])
    finally:
        os.chdir(where)
    return status, capsys.readouterr().out


@pytest.mark.parametrize("target", TARGETS)
def test_every_worker_runs_with_its_place_its_environment_and_its_secret(target: str, fronts: Path, capsys: pytest.CaptureFixture[str]):
    status, output = launch(fronts, target, "", capsys=capsys)
    assert status == 0, output
    num = 4 if target == "tpu-vm" else 2
    for i in range(num):
        assert f"worker {i} of {num} says a b, secret of 7 letters, in {fronts}: -m jaxllm.cli train {TINY} --run_dir" in output
    assert "hunter2" not in output
    written = [path for path in fronts.rglob("*") if path.is_file() and path.name not in ("tpus.json", "secrets.json")]
    assert not [path for path in written if b"hunter2" in path.read_bytes()], "a secret was written down"


@pytest.mark.parametrize("target", TARGETS)
def test_the_exit_status_is_the_runs(target: str, fronts: Path, capsys: pytest.CaptureFixture[str], impatient: None):
    status, output = launch(fronts, target, "[ $n = 1 ] && exit 3; sleep 1", capsys=capsys)
    assert status == 3, output
    assert re.search(r"worker 1 ended with exit status 3|task 1", output), output


@pytest.mark.parametrize("target", TARGETS)
def test_a_run_that_breaks_is_started_again(target: str, fronts: Path, capsys: pytest.CaptureFixture[str], impatient: None):
    body = f"if [ $n = 1 ] && [ ! -e {fronts}/broken ]; then touch {fronts}/broken; exit 1; fi; sleep 0.2"
    status, output = launch(fronts, target, body, "--restarts", "1", capsys=capsys)
    assert status == 0, output
    assert "restart 1" in output and output.count("worker 0 of") == 2


def test_slurm_goes_back_into_the_queue_when_the_time_is_up(fronts: Path, capsys: pytest.CaptureFixture[str]):
    body = f"[ -e {fronts}/told ] && exit 0; trap 'touch {fronts}/told; exit 143' TERM; touch {fronts}/up; while :; do sleep 0.05; done"

    def notice() -> None:
        while not (fronts / "up").exists():
            time.sleep(0.1)
        time.sleep(0.5)
        os.kill(int((fronts / "batch.pid").read_text()), signal.SIGTERM)

    threading.Thread(target=notice).start()
    status, output = launch(fronts, "slurm", body, capsys=capsys)
    assert status == 0, output
    assert "start 1" in output and "goes on in its next allocation" in output and "start 2" in output


def test_a_lost_connection_to_a_tpu_is_taken_up_again(fronts: Path, capsys: pytest.CaptureFixture[str]):
    (fronts / "drop").touch()
    status, output = launch(fronts, "tpu-vm", "for i in 1 2 3 4; do sleep 1; echo line $i; done", "--tpu", "one", capsys=capsys)
    assert status == 0 and "the connection is lost" in output, output
    for worker in (0, 1):
        assert [line[-1] for line in output.splitlines() if line.startswith(f"[worker {worker}] line")] == ["1", "2", "3", "4"]


def test_what_gcloud_refuses_is_passed_on(fronts: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["tpu-vm", TINY, "--tpu", "three"]) == 2
    assert "cannot describe the TPU 'three'" in capsys.readouterr().err


def test_the_command_line_itself():
    done = subprocess.run([sys.executable, "-m", "tools.launch", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "tpu-vm CONFIG" in done.stdout
