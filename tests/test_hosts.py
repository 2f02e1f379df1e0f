"""Several processes: who they are, whether all have come, and what tells them to stop. Threads stand for them, but in one test."""

from __future__ import annotations

import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jaxllm import hosts
from jaxllm.config import ConfigError
from jaxllm.hosts import Place, explicit, platform, roll_call
from tests.runs import ROOT


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


GIVEN = {"JAX_COORDINATOR_ADDRESS": "host:1234", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}


def test_what_the_environment_says():
    assert explicit({}) is None
    assert explicit(GIVEN) == Place("host:1234", 2, 1)


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"JAX_PROCESS_ID": ""}, "JAX_PROCESS_ID not; set all three"),
        ({"JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID is 2; with JAX_NUM_PROCESSES 2"),
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES is 'two'; it must be a whole number"),
        ({"JAX_COORDINATOR_ADDRESS": "host"}, "'host'; it must be HOST:PORT"),
    ],
)
def test_an_environment_that_contradicts_itself_is_refused(change: dict[str, str], expected: str):
    with pytest.raises(ConfigError, match=expected):
        explicit(GIVEN | change)


@pytest.mark.parametrize(
    "environment, name",
    [
        ({}, ""),
        ({"JAXLLM_DISTRIBUTED": "gcetpu"}, "gcetpu"),
        ({"SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "0", "SLURM_NTASKS": "16"}, "slurm"),
        ({"SLURM_NTASKS": "16", "SLURM_PROCID": "0"}, ""),  # the batch script itself
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, ""),  # a shell of salloc
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, "ompi"),
    ],
)
def test_a_platform_is_recognised_by_its_variables(environment: dict[str, str], name: str):
    assert platform(environment) == name


def test_a_platform_that_is_not_here_or_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_"))]:
        monkeypatch.delenv(name)
    with pytest.raises(ConfigError, match="'slrm'; did you mean 'slurm'"):
        hosts._asked("slrm", 5)
    with pytest.raises(ConfigError, match="finds no such platform here"):
        hosts._asked("slurm", 5)


def test_what_slurm_says_of_a_task(monkeypatch: pytest.MonkeyPatch):
    said = {"JOB_ID": "7", "STEP_NODELIST": "gpu[03-04]", "NTASKS": "16", "STEP_NUM_TASKS": "16", "PROCID": "9", "LOCALID": "1"}
    for name, value in said.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    place = hosts._asked("slurm", 5)
    assert place is not None and place.coordinator.startswith("gpu03:") and place[1:] == (16, 9, [1])


# ------------------------------------------------------------------------------------------ roll call


def call(numbers: list[int], num_processes: int, seconds: float) -> list[str]:
    """What each process that comes is told: '' or the error."""
    port = free_port()

    def one(number: int) -> str:
        try:
            roll_call(Place(f"127.0.0.1:{port}", num_processes, number), seconds)
        except (TimeoutError, ConfigError) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    with ThreadPoolExecutor(len(numbers)) as pool:
        return list(pool.map(one, numbers))


def test_all_come():
    assert call([0, 1, 2, 3], 4, 20) == [""] * 4


def test_the_one_that_does_not_come_is_named_to_all_within_the_time():
    start = time.monotonic()
    told = call([0, 1, 3], 4, 1.5)
    assert time.monotonic() - start < 6
    for line in told:
        assert line.startswith("TimeoutError: process 2 of 4 did not come up within 1.5 s; 0, 1 (")


def test_process_0_is_missed_too():
    assert "process 0 of 2 did not come up within 1 s at 127.0.0.1:" in call([1], 2, 1)[0]


def test_two_with_one_number_are_refused():
    assert all("process 1 is there twice" in line for line in call([0, 1, 1], 3, 5))


def hello(port: int, number: int) -> socket.socket:
    """A process that says who it is, and waits."""
    deadline = time.monotonic() + 10
    while True:
        try:
            connection = socket.create_connection(("127.0.0.1", port), timeout=10)
            break
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    connection.sendall(f"{hosts._HELLO} {number} somewhere\n".encode())
    return connection


def test_one_that_is_started_anew_while_others_are_awaited_takes_its_old_place():
    port = free_port()
    with ThreadPoolExecutor(1) as pool:
        started = pool.submit(roll_call, Place(f"127.0.0.1:{port}", 3, 0), 10)
        hello(port, 1).close()  # killed
        again = hello(port, 1)
        other = hello(port, 2)
        with again, other:
            assert again.recv(99) == other.recv(99) == b"\n", "all are there"
        started.result()


