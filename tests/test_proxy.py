"""Proxy-tuning: the formula in float64, three models cached against three whole rows, both ways in, and what is refused.

The numbered laws are those of the paper's card: what must hold of any implementation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxllm import sharding
from jaxllm.config import ConfigError, LayerKind, MeshConfig, ModelConfig
from jaxllm.evals import likelihood
from jaxllm.evals.generation import pass_at_k
from jaxllm.models import logits as processors
from jaxllm.models.beam import beam_search
from jaxllm.models.generate import Memory, completions, generator, sampler
from jaxllm.models.proxy import (
    Trio,
    combine,
    from_top_k,
    joint_config,
    own_prompts,
    proxy_lm,
    proxy_processor,
    pull,
    steer,
    with_prompts,
)
from jaxllm.models.transformer import decoder
from tests.reference_decoder import BASE, random_params

LARGE = replace(BASE, num_layers=1, vocab_size=18, logit_soft_cap=3.0, max_length=48)
"""A cap and a window of its own: heads differ."""
SMALL = replace(
    BASE, num_layers=1, width=8, num_heads=2, num_kv_heads=1, vocab_size=18, tied_embeddings=False, logit_scale=0.5, max_length=48
)
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5], [7, 8, 9, 10]]
LONGER = [[16, 17, 3, 1, 4, 1, 5, 16], [16, 9], [16, 17, 17, 17, 17, 2, 6, 5, 16], [11]]
"""What the expert reads in their place: longer, and in one row shorter."""
OTHERS = [[2], [9, 9, 9], [5, 5, 5, 5, 2, 6, 5], [7, 8, 9, 10]]
"""What the anti-expert does."""
NUM = 5


def other(params: Any, seed: int, by: float = 0.5) -> Any:
    """The same model after some tuning."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: (leaf + rng.normal(0, by, leaf.shape)).astype(np.float32), params)


@cache
def weights() -> Any:
    small = random_params(SMALL)
    return {"base": random_params(LARGE), "expert": other(small, 5), "anti": small}


@cache
def trio(alpha: float = 1.0, plausible: float = 0.0) -> Trio:
    return Trio(decoder(LARGE), decoder(SMALL), decoder(SMALL), alpha, plausible)


@cache
def engine(alpha: float = 1.0, temperature: float = 0.0, top_p: float = 1.0) -> Any:
    return generator(proxy_lm(*trio(alpha)), sampler(temperature, top_p=top_p))


@cache
def by_processor(temperature: float = 0.0, top_p: float = 1.0) -> Any:
    how = sampler(temperature, top_p=top_p, constraints=[proxy_processor(decoder(SMALL), decoder(SMALL))])
    return generator(decoder(LARGE), how)


def own() -> Any:
    return {"expert": own_prompts(LONGER, PROMPTS), "anti": own_prompts(OTHERS, PROMPTS)}


DRAWN: dict[str, Any] = {"num_tokens": 4, "num_samples": 2, "seed": 3}


def draw(way: str, params: Any) -> Any:
    """Two samples of each prompt at temperature 1.3 and top-p 0.7, each model with prompts of its own, in one of the two ways."""
    if way == "LM":
        return completions(engine(1.0, 1.3, 0.7), {**params, "prompts": own()}, PROMPTS, **DRAWN)
    frozen = {"expert": params["expert"], "anti": params["anti"], "prompts": own()}
    return completions(by_processor(1.3, 0.7), params["base"], PROMPTS, frozen=frozen, **DRAWN)


@cache
def drawn(way: str) -> Any:
    return draw(way, weights())


def small() -> Any:
    return {name: weights()[name] for name in ("expert", "anti")}


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def probabilities(*rows: Any, **options: Any) -> np.ndarray:
    return np.asarray(_probabilities(*(np.asarray(row, np.float32) for row in rows), options.pop("alpha", 1.0), **options))


_combine = jax.jit(combine, static_argnames="plausible")
_probabilities = jax.jit(lambda *rows, plausible=0.0: jax.nn.softmax(combine(*rows, plausible=plausible), -1), static_argnames="plausible")


