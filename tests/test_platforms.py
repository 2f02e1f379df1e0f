"""Compiler flags by platform: the user's own win, and the installed compiler knows every name."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from jaxllm import platforms
from jaxllm.platforms import FLAGS, VARIABLE, apply, environment, expected, installed


def test_a_flag_that_the_user_set_stays():
    mine = "--xla_gpu_enable_pipelined_all_gather=false --xla_dump_to=/somewhere"
    words = environment("gpu", {"XLA_FLAGS": mine})["XLA_FLAGS"].split()
    assert words[:2] == mine.split()
    assert len(words) == len({w.partition("=")[0] for w in words}) == len(FLAGS["gpu"]) + 1
    assert environment("gpu", {"XLA_FLAGS": " ".join(words)}) == {}, "nothing left to set"


def test_every_flag_has_a_reason_and_every_platform_a_variable():
    assert FLAGS.keys() == VARIABLE.keys()
    for flags in FLAGS.values():
        assert len({f.name for f in flags}) == len(flags) and all(f.reason for f in flags)


def test_the_platform_is_told_without_starting_it():
    assert expected({"JAX_PLATFORMS": "cuda"}, {"tpu": True}) == "gpu"
    assert expected({}, {"gpu": True, "tpu": False}) == "gpu"
    assert expected({}, {}) == "cpu"


def test_what_is_applied_is_what_the_platform_needs_after_the_users_own(monkeypatch: pytest.MonkeyPatch):
    variables = {"JAX_PLATFORMS": "cuda,cpu", "XLA_FLAGS": "--xla_dump_to=/somewhere", "HOME": "/home"}
    apply(variables)
    assert variables["XLA_FLAGS"].split()[0] == "--xla_dump_to=/somewhere"
    assert len(variables["XLA_FLAGS"].split()) == 1 + len(FLAGS["gpu"])
    again = dict(variables)
    apply(again)
    assert again == variables, "a process that this one starts has each flag once"
    for untouched in ({"JAX_PLATFORMS": "cpu"}, {"JAX_PLATFORMS": "tpu"}, {"JAX_PLATFORMS": "METAL"}):
        apply(after := dict(untouched))
        assert after == untouched
    monkeypatch.setattr(platforms, "installed", lambda: {"gpu": True, "tpu": False})
    apply(found := {})
    assert len(found["XLA_FLAGS"].split()) == len(FLAGS["gpu"])


def test_a_users_file_of_flags_is_left_alone():
    assert environment("gpu", {"XLA_FLAGS": "/etc/xla_flags"}) == {}


def test_devices_are_looked_for_in_files():
    assert installed().keys() == {"gpu", "tpu"}


@pytest.mark.parametrize("known", [True, False])
def test_the_installed_compiler_knows_the_gpu_flags_set_after_importing_jax(known: bool):
    """XLA ends a process that names a flag it does not know; the CPU's compiler reads the GPU's flags too."""
    flags = environment("gpu", {})["XLA_FLAGS"] + ("" if known else " --xla_gpu_enable_latency_hiding_schedulers=true")
    run = subprocess.run(
        [sys.executable, "-c", "import jax, os, sys; os.environ['XLA_FLAGS'] = sys.argv[1]; jax.devices()", flags],
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (run.returncode == 0) == known, run.stderr[-500:]