def test_one_that_ends_while_others_are_awaited_is_missing():
    port = free_port()
    with ThreadPoolExecutor(1) as pool:
        started = pool.submit(roll_call, Place(f"127.0.0.1:{port}", 3, 0), 2)
        hello(port, 1).close()
        with hello(port, 2) as other:
            told = other.recv(999).decode()
        with pytest.raises(TimeoutError, match=r"process 1 of 3 did not come up within 2 s; 0, 2 \(somewhere\) did"):
            started.result()
    assert "process 1 of 3 did not come up" in told


def test_strangers_on_the_port_do_not_count():
    port = free_port()
    told: list[str] = []

    def stranger() -> None:
        time.sleep(0.3)
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
        roll_call(Place(f"127.0.0.1:{port}", 2, 1), 10)
        told.append("all there")

    thread = threading.Thread(target=stranger)
    thread.start()
    roll_call(Place(f"127.0.0.1:{port}", 2, 0), 10)
    thread.join()
    assert told == ["all there"]


def test_a_port_that_is_taken_is_said():
    with socket.create_server(("", 0)) as server, pytest.raises(ConfigError, match="cannot listen on port"):
        roll_call(Place(f"127.0.0.1:{server.getsockname()[1]}", 2, 0), 1)


# --------------------------------------------------------------------------------------------- stopping


@pytest.fixture
def metadata() -> Iterator[tuple[str, dict[str, str]]]:
    """A machine's metadata: the address, and what each path says."""
    says = {"/preempted": "FALSE"}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200)
            self.end_headers()
            self.wfile.write(says[self.path].encode())

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", says
        server.shutdown()


@pytest.mark.parametrize("notice", ["TRUE", "TERMINATE_ON_HOST_MAINTENANCE"])
def test_a_notice_is_a_request_to_stop(notice: str, metadata: tuple[str, dict[str, str]], monkeypatch: pytest.MonkeyPatch):
    address, says = metadata
    monkeypatch.setattr(hosts, "NOTICE_SECONDS", 0.05)
    monkeypatch.setenv("JAXLLM_PREEMPTION_URL", f"http://127.0.0.1:{free_port()}/nobody,{address}/preempted")
    with hosts.Signals() as signals:
        signals.phase = "training"
        time.sleep(0.3)
        assert signals.code == 0
        says["/preempted"] = notice
        deadline = time.monotonic() + 10
        while not signals.code and time.monotonic() < deadline:
            time.sleep(0.02)
        assert signals.code == 128 + signal.SIGTERM


def test_under_a_platform_sigterm_again_is_the_same_notice(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JAXLLM_DISTRIBUTED", "slurm")
    with hosts.Signals() as signals:
        signals.phase = "training"
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
        assert signals.code == 143


# --------------------------------------------------------------------------------------------- one folder

TWO = """
import sys
from pathlib import Path
from jaxllm import hosts
from jaxllm.config import ConfigError
hosts.start()
for folder in sys.argv[1:]:
    try:
        hosts.check_shared(Path(folder))
        print("shared", flush=True)
    except ConfigError as error:
        print(error, flush=True)
hosts.leave(0)
"""


@pytest.mark.fault
def test_a_run_directory_that_is_not_shared_is_refused_on_all(tmp_path: Path):
    """Two processes agree on the first folder, and each has a second of its own."""
    port = free_port()
    runs = []
    for i in (0, 1):
        (tmp_path / "both").mkdir(exist_ok=True)
        (tmp_path / f"own-{i}").mkdir()
        env = os.environ | {
            "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(i), "XLA_FLAGS": "",
        }  # fmt: skip
        words = [sys.executable, "-c", TWO, str(tmp_path / "both"), str(tmp_path / f"own-{i}")]
        runs.append(subprocess.Popen(words, env=env, text=True, stdout=subprocess.PIPE))
    outputs = [run.communicate(timeout=120)[0] for run in runs]
    for i, output in enumerate(outputs):
        lines = [line for line in output.splitlines() if "Gloo" not in line]
        assert lines[0] == "shared"
        assert f"the run directory {tmp_path}/own-{i} is not shared: process 1 of 2 cannot see" in lines[1] and "gs://" in lines[1]
    assert not list((tmp_path / "both").iterdir())