@cache
def _whole(config: ModelConfig) -> Any:
    lm = decoder(config)
    return jax.jit(lambda p, tokens: lm.unembed(p).logits(lm.apply(p, tokens).hidden))


def next_logits(config: ModelConfig, params: Any, row: Sequence[int]) -> np.ndarray:
    """By the whole prefix again: no cache, no batch."""
    padded = np.zeros((1, 32), np.int32)
    padded[0, : len(row)] = row
    return np.asarray(_whole(config)(params, padded))[0, len(row) - 1].astype(np.float64)


def distributions(prompt: Sequence[int], expert: Sequence[int], anti: Sequence[int], ids: Sequence[int], alpha: float = 1.0) -> Any:
    """(base, proxy) probabilities [V] after these prompts and `ids`, as the paper's equation reads, in float64."""
    base = next_logits(LARGE, weights()["base"], [*prompt, *ids])
    plus, minus = (next_logits(SMALL, weights()[n], [*p, *ids]) for n, p in (("expert", expert), ("anti", anti)))
    return softmax(base), softmax(base + alpha * (plus - minus))


def by_full_prefix(
    prompt: Sequence[int], expert: Sequence[int], anti: Sequence[int], alpha: float, num: int = NUM
) -> tuple[list[int], Any]:
    """Greedy proxy-tuning, one row and one prefix at a time: ids and log-probabilities."""
    ids: list[int] = []
    logps = []
    for _ in range(num):
        p = distributions(prompt, expert, anti, ids, alpha)[1]
        ids.append(int(p.argmax()))
        logps.append(np.log(p.max()))
    return ids, np.array(logps)


# ------------------------------------------------------------------------------------------ the card's oracles

ROWS = ([2.0, 1, 0], [0.0, 3, 0], [1.0, 1, 0])


def test_oracle_1_the_worked_numbers():
    for alpha, want in {
        1.0: [0.114195, 0.843795, 0.042010],
        0.5: [0.348207, 0.574097, 0.077696],
        0.0: [0.665241, 0.244728, 0.090031],
    }.items():
        np.testing.assert_allclose(probabilities(*ROWS, alpha=alpha), want, atol=1e-6)


FINITE = hnp.arrays(np.float32, (3, 2, 7), elements=st.floats(-20, 20, width=32))
ALPHA = st.floats(-3, 3)


@given(FINITE, ALPHA)
@settings(max_examples=40, deadline=None)
def test_oracle_2_equal_small_models_leave_the_base_and_an_anti_expert_like_the_base_leaves_the_expert(rows: np.ndarray, alpha: float):
    base, expert, _ = rows
    np.testing.assert_allclose(probabilities(base, expert, expert, alpha=alpha), softmax(base.astype(np.float64)), atol=1e-5)
    np.testing.assert_allclose(probabilities(base, expert, base), softmax(expert.astype(np.float64)), atol=1e-4)


@given(FINITE, ALPHA, hnp.arrays(np.float32, (3, 2, 1), elements=st.floats(-20, 20, width=32)))
@settings(max_examples=40, deadline=None)
def test_oracle_3_constants_change_nothing_and_log_probabilities_do_for_logits(rows: np.ndarray, alpha: float, constants: np.ndarray):
    base, expert, anti = (row.astype(np.float64) for row in rows)
    want = softmax(base + alpha * (expert - anti))
    product = softmax(base) * (softmax(expert) / softmax(anti)) ** alpha
    np.testing.assert_allclose(product / product.sum(-1, keepdims=True), want, atol=1e-9, err_msg="the paper's second form")
    for given_rows in (rows, rows + constants, np.log(softmax(np.stack([base, expert, anti])))):
        np.testing.assert_allclose(probabilities(*given_rows, alpha=alpha), want, atol=1e-4)


