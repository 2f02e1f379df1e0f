"""Compiler flags by platform, each with its reason; set before JAX starts a backend, which reads them once.

A flag is listed only where it changes the compiled program: an unknown name aborts the process, so each one is also a risk with the
next release. On TPU the list is empty, because what overlaps collectives with work is on by default. Tried on libtpu 0.0.52 (weights
on `data`, scan over layers, full remat): setting `xla_tpu_enable_async_collective_fusion` and its `_fuse_all_gather`,
`_fuse_all_reduce`, `_multiple_steps` (v5e:4x4), `xla_tpu_overlap_compute_collective_tc` with `xla_enable_async_all_gather`, or
`xla_tpu_enable_data_parallel_all_reduce_opt` with `xla_tpu_data_parallel_opt_different_sized_ops` (v5e:2x2) to true gives a program
of the same length with the same collectives; the first one set to false does not. `xla_tpu_enable_ici_ag_pipelining` with
`xla_should_allow_loop_variant_parameter_in_chain` and `xla_should_add_loop_invariant_op_in_chain` (openxla.org/xla/flags_guidance)
does change it: gathers for the next layer begin in this one, 14 instead of 8 of them in the text. It holds a second layer's gathered
weights in memory and has not been timed, so it is left to whoever has a TPU.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import NamedTuple


class Flag(NamedTuple):
    """One flag of the compiler."""

    name: str
    value: str
    reason: str


FLAGS: dict[str, tuple[Flag, ...]] = {
    "cpu": (),
    "gpu": (
        Flag("xla_gpu_enable_latency_hiding_scheduler", "true", "starts a collective as early, and waits for it as late, as data allow"),
        Flag("xla_gpu_enable_pipelined_all_gather", "true", "gathers the next layer's weights while the scan is in this one"),
        Flag("xla_gpu_enable_pipelined_reduce_scatter", "true", "scatters the last layer's gradients while the scan is in this one"),
        Flag("xla_gpu_enable_pipelined_all_reduce", "true", "the same for what is summed over `slice` or `model`"),
        Flag("xla_gpu_enable_while_loop_double_buffering", "true", "pipelined gathers need a second buffer, or each step copies the first"),
        Flag("xla_gpu_enable_highest_priority_async_stream", "true", "a collective that is ready does not wait behind compute kernels"),
    ),
    "tpu": (),
}
"""Platform -> flags. Source: docs.jax.dev, "GPU performance tips"; jaxlib 0.12.0 knows each name (an unknown one aborts the process).
Their effect on speed has not been measured: no GPU has been had for it."""

VARIABLE = {"gpu": "XLA_FLAGS", "tpu": "LIBTPU_INIT_ARGS", "cpu": "XLA_FLAGS"}
"""Platform -> the environment variable that carries its flags."""


def environment(platform: str, variables: Mapping[str, str]) -> dict[str, str]:
    """The environment variables to set for `platform`, given those that are: the user's words come first, and stay as they are.

    >>> environment('cpu', {'XLA_FLAGS': '--xla_force_host_platform_device_count=8'})
    {}
    >>> given = {'XLA_FLAGS': '--xla_gpu_enable_latency_hiding_scheduler=false'}
    >>> environment('gpu', given)['XLA_FLAGS'].split()[:2]
    ['--xla_gpu_enable_latency_hiding_scheduler=false', '--xla_gpu_enable_pipelined_all_gather=true']
    """
    name = VARIABLE.get(platform, "")
    before = variables.get(name, "").split()
    if not FLAGS.get(platform) or (before and not before[0].startswith("-")):  # XLA_FLAGS may name a file of flags: the user's alone
        return {}
    taken = {word.lstrip("-").partition("=")[0] for word in before}
    more = [f"--{flag.name}={flag.value}" for flag in FLAGS[platform] if flag.name not in taken]
    return {name: " ".join([*before, *more])} if more else {}


def expected(variables: Mapping[str, str], installed: Mapping[str, bool]) -> str:
    """The platform that JAX will start on, told without starting it: JAX_PLATFORMS' first name, else the plugin that is there.

    Args:
      installed: whether 'gpu' and 'tpu' have devices here, as files show (`/dev/nvidia0`, `/dev/accel0`, `/dev/vfio/0`).

    >>> expected({'JAX_PLATFORMS': 'cuda,cpu'}, {}), expected({}, {'tpu': True}), expected({'JAX_PLATFORMS': 'cpu'}, {'gpu': True})
    ('gpu', 'tpu', 'cpu')
    """
    asked = variables.get("JAX_PLATFORMS", "").split(",")[0]
    if asked:
        return {"cuda": "gpu", "rocm": "gpu"}.get(asked, asked)
    return next((platform for platform in ("tpu", "gpu") if installed.get(platform)), "cpu")


def installed() -> dict[str, bool]:
    """For `expected`: whether 'gpu' and 'tpu' have device files here, and a TPU its driver (a virtual machine has /dev/vfio too)."""
    files = {"gpu": ("nvidia[0-9]*", "kfd"), "tpu": ("accel[0-9]*", "vfio/[0-9]*")}
    here = {platform: any(any(Path("/dev").glob(pattern)) for pattern in patterns) for platform, patterns in files.items()}
    return {**here, "tpu": here["tpu"] and importlib.util.find_spec("libtpu") is not None}


def apply(variables: MutableMapping[str, str]) -> None:
    """Put the flags of the platform that JAX will start on into `variables`, usually `os.environ`.

    Called before JAX starts a backend, which reads them once; importing JAX does not start one. Calling it again changes nothing, so
    a process started from this one has each flag once.
    """
    variables.update(environment(expected(variables, installed()), variables))
