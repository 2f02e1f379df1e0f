"""Several processes, one run: they start together, stop at the same step, and fail together."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm.config import ConfigError, nearest

POLL_SECONDS = 1.0
START_SECONDS = 300
"""Within which all processes must have come up, where JAXLLM_START_TIMEOUT says nothing."""
HEARTBEAT_SECONDS = 30
"""After which a process that says nothing counts as dead."""

EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
"""Describe the processes; they win over what is detected."""

DETECTED: tuple[tuple[str, str, str], ...] = (
    ("slurm", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),  # inside srun; a shell of salloc or a batch script has one task or none
    ("ompi", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
)
"""(the name that `jax.distributed` has for a platform, its variable for the number of processes, and for this one's place)."""


class Place(NamedTuple):
    """Who this process is among several."""

    coordinator: str
    """host:port of process 0."""
    num_processes: int
    process: int
    local_devices: Sequence[int] | None = None
    """Which of this machine's devices are its own; None means all."""


def start() -> None:
    """Join the other processes, if there are any.

    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID describe them. Without these, a step of Slurm or Open MPI with
    several tasks is recognised by itself, and JAXLLM_DISTRIBUTED names a platform that `jax.distributed` can ask: slurm, ompi,
    gcetpu, gketpu, or auto for whichever it finds (a TPU VM has to be asked over the network, so it is not asked unbidden).

    Raises:
      ConfigError: the variables contradict each other, or there is no such platform here.
      TimeoutError: processes that did not come up in time, with their numbers.
    """
    seconds = _whole("JAXLLM_START_TIMEOUT", os.environ.get("JAXLLM_START_TIMEOUT") or str(START_SECONDS))
    place = explicit(os.environ) or _asked(platform(os.environ), seconds)
    if place is None or place.num_processes == 1:
        return
    roll_call(place, seconds)
    # JAX would catch SIGTERM itself; here the vote of each step tells all processes of a notice that one has had.
    jax.config.update("jax_enable_preemption_service", False)
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        # CPU processes give up on each other after 30 s. Process 0 alone finds its programs in the compilation cache, and would be
        # that much ahead of the others; without the cache they arrive together.
        jax.config.update("jax_enable_compilation_cache", False)
    jax.distributed.initialize(
        *place[:3], local_device_ids=place.local_devices, cluster_detection_method="deactivate",
        initialization_timeout=seconds, heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )  # fmt: skip


def explicit(environment: Mapping[str, str]) -> Place | None:
    """What JAX_COORDINATOR_ADDRESS and its like say, or None where they are not set.

    >>> explicit({"JAX_COORDINATOR_ADDRESS": "host:1234", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"})
    Place(coordinator='host:1234', num_processes=2, process=1, local_devices=None)
    """
    given = {name: environment[name] for name in EXPLICIT if environment.get(name)}
    if not given:
        return None
    if missing := [name for name in EXPLICIT if name not in given]:
        raise ConfigError(f"{' and '.join(given)} set and {' and '.join(missing)} not; set all three, or none for one process")
    address, num_processes, process = given[EXPLICIT[0]], *(_whole(name, given[name]) for name in EXPLICIT[1:])
    if not re.fullmatch(r".+:\d+", address):
        raise ConfigError(f"{EXPLICIT[0]} is '{address}'; it must be HOST:PORT of process 0")
    if process >= num_processes:
        raise ConfigError(f"{EXPLICIT[2]} is {process}; with {EXPLICIT[1]} {num_processes} it is counted from 0 and below that")
    return Place(address, num_processes, process)


def platform(environment: Mapping[str, str]) -> str:
    """What `jax.distributed` is to ask: JAXLLM_DISTRIBUTED, or the platform whose variables speak of several processes, or ''.

    >>> platform({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3"}), platform({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"})
    ('slurm', '')
    """
    if named := environment.get("JAXLLM_DISTRIBUTED", ""):
        return named
    several = (name for name, size, place in DETECTED if environment.get(size, "1") not in ("", "1") and environment.get(place))
    return next(several, "")


def _whole(name: str, value: str) -> int:
    if not value.isdecimal():
        raise ConfigError(f"{name} is '{value}'; it must be a whole number")
    return int(value)


def _asked(name: str, seconds: int) -> Place | None:
    """What the platform says of this process."""
    if not name:
        return None
    from jax._src import clusters  # its public face, `jax.distributed.initialize`, joins without a roll call

    known = {cluster.name: cluster for cluster in clusters.ClusterEnv._cluster_types if cluster.name and cluster.name != "tpu"}
    if name not in ("auto", *known):
        raise ConfigError(f"JAXLLM_DISTRIBUTED is '{name}'{nearest(name, known) or ';'} it may be auto, {', '.join(known)}")
    found: Any = (None,)
    if name == "auto" or known[name].is_env_present():
        method = None if name == "auto" else name
        found = clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, method, seconds)
    if None in found[:3]:
        raise ConfigError(
            f"JAXLLM_DISTRIBUTED is '{name}', and jax.distributed finds no such platform here; unset it for one process, "
            f"or set {', '.join(EXPLICIT)}"
        )
    return Place(*found)


