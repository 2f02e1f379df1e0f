"""How fast a step could be: each part of the machine has its work and its rate, and the slowest one binds.

    seconds of a step ≥ max(products / peak, bytes / memory bandwidth, bytes / links, bytes / network)

The maximum is reached if all overlap perfectly; the sum if nothing overlaps. A real step lies between, and above where products
are too small for a chip's peak. Everything here is modelled. Source: arXiv:2204.02311 (MFU, HFU); https://jax-ml.github.io/scaling-book.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from jaxllm.chips import Chip
from jaxllm.flops import utilisation
from jaxllm.plan.links import Collective, Links
from jaxllm.plan.work import Work

SECONDS_PER_DAY = 86_400


@dataclass(frozen=True)
class Roofline:
    """One step on one machine."""

    terms: dict[str, float]
    """Part of the machine -> seconds that it needs: 'compute', 'memory', 'links …', 'network'."""
    num_chips: int
    peak_flops: float
    """Of all chips."""
    tokens_per_step: int
    model_flops: float
    """Of one step, as the paper counts: nothing twice."""
    executed_flops: float
    causal_flops: float | None = None
    """`model_flops` with the keys that a query sees in the place of all T."""

    @property
    def binding(self) -> str:
        """The part that takes longest."""
        return max(self.terms, key=lambda name: self.terms[name])

    @property
    def seconds(self) -> float:
        """Of a step whose parts overlap perfectly."""
        return max(self.terms.values())

    @property
    def serial_seconds(self) -> float:
        """Of a step in which nothing overlaps."""
        return sum(self.terms.values())

    @property
    def tokens_per_second(self) -> float:
        """At most."""
        return self.tokens_per_step / self.seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation, at most. Source: arXiv:2204.02311, Section 4.1."""
        return utilisation(self.model_flops, self.seconds, self.peak_flops)

    @property
    def causal_mfu(self) -> float | None:
        """MFU with attention counted causally: where a kernel skips what is masked, the other one can exceed 1."""
        return None if self.causal_flops is None else utilisation(self.causal_flops, self.seconds, self.peak_flops)

    @property
    def hfu(self) -> float:
        """Hardware FLOPs utilisation, recomputation included, at most."""
        return utilisation(self.executed_flops, self.seconds, self.peak_flops)

    def days(self, num_tokens: float) -> float:
        """Of training on so many tokens, at least."""
        return num_tokens / self.tokens_per_second / SECONDS_PER_DAY

    def chip_hours(self, num_tokens: float) -> float:
        """Of all chips, at least."""
        return self.days(num_tokens) * 24 * self.num_chips


def roofline(
    chip: Chip,
    num_chips: int,
    work: Work,
    collectives: Iterable[Collective],
    links: Links,
    *,
    tokens_per_step: int,
    model_flops: float,
    causal_flops: float | None = None,
) -> Roofline:
    """The seconds that each part of the machine needs for one step.

    Args:
      work: of the whole step on all chips; its `hbm_bytes` are one chip's.
      collectives: of the whole step.
      links: from `links.torus` or `links.switch`.
      model_flops: of the whole step; see `flops.TokenFlops`.
      causal_flops: likewise, attention counted causally.
    """
    terms = {
        "compute": work.flops / (num_chips * chip.peak_flops),
        "memory": work.hbm_bytes / chip.memory_bytes_per_second,
    }
    for collective in collectives:
        for network, seconds in links(collective).items():
            terms[network] = terms.get(network, 0.0) + seconds
    return Roofline(terms, num_chips, num_chips * chip.peak_flops, tokens_per_step, model_flops, work.flops, causal_flops)