def test_oracle_4_tables_of_another_length_are_refused_before_anything_runs_unless_tails_are_to_be_ignored():
    """Ids that spell something else: `tests/test_proxy_command.py`, since an LM knows no strings."""
    longer = decoder(replace(SMALL, vocab_size=20))
    with pytest.raises(ConfigError, match=r"the expert has 20 vocabulary entries and the base 18.*--vocab_tail ignore"):
        proxy_lm(decoder(LARGE), longer, decoder(SMALL))
    with pytest.raises(ConfigError, match="the anti has 20 vocabulary entries and the base 18"):
        jax.eval_shape(lambda: proxy_processor(decoder(SMALL), longer).init(small(), jnp.zeros((1, 2), jnp.int32), jnp.array([2]), 18, 4))


def test_oracle_5_cached_decoding_is_the_full_prefix_again():
    done = completions(engine(), weights(), PROMPTS, num_tokens=NUM)
    for one, prompt in zip(done, PROMPTS, strict=True):
        ids, logps = by_full_prefix(prompt, prompt, prompt, 1.0)
        assert one.ids == ids
        np.testing.assert_allclose(one.logps, logps, atol=1e-5)
    assert len({token for one in done for token in one.ids}) > 2, "the models say one thing only: the test is too easy"


def test_oracle_5_for_every_alpha():
    """Only the heads know alpha: the states of one pass serve a sweep."""
    hidden = jax.jit(lambda p, tokens: proxy_lm(*trio()).apply(p, tokens).hidden)(weights(), np.array([PROMPTS[0]], np.int32))
    for alpha in (-1.0, 0.0, 0.4, 2.0):
        logits = jax.jit(lambda p, h, alpha=alpha: proxy_lm(*trio(alpha)).unembed(p).logits(h))(weights(), hidden[:, -1])
        want = distributions(PROMPTS[0], PROMPTS[0], PROMPTS[0], [], alpha)[1]
        np.testing.assert_allclose(softmax(np.asarray(logits, np.float64))[0], want, atol=1e-5)


def test_oracle_5_with_a_prompt_for_each_model():
    """Longer and shorter than the base's, in one ragged batch."""
    done = completions(engine(), {**weights(), "prompts": own()}, PROMPTS, num_tokens=NUM)
    for one, *prompts in zip(done, PROMPTS, LONGER, OTHERS, strict=True):
        ids, logps = by_full_prefix(*prompts, 1.0)
        assert one.ids == ids
        np.testing.assert_allclose(one.logps, logps, atol=1e-5)
    plain = completions(engine(), weights(), PROMPTS, num_tokens=NUM)
    assert [one.ids for one in plain] != [one.ids for one in done], "the prompts make no difference: the test is too easy"


def test_oracle_6_a_batch_is_its_rows_one_at_a_time_and_what_is_finished_stays_so():
    whole = completions(engine(), weights(), PROMPTS, num_tokens=NUM)
    stop = whole[0].ids[2]
    done = completions(engine(), weights(), PROMPTS, num_tokens=NUM, stop_ids=[stop])
    for one, prompt, free in zip(done, PROMPTS, whole, strict=True):
        alone = completions(engine(), weights(), [prompt], num_tokens=NUM, stop_ids=[stop])[0]
        assert one.ids == alone.ids == (free.ids[: free.ids.index(stop)] if stop in free.ids else free.ids)
        assert one.finish == alone.finish == ("stop" if stop in free.ids else "length")


def test_oracle_7_top_p_sees_the_proxy_not_the_base():
    base = np.log([0.9, 0.06, 0.04])
    expert, anti = np.log([0.01, 0.01, 0.98]), np.log([0.9, 0.09, 0.01])
    cut = processors.top_p(0.8)
    on_base = cut.apply(None, (), jnp.asarray(base, jnp.float32)[None])
    after = cut.apply(None, (), combine(*(jnp.asarray(x, jnp.float32)[None] for x in (base, expert, anti))))
    assert np.isfinite(on_base).tolist() == [[True, False, False]], "the base alone would lose token 2"
    assert np.isfinite(after).tolist() == [[False, False, True]]


