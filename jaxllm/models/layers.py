"""Leaves of the model: norm, projection, feed-forward, rotary positions, dropout, embedding look-up.

Linen modules own parameters and nothing else; every projection goes through the injected `dot`, which
sees the module's whole subtree, so that a hook can keep leaves of its own beside `kernel`.
Letters: B batch, T length, D width, F feed-forward width, N query heads, K key/value heads, H head size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxllm.config import ModelConfig, RopeConfig
from jaxllm.contract import Dot
from jaxllm.sharding import BATCH_AXES, axis_size, constrain, current_mesh


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the trailing `len(shape)` dimensions; statistics in float32.

    rms:   x / sqrt(mean(x²) + eps) · scale
    layer: (x − mean(x)) / sqrt(var(x) + eps) · scale + bias

    Source: arXiv:1607.06450; arXiv:1910.07467 eq. 4.
    """

    config: ModelConfig
    shape: tuple[int, ...]
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalise `x`; the result has its type."""
        axes = tuple(range(-len(self.shape), 0))
        start = nn.initializers.zeros if self.config.norm_plus_one else nn.initializers.ones
        scale = self.param("scale", start, self.shape)
        y = x.astype(jnp.float32)
        if self.config.norm == "layer":
            y = y - y.mean(axes, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(axes, keepdims=True) + self.config.norm_eps)
        y = y * (1.0 + scale if self.config.norm_plus_one else scale)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, self.shape)
        return y.astype(x.dtype)


class Projection(nn.Module):
    """`x @ kernel + bias` as the einsum `spec`, through the injected `dot`."""

    dot: Dot
    site: str
    """Path of this projection inside its layer, e.g. 'attention/q'; what a hook selects by."""
    spec: str
    shape: tuple[int, ...]
    std: float
    bias_shape: tuple[int, ...] | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """The projection, in x's type."""
        self.param("kernel", nn.initializers.normal(self.std), self.shape)
        y = self.dot(self.site, self.spec, x, dict(self.variables["params"]))
        if self.bias_shape is not None:
            y = y + self.param("bias", nn.initializers.zeros, self.bias_shape)
        return y.astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "swiglu": nn.silu,
    "geglu": lambda x: nn.gelu(x, approximate=False),
    "geglu_tanh": lambda x: nn.gelu(x, approximate=True),
    "reglu2": lambda x: jnp.square(nn.relu(x)),
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
    "relu2": lambda x: jnp.square(nn.relu(x)),
}


class FeedForward(nn.Module):
    """gated: (act(x W_gate) ⊙ x W_up) W_down; otherwise act(x W_up) W_down.

    Source: arXiv:2002.05202 eq. 6 (SwiGLU, GeGLU); arXiv:1606.08415 (GELU).
    """

    config: ModelConfig
    dot: Dot

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], tap: Callable[[str, Array], Array]) -> Float[Array, "B T D"]:
        """The feed-forward branch; taps `mlp_hidden`, the input of the down projection."""
        cfg = self.config
        into = (cfg.width, cfg.ff_width)
        bias = (cfg.ff_width,) if cfg.mlp_bias else None
        act = ACTIVATIONS[cfg.activation]
        up = Projection(self.dot, "mlp/up", "BTD,DF->BTF", into, kernel_std(cfg, cfg.width), bias, name="up")(x)
        if cfg.gated:
            gate = Projection(self.dot, "mlp/gate", "BTD,DF->BTF", into, kernel_std(cfg, cfg.width), bias, name="gate")(x)
            hidden = act(gate) * up
        else:
            hidden = act(up)
        hidden = tap("mlp_hidden", constrain(hidden, "B . F"))
        out_bias = (cfg.width,) if cfg.mlp_bias else None
        std = kernel_std(cfg, cfg.ff_width, residual=True)
        return Projection(self.dot, "mlp/down", "BTF,FD->BTD", into[::-1], std, out_bias, name="down")(hidden)


