"""What a study's rows say: means with their standard errors, and whether the orderings hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxllm.config import ConfigError, nearest
from jaxllm.metrics import duration
from jaxllm.study.jobs import best_rate, jobs_of, settled
from jaxllm.study.values import Arm, Column, Ordering, Row, Study

MIN_TOKENS = 200_000
"""An ordering over arms that trained on fewer claims nothing."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds."""

    mean: float
    error: float | None
    """Standard error of the mean; None for one seed."""
    num_seeds: int


@dataclass(frozen=True)
class Outcome:
    """An arm's line of the table."""

    arm: Arm
    rows: tuple[Row, ...]
    """Those of its seeds, at the best rate."""
    searched: tuple[Row, ...]
    """Those of its search, in the order of the rates."""
    failed: tuple[str, ...]

    def values(self, metric: str) -> dict[int, float]:
        """The metric by seed, where it is finite."""
        found = {row["seed"]: row["metrics"].get(metric) for row in self.rows}
        return {seed: value for seed, value in found.items() if value is not None}


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error, s / √n with s² = Σ (x - mean)² / (n - 1).

    >>> estimate([1.0, 3.0])
    Estimate(mean=2.0, error=1.0, num_seeds=2)
    """
    n = len(values)
    mean = math.fsum(values) / n
    error = math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (n - 1) / n) if n > 1 else None
    return Estimate(mean, error, n)


def outcomes(study: Study, rows: Sequence[Row]) -> list[Outcome]:
    """One for each arm, in the study's order; rows of other configurations are left out.

    Raises:
      ConfigError: every arm has been run, and no row has a metric that is to be shown.
    """
    there = settled(rows)
    last = {(row["arm"], row["kind"], row["seed"], row["lr"], row["config"]): row for row in rows}
    found = []
    for arm in study.arms:
        jobs = [job for job in jobs_of(study, arm, rows) if job.fingerprint]
        mine = [(job, there[job.key]) for job in jobs if job.key in there]
        good = [(job, row) for job, row in mine if not row.get("failed")]
        lines = [
            f"{job}: {row['failed']}"
            for job in jobs
            if (row := last.get((arm.name, job.kind, job.seed, job.lr, job.fingerprint))) and row.get("failed")
        ]
        found.append(
            Outcome(
                arm, tuple(row for job, row in good if job.kind != "search"), tuple(row for job, row in mine if job.kind == "search"),
                tuple(lines),
            )
        )  # fmt: skip
    if all(outcome.rows for outcome in found):
        metrics = list(dict.fromkeys(name for outcome in found for row in outcome.rows for name in row["metrics"]))
        for column in study.columns:
            if column.metric not in metrics:
                near = nearest(column.metric, metrics) or f"; there are {', '.join(metrics)}"
                raise ConfigError(f"study '{study.name}' shows '{column.metric}', which none of its runs has{near}")
    return found


def mixed_bases(study: Study, rows: Sequence[Row]) -> list[str]:
    """Weights that arms began from, of which the rows that are shown know more than one fingerprint: they do not compare."""
    found: dict[str, set[str]] = {}
    for outcome in outcomes(study, rows):
        config = outcome.arm.config
        if config is not None and config.init_from and outcome.arm.prepare is None:
            found.setdefault(config.init_from, set()).update(
                row["parent"] for row in (*outcome.searched, *outcome.rows) if row.get("parent")
            )
    return [f"{path} ({', '.join(sorted(prints))})" for path, prints in found.items() if len(prints) > 1]


def tokens_seen(study: Study, found: Mapping[str, Outcome], name: str) -> float:
    """The fewest tokens that a run of the arm trained on; of a derived arm, that those it needs did; infinite where nothing is trained."""
    arm = study.arm(name)
    if arm.config is not None:
        return min((row["tokens"] for row in found[name].rows), default=0)
    return min((tokens_seen(study, found, other) for other in arm.needs), default=math.inf)


@dataclass(frozen=True)
class Verdict:
    """How an ordering came out."""

    difference: Estimate | None
    """right - left, paired over the seeds that both have."""
    words: str


def judge(study: Study, ordering: Ordering, found: Mapping[str, Outcome]) -> Verdict:
    """Whether an ordering holds: the mean of right - left over common seeds, against its 95 % interval by Student's distribution.

    '<' holds where the interval lies above 0, '<=' where it does not lie below. With three seeds it is ±4.3 standard errors.
    """
    left, right = (found[name].values(ordering.metric) for name in (ordering.left, ordering.right))
    if found[ordering.left].arm.is_constant and left:
        left = dict.fromkeys(right, next(iter(left.values())))
    if found[ordering.right].arm.is_constant and right:
        right = dict.fromkeys(left, next(iter(right.values())))
    common = [seed for seed in left if seed in right]
    if not common:
        return Verdict(None, "not measured")
    difference = estimate([right[seed] - left[seed] for seed in common])
    fewest = min(tokens_seen(study, found, name) for name in (ordering.left, ordering.right))
    if fewest < MIN_TOKENS:
        return Verdict(difference, f"no claim: an arm saw {fewest:,.0f} tokens, fewer than {MIN_TOKENS:,}")
    if difference.error is None:
        return Verdict(difference, "one seed, no claim")
    from scipy.special import stdtrit  # a second, for which --help would wait

    reach = float(stdtrit(len(common) - 1, 0.975)) * difference.error
    if difference.mean > reach:
        return Verdict(difference, "holds")
    if difference.mean < -reach:
        return Verdict(difference, "does not hold")
    return Verdict(difference, "within noise" if ordering.relation == "<" else "holds, within noise")


# ------------------------------------------------------------------------------------------ Markdown


def table(study: Study, rows: Sequence[Row]) -> str:
    """The study's table as Markdown: mean ± standard error over seeds, the best of each column bold."""
    found = outcomes(study, rows)
    best = {column.metric: _best(column, found) for column in study.columns}
    arrows = {"lower": " ↓", "higher": " ↑", "neither": ""}
    headings = ["arm", *(f"{c.heading or c.metric}{arrows[c.better]}" for c in study.columns)]
    headings += ["seeds", "learning rate", "trained", "tokens", "seconds"]
    lines = [_line(headings), "|---" + "|--:" * (len(headings) - 1) + "|"]
    if study.ranked:
        found.sort(key=lambda outcome: min(outcome.values(study.criterion).values(), default=math.inf))
    for outcome in found:
        cells = [_cell(column, outcome, best[column.metric]) for column in study.columns]
        lines.append(_line([outcome.arm.name, *cells, *_run_cells(study, outcome, rows)]))
    return "\n".join(lines)


