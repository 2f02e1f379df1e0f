"""The dense attention and the merge of two parts, against NumPy float64; the slots of the cache by brute force."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.models.attention import Sight, attend_dense, merge, slot_index, write_slots

B, T, S, N, K, H = 2, 5, 7, 6, 3, 4
O0 = {"xla_backend_optimization_level": 0}  # LLVM's effort only: half the time to compile


def arrays(num_keys: int = S) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((B, T, N, H), (B, num_keys, K, H), (B, num_keys, K, H)))
    return q, k, v


def in_numpy(sight: Sight) -> Any:
    """The same fields, quick to index."""
    return SimpleNamespace(**{name: np.asarray(value) if isinstance(value, jax.Array) else value for name, value in vars(sight).items()})


def sees(sight: Any, b: int, i: int, j: int) -> bool:
    """Whether query i of row b sees key j: the words of `Sight`'s docstrings, one pair at a time."""
    qp = i if sight.q_positions is None else int(sight.q_positions[b, i])
    kp = j if sight.k_positions is None else int(sight.k_positions[b, j])
    if sight.k_positions is not None and kp < 0:
        return False
    if sight.q_segments is not None and not sight.q_segments[b, i] == sight.k_segments[b, j] != 0:
        return False
    if sight.window is not None and abs(qp - kp) >= sight.window:
        return False
    marked = sight.prefix_mask is not None and sight.prefix_mask[b, i] and sight.prefix_mask[b, j]
    return bool(not sight.causal or kp <= qp or marked)


def reference(q: Any, k: Any, v: Any, sight: Sight, scale: float, cap: float | None) -> tuple[np.ndarray, np.ndarray]:
    """(output, log-sum-exp) in float64."""
    q, k, v, sight = np.asarray(q), np.asarray(k), np.asarray(v), in_numpy(sight)
    out, lse = np.zeros(q.shape), np.full(q.shape[:3], -np.inf)
    for b, i, n in np.ndindex(q.shape[:3]):
        keys = [j for j in range(k.shape[1]) if sees(sight, b, i, j)]
        if not keys:
            continue
        g = n // (q.shape[2] // k.shape[2])
        scores = np.array([scale * q[b, i, n].astype(np.float64) @ k[b, j, g] for j in keys])
        scores = scores if cap is None else cap * np.tanh(scores / cap)
        if sight.alibi:
            qp = np.arange(q.shape[1]) if sight.q_positions is None else sight.q_positions[b]
            kp = np.arange(k.shape[1]) if sight.k_positions is None else sight.k_positions[b]
            slope = [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125][n]  # of 6 heads: those of 4, then every second of 8
            scores -= slope * np.abs(qp[i] - kp[keys])
        if sight.bias is not None:
            scores += np.broadcast_to(sight.bias, (B, N, *sight.bias.shape[2:]))[b, n, i, keys]
        lse[b, i, n] = np.log(np.exp(scores).sum())
        out[b, i, n] = np.exp(scores - lse[b, i, n]) @ v[b, keys, g]
    return out, lse


Q_SEGMENTS = jnp.array([[1, 1, 2, 2, 0], [1, 1, 1, 1, 1]])
K_SEGMENTS = jnp.array([[1, 1, 2, 2, 0, 0, 2], [1, 1, 1, 0, 0, 3, 1]])
Q_POSITIONS = jnp.array([[3, 4, 5, 6, 7], [8, 9, 10, 11, 12]])
K_POSITIONS = jnp.array([[-1, -1, 2, 3, 4, 5, 6], [8, 9, 10, 3, -1, 5, 6]])
BIAS = jnp.asarray(np.random.default_rng(1).normal(size=(B, N, T, S)), jnp.float32)

SIGHTS = {
    "causal": Sight(),
    "everything": Sight(causal=False),
    "window": Sight(window=2),
    "window both ways": Sight(causal=False, window=2),
    "segments": Sight(q_segments=Q_SEGMENTS, k_segments=K_SEGMENTS),
    "slots of a cache": Sight(q_positions=Q_POSITIONS, k_positions=K_POSITIONS, window=5),
    "alibi": Sight(alibi=True),
    "alibi, slots": Sight(alibi=True, q_positions=Q_POSITIONS, k_positions=K_POSITIONS),
    "alibi both ways": Sight(causal=False, alibi=True),
    "bias": Sight(bias=BIAS),
    "one bias of all heads": Sight(bias=BIAS[:, :1]),
    "one bias of all rows": Sight(bias=BIAS[:1]),
}


