"""What a forward pass costs in joules by the price of each operation, and the law that loss follows in the number of parameters.

A product of [m, n] and [n, p] takes m·n·p multiplications and m·(n-1)·p additions. With sign or ternary weights it takes additions
of integers, and m·p + m·n multiplications for the scales. Products of attention (q·k and the weighted sum) stay in 16 bits.

    energy(model, bits=1).joules      # of 512 tokens at 7 nm

The paper's table 2 and figure 1 come out of this with GPT's shapes (four square kernels for attention, a feed-forward width of 4 D,
embeddings and head left out): every cell within 0.01 J (tests/test_bitnet_packed.py). The paper prints no recipe; this one is ours.

Source: arXiv:2310.11453 section 2.5 (equations 13 to 16), tables 1 and 2; prices: Horowitz 2014 at 45 nm, arXiv:2106.12169 at 7 nm
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import scipy.optimize

from jaxllm.config import ConfigError, ModelConfig

type Process = Literal["45nm", "7nm"]

PICOJOULES: dict[Process, dict[int, tuple[float, float]]] = {
    "45nm": {32: (0.9, 3.7), 16: (0.4, 1.1), 8: (0.03, 0.2)},
    "7nm": {32: (0.38, 1.31), 16: (0.16, 0.34), 8: (0.007, 0.07)},
}
"""Process -> bits of the operands (8: integers) -> (an addition, a multiplication)."""


class Energy(NamedTuple):
    """Joules of a forward pass."""

    add: float
    multiply: float

    @property
    def joules(self) -> float:
        """Both."""
        return self.add + self.multiply


def energy(model: ModelConfig, *, bits: Literal[1, 16, 32], num_tokens: int = 512, process: Process = "7nm") -> Energy:
    """Energy of the products of one forward pass over a row of `num_tokens`, embeddings and head left out.

    Args:
      bits: of the weights; 1 stands for BitNet, ternary weights too: additions of 8-bit integers.
    """
    c, T = model, num_tokens
    heads, kv_heads = c.num_heads * c.head_size, c.num_kv_heads * c.head_size
    into_ff = [(c.width, c.ff_width)] * (2 if c.gated else 1)
    kernels = [(c.width, heads), (c.width, kv_heads), (c.width, kv_heads), (heads, c.width), *into_ff, (c.ff_width, c.width)]
    float_bits = 32 if bits == 32 else 16
    total = np.zeros(2)  # additions, multiplications
    for inputs, outputs in kernels:
        additions = T * (inputs - 1) * outputs
        if bits == 1:
            total += additions * PICOJOULES[process][8][0], (T * inputs + T * outputs) * PICOJOULES[process][16][1]
        else:
            total += np.array([additions, T * inputs * outputs]) * PICOJOULES[process][float_bits]
    total += np.array([2 * T * T * heads] * 2) * PICOJOULES[process][float_bits]
    add, multiply = total * c.num_layers * 1e-12
    return Energy(float(add), float(multiply))


class ScalingLaw(NamedTuple):
    """L(N) = a·N^b + c: the loss of a model with N parameters; c is what no size takes away."""

    a: float
    b: float
    c: float

    def loss(self, num_params: float) -> float:
        """The law's value.

        >>> ScalingLaw(2.0, -0.5, 1.0).loss(4.0)
        2.0
        """
        return self.a * num_params**self.b + self.c


def fit_scaling(sizes: Sequence[float], losses: Sequence[float]) -> ScalingLaw:
    """The least-squares L(N) = a·N^b + c with a > 0, b < 0 and c ≥ 0 through losses of models of those sizes.

    For a given b the best a and c follow by linear (non-negative) least squares, so only b is searched.

    Raises:
      ConfigError: unequal numbers of sizes and losses, fewer than four sizes (three would fit any curve), or losses that do not fall.

    Source: arXiv:2310.11453 section 3.2
    """
    n, loss = np.asarray(sizes, np.float64), np.asarray(losses, np.float64)
    if n.shape != loss.shape or n.ndim != 1:
        raise ConfigError(f"a scaling law needs one loss for each size; given {n.size} sizes and {loss.size} losses")
    if np.unique(n).size < 4 or (n <= 0).any() or not np.isfinite(loss).all():
        raise ConfigError(f"a scaling law has three constants and needs at least four positive sizes with finite losses; given {sizes}")
    middle = np.exp(np.log(n).mean())  # of the sizes: N^b spans hundreds of orders of magnitude otherwise

    def best(b: float) -> tuple[float, np.ndarray]:
        constants, residual = scipy.optimize.nnls(np.stack([(n / middle) ** b, np.ones_like(n)], 1), loss)
        return residual, constants

    grid = -np.geomspace(1e-3, 8.0, 200)
    start = int(np.argmin([best(b)[0] for b in grid]))
    around = sorted((grid[max(start - 1, 0)], grid[min(start + 1, grid.size - 1)]))
    b = float(scipy.optimize.minimize_scalar(lambda b: best(b)[0], bounds=around, method="bounded", options={"xatol": 1e-12}).x)
    a, c = best(b)[1]
    if a <= 0:
        raise ConfigError(f"the losses do not fall with size, so no law a·N^b + c with b < 0 fits: {list(zip(sizes, losses, strict=True))}")
    return ScalingLaw(float(a / middle**b), b, float(c))
