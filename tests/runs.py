"""Start `jaxllm train` in processes of its own, wait for a line, kill it, and compare what it left bit by bit."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
TINY = str(ROOT / "tests" / "tiny.py")


def corpus(folder: Path, *, middle: bytes = b"") -> Path:
    """Real text with no download: paragraphs of the standard library's longest docstrings' modules."""
    import argparse
    import decimal
    import inspect
    import typing

    text = "\n\n".join(inspect.getsource(module) for module in (argparse, typing, decimal))
    half = len(text) // 2
    path = folder / "corpus.txt"
    path.write_bytes(text[:half].encode() + middle + text[half:].encode())
    return path


class Run:
    """One `jaxllm` process whose output is read as it comes."""

    def __init__(self, *arguments: str, text: Path, devices: int = 1, env: dict[str, str] | None = None, preexec: Any = None) -> None:
        environment = os.environ | {
            "JAXLLM_TEST_TEXT": str(text),
            "JAXLLM_CACHE": str(text.parent / "cache"),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "PYTHONPATH": str(ROOT),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jaxllm.cli", *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment | (env or {}), cwd=text.parent, preexec_fn=preexec,
        )  # fmt: skip
        self.lines: list[str] = []
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._news:
                self.lines.append(line.rstrip("\n"))
                self._news.notify_all()
        with self._news:
            self._news.notify_all()

    @property
    def output(self) -> str:
        """Everything printed so far."""
        return "\n".join(self.lines)

    def wait_for(self, pattern: str, seconds: float = 240) -> str:
        """The first line that contains `pattern`; fails when the process ends or the time is up before it."""
        deadline, seen = time.monotonic() + seconds, 0
        while True:
            with self._news:
                while seen < len(self.lines):
                    if re.search(pattern, self.lines[seen]):
                        return self.lines[seen]
                    seen += 1
                assert self._reader.is_alive(), f"the process ended without '{pattern}':\n{self.output}"
                assert time.monotonic() < deadline, f"no '{pattern}' in {seconds} s:\n{self.output}"
                self._news.wait(1.0)

    def kill(self, number: int) -> None:
        """Send a signal, as somebody outside would."""
        self.process.send_signal(number)

    def finish(self, seconds: float = 300) -> int:
        """Wait for the end; the exit status."""
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"still running after {seconds} s:\n{self.output}") from None
        self._reader.join(10)
        return status


def train(*arguments: str, text: Path, status: int = 0, **options: Any) -> str:
    """Run to the end and check the exit status; the output."""
    run = Run("train", TINY, *arguments, text=text, **options)
    got = run.finish()
    assert got == status, f"exit status {got}, expected {status}:\n{run.output}"
    return run.output


def train_until(pattern: str, number: int, *arguments: str, text: Path, **options: Any) -> tuple[int, str]:
    """Run until a line matches, send a signal, and wait: (exit status, output)."""
    run = Run("train", TINY, *arguments, text=text, **options)
    run.wait_for(pattern)
    run.kill(number)
    return run.finish(), run.output


def digest(run_dir: Path) -> tuple[int, dict[str, str]]:
    """(step, hash of every leaf) of the newest checkpoint: params, optimizer, loss state, average and key.

    Read with Orbax directly, as NumPy arrays, not by the code under test.
    """
    import jax
    import orbax.checkpoint as ocp

    folder = max(p for p in (run_dir / "checkpoints").iterdir() if p.name.isdigit())
    arrays = (folder / "arrays").absolute()
    with ocp.PyTreeCheckpointer() as reader:
        names = reader.metadata(arrays).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), names)
        restored = reader.restore(arrays, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    leaves: dict[str, str] = {}

    def walk(node: Any, path: str) -> None:
        if isinstance(node, dict):
            for key in sorted(node):
                walk(node[key], f"{path}/{key}")
        else:
            leaves[path] = hashlib.sha256(np.ascontiguousarray(np.asarray(node)).tobytes()).hexdigest()

    walk(restored, "")
    assert len(leaves) > 20, "a state of so few leaves is not the whole state"
    return int(folder.name), leaves


def losses(run_dir: Path) -> dict[int, tuple[float, float]]:
    """step -> (loss, gradient norm), exactly as written."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [r["step"] for r in records if r["kind"] == "train"]
    assert len(steps) == len(set(steps)), "a step is recorded twice"
    return {r["step"]: (r["loss"], r["grad_norm"]) for r in records if r["kind"] == "train"}


SIGKILL, SIGTERM, SIGINT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