def kernel_std(config: ModelConfig, fan_in: int, *, residual: bool = False) -> float:
    """Standard deviation of a kernel's init: fan_in^-½ (PaLM), or init_std, over √(2L) where it writes to the residual stream.

    Source: PaLM arXiv:2204.02311 section 2; GPT-2 (2019) section 2.3.
    """
    if config.init == "fan_in":
        return fan_in**-0.5
    return config.init_std / math.sqrt(2 * config.num_layers) if residual else config.init_std


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Zero each entry with probability `rate` and divide the rest by 1 − rate; the identity without a key.

    The random bits are a function of the key and the global index only, so they agree on any mesh.
    """
    if rate == 0.0 or key is None:
        return x
    return jnp.where(jax.random.bernoulli(key, 1.0 - rate, x.shape), x / (1.0 - rate), 0.0).astype(x.dtype)


# --------------------------------------------------------------------------------------- positions


def rope_frequencies(rope: RopeConfig, head_size: int) -> tuple[Float[Array, " R"], float]:
    """Radians per position of each rotated plane, and a factor on cos and sin (1 but for yarn).

    Source: arXiv:2104.09864 section 3.2.2; linear arXiv:2306.15595; llama3: Llama 3.1's released code;
    yarn arXiv:2309.00071 section 3.

    >>> rope_frequencies(RopeConfig(), 4)[0].tolist()
    [1.0, 0.009999999776482582]
    """
    rotated = round(head_size * rope.fraction)
    planes = jnp.arange(0, rotated, 2, dtype=jnp.float32)
    base = rope.base * rope.factor ** (rotated / (rotated - 2)) if rope.scaling == "ntk" else rope.base
    freq = base ** (-planes / rotated)
    if rope.scaling == "linear":
        return freq / rope.factor, 1.0
    if rope.scaling == "llama3":
        turns = rope.original_max_length * freq / (2 * math.pi)
        blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        blend = jnp.clip(blend, 0.0, 1.0)
        return (1 - blend) * freq / rope.factor + blend * freq, 1.0
    if rope.scaling == "yarn":

        def plane_that_turns(times: float) -> float:
            return rotated * math.log(rope.original_max_length / (times * 2 * math.pi)) / (2 * math.log(base))

        low = max(math.floor(plane_that_turns(rope.beta_fast)), 0)
        high = min(math.ceil(plane_that_turns(rope.beta_slow)), rotated - 1)
        ramp = jnp.clip((jnp.arange(rotated // 2, dtype=jnp.float32) - low) / max(high - low, 1e-3), 0.0, 1.0)
        factor = 0.1 * math.log(rope.factor) + 1.0 if rope.attention_factor is None else rope.attention_factor
        return (1 - ramp) * freq + ramp * freq / rope.factor, factor
    return freq, 1.0


def rope_tables(rope: RopeConfig, head_size: int, positions: Int[Array, "B T"]) -> tuple[Float[Array, "B T R"], Float[Array, "B T R"]]:
    """cos and sin of position · frequency, float32."""
    freq, factor = rope_frequencies(rope, head_size)
    angle = positions[..., None].astype(jnp.float32) * freq
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def rotate(x: Float[Array, "B T N H"], tables: tuple[Float[Array, "B T R"], Float[Array, "B T R"]]) -> Float[Array, "B T N H"]:
    """Turn the pairs (x[i], x[i + R]) of the first 2R entries of each head; the rest passes through.

    The two halves of a pair are R apart, as in GPT-NeoX and Hugging Face; converters permute the interleaved layout.
    """
    cos, sin = (table[:, :, None, :] for table in tables)
    planes = cos.shape[-1]
    a, b, rest = jnp.split(x.astype(jnp.float32), (planes, 2 * planes), axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1).astype(x.dtype)


def alibi_slopes(num_heads: int) -> Float[Array, " N"]:
    """Slopes 2^(-8n/N), for N not a power of two interleaved from the next one.

    Source: arXiv:2108.12409 section 3, and its released code for other head counts.

    >>> alibi_slopes(2).tolist()
    [0.0625, 0.00390625]
    """
    power = 2 ** math.ceil(math.log2(num_heads))
    slopes = 2.0 ** (-8.0 * jnp.arange(1, power + 1, dtype=jnp.float32) / power)
    return slopes if power == num_heads else jnp.concatenate([slopes[1::2], slopes[::2]])[:num_heads]


# --------------------------------------------------------------------------------------- embedding


def look_up(table: Float[Array, "V D"], tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """`table[tokens]`, on a mesh without ever gathering the table over `model`.

    A plain gather from [V@model, D@data] makes XLA's partitioner replicate the table ("Involuntary full
    rematerialization"). Here each model shard looks up the rows that it holds, and a reduce-scatter over
    `model` both completes the rows and leaves them sharded over D, as block boundaries want them.
    """
    mesh = current_mesh()
    if mesh is None:
        return jnp.take(table, tokens, axis=0)
    (vocab, width), shards = table.shape, axis_size(mesh, "model")
    rows = BATCH_AXES if tokens.shape[0] % axis_size(mesh, BATCH_AXES) == 0 else None
    vocab_axis = "model" if vocab % shards == 0 else None
    width_axis = "data" if width % axis_size(mesh, "data") == 0 else None
    kept = None if rows else width_axis  # rows that do not divide: each data shard looks up its own columns of every row
    scatter = vocab_axis and width // axis_size(mesh, kept) % shards == 0

    def local(table: Array, tokens: Array) -> Array:
        if rows:  # varying over `slice` from here on: the gradient is then reduced over `data` first, and only its shard crosses
            table = jax.lax.pcast(table, "slice", to="varying")
        if width_axis and not kept:
            table = jax.lax.all_gather(table, width_axis, axis=1, tiled=True)
        if not vocab_axis:
            return jnp.take(table, tokens, axis=0)
        index = tokens - jax.lax.axis_index("model") * table.shape[0]
        mine = (index >= 0) & (index < table.shape[0])
        x = jnp.where(mine[..., None], jnp.take(table, jnp.where(mine, index, 0), axis=0), 0.0)
        return jax.lax.psum_scatter(x, "model", scatter_dimension=2, tiled=True) if scatter else jax.lax.psum(x, "model")

    columns = tuple(axis for axis in (kept, "model" if scatter else None) if axis)
    return jax.shard_map(local, in_specs=(P(vocab_axis, width_axis), P(rows, None)), out_specs=P(rows, None, columns or None))(
        table, tokens
    )