@pytest.mark.parametrize("way", ["LM", "processor"])
def test_oracle_7_in_decoding_what_is_drawn_is_in_the_proxy_s_nucleus_and_not_always_in_the_base_s(way: str):
    outside = 0
    for one in drawn(way):
        prompts = (PROMPTS[one.prompt], LONGER[one.prompt], OTHERS[one.prompt])
        for t, token in enumerate(one.ids):
            for which, p in enumerate(distributions(*prompts, one.ids[:t])):
                p = softmax(np.log(p) / 1.3)
                before = p[p > p[token]].sum()
                assert which == 0 or before < 0.7 + 1e-6, "the proxy's own top-p lost it"
                outside += which == 0 and before > 0.7
    assert outside > 0, "no token that the base alone would have lost: the test is too easy"


def test_oracle_8_pass_at_k_is_unbiased():
    for correct, want in {0: 0.0, 1: 0.5, 3: 0.894737, **dict.fromkeys(range(11, 21), 1.0)}.items():
        assert pass_at_k(20, correct, 10) == pytest.approx(want, abs=1e-6)


def test_oracle_10_what_is_banned_stays_banned_and_nothing_is_nan():
    inf = np.inf
    cases = {  # (base, expert, anti) of token 1 -> what it becomes at alpha 1 and at alpha -1; None: the base's own
        (-inf, 0.0, 0.0): ("banned", "banned"),
        (-inf, -inf, -inf): ("banned", "banned"),
        (-inf, 0.0, -inf): ("banned", "banned"),
        (1.0, -inf, 0.0): ("banned", "kept"),
        (1.0, 0.0, -inf): ("kept", "banned"),
        (1.0, -inf, -inf): ("kept", "kept"),
    }
    for values, wanted in cases.items():
        rows = [np.array([0.5, value, -0.5]) for value in values]
        for alpha, want in zip((1.0, -1.0), wanted, strict=True):
            got = np.asarray(_combine(*(np.asarray(row, np.float32) for row in rows), alpha))
            assert not np.isnan(got).any() and np.isfinite(got[[0, 2]]).all()
            assert got[1] == (-inf if want == "banned" else 1.0), (values, alpha)
    nothing = np.full(3, -inf)
    assert np.isfinite(np.asarray(combine(jnp.zeros(3), *(jnp.asarray(nothing, jnp.float32),) * 2))).all()
    assert np.isneginf(np.asarray(combine(jnp.asarray(nothing, jnp.float32), jnp.zeros(3), jnp.ones(3)))).all()


# ------------------------------------------------------------------------------------------------- the formula


@given(FINITE, hnp.arrays(bool, (3, 2, 7)), ALPHA)
@settings(max_examples=60, deadline=None)
def test_bans_of_any_model_anywhere_give_no_nan_and_hide_no_ban_of_the_base(rows: np.ndarray, banned: np.ndarray, alpha: float):
    rows = np.where(banned, -np.inf, rows)
    got = np.asarray(_combine(*rows, alpha))
    assert not np.isnan(got).any() and not np.isposinf(got).any() and np.isneginf(got[banned[0]]).all()
    expert_alone = banned[1] & ~banned[2]
    if alpha > 1e-6:
        assert np.isneginf(got[expert_alone]).all()


def test_pairs_add_up_and_alpha_may_be_of_each_row_or_token():
    rng = np.random.default_rng(0)
    base, a, b, c, d = (jnp.asarray(row, jnp.float32) for row in rng.normal(size=(5, 2, 6)))
    per_row, per_token = jnp.array([[0.3], [1.7]]), jnp.asarray(rng.uniform(size=(2, 6)), jnp.float32)
    got = steer(base, [(pull(a, b), per_row), (pull(c, d), per_token)])
    want = base + per_row * (jax.nn.log_softmax(a) - jax.nn.log_softmax(b)) + per_token * (jax.nn.log_softmax(c) - jax.nn.log_softmax(d))
    np.testing.assert_allclose(got, want, atol=1e-5)
    masked = combine(base, a, b, jnp.where(jnp.arange(6) < 3, 1.0, 0.0))
    np.testing.assert_allclose(masked[:, 3:], base[:, 3:])


