"""The decoder again, in NumPy float64 and naive: written from the formulas that the config's fields document, with loops.

`ref_hidden` is the whole of it. `BASE` is a small model to vary and `random_params` its weights, no scale 1 and no bias 0.
"""

from __future__ import annotations

import math
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxllm import tree
from jaxllm.config import ModelConfig, RopeConfig
from jaxllm.models.transformer import decoder

BASE = ModelConfig(num_layers=3, width=12, num_heads=4, num_kv_heads=2, head_size=4, ff_width=20, vocab_size=19, max_length=16)
BIASES: dict[str, Any] = {"qkv_bias": True, "attention_out_bias": True, "mlp_bias": True}
GPT: dict[str, Any] = {**BIASES, "norm": "layer", "norm_bias": True, "activation": "gelu_tanh", "position": "learned", "num_kv_heads": 4}


@cache
def random_params(config: ModelConfig) -> Any:
    """Every leaf random, so that no scale is 1 and no bias 0."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(decoder(config).init, jax.random.key(0))
    return tree.map_with_path(lambda path, leaf: rng.normal(0.4 if "norm" in path else 0, 0.4, leaf.shape).astype(np.float32), shapes)


class Extras(NamedTuple):
    """What one row may have besides its tokens."""

    prefix_mask: np.ndarray | None = None  # [T]
    bias: np.ndarray | None = None  # [N T T]
    prefix: tuple[np.ndarray, np.ndarray] | None = None  # [L P K H] each
    memory: np.ndarray | None = None  # [S M]
    memory_segments: np.ndarray | None = None  # [S]


def ref_norm(c: ModelConfig, leaves: dict, x: np.ndarray, num_dims: int = 1, bias: bool = False) -> np.ndarray:
    dims = tuple(range(-num_dims, 0))
    if c.norm == "layer":
        x = x - x.mean(dims, keepdims=True)
    x = x / np.sqrt((x**2).mean(dims, keepdims=True) + c.norm_eps)
    x = x * (1 + leaves["scale"] if c.norm_plus_one else leaves["scale"])
    return x + leaves["bias"] if bias else x


def ref_frequencies(rope: RopeConfig, H: int) -> tuple[list[float], float]:
    """Radians per position of plane i, and the factor on cos and sin, one plane at a time."""
    n, out = round(H * rope.fraction), []
    amplitude = 1.0
    if rope.scaling == "yarn":
        amplitude = rope.attention_factor if rope.attention_factor is not None else 0.1 * math.log(rope.factor) + 1

    def plane(turns: float) -> float:  # the (fractional) plane that turns so often over the original context
        return n * math.log(rope.original_max_length / (2 * math.pi * turns)) / (2 * math.log(rope.base))

    for i in range(n // 2):
        base = rope.base * rope.factor ** (n / (n - 2)) if rope.scaling == "ntk" else rope.base
        f = base ** (-2 * i / n)
        if rope.scaling == "linear":
            f /= rope.factor
        elif rope.scaling == "llama3":
            wavelength = 2 * math.pi / f
            if wavelength > rope.original_max_length / rope.low_freq_factor:
                f /= rope.factor
            elif wavelength >= rope.original_max_length / rope.high_freq_factor:
                s = (rope.original_max_length / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
                f = (1 - s) * f / rope.factor + s * f
        elif rope.scaling == "yarn":
            low, high = max(math.floor(plane(rope.beta_fast)), 0), min(math.ceil(plane(rope.beta_slow)), n - 1)
            share = min(max((i - low) / max(high - low, 1e-3), 0), 1)
            f = (1 - share) * f + share * f / rope.factor
        out.append(f)
    return out, amplitude


def ref_rotate(rope: RopeConfig, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """x [T N H]: the pair (x[i], x[i + R]) as a complex number times e^(i · position · frequency)."""
    freq, amplitude = ref_frequencies(rope, x.shape[-1])
    R = len(freq)
    turn = amplitude * np.exp(1j * np.outer(positions, freq))[:, None]
    z = (x[..., :R] + 1j * x[..., R : 2 * R]) * turn
    return np.concatenate([z.real, z.imag, x[..., 2 * R :]], -1)


def ref_slopes(N: int) -> list[float]:
    if N & (N - 1) == 0:
        return [2 ** (-8 * (n + 1) / N) for n in range(N)]
    below = 2 ** (N.bit_length() - 1)
    return ref_slopes(below) + ref_slopes(2 * below)[::2][: N - below]


def ref_softmax(scores: np.ndarray) -> np.ndarray:
    e = np.exp(scores - scores.max())
    return e / e.sum()


def ref_attention(
    c: ModelConfig, p: dict, x: np.ndarray, source: np.ndarray, sees: Any, rotated: Any, row: Extras, layer: int
) -> np.ndarray:
    """One query of one head at a time. `sees(i, j)`; `rotated` turns q and k, or is None across to a memory."""

    def project(name: str, y: np.ndarray) -> np.ndarray:
        out = np.einsum("td,dnh->tnh", y, p[name]["kernel"])
        return out + p[name]["bias"] if c.qkv_bias else out

    own = rotated is not None
    q, k, v = project("q", x), project("k", source), project("v", source)
    if c.qk_norm != "none":
        num_dims = {"head": 1, "full": 2}[c.qk_norm]
        q, k = ref_norm(c, p["q_norm"], q, num_dims), ref_norm(c, p["k_norm"], k, num_dims)
    if own and c.position == "rope":
        q, k = rotated(q), rotated(k)
    scale = c.head_size**-0.5 if c.attention_scale is None else c.attention_scale
    cap = (lambda s: c.attention_soft_cap * np.tanh(s / c.attention_soft_cap)) if c.attention_soft_cap else (lambda s: s)
    heads = np.zeros((len(x), c.num_heads, c.head_size))
    for n in range(c.num_heads):
        g = n * c.num_kv_heads // c.num_heads
        for i in range(len(x)):
            visible = [j for j in range(len(source)) if sees(i, j)]
            scores = [float(cap(scale * (q[i, n] @ k[j, g]))) for j in visible]
            if own and c.position == "alibi":
                scores = [s - ref_slopes(c.num_heads)[n] * abs(i - j) for s, j in zip(scores, visible, strict=True)]
            if own and row.bias is not None:
                scores = [s + row.bias[n, i, j] for s, j in zip(scores, visible, strict=True)]
            values = [v[j, g] for j in visible]
            if own and row.prefix is not None:
                keys, more = row.prefix[0][layer][:, g], row.prefix[1][layer][:, g]
                scores, values = [*scores, *(float(cap(scale * (q[i, n] @ key))) for key in keys)], [*values, *more]
            if values:
                heads[i, n] = ref_softmax(np.array(scores)) @ np.array(values)
    out = np.einsum("tnh,nhd->td", heads, p["o"]["kernel"])
    return out + p["o"]["bias"] if c.attention_out_bias else out


def ref_gelu(x: np.ndarray, tanh: bool) -> np.ndarray:
    inner = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)) if tanh else np.vectorize(math.erf)(x / math.sqrt(2))
    return 0.5 * x * (1 + inner)


def ref_mlp(c: ModelConfig, p: dict, x: np.ndarray) -> np.ndarray:
    def project(name: str, y: np.ndarray) -> np.ndarray:
        return y @ p[name]["kernel"] + (p[name]["bias"] if c.mlp_bias else 0)

    act = partial(ref_gelu, tanh=c.activation.endswith("tanh"))
    if c.activation == "swiglu":
        act = lambda z: z / (1 + np.exp(-z))
    elif c.activation in ("reglu2", "relu2"):
        act = lambda z: np.maximum(z, 0) ** 2
    if c.activation in ("swiglu", "geglu", "geglu_tanh", "reglu2"):
        return project("down", act(project("gate", x)) * project("up", x))
    return project("down", act(project("up", x)))


def ref_hidden(
    c: ModelConfig, params: dict, inputs: np.ndarray, positions: np.ndarray, segments: np.ndarray, row: Extras = Extras()
) -> np.ndarray:
    """Final hidden states [T D] of one row, in float64."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x = inputs.astype(np.float64) if inputs.ndim == 2 else p["embed"]["tokens"][inputs] * c.embedding_scale
    if c.position == "learned":
        x = x + p["embed"]["positions"][positions]
    for layer in range(c.num_layers):
        x = ref_block(c, jax.tree.map(lambda leaf: leaf[layer], p["layers"]), x, positions, segments, row, layer)
    return ref_norm(c, p["final_norm"], x, bias=c.norm_bias) if c.final_norm else x


