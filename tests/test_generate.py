"""Generation: greedy equals the argmax of the full forward pass, and a row's text is its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import tree
from jaxllm.config import ConfigError, LayerKind, ModelConfig
from jaxllm.models.generate import Generator, complete, generator, sampler, stream
from jaxllm.models.transformer import decoder

CONFIG = ModelConfig(
    num_layers=2, width=12, num_heads=2, num_kv_heads=1, head_size=4, ff_width=20, vocab_size=17, max_length=16,
    layer_pattern=(LayerKind(window=3), LayerKind()),
)  # fmt: skip
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5]]
NUM = 6


@pytest.fixture(scope="module", autouse=True)
def quick_compiles() -> Iterator[None]:
    """The generator jits for itself: spare LLVM's effort here, half the time to compile."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@cache
def params() -> Any:
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(decoder(CONFIG).init, jax.random.key(0))
    return tree.map_with_path(lambda path, leaf: rng.normal(1.0 if "norm" in path else 0.0, 0.5, leaf.shape).astype(np.float32), shapes)


@cache
def make(temperature: float) -> Generator:
    return generator(decoder(CONFIG), sampler(temperature))


def run(prompts: Sequence[Sequence[int]], temperature: float, **options: Any) -> list[list[int]]:
    return np.array(list(stream(make(temperature), params(), prompts, num_tokens=NUM, **options))).T.tolist()


@cache
def greedy_by_full_forward() -> list[list[int]]:
    """No cache and no batch: the whole row again for every token."""
    lm, rows = decoder(CONFIG), []
    full = jax.jit(lambda p, tokens: lm.unembed(p).logits(lm.apply(p, tokens).hidden))
    for prompt in PROMPTS:
        row = list(prompt)
        for _ in range(NUM):
            padded = np.zeros((1, 16), np.int32)
            padded[0, : len(row)] = row
            row.append(int(np.argmax(full(params(), padded)[0, len(row) - 1])))
        rows.append(row[len(prompt) :])
    return rows


def test_greedy_equals_the_full_forward_pass():
    rows = run(PROMPTS, 0.0)
    assert rows == greedy_by_full_forward()
    assert len({token for row in rows for token in row}) > 3, "the model says one thing only: the test is too easy"


def test_greedy_does_not_look_at_the_seed():
    assert run(PROMPTS, 0.0, seed=5) == run(PROMPTS, 0.0)


def test_one_seed_is_one_text_and_another_seed_another():
    first = run(PROMPTS, 1.5, seed=1)
    assert run(PROMPTS, 1.5, seed=1) == first
    assert run(PROMPTS, 1.5, seed=2) != first


def test_a_row_has_the_same_text_alone_as_in_a_ragged_batch():
    assert run(PROMPTS[2:], 1.5, seed=1) == run(PROMPTS, 1.5, seed=1)[2:]


def test_completions_end_before_their_stop_token():
    rows = greedy_by_full_forward()
    stop = rows[0][2]
    assert complete(make(0.0), params(), PROMPTS, num_tokens=NUM, stop_ids=[stop]) == [
        row[: row.index(stop)] if stop in row else row for row in rows
    ]
    assert complete(make(0.0), params(), PROMPTS, num_tokens=NUM) == rows


# --------------------------------------------------------------------------------------------- sampler

PROBABILITIES = np.array([0.05, 0.4, 0.1, 0.25, 0.2])  # in order of size: 1, 3, 4, 2, 0


def support(logits: Any = None, **options: Any) -> dict[int, float]:
    """token -> share of 4,000 draws."""
    row = np.log(PROBABILITIES) if logits is None else logits
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = sampler(**options)(jnp.broadcast_to(jnp.asarray(row, jnp.float32), (4000, len(row))), keys)
    tokens, counts = np.unique(drawn, return_counts=True)
    return dict(zip(tokens.tolist(), (counts / 4000).tolist(), strict=True))


@pytest.mark.parametrize(
    "options, allowed",
    [
        ({}, {0, 1, 2, 3, 4}),
        ({"top_k": 1}, {1}),
        ({"top_k": 3}, {1, 3, 4}),
        ({"top_k": 5}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.39}, {1}),
        ({"top_p": 0.41}, {1, 3}),  # 0.4 is not enough
        ({"top_p": 0.8}, {1, 3, 4}),
        ({"top_p": 0.9}, {1, 3, 4, 2}),
        ({"top_k": 2, "top_p": 0.7}, {1, 3}),  # of the two, 0.4 / 0.65 = 0.62
        ({"top_k": 2, "top_p": 0.6}, {1}),
        ({"temperature": 0.0}, {1}),
    ],
)
def test_which_tokens_can_be_drawn(options: dict[str, Any], allowed: set[int]):
    shares = support(**options)
    assert set(shares) == allowed
    total = PROBABILITIES[list(allowed)].sum()
    for token, share in shares.items():
        assert share == pytest.approx(PROBABILITIES[token] / total, abs=0.035)


def test_temperature_divides_the_logits():
    shares, want = support(temperature=0.5), PROBABILITIES**2 / (PROBABILITIES**2).sum()
    for token, share in shares.items():
        assert share == pytest.approx(want[token], abs=0.035)


@pytest.mark.parametrize("options", [{}, {"top_p": 0.95}, {"top_k": 4}])
def test_padded_vocabulary_is_never_drawn(options: dict[str, Any]):
    assert set(support(np.append(np.log(PROBABILITIES), [-np.inf, -np.inf]), **options)) <= {0, 1, 2, 3, 4}


# ---------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_impossible_sampling_is_refused(options: dict[str, Any]):
    with pytest.raises(ConfigError, match="temperature >= 0, top_k >= 0, 0 < top_p <= 1"):
        sampler(**options)


def test_an_empty_prompt_is_refused():
    with pytest.raises(ConfigError, match="prompt 1 is empty"):
        next(stream(make(0.0), params(), [[1], []], num_tokens=1))


def test_no_prompts_give_no_completions():
    assert complete(make(0.0), params(), [], num_tokens=2) == []


def test_a_context_that_learned_positions_do_not_reach_is_refused():
    lm = decoder(ModelConfig(position="learned", max_length=8))
    with pytest.raises(ConfigError, match="2 too many for a context of 8"):
        next(stream(generator(lm, sampler()), {}, [[1] * 4, [1]], num_tokens=6))


def test_a_cache_too_short_for_the_text_is_refused():
    """Else positions wrap around, early tokens are overwritten, and the text is silently another."""
    with pytest.raises(ConfigError):
        assert run(PROMPTS, 0.0, max_length=6) == greedy_by_full_forward()


def test_top_k_larger_than_the_vocabulary_keeps_all():
    assert set(support(top_k=50)) == {0, 1, 2, 3, 4}