def test_the_plausibility_mask_is_the_base_s():
    base = np.log([0.5, 0.3, 0.15, 0.05])
    expert, anti = np.log([0.1, 0.1, 0.1, 0.7]), np.log([0.4, 0.3, 0.299, 0.001])
    assert probabilities(base, expert, anti, alpha=2.0).argmax() == 3, "a token that the base hardly ever says"
    for share, kept in {0.0: 4, 0.1: 4, 0.11: 3, 0.31: 2, 1.0: 1}.items():
        got = probabilities(base, expert, anti, alpha=2.0, plausible=share)
        assert (got > 0).sum() == kept and (got[:kept] > 0).all()


def test_a_base_known_by_its_top_k():
    rng = np.random.default_rng(0)
    logps = np.log(softmax(rng.normal(size=(2, 9))))
    ids = np.argsort(-logps, -1)[:, :4]
    top = np.take_along_axis(logps, ids, -1)
    expert, anti = rng.normal(size=(2, 2, 9))
    for missing, rest in (("drop", np.full((2, 1), -np.inf)), ("floor", top[:, -1:])):
        base = np.broadcast_to(rest, (2, 9)).copy()
        np.put_along_axis(base, ids, top, -1)
        got = from_top_k(jnp.asarray(ids, jnp.int32), jnp.asarray(top, jnp.float32), 9, missing)
        np.testing.assert_allclose(got, base, rtol=1e-6)
        np.testing.assert_allclose(probabilities(got, expert, anti), softmax(base + expert - anti), atol=1e-6)


@pytest.mark.parametrize(
    "alpha, plausible, says", [(np.inf, 0.0, "alpha is inf"), (np.nan, 0.0, "alpha is nan"), (1.0, 1.5, "plausible is 1.5")]
)
def test_numbers_that_are_none_are_refused(alpha: float, plausible: float, says: str):
    for make in (lambda: proxy_lm(*trio()[:3], alpha, plausible), lambda: proxy_processor(*trio()[1:3], alpha, plausible)):
        with pytest.raises(ConfigError, match=says):
            make()


# --------------------------------------------------------------------------------------------------- both ways in


def test_both_ways_write_the_same_and_each_tells_its_own_log_probabilities():
    """An LM's are the proxy's, a processor's generator tells the base's."""
    for ours, theirs in zip(drawn("LM"), drawn("processor"), strict=True):
        assert ours.ids == theirs.ids
        prompts = (PROMPTS[ours.prompt], LONGER[ours.prompt], OTHERS[ours.prompt])
        for t, token in enumerate(ours.ids):
            base, proxy = distributions(*prompts, ours.ids[:t])
            assert theirs.logps[t] == pytest.approx(np.log(base[token]), abs=1e-5)
            assert ours.logps[t] == pytest.approx(np.log(proxy[token]), abs=1e-5)
    assert len({tuple(one.ids) for one in drawn("LM")}) > len(PROMPTS), "both samples of every prompt are one"


@pytest.mark.parametrize("way", ["LM", "processor"])
def test_beams_score_by_the_proxy_and_carry_all_three_caches_along(way: str):
    if way == "LM":
        found = beam_search(engine(), {**weights(), "prompts": own()}, PROMPTS, num_tokens=4, num_beams=2)
    else:
        frozen = {**small(), "prompts": own()}
        found = beam_search(by_processor(), weights()["base"], PROMPTS, num_tokens=4, num_beams=2, frozen=frozen)
    for beams, *prompts in zip(found, PROMPTS, LONGER, OTHERS, strict=True):
        for beam in beams:
            logp = sum(np.log(distributions(*prompts, beam.ids[:t])[1][token]) for t, token in enumerate(beam.ids))
            assert beam.logp == pytest.approx(logp, abs=1e-4)
        assert beams[0].logp >= by_full_prefix(*prompts, 1.0, num=4)[1].sum() - 1e-4 or beams[0].logp > beams[1].logp


