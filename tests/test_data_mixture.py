"""Mixtures, ramps and positions: all by cumulative sums, so that seeking equals streaming."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.config import ConfigError, DataConfig, SourceConfig
from jaxllm.data.mixture import Order, Shares
from jaxllm.data.position import Position
from jaxllm.data.ramp import Ramp

WEIGHTS = st.lists(st.floats(0.001, 1000), min_size=1, max_size=6)


def config(num_sources, **fields):
    return DataConfig(sources=tuple(SourceConfig(kind="stdlib") for _ in range(num_sources)), **fields)


@given(WEIGHTS, st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_any_prefix_has_the_right_proportions_to_within_two_rows(weights, zeros):
    weights = [*weights, *[0.0] * zeros]
    shares = Shares([(0, weights)])
    dealt = [shares.locate(row) for row in range(400)]
    counts = np.zeros(len(weights), int)
    exact = np.array(weights) / sum(weights)
    for row, (source, index) in enumerate(dealt):
        assert index == counts[source]  # each source's rows are dealt in order, none twice, none left out
        counts[source] += 1
        assert np.abs(counts - exact * (row + 1)).max() < 2
    for row in (10**6 + 1, 10**12 + 7):  # far away: no drift
        source, index = shares.locate(row)
        assert abs(index - exact[source] * row) < 2 + 1e-6 * row * np.finfo(float).eps * 1e6


def test_two_sources_are_never_off_by_more_than_half_a_row():
    shares = Shares([(0, (0.7, 0.3))])
    counts = np.zeros(2)
    for row in range(1000):
        counts[shares.locate(row)[0]] += 1
        assert np.abs(counts - np.array([0.7, 0.3]) * (row + 1)).max() <= 0.5 + 1e-9


@given(st.lists(st.tuples(st.integers(1, 50), WEIGHTS.filter(lambda w: len(w) >= 3)), min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_a_schedule_goes_on_where_each_source_was(phases):
    firsts = np.cumsum([0, *(length for length, _ in phases)])[: len(phases)].tolist()
    schedule = [(first, weights[:3]) for first, (_, weights) in zip(firsts, phases, strict=True)]
    shares = Shares(schedule)
    counts = [0, 0, 0]
    for row in range(250):
        source, index = shares.locate(row)
        assert index == counts[source]
        counts[source] += 1


def sizes_of(source, epoch):
    return [[5, 3, 8][source], [4, 3, 9][source]][epoch % 2]


@given(st.sampled_from(["concatenate", "weighted"]), st.integers(0, 3) | st.none(), st.lists(st.integers(0, 100), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_seeking_equals_streaming(mixture, key, wanted):
    made = config(3, mixture=mixture, mixture_schedule=((0, (2.0, 1.0, 1.0)), (20, (0.0, 1.0, 3.0))) if mixture == "weighted" else ())
    stream = Order(made, sizes_of, key)
    streamed = [tuple(int(v[0]) for v in stream.places(np.array([row]))) for row in range(101)]
    fresh = Order(made, sizes_of, key).places(np.array(wanted))
    assert [tuple(map(int, place)) for place in zip(*fresh, strict=True)] == [streamed[row] for row in wanted]


@pytest.mark.parametrize("key", [None, 1])
def test_concatenated_sources_give_every_row_once_an_epoch(key):
    order = Order(config(3), sizes_of, key)
    places = order.places(np.arange(16 + 16 + 16))
    rows = list(zip(*(part.tolist() for part in places), strict=True))
    for epoch in range(3):
        part = rows[16 * epoch : 16 * (epoch + 1)]
        assert sorted(part) == [(s, epoch, r) for s in range(3) for r in range(sizes_of(s, epoch))]
    mine = [(s, r) for s, _, r in rows]
    assert (key is None) == (mine[:5] == [(0, r) for r in range(5)])
    assert order.epoch_rows(1) == 16


def test_every_epoch_and_source_has_an_order_of_its_own():
    made = config(2, mixture="weighted")
    places = Order(made, lambda source, epoch: 20, 1).places(np.arange(80))
    orders = {tuple(places.row[(places.source == s) & (places.epoch == e)].tolist()) for s in range(2) for e in range(2)}
    assert len(orders) == 4 and all(sorted(order) == list(range(20)) for order in orders)


def test_weighted_sources_run_through_their_own_epochs():
    order = Order(config(3, mixture="weighted"), sizes_of, 1)
    places = order.places(np.arange(300))
    for source in range(3):
        mine = [(e, r) for s, e, r in zip(*places, strict=True) if s == source]
        expected = [(e, r) for e in range(40) for r in range(sizes_of(source, e))][: len(mine)]
        assert [e for e, _ in mine] == [e for e, _ in expected]
        first = sizes_of(source, 0)
        assert sorted(mine[:first]) == expected[:first]


def test_no_epoch_is_planned_before_it_is_needed():
    asked = []
    order = Order(config(1), lambda source, epoch: asked.append(epoch) or 10, 0)
    order.places(np.arange(10))
    assert set(asked) == {0}
    order.places(np.array([25]))
    assert set(asked) == {0, 1, 2}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mixture_schedule": ((0, (1.0,)),)}, "1 weights from row 0 and there are 2 sources"),
        ({"mixture_schedule": ((0, (1.0, -1.0)),)}, "must be 0 or more"),
        ({"mixture_schedule": ((5, (0.0, 0.0)),)}, r"from row 5 are \(0.0, 0.0\)"),
        ({"mixture_schedule": ((5, (1.0, 1.0)), (5, (1.0, 1.0)))}, "row 5 after row 5"),
    ],
)
def test_impossible_mixtures_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        Order(config(2, mixture="weighted", **fields), sizes_of, 0)


# ------------------------------------------------------------------------------------------- ramp


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=4), st.integers(1, 9))
@settings(max_examples=50, deadline=None)
def test_a_ramp_counts_rows_as_a_loop_would(phases, last):
    ramp = Ramp(DataConfig(batch_ramp=tuple(phases), batch_size=last))
    sizes = [size for steps, size in phases for _ in range(steps)] + [last] * 20
    assert [ramp.batch_size(i) for i in range(len(sizes))] == sizes
    assert [ramp.first_row(i) for i in range(len(sizes))] == np.cumsum([0, *sizes])[:-1].tolist()
    assert ramp.sizes == set(sizes)


def test_palms_ramp():
    ramp = Ramp(DataConfig(batch_ramp=((50_000, 512), (65_000, 1024)), batch_size=2048))
    assert [ramp.batch_size(i) for i in (0, 49_999, 50_000, 114_999, 115_000, 10**7)] == [512, 512, 1024, 1024, 2048, 2048]
    assert ramp.first_row(255_000) * 2048 == 775_946_240_000  # 775.9 B tokens
    with pytest.raises(ConfigError, match="0 steps of 4 rows"):
        Ramp(DataConfig(batch_ramp=((0, 4),)))


# --------------------------------------------------------------------------------------- position


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 10)), max_size=6))
@settings(max_examples=100, deadline=None)
def test_the_batch_id_is_the_stepth_one_not_skipped(ranges):
    position = Position()
    gone = set()
    for first, length in ranges:
        position = position.skip(first, first + length)
        gone |= set(range(first, first + length))
    left = [id for id in range(120) if id not in gone]
    seen = []
    for _ in range(50):
        seen.append(position.batch_id)
        position = position.following()
    assert seen == left[:50]
    assert Position.from_json(json.loads(json.dumps(position.to_json()))) == position
    assert all(a < b for a, b in position.skipped) and list(position.skipped) == sorted(position.skipped)