# ------------------------------------------------------------------------------------------ roll call


def roll_call(place: Place, seconds: float) -> None:
    """Wait until all processes are there: each tells process 0 who it is, on the coordinator's port, and hears that all have come.

    JAX's own start aborts the process when one is missing, without saying which; so this comes before it.

    Raises:
      TimeoutError: who did not come within `seconds`, said on every process that did.
      ConfigError: two processes have the same number.
    """
    deadline = time.monotonic() + seconds
    host, _, port = place.coordinator.rpartition(":")
    verdict = _call(place, int(port), deadline, seconds) if place.process == 0 else _answer(place, host, int(port), deadline, seconds)
    if verdict.startswith("twice"):
        raise ConfigError(verdict.removeprefix("twice "))
    if verdict:
        raise TimeoutError(verdict)


def _call(place: Place, port: int, deadline: float, seconds: float) -> str:
    """Process 0: collect the others, and tell them the verdict ('' when all are there)."""
    there: dict[int, tuple[str, socket.socket]] = {}
    verdict = ""
    with _listen(port) as server, contextlib.ExitStack() as open_connections:
        while not verdict:
            if len(there) == place.num_processes - 1:
                there = _alive(there)
                if len(there) == place.num_processes - 1:
                    break
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                connection, _ = server.accept()
                open_connections.enter_context(connection)
                connection.settimeout(5.0)
                word, text, name = connection.makefile("r").readline().split()
                number = int(text)
                if word != _HELLO:
                    continue  # something else than one of us
            except TimeoutError:
                if time.monotonic() < deadline:
                    continue  # a connection that said nothing
                there = _alive(there)
                missing = sorted({*range(1, place.num_processes)} - set(there))
                came = ", ".join(["0", *(f"{number} ({name})" for number, (name, _) in sorted(there.items())[:8])])
                verdict = f"{_processes(missing)} of {place.num_processes} did not come up within {seconds:g} s; {came} did"
            except (OSError, ValueError):
                continue
            else:
                if number in there and _alive({number: there[number]}):  # else it was started anew
                    hosts = f"{there[number][0]} and {name}"
                    verdict = f"twice process {number} is there twice, on {hosts}; number them from 0 to {place.num_processes - 1}"
                    _tell(connection, verdict)
                else:
                    there[number] = name, connection
        for _, connection in there.values():
            _tell(connection, verdict)
    return verdict


def _tell(connection: socket.socket, verdict: str) -> None:
    with contextlib.suppress(OSError):
        connection.sendall(f"{verdict}\n".encode())


