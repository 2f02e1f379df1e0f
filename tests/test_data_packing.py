"""Packing plans: every prediction of every document exactly once, nothing overlaps, nothing overflows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.data.packing import Plan, combine, first_fit, make_plan, permute

LENGTHS = st.lists(st.integers(2, 40), min_size=1, max_size=30)


def plan_of(lengths, limit, packing, separate, key=3, documents=None):
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    documents = np.arange(len(lengths)) if documents is None else documents
    return make_plan(offsets, documents, limit, packing, separate=separate, key=key), offsets


def inputs(plan):
    """Every (row, token) pair that is an input, piece by piece."""
    return [(row, t) for row in range(plan.num_rows) for p in range(plan.rows[row], plan.rows[row + 1])
            for t in range(plan.starts[p], plan.starts[p] + plan.lengths[p])]  # fmt: skip


@given(LENGTHS, st.integers(2, 16), st.sampled_from(["first_fit", "concatenate", "none"]), st.booleans(), st.integers(0, 5) | st.none())
@settings(max_examples=150, deadline=None)
def test_every_prediction_is_in_exactly_one_row(lengths, limit, packing, separate, key):
    plan, offsets = plan_of(lengths, limit, packing, separate, key)
    ends = set(offsets[1:].tolist())
    predicted = sorted(t + 1 for _, t in inputs(plan) if t + 1 not in ends)
    # Brute force: all tokens but each document's first are predicted by the token before them.
    assert predicted == [t for d, n in enumerate(lengths) for t in range(offsets[d] + 1, offsets[d] + n)]
    sizes = np.add.reduceat(plan.lengths, plan.rows[:-1])
    assert plan.rows[0] == 0 and plan.rows[-1] == len(plan.starts) and (np.diff(plan.rows) > 0).all()
    assert sizes.max() <= limit and plan.lengths.min() >= 1
    for start, length in zip(plan.starts, plan.lengths, strict=True):  # no piece leaves its document
        document = np.searchsorted(offsets, start, side="right") - 1
        assert start + length <= offsets[document + 1] - (separate and packing != "concatenate")
    if packing == "none":
        assert (np.diff(plan.rows) == 1).all()
    if packing == "concatenate":
        assert (sizes[:-1] == limit).all() and len(inputs(plan)) == sum(lengths)


@given(st.lists(st.integers(1, 12), max_size=60), st.integers(12, 20))
@settings(max_examples=150, deadline=None)
def test_first_fit_is_the_tightest_row_of_all(lengths, capacity):
    rows = []
    for length in lengths:
        fitting = [r for r in range(len(rows)) if sum(rows[r]) + length <= capacity]
        tightest = max((sum(rows[r]) for r in fitting), default=None)
        rows.append([]) if not fitting else None
        candidates = [r for r in fitting if sum(rows[r]) == tightest] or [len(rows) - 1]
        rows[candidates[-1]].append(length)  # which of several equal rows does not change how full they get
    got = first_fit(np.array(lengths, np.int64), capacity)
    fill = np.bincount(got, lengths).astype(int).tolist() if lengths else []
    assert sorted(fill) == sorted(map(sum, rows))
    opened = [int(r) for i, r in enumerate(got) if r not in got[:i]]
    assert opened == list(range(len(opened)))


def test_first_fit_leaves_little_padding_and_is_fast():
    lengths = np.random.default_rng(0).lognormal(4.5, 1.2, 100_000).astype(np.int64).clip(1, 512)
    row = first_fit(lengths, 512)
    assert lengths.sum() / ((row.max() + 1) * 512) > 0.99


def test_each_epoch_has_its_own_order_and_only_documents_asked_for():
    lengths = [5, 9, 30, 2, 7, 7, 7]
    plans = [plan_of(lengths, 10, "first_fit", True, key=combine(0, epoch), documents=np.array([0, 2, 4, 5, 6]))[0] for epoch in range(4)]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    for plan in plans:
        owners = set((np.searchsorted(offsets, plan.starts, side="right") - 1).tolist())
        assert owners == {0, 2, 4, 5, 6}
    assert len({tuple(plan.starts.tolist()) for plan in plans}) == 4
    again = plan_of(lengths, 10, "first_fit", True, key=combine(0, 1), documents=np.array([0, 2, 4, 5, 6]))[0]
    assert again.starts.tolist() == plans[1].starts.tolist()


def test_unshuffled_concatenation_is_the_text_itself():
    plan, _ = plan_of([3, 4, 2, 8], 5, "concatenate", False, key=None)
    assert [t for _, t in inputs(plan)] == list(range(17))
    assert plan.rows.tolist() == [0, 2, 5, 6, 7] and plan.lengths.tolist() == [3, 2, 2, 2, 1, 5, 2]


def test_plans_survive_the_disk(tmp_path):
    plan, _ = plan_of([5, 9, 30], 10, "first_fit", True)
    plan.save(tmp_path)
    again = Plan.load(tmp_path)
    assert isinstance(again.starts, np.memmap)
    for name in ("starts", "lengths", "rows"):
        np.testing.assert_array_equal(getattr(again, name), getattr(plan, name))


@given(st.integers(1, 700), st.integers(0, 2**70))
@settings(max_examples=100, deadline=None)
def test_permute_is_a_permutation_that_seeks(num, key):
    whole = permute(np.arange(num), num, key)
    assert sorted(whole.tolist()) == list(range(num))
    assert permute(np.array([num // 2]), num, key)[0] == whole[num // 2]


@pytest.mark.parametrize("num", [4096, 5000])
def test_permute_looks_random(num):
    whole = permute(np.arange(num), num, combine(1))
    assert abs(np.corrcoef(whole, np.arange(num))[0, 1]) < 4 / np.sqrt(num)
    assert abs(np.mean(whole[1:] > whole[:-1]) - 0.5) < 4 / np.sqrt(12 * num) * 1.5
    assert np.mean(whole == permute(np.arange(num), num, combine(2))) < 0.01


def test_orders_do_not_change_between_releases():
    """A checkpoint's position means the same rows for ever."""
    assert permute(np.arange(8), 8, 7).tolist() == [2, 7, 6, 0, 3, 1, 5, 4]
    assert combine(1, 2, 3) == 3592312200069816221