@pytest.mark.parametrize("cap", [None, 0.8])
@pytest.mark.parametrize("name", SIGHTS)
def test_equals_numpy(name: str, cap: float | None):
    q, k, v = arrays()
    out, lse = attend_dense(q, k, v, SIGHTS[name], scale=0.7, soft_cap=cap)
    want, want_lse = reference(q, k, v, SIGHTS[name], 0.7, cap)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-5, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_prefix_marks_windows_and_segments_together(data: st.DataObject):
    def rows(of: st.SearchStrategy[Any]) -> jax.Array:
        return jnp.array([data.draw(st.lists(of, min_size=S, max_size=S)) for _ in range(B)])

    segments = rows(st.integers(0, 2))
    sight = Sight(
        causal=data.draw(st.booleans()), window=data.draw(st.sampled_from([None, 1, 3, 50])),
        q_segments=segments, k_segments=segments, prefix_mask=rows(st.booleans()),
    )  # fmt: skip
    seen = in_numpy(sight)
    want = [[[sees(seen, b, i, j) for j in range(S)] for i in range(S)] for b in range(B)]
    np.testing.assert_array_equal(sight.mask(S, S), want)


def test_nobody_to_hide_is_no_mask():
    assert Sight(causal=False).mask(3, 4) is None


@pytest.mark.parametrize("cut", [0, 3, S])
def test_merging_two_parts_of_the_keys_equals_the_whole(cut: int):
    """Values and gradients; an empty part, and rows that see only one part, included."""
    q, k, v = arrays()
    sight = Sight(q_positions=Q_POSITIONS, k_positions=K_POSITIONS, window=4, alibi=True)

    def part(q: Any, k: Any, v: Any, first: int, last: int) -> Any:
        return attend_dense(q, k[:, first:last], v[:, first:last], replace(sight, k_positions=K_POSITIONS[:, first:last]), scale=0.5)

    def whole(q: Any, k: Any, v: Any) -> Any:
        return part(q, k, v, 0, S)

    def merged(q: Any, k: Any, v: Any) -> Any:
        empty = jnp.zeros(q.shape), jnp.full(q.shape[:3], -jnp.inf)
        parts = [part(q, k, v, first, last) for first, last in ((0, cut), (cut, S)) if last > first]
        return merge(*parts) if len(parts) == 2 else merge(empty, parts[0])

    def value_and_gradient(f: Any) -> Any:
        loss = lambda *a: (jnp.sin((out := f(*a))[0]).sum(), out)
        return jax.tree.leaves(jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True), compiler_options=O0)(q, k, v))

    for got, want in zip(value_and_gradient(merged), value_and_gradient(whole), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_merge_does_not_overflow():
    out, high, low = jnp.ones((1, 1, 1, 1)), jnp.full((1, 1, 1), 300.0), jnp.full((1, 1, 1), -300.0)
    both, lse = merge((2 * out, high), (4 * out, high))
    assert (both.item(), lse.item()) == (pytest.approx(3.0, rel=1e-4), pytest.approx(300 + np.log(2)))
    assert merge((2 * out, high), (4 * out, low))[0].item() == pytest.approx(2.0, rel=1e-4)
    assert merge((2 * out, low), (4 * out, low))[0].item() == pytest.approx(3.0, rel=1e-4)


def test_scores_that_overflow_an_exponential():
    q, k, v = arrays()
    out, lse = attend_dense(1e3 * q, 1e3 * k, v, Sight(), scale=1.0)
    assert np.isfinite(out).all() and np.isfinite(lse).all()


def test_a_query_that_sees_nothing_gets_zeros_and_finite_gradients():
    q, k, v = arrays()
    blind = Sight(q_segments=Q_SEGMENTS * 0, k_segments=K_SEGMENTS)
    out, lse = attend_dense(q, k, v, blind, scale=0.5)
    assert (np.asarray(out) == 0).all() and (np.asarray(lse) == -np.inf).all()

    def loss(q: Any, k: Any, v: Any, sight: Sight) -> Any:
        alone = attend_dense(q, k, v, sight, scale=0.5)
        return jnp.sin(merge(alone, alone)[0]).sum() + alone[0].sum()

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), compiler_options=O0)
    for gradient in gradients(q, k, v, blind):
        assert (np.asarray(gradient) == 0).all()
    some = Sight(q_segments=Q_SEGMENTS, k_segments=K_SEGMENTS)  # the last query of row 0 is padding
    for gradient in gradients(q, k, v, some):
        assert np.isfinite(gradient).all()


