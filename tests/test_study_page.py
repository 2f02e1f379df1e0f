"""What is kept of a study, and what its table, its orderings and its page say."""

from __future__ import annotations

import json
import math
import os
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxllm import cli
from jaxllm.config import ConfigError
from jaxllm.study import Arm, Column, Figure, Ordering, Study, figures, page, results, running, table
from tests.runs import ROOT
from tests.studies import BASE, Trainer, go, rows_of, study, timeless, work_in


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work_in(tmp_path, monkeypatch)


# --------------------------------------------------------------------------------------- the results file


@pytest.mark.parametrize(
    "line, why",
    [
        (b"{not json", "line 2 is not a result: it is not JSON"),
        (b"[1]", "line 2 is not a result: it is not an object"),
        (b'{"study": "s"}', "its 'arm' is None"),
        (b'{"study": "s", "arm": "a", "kind": "run", "seed": "0", "lr": 1, "config": "x", "metrics": {}}', "its 'seed' is '0'"),
        (b'{"study": "s", "arm": "a", "kind": "run", "seed": 0, "lr": "1", "config": "x", "metrics": {}}', "its 'lr' is '1'"),
        (b'{"study": "s", "arm": "a", "kind": "run", "seed": 0, "lr": 1, "config": "x", "metrics": {"a": "b"}}', "its 'metrics' are"),
        (b"", "line 2 is not a result"),
    ],
)
def test_a_broken_line_is_named_and_nothing_is_written(line: bytes, why: str) -> None:
    go(study(Arm("a", BASE, seeds=(0,))), Trainer())
    path = Path("docs/results/s.jsonl")
    text = path.read_bytes() + line + b"\n" + path.read_bytes()
    path.write_bytes(text)
    with pytest.raises(ConfigError, match=r"docs/results/s\.jsonl, line 2") as refused, results.held(path):
        pass
    assert why in str(refused.value) and path.read_bytes() == text


@pytest.mark.parametrize("cut", [1, 20, 300])
def test_a_last_line_that_was_cut_off_is_set_aside_and_its_run_looked_at_again(cut: int) -> None:
    of, trainer = study(Arm("a", BASE, seeds=(0, 1))), Trainer()
    before = go(of, trainer)
    path = Path("docs/results/s.jsonl")
    text = path.read_bytes()
    path.write_bytes(text[:-cut])
    assert results.read(path) == before[:1], "a reader leaves out what is still being written"
    after = go(of, trainer)
    assert timeless(after) == timeless(before)
    assert Path("docs/results/s.jsonl.torn").read_bytes() == text[:-cut].splitlines(keepends=True)[-1].rstrip(b"\n") + b"\n"


