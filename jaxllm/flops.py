"""The work of a trained token, and the share of a machine's peak that it uses."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from jaxllm.config import ModelConfig

type Part = Literal["input", "projections", "attention", "everything"]
"""Of a layer's activations: its input, the outputs of its projections, that of attention before `o`; all that its backward pass reads."""


@dataclass(frozen=True)
class Remat:
    """What a remat policy keeps of a layer for the backward pass, and where; what is in neither is computed again."""

    on_device: tuple[Part, ...] = ()
    on_host: tuple[Part, ...] = ()

    def keeps(self, part: Part) -> bool:
        """Whether the backward pass finds it, wherever it lies."""
        return not {part, "everything"}.isdisjoint(self.on_device + self.on_host)


REMAT: Mapping[str, Remat] = {
    "none": Remat(("everything",)),
    "minimal": Remat(("input", "projections", "attention")),
    "dots": Remat(("input", "projections")),
    "full": Remat(("input",)),
    "offload": Remat(("input",), on_host=("projections",)),
    "offload_inputs": Remat(on_host=("input",)),
}
"""`TrainConfig.remat` -> what `models.stack.REMAT` makes of it."""


def utilisation(flops: float, seconds: float, peak_flops: float) -> float:
    """FLOPs done in `seconds` / what `peak_flops` allows in that time.

    MFU of the model's own work, HFU of all that is executed. Padding is not a token. Source: arXiv:2204.02311, Section 4.1.
    """
    return flops / seconds / peak_flops


@dataclass(frozen=True)
class TokenFlops:
    """The work of one trained token, by what it is for."""

    forward: float
    backward: float
    recomputed: float
    """Of the forward pass, in the backward pass."""
    others: float
    """Of models besides the student."""

    @property
    def model(self) -> float:
        """What MFU speaks of: nothing twice."""
        return self.forward + self.backward + self.others

    @property
    def executed(self) -> float:
        """What HFU speaks of."""
        return self.model + self.recomputed


def of_token(
    model: ModelConfig,
    num_params: float,
    sequence_length: int,
    *,
    num_frozen: float = 0,
    others: float = 0.0,
    remat: str = "none",
    causal: bool = False,
) -> TokenFlops:
    """forward 2 · num_params + 2p, backward 4 · num_params − 2 · num_frozen + 4p, with p = 2 · N·H · Σ_layers keys per query.

    Backward is 2 for the activations' gradients, and 2 for the gradients of the parameters that train; p is one product of attention.
    Recomputed, as far as the policy does not keep it: p for q·kᵀ and p for the weighted sum; 2 for each weight of a layer, but for those
    whose product nobody reads again (`down`, and `o` in a parallel block).

    Args:
      num_params: parameters that a token passes through, embedding tables too, as in the paper.
      sequence_length: T. 0 leaves attention out.
      num_frozen: those of them without a gradient of their own, as the base under adapters.
      others: `Experiment.other_flops_per_token`.
      remat: a key of `REMAT`.
      causal: count the keys that a query sees (half of T, less under a window) and not all T, which is PaLM's way.

    Source: arXiv:2204.02311, Appendix B.
    """
    keys = [visible_keys(sequence_length, model.kind(layer).window) if causal else sequence_length for layer in range(model.num_layers)]
    heads, kept = model.num_heads * model.head_size, REMAT[remat]
    product = 2 * heads * sum(keys)
    unread = model.ff_width * model.width + (heads * model.width if model.block == "parallel" else 0)
    projections = 2 * model.num_layers * (layer_params(model) - unread)
    recomputed = (
        product * (not kept.keeps("everything")) + product * (not kept.keeps("attention")) + projections * (not kept.keeps("projections"))
    )
    return TokenFlops(2 * num_params + 2 * product, 4 * num_params - 2 * num_frozen + 4 * product, recomputed, others)


def layer_params(model: ModelConfig) -> int:
    """Kernels of one layer."""
    attention = 2 * (model.num_heads + model.num_kv_heads) * model.head_size * model.width
    return attention + (3 if model.gated else 2) * model.width * model.ff_width


def visible_keys(sequence_length: int, window: int | None = None) -> float:
    """Keys that a query of a causal row sees, on average over the row.

    >>> visible_keys(4), visible_keys(4, window=2)
    (2.5, 1.75)
    """
    width = sequence_length if window is None else min(window, sequence_length)
    return width - width * (width - 1) / (2 * sequence_length) if sequence_length else 0.0


def measured_peak(dtype: str = "float32", size: int = 2048, max_seconds: float = 0.5) -> float:
    """FLOP/s of the fastest `size`³ matmul of `dtype` operands with float32 accumulation that the default device does now.

    For machines without a published peak. One call takes the compilation, a warm-up, and at least two and at most ten matmuls,
    stopping after `max_seconds`. On CPU all fake devices share this one peak. An accelerator needs `size` 8192 to get busy.
    """
    import jax
    import jax.numpy as jnp

    matmul = jax.jit(lambda x: jnp.dot(x, x, preferred_element_type=jnp.float32))
    x = jnp.full((size, size), 0.5, dtype)
    matmul(x).block_until_ready()
    laps: list[float] = []
    while len(laps) < 2 or (len(laps) < 10 and sum(laps) < max_seconds):
        start = time.perf_counter()
        matmul(x).block_until_ready()
        laps.append(time.perf_counter() - start)
    return 2 * size**3 / min(laps)