def test_a_schedule_steers_the_first_token_only():
    fades = proxy_processor(decoder(SMALL), decoder(SMALL), alpha=lambda step: jnp.where(step < 1, 1.0, 0.0))

    @jax.jit
    def two(frozen: Any, tokens: Any, lengths: Any, logits: Any, chosen: Any) -> Any:
        state = fades.init(frozen, tokens, lengths, 18, 16)
        return fades.apply(frozen, state, logits), fades.apply(frozen, fades.update(frozen, state, chosen), logits)

    tokens, base = np.array([PROMPTS[0]], np.int32), np.random.default_rng(0).normal(size=(1, 18)).astype(np.float32)
    first, second = two(small(), tokens, np.array([5]), base, np.array([2], np.int32))
    plus, minus = (next_logits(SMALL, weights()[name], PROMPTS[0]) for name in ("expert", "anti"))
    np.testing.assert_allclose(np.exp(first[0]), softmax(base[0].astype(np.float64) + plus - minus), atol=1e-5)
    np.testing.assert_allclose(np.exp(second[0]), softmax(base[0].astype(np.float64)), atol=1e-6)


def test_a_proxy_of_a_proxy_adds_a_second_difference():
    twice = proxy_lm(proxy_lm(*trio(0.5)), *trio()[1:3], 0.5)
    nested = {"base": weights(), "expert": weights()["expert"], "anti": weights()["anti"]}
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 18, (2, 7)))
    once = proxy_lm(*trio())
    both = jax.jit(
        lambda *ps: [jax.nn.log_softmax(m.unembed(p).logits(m.apply(p, tokens).hidden)) for m, p in zip((twice, once), ps, strict=True)]
    )
    got, want = both(nested, weights())
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_tails_that_are_ignored_leave_the_base_its_own_tokens():
    """A longer expert is cut; where the small tables are shorter, the base's probability stays as it is, relative to the others'."""
    rng = np.random.default_rng(1)
    for size in (16, 20):
        config = replace(SMALL, vocab_size=size)
        params = {"base": weights()["base"], "expert": random_params(config), "anti": other(random_params(config), 3)}
        lm = proxy_lm(decoder(LARGE), decoder(config), decoder(config), vocab_tail="ignore")
        row = rng.integers(0, 16, (1, 32)).astype(np.int32)
        got = np.asarray(jax.jit(lambda p, t, lm=lm: lm.unembed(p).logits(lm.apply(p, t).hidden))(params, row))[0]
        base = np.asarray(_whole(LARGE)(params["base"], row))[0]
        plus, minus = (np.asarray(_whole(config)(params[n], row))[0] for n in ("expert", "anti"))
        shared = min(size, 18)
        expected = base.copy()
        logs = [np.log(softmax(x[:, :18].astype(np.float64))) for x in (plus, minus)]
        expected[:, :shared] += (logs[0] - logs[1])[:, :shared]
        np.testing.assert_allclose(got, expected, atol=1e-4)


def test_prompts_found_by_the_base_s_row():
    longer = {tuple(prompt): own for prompt, own in zip(PROMPTS, LONGER, strict=True)}
    got = completions(with_prompts(engine(), longer), weights(), PROMPTS[::-1], num_tokens=3)
    for one, prompt, own in zip(got, PROMPTS[::-1], LONGER[::-1], strict=True):
        assert one.ids == by_full_prefix(prompt, own, prompt, 1.0, num=3)[0]


def test_prompts_of_another_number_are_refused():
    three = {"expert": own_prompts(LONGER[:3], PROMPTS[:3])}
    with pytest.raises(ConfigError, match="3 prompts of its own for a batch of 4"):
        completions(engine(), {**weights(), "prompts": three}, PROMPTS, num_tokens=2)
    with pytest.raises(ConfigError, match="3 prompts of the expert's own for 4 rows"):
        completions(by_processor(), weights()["base"], PROMPTS, num_tokens=2, frozen={**small(), "prompts": three})
    with pytest.raises(ConfigError, match="give one with a token at least for each"):
        own_prompts([[1], []], [[1], [2]])


def test_a_memory_holds_all_three():
    memory = Memory()
    prompt, seen = [3, 1, 4, 1, 5, 9, 2], []
    for more in ([6], [5]):
        told = completions(engine(), weights(), [prompt], num_tokens=4, memory=memory)[0].ids
        assert told == completions(engine(), weights(), [prompt], num_tokens=4)[0].ids
        seen.append(told)
        prompt = [*prompt, *told, *more]
    assert len(memory.ids) == len(prompt) - 2 and seen[0] != seen[1]