def _run_cells(study: Study, outcome: Outcome, rows: Sequence[Row]) -> list[str]:
    if not outcome.rows:
        return ["–"] * 5
    mean = lambda name: estimate([row[name] for row in outcome.rows]).mean
    rate = best_rate(study, outcome.arm, rows)
    trained = outcome.rows[0].get("num_trained")
    return [
        str(len(outcome.rows)),
        "–" if rate is None else f"{rate:g}",
        "–" if trained is None else f"{trained:,}",
        "–" if outcome.arm.config is None else f"{mean('tokens'):,.0f}",
        f"{mean('seconds'):,.0f}",
    ]


def _cell(column: Column, outcome: Outcome, best: float | None) -> str:
    values = list(outcome.values(column.metric).values())
    if not values:
        return "failed" if outcome.failed and not outcome.rows else "–"
    value = estimate(values)
    text = plus_minus(value, column.digits)
    return f"**{text}**" if value.mean == best else text


def _best(column: Column, found: Sequence[Outcome]) -> float | None:
    means = [estimate(list(values.values())).mean for outcome in found if (values := outcome.values(column.metric))]
    if column.better == "neither" or len(means) < 2:
        return None
    return min(means) if column.better == "lower" else max(means)


def plus_minus(value: Estimate, digits: int) -> str:
    """A mean and its error with so many digits.

    >>> plus_minus(Estimate(3.14159, 0.0123, 3), 3), plus_minus(Estimate(3.14159, None, 1), 1)
    ('3.142 ± 0.012', '3.1')
    """
    return f"{value.mean:.{digits}f}" + ("" if value.error is None else f" ± {value.error:.{digits}f}")


