"""Bits per byte and its baselines, against closed forms."""

from __future__ import annotations

import inspect
import lzma
import math
import random

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.config import ConfigError
from jaxllm.evals import perplexity

ALL_BYTES = bytes(range(256))
SOURCE = inspect.getsource(lzma).encode()
NOISE = random.Random(0).randbytes(20_000)


# ------------------------------------------------------------------------------------------- unigram


def test_uniform_bytes_cost_8_bits():
    assert perplexity.byte_unigram_bits(ALL_BYTES * 7, ALL_BYTES) == pytest.approx(8, abs=1e-12)
    assert perplexity.byte_unigram_bits(b"", b"never seen") == 8.0


def test_constant_bytes_cost_almost_nothing():
    n = 100_000
    assert perplexity.byte_unigram_bits(b"a" * n, b"a" * 50) == pytest.approx(-math.log2((n + 1) / (n + 256)))
    assert perplexity.byte_unigram_bits(b"a" * n, b"a" * 50) < 0.004


def test_two_equal_bytes_cost_one_bit_and_an_unseen_one_is_finite():
    assert perplexity.byte_unigram_bits(b"ab" * 10**6, b"ba") == pytest.approx(1, abs=1e-3)
    assert perplexity.byte_unigram_bits(b"a" * 1000, b"z") == pytest.approx(math.log2(1256))


@given(st.binary(max_size=40), st.binary(min_size=1, max_size=40))
@settings(max_examples=30, deadline=None)
def test_unigram_equals_the_sum_over_bytes(train, held_out):
    bits = [-math.log2((train.count(b) + 1) / (len(train) + 256)) for b in held_out]
    assert perplexity.byte_unigram_bits(train, held_out) == pytest.approx(sum(bits) / len(bits))


# ---------------------------------------------------------------------------------------------- lzma


def test_noise_does_not_compress_and_a_constant_does():
    assert 8 <= perplexity.lzma_whole_bits(NOISE) < 8.01
    assert perplexity.lzma_whole_bits(b"a" * 100_000) < 0.02
    assert 8 <= perplexity.lzma_window_bits([(b"", NOISE[i : i + 500]) for i in range(0, 20_000, 500)]) < 8.1