# ------------------------------------------------------------------------------------------------ an LM like others


def test_it_scores_as_likelihoods_of_the_full_formula():
    """Choices that share a context in one row, through the evaluation's own scorer."""
    requests = [likelihood.Request((3, 1, 4), (1, 5)), likelihood.Request((3, 1, 4), (9,)), likelihood.Request((2,), (6, 5, 3))]
    scorer = likelihood.scorer(proxy_lm(*trio(0.7)), batch_tokens=64)
    scores = likelihood.score(scorer, weights(), requests)
    for (context, continuation), score in zip(requests, scores, strict=True):
        want, greedy = 0.0, True
        for t, token in enumerate(continuation):
            row = [*context, *continuation[:t]]
            base, plus, minus = (next_logits(c, weights()[n], row) for c, n in ((LARGE, "base"), (SMALL, "expert"), (SMALL, "anti")))
            p = softmax(base + 0.7 * (plus - minus))
            want, greedy = want + np.log(p[token]), greedy and p.argmax() == token
        assert score.log_prob == pytest.approx(want, abs=1e-4) and score.is_greedy == greedy


def test_windows_and_alibi_of_a_small_model_count_for_all_three():
    windowed = replace(SMALL, layer_pattern=(LayerKind(window=4),))
    joined = joint_config(Trio(decoder(LARGE), decoder(windowed), decoder(SMALL)))
    assert [kind.window for kind in joined.layer_pattern] == [None, 4] and joined.width == 12 + 8 + 8
    assert likelihood.scorer(proxy_lm(decoder(LARGE), decoder(windowed), decoder(SMALL))).share_within == 4
    far = replace(SMALL, position="alibi", max_length=24)
    joined = joint_config(Trio(decoder(LARGE), decoder(far), decoder(far)))
    assert joined.position == "alibi" and joined.max_length == 24
    with pytest.raises(ConfigError, match="one model has learned positions and another ALiBi"):
        joint_config(Trio(decoder(replace(LARGE, position="learned")), decoder(far), decoder(far)))
    with pytest.raises(ConfigError, match="the base's mask is 'causal' and the expert's 'prefix'"):
        joint_config(Trio(decoder(LARGE), decoder(replace(SMALL, mask="prefix")), decoder(SMALL)))


def test_embeddings_in_place_of_tokens_are_refused():
    with pytest.raises(ConfigError, match="reads token ids"):
        proxy_lm(*trio()).apply(weights(), jnp.zeros((1, 2, 12)))


def test_init_makes_all_three_and_dropout_is_any_s():
    shapes = jax.eval_shape(proxy_lm(*trio()).init, jax.random.key(0))
    assert jax.tree.map(lambda leaf: leaf.shape, shapes) == jax.tree.map(lambda leaf: leaf.shape, weights())
    assert proxy_lm(decoder(LARGE), decoder(replace(SMALL, residual_dropout=0.1)), decoder(SMALL)).has_dropout
    assert not proxy_lm(*trio()).has_dropout


# --------------------------------------------------------------------------------------------------------- meshes


@pytest.mark.parametrize("way", ["LM", "processor"])
def test_a_mesh_of_2_by_4_writes_what_one_device_does(way: str):
    mesh = sharding.make_mesh(MeshConfig(data=2, model=4))
    placed = {}
    with jax.set_mesh(mesh):
        for name, params in weights().items():
            padded = sharding.pad_vocab(params, 4)
            assert padded["embed"]["tokens"].shape[0] == 20, "18 tokens over 4 shards: a padded table"
            placed[name] = jax.device_put(padded, sharding.shardings(sharding.param_specs(padded, mesh), mesh))
        spread = draw(way, placed)
    assert [one.ids for one in spread] == [one.ids for one in drawn(way)]
    np.testing.assert_allclose([one.logps for one in spread], [one.logps for one in drawn(way)], atol=1e-4)