def orderings(study: Study, rows: Sequence[Row]) -> str:
    """The study's orderings as Markdown: the claim, the paired difference, and the verdict."""
    found = {outcome.arm.name: outcome for outcome in outcomes(study, rows)}
    digits = {column.metric: column.digits for column in study.columns}
    lines = [_line(["expected", "by", "right − left", "seeds", "verdict"]), "|---|---|--:|--:|---|"]
    for ordering in study.orderings:
        verdict = judge(study, ordering, found)
        value = verdict.difference
        cells = ["–", "–"] if value is None else [plus_minus(value, digits[ordering.metric]), str(value.num_seeds)]
        relation = f"{ordering.left} {ordering.relation.replace('<=', '≤')} {ordering.right}"
        claim = f"{ordering.text}: {relation}" if ordering.text else relation
        lines.append(_line([claim, ordering.metric, *cells, f"**{verdict.words}**"]))
    return "\n".join(lines)


def searches(study: Study, rows: Sequence[Row]) -> str:
    """The learning-rate searches as Markdown, and which best rates lie at an edge; empty where nothing was searched."""
    found = [outcome for outcome in outcomes(study, rows) if outcome.searched]
    if not found:
        return ""
    rates = sorted({rate for outcome in found for rate in outcome.arm.rates})
    lines = [_line(["arm", *(f"{rate:g}" for rate in rates)]), "|---" + "|--:" * len(rates) + "|"]
    notes = []
    for outcome in found:
        best = best_rate(study, outcome.arm, rows)
        cells = dict.fromkeys(rates, "")
        for row in outcome.searched:
            value = row.get("metrics", {}).get(study.criterion)
            text = "diverged" if row.get("failed") else "not finite" if value is None else f"{value:.3f}"
            cells[row["lr"]] = f"**{text}**" if row["lr"] == best else text
        lines.append(_line([outcome.arm.name, *cells.values()]))
        if best is not None and best in (min(outcome.arm.rates), max(outcome.arm.rates)):
            notes.append(f"{outcome.arm.name}: the best rate, {best:g}, is at the edge of the list; a better one may lie beyond.")
    others: dict[str, list[str]] = {}
    for arm in study.arms:
        if arm.config is not None and len(arm.rates) < 2:
            others.setdefault(f"At the rate of {arm.rate_of}" if arm.rate_of else "At one rate, not searched", []).append(arm.name)
    notes += [f"{how}: {'; '.join(names)}." for how, names in others.items()]
    return "\n".join(lines) + "".join(f"\n\n{note}" for note in notes)


def cost(study: Study, rows: Sequence[Row]) -> str:
    """When, where and from which commits the rows are, and how long they took in all, as a sentence."""
    used = [row for outcome in outcomes(study, rows) for row in (*outcome.searched, *outcome.rows)]
    if not used:
        return "Not run yet."
    # A search's winner has two rows; the later one's seconds hold the other's.
    seconds = {(row["arm"], row["seed"], row["lr"], row["config"]): row["seconds"] for row in used}
    dates = sorted(row["date"][:10] for row in used)
    several = lambda name: ", ".join(sorted({str(row[name]) for row in used if row.get(name) is not None}))
    commits = ", ".join(sorted({row["commit"].replace(row["commit"][:40], row["commit"][:10]) for row in used}))
    return (
        f"{len(seconds)} runs, {duration(math.fsum(seconds.values()))} in all, {' to '.join(sorted({dates[0], dates[-1]}))}; "
        f"{several('device')}, {several('precision')}, JAX {several('jax')}; commit {commits}."
    )


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