def test_gpt3_a_window_as_long_as_the_row_is_no_window():
    q, k, v = arrays(num_keys=T)
    dense, banded = (attend_dense(q, k, v, Sight(window=window), scale=0.5) for window in (None, T))
    for a, b in zip(dense, banded, strict=True):
        np.testing.assert_array_equal(a, b)


def test_gpt3_a_key_outside_the_band_changes_nothing():
    q, k, v = arrays(num_keys=T)
    i, w = 4, 3
    for j in range(T):
        other = v.at[:, j].add(1)
        change = np.abs(attend_dense(q, k, v, Sight(window=w), scale=0.5)[0] - attend_dense(q, k, other, Sight(window=w), scale=0.5)[0])
        assert (change[:, i].max() > 0) == (0 <= i - j < w)


def test_dropout_falls_on_the_weights():
    """With one-hot values the output is the dropped weights: each is 0 or weight / (1 − rate)."""
    rng = np.random.default_rng(2)
    size = 32
    q, k = jnp.asarray(rng.normal(size=(2, 1, size, 4, size)), jnp.float32)
    v = jnp.broadcast_to(jnp.eye(size)[None, :, None], (1, size, 4, size))
    plain = np.asarray(attend_dense(q, k, v, Sight(causal=False), scale=0.1)[0])
    out, lse = attend_dense(q, k, v, Sight(causal=False), scale=0.1, dropout_rate=0.25, key=jax.random.key(0))
    kept = np.asarray(out) > 0
    np.testing.assert_allclose(np.asarray(out)[kept], plain[kept] / 0.75, rtol=1e-5)
    assert kept.mean() == pytest.approx(0.75, abs=0.03)
    np.testing.assert_allclose(lse, attend_dense(q, k, v, Sight(causal=False), scale=0.1)[1])
    np.testing.assert_array_equal(attend_dense(q, k, v, Sight(causal=False), scale=0.1, dropout_rate=0.25)[0], plain)


def test_bfloat16_operands_keep_float32_sums():
    q, k, v = arrays()
    out, lse = attend_dense(q, k, v, Sight(causal=False), scale=0.5, dtype="bfloat16")
    want, want_lse = reference(q, k, v, Sight(causal=False), 0.5, None)
    assert out.dtype == lse.dtype == jnp.float32
    np.testing.assert_allclose(out, want, atol=0.03)
    np.testing.assert_allclose(lse, want_lse, atol=0.03)


# ----------------------------------------------------------------------------------------------- slots


@settings(max_examples=20, deadline=None)
@given(num_slots=st.integers(1, 6), chunks=st.lists(st.lists(st.integers(0, 4), min_size=2, max_size=2), min_size=1, max_size=4))
def test_a_ring_holds_the_last_tokens_of_each_row(num_slots: int, chunks: list[list[int]]):
    """Rows advance by ragged chunks; afterwards the slots hold exactly each row's last `num_slots` positions."""
    width, seen = 4, np.zeros(2, int)
    slots = np.zeros((2, 1, num_slots, 1), np.float32)
    held = np.full((2, num_slots), -1)
    for sizes in chunks:
        positions = seen[:, None] + np.arange(width)
        index = slot_index(jnp.asarray(positions), jnp.arange(width) < jnp.array(sizes)[:, None], num_slots)
        for written in np.asarray(index):
            written = written[written < num_slots]
            assert len(set(written)) == len(written), "which of two writes to one slot wins is not defined"
        slots = np.asarray(write_slots(jnp.asarray(slots), jnp.asarray(positions[..., None, None], jnp.float32), index))
        held = np.asarray(jnp.asarray(held).at[np.arange(2)[:, None], index].set(positions, mode="drop"))
        seen += sizes
    for row in range(2):
        last = set(range(max(0, seen[row] - num_slots), seen[row]))
        assert {int(p) for p in held[row] if p >= 0} == last
        assert all(int(slots[row, 0, p % num_slots, 0]) == p for p in last)
