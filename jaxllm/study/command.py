"""The words of a study's command: which arms, which file, run or list."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jaxllm.config import ConfigError, TrainConfig, nearest
from jaxllm.flags import parse_flags
from jaxllm.study.values import Arm, Study

USAGE = """  --only REGEX      the arms whose whole name matches, and those that they need
  --out FILE        the results file; docs/results/STUDY.jsonl where it is not given
  --list            print what is done and what would run
  --FIELD VALUE …   a field of every arm's config, e.g. --num_steps 50; other values are other rows"""

FOLDER = Path("docs/results")
"""Of results files and pages, under the current directory."""


@dataclass(frozen=True)
class Options:
    """What a study's command takes besides the fields of the configurations."""

    only: str = ""
    out: str = ""
    list: bool = False


def split_words(words: Sequence[str]) -> tuple[Options, list[str]]:
    """(the study's own options, the words of the configurations).

    Raises:
      ConfigError: an option of the study's without its value.
    """
    own: list[str] = []
    others: list[str] = []
    target = others
    for word in words:
        if word.startswith("--"):
            target = own if word[2:].partition("=")[0] in ("only", "out", "list") else others
        target.append(word)
    return parse_flags(Options(), own, "study"), others


def overridden(study: Study, words: Sequence[str], program: str) -> Study:
    """The study with flags applied to every arm that trains. A learning rate or a seed among them is the only one tried.

    Raises:
      ConfigError: as `parse_flags`.
    """
    if not words:
        return study
    given = {word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")}

    def change(arm: Arm) -> Arm:
        if arm.config is not None:
            arm = replace(arm, config=parse_flags(arm.config, words, program))
        if arm.config is not None and "optim.lr" in given:
            arm = replace(arm, rates=(), rate_of="")
        return replace(arm, seeds=(seed,)) if "seed" in given and not arm.is_constant else arm

    seed = parse_flags(first_config(study)[0], words, program).seed
    study = replace(study, arms=tuple(map(change, study.arms)))
    return replace(study, search_seed=seed) if "seed" in given else study


def chosen(study: Study, pattern: str) -> list[Arm]:
    """The arms that `--only` names, each after what it needs.

    Raises:
      ConfigError: not a regular expression, or none matches (with the nearest).
    """
    names = [arm.name for arm in study.arms]
    try:
        matching = [name for name in names if re.fullmatch(pattern or ".*", name)]
    except re.error as error:
        raise ConfigError(f"--only '{pattern}' is not a regular expression: {error}") from None
    if not matching:
        raise ConfigError(f"--only '{pattern}' matches no arm{nearest(pattern, names) or ';'} arms: {', '.join(names)}")
    return study.in_order(matching)


def first_config(study: Study) -> tuple[TrainConfig, Callable[..., object] | None]:
    """(config, build) of the first arm that trains, which `jaxllm plan` plans.

    Raises:
      ConfigError: none does.
    """
    for arm in study.arms:
        if arm.config is not None:
            return arm.config, arm.build
    raise ConfigError(f"no arm of study '{study.name}' trains anything, so it has no configuration")


def run(study: Study, words: Sequence[str], program: str) -> int:
    """Run what is missing of a study, or list it; then print its table. Returns the exit status."""
    options, others = split_words(words)
    if {"-h", "--help"} & {*others}:
        print(f"usage: {program} [--only REGEX] [--out FILE] [--list] [--FIELD VALUE …]\n\n{USAGE}\n")
        parse_flags(first_config(study)[0], ["--help"], program)
    study = overridden(study, others, program)
    arms = chosen(study, options.only)
    path = Path(options.out or FOLDER / f"{study.name}.jsonl")
    from jaxllm.study import results

    if options.list:
        print(listing(study, arms, path))
        return 0
    import jax

    from jaxllm import hosts
    from jaxllm.study import running, table

    hosts.start()
    if jax.process_count() > 1:
        raise ConfigError("a study runs in one process, and there are several; run it on one host, or train its arms as runs of their own")
    say = lambda line: print(line, flush=True)
    with results.held(path, say) as held:
        mine = replace(held, rows=[row for row in held.rows if row["study"] == study.name])
        say(f"{study.title}\n{running.progress(study, arms, mine.rows)}; results: {path}")
        status = running.run_missing(study, arms, mine, say, overrides=others)
        if status < 128:
            say(f"\n{table.table(study, mine.rows)}")
            if study.orderings:
                say(f"\n{table.orderings(study, mine.rows)}")
            for line in running.failures(study, arms, mine.rows):
                say(f"failed: {line}")
    return status


def listing(study: Study, arms: Sequence[Arm], path: Path) -> str:
    """What is done and what would run, one line for each job."""
    from jaxllm.study import results, running
    from jaxllm.study.jobs import jobs_of, key_of, settled

    rows = [row for row in results.read(path) if row["study"] == study.name]
    there, last = settled(rows), {key_of(row): row for row in rows}
    lines = [f"{study.title}\n{running.progress(study, arms, rows)}; results: {path}"]
    for job in (job for arm in arms for job in jobs_of(study, arm, rows)):
        row = last.get(job.key) if job.fingerprint else None
        stands = "failed" if row and row.get("failed") else "done"
        state = "next" if row is None else stands if job.key in there else "again"
        about = running.outcome(study, row) if row else f"{running.num_tokens(job.config):,} tokens" if job.config else "nothing to train"
        lines.append(f"  {state:6}  {job.kind:7}  {job}  {about}")
    return "\n".join(lines)