def test_no_container_is_counted():
    """A container adds its header, index and checksums; what is left is the stream, which must decode."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]  # preset 9's own dictionary: the size may not change
    stream = lzma.compress(SOURCE, format=lzma.FORMAT_RAW, filters=filters)
    assert lzma.decompress(stream, lzma.FORMAT_RAW, filters=filters) == SOURCE
    assert perplexity.lzma_whole_bits(SOURCE) == 8 * len(stream) / len(SOURCE)
    assert len(stream) < len(lzma.compress(SOURCE, preset=9 | lzma.PRESET_EXTREME)) - 30


def test_short_windows_cost_more_than_long_ones_and_all_at_once_least():
    def cut(size):
        return [(b"", SOURCE[i : i + size]) for i in range(0, len(SOURCE), size)]

    costs = [perplexity.lzma_window_bits(cut(size)) for size in (128, 512, 2048)] + [perplexity.lzma_whole_bits(SOURCE)]
    assert costs == sorted(costs, reverse=True) and len(set(costs)) == 4
    assert perplexity.lzma_window_bits([(b"", SOURCE)]) == costs[-1]


def test_context_and_target_are_one_window_and_nothing_is_subtracted():
    split = [(SOURCE[:700], SOURCE[700:900]), (b"", SOURCE[900:1500])]
    joined = [(b"", SOURCE[:900]), (SOURCE[900:1500], b"")]
    assert perplexity.lzma_window_bits(split) == perplexity.lzma_window_bits(joined)
    # Windows weigh by their length: it is a ratio of sums, not a mean of ratios.
    one, other = perplexity.lzma_window_bits(split[:1]), perplexity.lzma_window_bits(split[1:])
    assert perplexity.lzma_window_bits(split) == pytest.approx((900 * one + 600 * other) / 1500)


# ------------------------------------------------------------------------------------------ evaluate


def as_sums(batch):
    return batch


def test_a_uniform_model_over_bytes_has_8_bits_perplexity_256_and_no_error():
    batches = [(jnp.full(4, 10 * math.log(256)), jnp.full(4, 10)), (jnp.full(2, 5 * math.log(256)), jnp.full(2, 5))]
    out = perplexity.evaluate(as_sums, batches, num_bytes=50)
    assert out["bits_per_byte"] == pytest.approx(8) and out["perplexity"] == pytest.approx(256, rel=1e-5)
    assert out["loss"] == pytest.approx(math.log(256)) and out["loss_standard_error"] == pytest.approx(0, abs=1e-6)
    assert (out["num_tokens"], out["num_windows"]) == (50, 6)


def test_loss_is_a_ratio_of_sums_however_the_rows_are_batched():
    rng = np.random.default_rng(0)
    tokens, nats = rng.integers(1, 50, 12).astype(float), rng.uniform(1, 100, 12)
    whole = perplexity.evaluate(as_sums, [(nats, tokens)], 300)
    assert perplexity.evaluate(as_sums, [(nats[:5], tokens[:5]), (nats[5:], tokens[5:])], 300) == pytest.approx(whole)
    assert whole["loss"] == pytest.approx(nats.sum() / tokens.sum())
    assert whole["bits_per_byte"] == pytest.approx(nats.sum() / math.log(2) / 300)
    ratio = whole["bits_per_byte"] / whole["loss"]
    assert whole["bits_per_byte_standard_error"] == pytest.approx(ratio * whole["loss_standard_error"])


def test_standard_error_is_that_of_the_mean_for_equal_windows_and_the_bootstraps_for_others():
    rng = np.random.default_rng(1)
    tokens = np.full(40, 8.0)
    nats = rng.uniform(5, 30, 40)
    out = perplexity.evaluate(as_sums, [(nats, tokens)], 1)
    assert out["loss_standard_error"] == pytest.approx(np.std(nats / 8, ddof=1) / math.sqrt(40))

    tokens = rng.integers(1, 60, 400).astype(float)
    nats = tokens * rng.uniform(1, 4, 400)
    out = perplexity.evaluate(as_sums, [(nats, tokens)], 1)
    drawn = rng.integers(0, 400, (4000, 400))
    bootstrap = np.std(nats[drawn].sum(1) / tokens[drawn].sum(1))
    assert out["loss_standard_error"] == pytest.approx(bootstrap, rel=0.08)


def test_padding_rows_change_nothing_and_one_window_has_no_error():
    plain = perplexity.evaluate(as_sums, [([3.0, 4.0], [2, 3])], 9)
    assert perplexity.evaluate(as_sums, [([3.0, 0.0, 4.0], [2, 0, 3]), ([0.0], [0])], 9) == plain
    assert math.isnan(perplexity.evaluate(as_sums, [(7.0, 5)], 9)["loss_standard_error"])
    assert perplexity.evaluate(as_sums, [(7.0, 5), (1.0, 1)], 9)["num_windows"] == 2  # one number per batch: a window each


def test_a_hopeless_model_is_reported_not_an_overflow():
    assert math.isfinite(perplexity.evaluate(as_sums, [([5000.0], [1])], 1)["perplexity"])


def test_nothing_to_evaluate_is_said():
    for call in (
        lambda: perplexity.evaluate(as_sums, [], 10),
        lambda: perplexity.evaluate(as_sums, [([0.0], [0])], 10),
        lambda: perplexity.evaluate(as_sums, [([1.0], [1])], 0),
        lambda: perplexity.lzma_window_bits([]),
        lambda: perplexity.lzma_whole_bits(b""),
        lambda: perplexity.byte_unigram_bits(b"abc", b""),
        lambda: perplexity.bits_per_byte(1.0, 0),
    ):
        with pytest.raises(ConfigError, match="held"):
            call()
