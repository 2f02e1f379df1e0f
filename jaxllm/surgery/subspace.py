"""What a low-rank change does to a matrix: overlap of subspaces, and how much it amplifies directions that are there already.

Host side, float64. Kernels are [in out], so a paper's right-singular vectors (of A in x·Aᵀ) are our left ones.

Source: arXiv:2106.09685 sections 7.2 and 7.3, appendix G (whose identity is misprinted: φ = 1 − d²/min(i, j)).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float


def similarity(a: Float[np.ndarray, "D R"], b: Float[np.ndarray, "D S"], i: int, j: int) -> float:
    """φ = ‖Uᵢᵀ Vⱼ‖² / min(i, j) of the spaces that the first i and j singular directions span: 1 for one inside the other, 0 for none.

    >>> e = np.eye(4)
    >>> similarity(e[:, :2], e[:, :2], 2, 2), similarity(e[:, :2], e[:, 2:], 2, 2)
    (1.0, 0.0)
    """
    return float(similarities(a, b)[i - 1, j - 1])


def similarities(a: Float[np.ndarray, "D R"], b: Float[np.ndarray, "D S"]) -> Float[np.ndarray, "R S"]:
    """φ for every i up to R and j up to S."""
    u, v = (np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)[0] for x in (a, b))
    overlaps = np.square(u.T @ v).cumsum(0).cumsum(1)
    sizes = np.minimum(np.arange(1, overlaps.shape[0] + 1)[:, None], np.arange(1, overlaps.shape[1] + 1)[None])
    return overlaps / sizes


class Amplification(NamedTuple):
    """Frobenius norms of section 7.3."""

    change: float
    """‖ΔW‖."""
    seen: float
    """‖Uᵀ W V‖: of the kernel within the change's own r directions."""
    own: float
    """The same within the kernel's own r first directions."""
    random: float
    """And within r random ones."""

    @property
    def factor(self) -> float:
        """How much larger the change is than what the kernel had there."""
        return self.change / self.seen


def amplification(kernel: Float[np.ndarray, "D E"], change: Float[np.ndarray, "D E"], rank: int, seed: int = 0) -> Amplification:
    """Norms of a change of `rank` and of the kernel seen through three pairs of `rank` directions."""
    kernel, change = np.asarray(kernel, np.float64), np.asarray(change, np.float64)
    rng = np.random.default_rng(seed)
    random = [np.linalg.qr(rng.normal(size=(size, rank)))[0] for size in kernel.shape]
    seen, own, drawn = (float(np.linalg.norm(u.T @ kernel @ v)) for u, v in (_directions(change, rank), _directions(kernel, rank), random))
    return Amplification(float(np.linalg.norm(change)), seen, own, drawn)


def _directions(matrix: np.ndarray, rank: int) -> Sequence[np.ndarray]:
    u, _, vt = np.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank], vt[:rank].T
