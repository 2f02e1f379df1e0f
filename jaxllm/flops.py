"""The work of a trained token, and the share of a machine's peak that it uses."""

from __future__ import annotations

import time

from jaxllm.config import ModelConfig


def utilisation(flops: float, seconds: float, peak_flops: float) -> float:
    """FLOPs done in `seconds` / what `peak_flops` allows in that time.

    MFU of the model's own work, HFU of all that is executed. Padding is not a token. Source: arXiv:2204.02311, Section 4.1.
    """
    return flops / seconds / peak_flops


def model_flops_per_token(
    model: ModelConfig, num_params: float, sequence_length: int, *, num_frozen: float = 0, causal: bool = False
) -> float:
    """6 · num_params − 2 · num_frozen + 12 · N·H · Σ_layers keys per query: the work of one trained token, nothing twice.

    That is 2 forward, 2 for the activations' gradients, and 2 for the gradients of the parameters that train.

    Args:
      num_params: parameters that a token passes through, embedding tables too, as in the paper.
      sequence_length: T. 0 leaves attention out.
      num_frozen: those of them without a gradient of their own, as the base under adapters.
      causal: count the keys that a query sees (half of T, less under a window) and not all T, which is PaLM's way.

    Source: arXiv:2204.02311, Appendix B.
    """
    keys = [visible_keys(sequence_length, model.kind(layer).window) if causal else sequence_length for layer in range(model.num_layers)]
    return 6 * num_params - 2 * num_frozen + 12 * model.num_heads * model.head_size * sum(keys)


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