def _alive(there: Mapping[int, tuple[str, socket.socket]]) -> dict[int, tuple[str, socket.socket]]:
    """Those that have not hung up: they wait and say nothing, so that there is nothing to read."""
    alive = {}
    for number, (name, connection) in there.items():
        connection.setblocking(False)
        with contextlib.suppress(OSError):
            try:
                connection.recv(1, socket.MSG_PEEK)
            except BlockingIOError:
                alive[number] = name, connection
        connection.settimeout(5.0)
    return alive


def _listen(port: int) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        raise ConfigError(f"process 0 cannot listen on port {port} ({error.strerror}); name another in {EXPLICIT[0]}") from None


def _answer(place: Place, host: str, port: int, deadline: float, seconds: float) -> str:
    """The others: say who one is, and hear the verdict."""
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host, port), timeout=5.0) as connection:
                connection.sendall(f"{_HELLO} {place.process} {socket.gethostname()}\n".encode())
                connection.settimeout(seconds + 5.0)  # process 0 may have begun to count just now
                with connection.makefile("r") as lines:
                    if line := lines.readline():
                        return line.strip()
        except OSError:
            pass
        time.sleep(0.2)
    return f"process 0 of {place.num_processes} did not come up within {seconds:g} s at {place.coordinator}"


_HELLO = "jaxllm-here"


def _processes(numbers: Sequence[int]) -> str:
    text = ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
    return f"process{'es' if len(numbers) > 1 else ''} {text}"


# -------------------------------------------------------------------------------------- stop together


REPEATED_SECONDS = 30.0
"""Platforms send SIGTERM to a step, to its processes and again when the machine goes down: within this time it is one notice."""
NOTICE_SECONDS = 2.0
"""Between two looks at JAXLLM_PREEMPTION_URL."""