def test_a_line_is_appended_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = go(study(Arm("a", BASE, seeds=(0,))), Trainer())
    path = Path("docs/results/s.jsonl")
    before = path.read_bytes()
    write, calls = os.write, []

    def half(descriptor: int, data: bytes) -> int:
        calls.append(len(data))
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return write(descriptor, data[: len(data) // 2])

    with results.held(path) as held, monkeypatch.context() as full_disk:
        full_disk.setattr(results.os, "write", half)
        with pytest.raises(OSError, match="No space") as full:
            held.append(row)
    assert full.value.filename == str(path) and len(calls) == 2
    assert path.read_bytes() == before


def test_a_second_process_is_refused_and_harms_nothing() -> None:
    path = Path("docs/results/s.jsonl")
    with results.held(path) as held:
        for _ in range(2):
            with pytest.raises(ConfigError, match=r"another process is writing to docs/results/s\.jsonl"), results.held(path):
                pass
            assert path.exists()
        held.append({"study": "s", "arm": "a", "kind": "run", "seed": 0, "lr": 1.0, "config": "x", "metrics": {}})
    assert len(results.read(path)) == 1


# ------------------------------------------------------------------------------------ means and orderings


def verdicts(relation: Any, left: list[float], right: list[float], tokens: int = 300_000) -> tuple[Any, str]:
    seeds = tuple(range(len(left)))
    of = study(Arm("x", BASE, seeds=seeds), Arm("y", BASE, seeds=seeds), orderings=(Ordering("x", relation, "y"),))
    rows = [row | {"tokens": tokens} for row in rows_of(of, x=left, y=right)]
    verdict = table.judge(of, of.orderings[0], {outcome.arm.name: outcome for outcome in table.outcomes(of, rows)})
    return verdict.difference, verdict.words


def test_orderings_against_numbers_worked_out_by_hand() -> None:
    # differences 0.3, 0.5, 0.4: mean 0.4, s.d. 0.1, s.e. 0.1/√3 = 0.0577; the arms themselves scatter by 1, which pairing takes out
    difference, words = verdicts("<", [1.0, 2.0, 3.0], [1.3, 2.5, 3.4])
    assert (difference.mean, difference.error, difference.num_seeds) == (pytest.approx(0.4), pytest.approx(0.1 / math.sqrt(3)), 3)
    assert words == "holds"
    assert verdicts("<=", [1.0, 2.0, 3.0], [1.3, 2.5, 3.4])[1] == "holds"
    assert verdicts("<", [1.3, 2.5, 3.4], [1.0, 2.0, 3.0])[1] == verdicts("<=", [1.3, 2.5, 3.4], [1.0, 2.0, 3.0])[1] == "does not hold"
    # differences 0.3, -0.1, 0.25: mean 0.15, s.d. 0.2179, s.e. 0.1258: above one, below two
    assert verdicts("<", [1.0, 2.0, 3.0], [1.3, 1.9, 3.25])[1] == "within noise"
    assert verdicts("<", [1.3, 1.9, 3.25], [1.0, 2.0, 3.0])[1] == "within noise"
    assert verdicts("<=", [1.3, 1.9, 3.25], [1.0, 2.0, 3.0])[1] == "holds, within noise"
    assert verdicts("<", [1.0, 1.0], [1.0, 1.0])[1] == "within noise"


def test_few_tokens_or_one_seed_claim_nothing() -> None:
    assert verdicts("<", [1.0, 2.0], [2.0, 3.1], tokens=199_999)[1] == "no claim: an arm saw 199,999 tokens, fewer than 200,000"
    assert verdicts("<", [1.0, 2.0], [2.0, 3.1], tokens=200_000)[1] == "holds"
    assert verdicts("<", [1.0], [2.0])[1] == "one seed, no claim"


def test_rows_that_began_from_different_weights_are_named() -> None:
    """An arm that prepares its own start is left out: it has weights of its own."""
    tuned = replace(BASE, init_from="cache://models/x")
    of = study(Arm("a", tuned, seeds=(0, 1)), Arm("b", tuned, seeds=(0,), prepare=lambda run: tuned))
    rows = [row | {"parent": parent} for row, parent in zip(rows_of(of, a=[1.0, 2.0], b=[3.0]), ("new", "old", "other"), strict=True)]
    assert table.mixed_bases(of, rows) == ["cache://models/x (new, old)"]
    assert "began from different weights" in page.section(of, rows, {})
    assert table.mixed_bases(of, [row | {"parent": "new"} for row in rows]) == []


def test_seeds_are_paired_and_a_given_model_compares_with_all_of_them() -> None:
    of = study(
        Arm("x", BASE, seeds=(0, 1)), Arm("y", BASE, seeds=(1, 2)), Arm("given", measure=lambda run: {}, seeds=(0,)),
        Arm("derived", measure=lambda run: {}, needs=("x",), seeds=(0, 1)),
        orderings=(Ordering("x", "<", "y"), Ordering("x", "<", "given"), Ordering("given", "<", "y"), Ordering("x", "<", "derived")),
    )  # fmt: skip
    rows = rows_of(of, x=[1.0, 1.01], y=[0, 2.0, 2.02], given=[1.5])
    rows += [row for row in rows_of(of, derived=[3.0, 3.02]) if row["arm"] == "derived"]
    found = {outcome.arm.name: outcome for outcome in table.outcomes(of, rows)}
    judged = [table.judge(of, ordering, found) for ordering in of.orderings]
    assert [(v.difference and v.difference.num_seeds, v.words) for v in judged] == [
        (1, "one seed, no claim"), (2, "holds"), (2, "holds"), (2, "holds"),
    ]  # fmt: skip
    assert judged[1].difference is not None and judged[1].difference.mean == pytest.approx(0.495)
    little = [row | {"tokens": 5} if row["arm"] == "x" else row for row in rows]
    found = {outcome.arm.name: outcome for outcome in table.outcomes(of, little)}
    assert "5 tokens" in table.judge(of, of.orderings[3], found).words and "5 tokens" in table.judge(of, of.orderings[1], found).words
    assert table.judge(of, of.orderings[2], found).words == "holds"
    assert table.judge(of, Ordering("x", "<", "y", "bleu"), found).words == "not measured"


def test_the_standard_error_is_numpys() -> None:
    values = np.random.default_rng(0).normal(size=7)
    found = table.estimate([*map(float, values)])
    assert found.mean == pytest.approx(values.mean()) and found.error == pytest.approx(values.std(ddof=1) / math.sqrt(7))
    assert table.estimate([2.0]) == table.Estimate(2.0, None, 1)


def test_the_table_and_the_page_say_what_the_rows_say() -> None:
    of = study(
        Arm("x", BASE, rates=(1e-3, 2e-3), seeds=(0, 1)), Arm("y", BASE, seeds=(0,)), Arm("z", BASE),
        columns=(Column("loss", "held-out loss", digits=2), Column("bleu", better="higher")),
        orderings=(Ordering("x", "<", "y", text="better"),),
        about="On a corpus.", paper="| arm | loss |\n|---|--:|\n| x | 1.0 |",
    )  # fmt: skip
    trainer = Trainer(lambda config: 1.0 + config.seed / 10 + (0.5 if config.optim.lr > 1e-3 else 0.0))
    with results.held(Path("docs/results/s.jsonl")) as held:
        assert running.run_missing(of, of.arms[:2], held, lambda line: None, trainer) == 0
    rows = [row | {"seconds": 5.0, "date": "2026-11-21T20:00:00+00:00"} for row in held.rows]
    assert table.table(of, rows).splitlines() == [
        "| arm | held-out loss ↓ | bleu ↑ | seeds | learning rate | trained | tokens | seconds |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
        "| x | 1.05 ± 0.05 | – | 2 | 0.001 | 10 | 1,000,000 | 5 |",
        "| y | **1.00** | – | 1 | 0.001 | 10 | 1,000,000 | 5 |",
        "| z | – | – | – | – | – | – | – |",
    ]
    text = page.section(of, [*rows, rows[0] | {"config": "other"}], {})
    assert "| better: x < y | loss | 0.00 | 1 | **one seed, no claim** |" in text
    assert "4 runs, 20 s in all, 2026-11-21;" in text, "the winner's search and run are one run"
    assert " Rows of other configurations, which are in the file and not shown here: 1." in text
    assert "x: the best rate, 0.001, is at the edge of the list; a better one may lie beyond." in text
    assert "### The paper's\n\n| arm | loss |" in text and "\n\nOn a corpus.\n\n| arm |" in text
    with pytest.raises(ConfigError, match="shows 'bleu', which none of its runs has; there are loss"):
        table.outcomes(replace(of, arms=of.arms[:2]), rows)


# ------------------------------------------------------------------------------------------------- pages


def plot(rows: Any) -> str:
    return figures.over_rates("loss", "held-out loss")(rows)


def test_a_page_is_the_same_bytes_from_the_same_lines(capsys: pytest.CaptureFixture[str]) -> None:
    of = study(Arm("x", BASE, rates=(1e-3, 2e-3, 4e-3)), figures=(Figure("rates", "Loss over the rate.", plot),))
    go(of, Trainer())
    presets = {"small": of, "debug": replace(of, name="d"), "paper": BASE}
    Path("docs/results/d.jsonl").write_text(Path("docs/results/s.jsonl").read_text().replace('"study": "s"', '"study": "d"'))
    Path("README.md").write_text("# A\n<!-- results s -->\nold\n<!-- /results -->\nB\n<!-- results of-another -->\nC\n<!-- /results -->\n")
    assert page.write("mine", presets) == 0
    made = {path.name: path.read_bytes() for path in Path("docs/results").iterdir()}
    assert set(made) == {"s.jsonl", "d.jsonl", "s-rates.svg", "mine.md"}
    assert made["mine.md"].count(b"\n## ") == 1, "debug is no result"
    assert b"![Loss over the rate.](s-rates.svg)" in made["mine.md"]
    readme = Path("README.md").read_text()
    assert readme.startswith("# A\n<!-- results s -->\n| arm |") and readme.endswith(
        "\n<!-- /results -->\nB\n<!-- results of-another -->\nC\n<!-- /results -->\n"
    )
    assert page.write("mine", presets) == 0
    assert {path.name: path.read_bytes() for path in Path("docs/results").iterdir()} == made and Path("README.md").read_text() == readme
    with pytest.raises(ConfigError, match=r"a table of 'of-another', which has no results"):
        page.with_tables(readme, page.tables(presets, Path("docs/results")))
    with pytest.raises(ConfigError, match=r"no results in docs/results for t; run one first"):
        page.write("mine", {"small": replace(of, name="t")})


def test_a_plot_is_an_svg_that_stands_alone() -> None:
    rows = [{"arm": arm, "kind": "search", "lr": lr, "metrics": {"loss": lr * 10}} for arm in ("a<b", "c") for lr in (0.1, 0.2)]
    svg = plot(rows)
    root = ET.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg" and root.get("aria-label") == "held-out loss over the learning rate"
    words = {"".join(node.itertext()).strip() for node in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"a<b", "c", "0.1", "0.2", "learning rate", "held-out loss"} <= words
    assert "prefers-color-scheme:dark" in svg and "#00000" not in svg and svg == plot(rows)


def stale(root: Path) -> list[str]:
    """What of the committed pages, plots and README tables is not what the results files give."""
    found, made, expected, folder = [], {}, set(), root / page.FOLDER
    for path in sorted((root / "experiments").glob("*.py")):
        presets = getattr(cli.load_file(path), "PRESETS", {})
        expected |= {f"{value.name}.jsonl" for value in presets.values() if isinstance(value, Study)}
        if not (folder / f"{path.stem}.md").exists():  # run, perhaps, but with no page yet
            continue
        made |= page.tables(presets, folder)
        for name, text in page.pages(path.stem, presets, folder).items():
            expected.add(name)
            if not (folder / name).exists() or (folder / name).read_text() != text:
                found.append(f"{page.FOLDER / name}: run `python -m experiments.{path.stem} page`")
    there = {path.name for path in folder.glob("*") if path.suffix in (".jsonl", ".svg", ".md")}
    found += [f"{page.FOLDER / name}: no experiment's" for name in sorted(there - expected)]
    readme = root / "README.md"
    if readme.exists() and page.with_tables(readme.read_text(), made) != readme.read_text():
        found.append("README.md: a table is not what the results give")
    return found


def test_what_is_committed_is_what_the_results_give() -> None:
    assert stale(ROOT) == []


def test_a_stale_page_is_found() -> None:
    Path("experiments").mkdir()
    Path("experiments/mine.py").write_text(
        "from jaxllm.config import TrainConfig\nfrom jaxllm.study import Arm, Study\n"
        "PRESETS = {'small': Study(name='s', title='T', arms=(Arm('a', TrainConfig(precision='float32', num_steps=5)),))}\n"
    )
    presets = cli.load_file(Path("experiments/mine.py")).PRESETS
    Path("README.md").write_text("<!-- results s -->\n<!-- /results -->\n")
    go(replace(presets["small"], columns=(Column("loss"),)), Trainer())
    rows = results.read(Path("docs/results/s.jsonl"))
    for row in rows:
        row["metrics"]["bits_per_byte"] = 1.0
    Path("docs/results/s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page.write("mine", presets)
    assert stale(Path()) == []
    text = Path("docs/results/mine.md").read_text()
    for file, old, new in (
        ("docs/results/mine.md", "1.000", "0.999"),
        ("README.md", "1.000", "0.999"),
        ("docs/results/s.jsonl", "1.0", "3.0"),
    ):
        before = Path(file).read_text()
        Path(file).write_text(before.replace(old, new))
        assert stale(Path()), file
        Path(file).write_text(before)
    assert Path("docs/results/mine.md").read_text() == text and stale(Path()) == []
    Path("docs/results/old.svg").write_text("")
    assert stale(Path()) == ["docs/results/old.svg: no experiment's"]
