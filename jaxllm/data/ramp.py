"""The batch ramp: batch id -> size and first row, by cumulative sums."""

from __future__ import annotations

from bisect import bisect_right

import numpy as np

from jaxllm.config import ConfigError, DataConfig


class Ramp:
    """`batch_ramp` phases of (steps, size), then `batch_size` for ever.

    >>> ramp = Ramp(DataConfig(batch_ramp=((3, 2),), batch_size=4))
    >>> [(ramp.batch_size(i), ramp.first_row(i)) for i in range(5)]
    [(2, 0), (2, 2), (2, 4), (4, 6), (4, 10)]
    """

    def __init__(self, config: DataConfig) -> None:
        for steps, size in config.batch_ramp:
            if steps < 1 or size < 1:
                raise ConfigError(f"data.batch_ramp has a phase of {steps} steps of {size} rows; both must be at least 1")
        sizes = [size for _, size in config.batch_ramp]
        self._sizes = [*sizes, config.batch_size]
        self._ends = np.cumsum([0, *(steps for steps, _ in config.batch_ramp)], dtype=np.int64).tolist()
        self._rows = np.cumsum([0, *(steps * size for steps, size in config.batch_ramp)], dtype=np.int64).tolist()

    @property
    def sizes(self) -> set[int]:
        """Every size that occurs."""
        return set(self._sizes)

    def batch_size(self, batch_id: int) -> int:
        """Rows of this batch."""
        return self._sizes[bisect_right(self._ends, batch_id) - 1]

    def first_row(self, batch_id: int) -> int:
        """Rows of all batches before this one."""
        phase = bisect_right(self._ends, batch_id) - 1
        return self._rows[phase] + (batch_id - self._ends[phase]) * self._sizes[phase]