class Signals:
    """SIGTERM and SIGINT as a request to stop after this step; the second one ends the process at once.

    Where a platform started this process (JAXLLM_DISTRIBUTED), SIGTERM again within 30 s is the same request. Ending at once is
    safe: whatever is half-written has no manifest and does not count. Before the first step nothing would be lost, so there the
    first signal ends the process.
    """

    def __init__(self) -> None:
        self.code = 0
        """0, or the exit status to end with: 128 + the signal."""
        self.phase: Literal["starting", "training", "finishing"] = "starting"
        self._since = 0.0
        self._patience_seconds = REPEATED_SECONDS if os.environ.get("JAXLLM_DISTRIBUTED") else 0.0
        self._done = threading.Event()

    def __enter__(self) -> Signals:
        self._old = {s: signal.signal(s, self._on_signal) for s in (signal.SIGTERM, signal.SIGINT)}
        if urls := os.environ.get("JAXLLM_PREEMPTION_URL"):
            threading.Thread(target=watch_notices, args=(urls.split(","), self._done), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.code:
            if number == signal.SIGTERM == self.code - 128 and time.monotonic() - self._since < self._patience_seconds:
                return
            os._exit(128 + number)
        self.code, self._since = 128 + number, time.monotonic()
        second = "a second signal ends at once (the last checkpoint stays whole)"
        message = {
            "starting": "stopped before the first step; nothing is lost",
            "training": f"stopping after this step; {second}",
            "finishing": f"training is done and saved; finishing the last evaluation and the report; {second}",
        }[self.phase]
        os.write(sys.stderr.fileno(), f"\n{message}\n".encode())
        if self.phase == "starting":
            raise SystemExit(self.code)


def watch_notices(urls: Sequence[str], done: threading.Event) -> None:
    """Turn a platform's notice that this machine will be taken away into SIGTERM: what a URL says is TRUE, or begins with TERMINATE."""
    unheard = set(urls)
    while not done.wait(NOTICE_SECONDS):
        for url in urls:
            try:
                request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
                with urllib.request.urlopen(request, timeout=NOTICE_SECONDS) as reply:
                    text = reply.read(100).decode(errors="replace").strip()
            except OSError as error:
                if url in unheard:
                    print(f"note: no notices of pre-emption: {url} cannot be read ({error})", file=sys.stderr, flush=True)
                    unheard.discard(url)
                continue
            if text == "TRUE" or text.startswith("TERMINATE"):
                print(f"notice: this machine will be taken away ({url} says {text})", file=sys.stderr, flush=True)
                os.kill(os.getpid(), signal.SIGTERM)
                return


class Vote:
    """The largest of all processes' numbers, as an array that rides along with the step.

    Every process reads the result of the same vote at the same step, so all take the same decision.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._sharding = NamedSharding(mesh, P(mesh.axis_names))
        self._size = mesh.size
        self._max = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, P()))

    def __call__(self, number: int) -> Any:
        """A scalar to be read later: the maximum over processes."""
        if jax.process_count() == 1:
            return number
        local = np.full((1,), number, np.int32)
        return self._max(jax.make_array_from_callback((self._size,), self._sharding, lambda index: local))


@contextmanager
def fail_together() -> Iterator[None]:
    """If this process fails, tell the others why; if another has failed, end with its message instead of hanging.

    A process that is killed says nothing: the others learn of it from their broken connection, or from its
    missing heartbeat after 30 s.
    """
    if jax.process_count() == 1:
        yield
        return
    from jax._src import distributed  # the public API has no key-value store

    client: Any = distributed.global_state.client
    key, me, done = "jaxllm/failed", jax.process_index(), threading.Event()

    def end_if_told() -> None:
        try:
            message = client.key_value_try_get(key)
        except Exception:  # not set yet
            return
        print(f"jaxllm: ending, because {message}", file=sys.stderr, flush=True)
        _wait_for_the_others(me)
        os._exit(1)

    def watch() -> None:
        while not done.wait(POLL_SECONDS):
            end_if_told()

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    except BaseException as error:
        done.set()
        if not isinstance(error, SystemExit):
            if not isinstance(error, ConfigError):
                end_if_told()  # a broken connection is what follows from the other's end
            client.key_value_set(key, f"process {me} failed: {type(error).__name__}: {error}"[:500], allow_overwrite=True)
            _wait_for_the_others(me)
        raise
    finally:
        done.set()


def _wait_for_the_others(me: int) -> None:
    """The store lives in process 0, and ends with it: leave the others time to read the message."""
    if me == 0:
        time.sleep(3 * POLL_SECONDS)


def leave(status: int) -> None:
    """End a failed process of several at once: the usual way out waits for the others, who are ending too."""
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def check_shared(folder: Path) -> None:
    """Refuse a run directory that is not one and the same on all hosts: process 0 leaves a file there that all must see.

    Raises:
      ConfigError: the processes that do not see it; on every process.
    """
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    first = jax.process_index() == 0
    token = np.frombuffer(os.urandom(8), np.uint8)
    if first:
        (folder / f".shared-{token.tobytes().hex()}").write_text("")
    path = folder / f".shared-{multihost_utils.broadcast_one_to_all(token).astype(np.uint8).tobytes().hex()}"
    deadline = time.monotonic() + SHARED_SECONDS
    while not (seen := path.exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    blind = [number for number, sees in enumerate(multihost_utils.process_allgather(np.int32(seen))) if not sees]
    if first:
        path.unlink()
    if blind:
        raise ConfigError(
            f"the run directory {folder} is not shared: {_processes(blind)} of {jax.process_count()} cannot see what process 0 writes "
            "there; use --run_dir with a path on a disk that all hosts mount, or gs://… or s3://…"
        )


SHARED_SECONDS = 10.0
"""A file on a network disk may take a while to be seen."""


def only_first(say: Any) -> Any:
    """`say` on process 0, silence elsewhere."""
    return say if jax.process_index() == 0 else partial(_silent)


def _silent(*args: Any, **kwargs: Any) -> None:
    pass
