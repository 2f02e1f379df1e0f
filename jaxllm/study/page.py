"""docs/results/NAME.md and the README's tables, made from the results files alone: the same bytes from the same lines."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from jaxllm.config import ConfigError, TrainConfig, nearest
from jaxllm.files import write_atomic
from jaxllm.study import results, table
from jaxllm.study.command import FOLDER
from jaxllm.study.jobs import jobs_of, settled
from jaxllm.study.values import Row, Study

MARKS = re.compile(r"(<!-- results (\S+) -->\n).*?(<!-- /results -->)", re.DOTALL)
"""Lines of the README that are a study's table."""


def studies_of(presets: Mapping[str, TrainConfig | Study]) -> list[Study]:
    """The studies whose results are kept: all but the preset `debug`, which shows that the code runs and no more."""
    return [value for name, value in presets.items() if isinstance(value, Study) and name != "debug"]


def write(name: str, presets: Mapping[str, TrainConfig | Study], root: Path = Path()) -> int:
    """Write the page of an experiment, its plots, and its tables in README.md where that has their marks.

    Args:
      name: of the experiment's file.
      root: holds docs/results and README.md.
    """
    (root / FOLDER).mkdir(parents=True, exist_ok=True)
    for file, text in pages(name, presets, root / FOLDER).items():
        write_atomic(root / FOLDER / file, text.encode())
        print(f"wrote {root / FOLDER / file}")
    readme = root / "README.md"
    if readme.exists():
        before = readme.read_text()
        after = with_tables(before, tables(presets, root / FOLDER), all_known=False)
        if after != before:
            write_atomic(readme, after.encode())
            print(f"wrote its tables in {readme}")
    return 0


def pages(name: str, presets: Mapping[str, TrainConfig | Study], folder: Path) -> dict[str, str]:
    """{file name: text} of an experiment's page and its plots, from the results files in `folder`."""
    files: dict[str, str] = {}
    used: list[str] = []
    sections: list[str] = []
    for study in studies_of(presets):
        path = folder / f"{study.name}.jsonl"
        rows = rows_of(study, folder)
        if not rows:
            continue
        used.append(path.name)
        figures = _figures(study, rows)
        files |= {file: svg for file, (_, svg) in figures.items()}
        sections.append(section(study, rows, {file: caption for file, (caption, _) in figures.items()}))
    if not used:
        raise ConfigError(f"there are no results in {folder} for {', '.join(study.name for study in studies_of(presets))}; run one first")
    links = ", ".join(f"[{file}]({file})" for file in used)
    head = f"# Results of experiments/{name}.py\n\nWritten by `python -m experiments.{name} page` from {links}; not to be edited."
    files[f"{name}.md"] = "\n\n".join([head, *sections]) + "\n"
    return files


def rows_of(study: Study, folder: Path) -> list[Row]:
    """The rows of a study in its results file."""
    return [row for row in results.read(folder / f"{study.name}.jsonl") if row["study"] == study.name]


def section(study: Study, rows: list[Row], captions: Mapping[str, str]) -> str:
    """A study's part of the page.

    Args:
      captions: of its plots, by file name.
    """
    keys = {job.key for arm in study.arms for job in jobs_of(study, arm, rows)}
    others = sum(key not in keys for key in settled(rows))
    note = f" Rows of other configurations, which are in the file and not shown here: {others}." if others else ""
    failed = [line for outcome in table.outcomes(study, rows) for line in outcome.failed]
    searched = table.searches(study, rows)
    criterion = next((c.heading or c.metric for c in study.columns if c.metric == study.criterion), study.criterion)
    parts = [f"## {study.name}: {study.title}", study.about, table.table(study, rows)]
    parts += ["Mean ± standard error of the mean over seeds; one seed has no error. " + table.cost(study, rows) + note]
    if mixed := table.mixed_bases(study, rows):
        parts += [f"**Rows began from different weights**, and do not compare: {'; '.join(mixed)}. Remove the old ones and run again."]
    if study.orderings:
        parts += ["### Orderings", table.orderings(study, rows)]
        parts += [
            "The difference is paired over the seeds that both arms have. It holds where its 95 % interval (Student's) lies above 0. "
            f"Arms that trained on fewer than {table.MIN_TOKENS:,} tokens, or with one seed, claim nothing."
        ]
    if study.paper:
        parts += ["### The paper's", study.paper]
    if searched:
        parts += [f"### Learning rates: {criterion} with seed {study.search_seed}", searched]
    parts += [f"![{caption}]({file})\n\n{caption}" for file, caption in captions.items()]
    if failed:
        parts += ["### Failed", "\n".join(f"- {line}" for line in failed)]
    return "\n\n".join(part.strip("\n") for part in parts if part)


def _figures(study: Study, rows: list[Row]) -> dict[str, tuple[str, str]]:
    """{file name: (caption, SVG)}; they see the rows of the study as it is, and those only."""
    mine = [row for outcome in table.outcomes(study, rows) for row in (*outcome.searched, *outcome.rows)]
    return {f"{study.name}-{figure.name}.svg": (figure.caption, figure.draw(mine)) for figure in study.figures if mine}


# -------------------------------------------------------------------------------------------- README


def tables(presets: Mapping[str, TrainConfig | Study], folder: Path) -> dict[str, str]:
    """{study: its table and orderings as Markdown} for those that have been run."""
    made = {}
    for study in studies_of(presets):
        if rows := rows_of(study, folder):
            made[study.name] = table.table(study, rows) + (f"\n\n{table.orderings(study, rows)}" if study.orderings else "")
    return made


def with_tables(text: str, made: Mapping[str, str], all_known: bool = True) -> str:
    """A text with what is between `<!-- results STUDY -->` and `<!-- /results -->` replaced by that study's table.

    Args:
      all_known: whether a mark of a study that is not in `made` is an error; else it is left as it is.

    Raises:
      ConfigError: a mark of a study that has no results, with the nearest.
    """

    def replaced(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        if name in made:
            return f"{begin}{made[name]}\n{end}"
        if all_known:
            raise ConfigError(f"the README has a table of '{name}', which has no results{nearest(name, made)}")
        return match[0]

    return MARKS.sub(replaced, text)
