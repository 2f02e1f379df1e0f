"""What the benchmarks of compiled steps compute besides compiling: the search for the largest batch, the plot."""

from __future__ import annotations

from xml.etree import ElementTree

from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.plan.topology import parse
from tools.bench import maxtext, scaling


@settings(max_examples=40, deadline=None)
@given(fixed=st.integers(0, 50), each=st.integers(1, 40), bend=st.integers(0, 3), first=st.integers(1, 6), room=st.integers(1, 400))
def test_the_largest_batch_is_found_wherever_it_is(fixed: int, each: int, bend: int, first: int, room: int):
    """Of sizes that grow, also faster than the line that the search expects."""
    size = lambda b: fixed + each * b + bend * b * b // 4
    fits = lambda b: size(b) if size(b) <= room else None
    expected = max((b for b in range(1, 500) if size(b) <= room), default=0)
    assert maxtext.largest(fits, room, first) == expected


def test_the_largest_batch_takes_few_compilations():
    tried: set[int] = set()

    def total(batch: int) -> int | None:
        tried.add(batch)
        return 1000 + 790 * batch if 1000 + 790 * batch <= 16_900 else None

    assert maxtext.largest(total, 16_900, 4) == 20 and len(tried) <= 4


def test_the_plot_shows_every_size_and_line():
    sizes = [parse(name, number) for name, number in scaling.SIZES]
    svg = scaling.plot([scaling.Point(machine, {"all-gather": 3.0}, 0.1, 2.5, 1.0, 1.0) for machine in sizes])
    words = {element.text for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")}
    assert {"16", "64", "256", "1,024", "in-slice, compiled", "in-slice, by arithmetic", "between slices, compiled"} <= words
