"""What a batch would take, before anything of it is allocated."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import jax

from jaxllm.config import ConfigError
from jaxllm.contract import LM


def check_cache(lm: LM, num_rows: int, num_slots: int, mesh: Any, *, beams: bool = False) -> None:
    """Refuse rows whose cache alone is more than the memory that is free.

    Args:
      beams: the cache is there twice, as the rows of one step are parents of the next one's in any order.

    Raises:
      ConfigError: it is; says how much, and what makes it less.
    """
    needed = cache_bytes(lm, num_rows, num_slots) * (2 if beams else 1)
    check_memory(needed, mesh, f"{num_rows:,} rows of {num_slots:,} tokens need a cache", "ask for fewer tokens, samples or rows at once")


def check_memory(needed: int, mesh: Any, what: str, remedy: str) -> None:
    """Refuse `what` where it needs more bytes than are free."""
    free = free_bytes(mesh)
    if free is not None and needed > free:
        raise ConfigError(f"{what} of {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free; {remedy}")


def cache_bytes(lm: LM, num_rows: int, num_slots: int) -> int:
    """Of the cache, all devices together: it is allocated in thought only.

    It grows with rows and slots in proportion once windows are full, so sizes that no array has are reckoned from smaller ones.
    """
    most = 1 << 24  # of slots; past int32 JAX itself would stumble
    slots, rest = min(num_slots, most), max(1.0, num_slots / most)
    one = jax.eval_shape(lambda: jax.tree.leaves(lm.init_cache(1, slots)))
    return math.ceil(sum(leaf.size * leaf.dtype.itemsize for leaf in one) * num_rows * rest)


def free_bytes(mesh: Any) -> int | None:
    """Memory that is free on this process's devices of the mesh, scaled to all of it; None where the system does not say."""
    ours = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    if ours[0].platform == "cpu":
        free = _host_bytes()
    else:
        stats = [device.memory_stats() or {} for device in ours]
        known = all("bytes_limit" in one for one in stats)
        free = sum(one["bytes_limit"] - one.get("bytes_in_use", 0) for one in stats) if known else None
    return None if free is None else free * mesh.devices.size // len(ours)


def _host_bytes() -> int | None:
    """What the system could still give to a process."""
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:  # not Linux
        return None
    return None if found is None else int(found[1]) * 1024