def ref_block(c: ModelConfig, p: dict, x: np.ndarray, positions: np.ndarray, segments: np.ndarray, row: Extras, layer: int) -> np.ndarray:
    kind = c.layer_pattern[layer % len(c.layer_pattern)]
    marks = row.prefix_mask if c.mask == "prefix" and row.prefix_mask is not None else np.zeros(len(x), bool)

    def sees(i: int, j: int) -> bool:
        order = c.mask == "bidirectional" or j <= i or (marks[i] and marks[j])
        near = kind.window is None or abs(i - j) < kind.window
        return bool(order and near and segments[i] == segments[j] and segments[j] > 0)

    def norm(name: str, y: np.ndarray) -> np.ndarray:
        return ref_norm(c, p[name], y, bias=c.norm_bias)

    def before(branch: str, y: np.ndarray) -> np.ndarray:
        return norm(f"{branch}_norm", y) if c.norm_placement in ("before", "both") else y

    def after(branch: str, y: np.ndarray) -> np.ndarray:
        return norm(f"{branch}_post_norm", y) if c.norm_placement in ("after", "both") else y

    def add(branch: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return norm(f"{branch}_post_norm", x + y) if c.norm_placement == "after_residual" else x + after(branch, y)

    def attend(u: np.ndarray) -> np.ndarray:
        turn = partial(ref_rotate, kind.rope or c.rope, positions=positions)
        return ref_attention(c, p["attention"], u, u, sees, turn, row, layer)

    if c.block == "parallel":
        u = before("attention", x)
        w = before("mlp", x) if c.parallel_norms == 2 else u
        if c.norm_placement == "after_residual":
            return norm("attention_post_norm", x + attend(u) + ref_mlp(c, p["mlp"], w))
        return x + after("attention", attend(u)) + after("mlp", ref_mlp(c, p["mlp"], w))
    x = add("attention", x, attend(before("attention", x)))
    if c.cross_attention:
        assert row.memory is not None
        owner = row.memory_segments
        reads = lambda i, j: owner is None or (owner[j] == segments[i] and owner[j] > 0)
        u = before("cross_attention", x)
        x = add("cross_attention", x, ref_attention(c, p["cross_attention"], u, row.memory, reads, None, row, layer))
    return add("mlp", x, ref_mlp(c, p["mlp"], before("mlp", x)))
