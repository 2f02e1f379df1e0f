"""A paper's experiment as values: arms that are trained and measured, the numbers to show, the orderings to expect.

Nothing here imports JAX: a file of experiments is read to print its help.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from jaxllm.config import ConfigError, TrainConfig, check_choices, nearest

type Row = dict[str, Any]
"""One line of a results file; `metrics` holds the numbers that were measured, by name."""
type Build = Callable[..., Any]
"""(config, precision=…) -> step.Experiment"""


@dataclass(frozen=True)
class Run:
    """One arm at one seed, as its own functions see it."""

    config: TrainConfig | None
    """With its seed and learning rate; None where nothing is trained."""
    run_dir: Path
    """Where it trains, or has trained; a derived arm may keep files there."""
    seed: int
    needs: Mapping[str, Run] = field(default_factory=dict)
    """The runs of the same seed that the arm needs, by the name of their arm."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Of one that is needed: the numbers of its row."""
    say: Callable[[str], None] = print


def reseeded(config: TrainConfig, seed: int) -> TrainConfig:
    """`config` with another seed: of the weights, the order of the data, and dropout."""
    return replace(config, seed=seed)


def starting_from(name: str) -> Callable[[Run], TrainConfig]:
    """An `Arm.prepare`: the weights of the arm `name`, which must be among `Arm.needs`, start this one."""

    def prepare(run: Run) -> TrainConfig:
        assert run.config is not None
        return replace(run.config, init_from=str(run.needs[name].run_dir))

    return prepare


@dataclass(frozen=True)
class Arm:
    """One line of a study's table: what is trained, at which learning rates and seeds, and what is measured of it."""

    name: str
    """As the table shows it; unique in its study."""
    config: TrainConfig | None = None
    """None: a derived arm, which trains nothing and has only `measure`."""
    build: Build | None = None
    """(config, precision=…) -> Experiment; None means `pretrain.experiment`, without samples and baselines."""
    rates: tuple[float, ...] = ()
    """Learning rates to search; empty means `config.optim.lr`."""
    rate_of: str = ""
    """An arm whose best rate this one takes, instead of a search of its own."""
    seeds: tuple[int, ...] = (0, 1, 2)
    vary: Callable[[TrainConfig, int], TrainConfig] = reseeded
    """(config, seed) -> config. Arms with little data also draw other data."""
    needs: tuple[str, ...] = ()
    """Arms whose run of the same seed this one uses (or whose only one, where they have one seed). They come first."""
    prepare: Callable[[Run], TrainConfig] | None = None
    """The config once what it needs is there, e.g. with `init_from` set to another arm's run directory."""
    measure: Callable[[Run], Mapping[str, float]] | None = None
    """Numbers beyond those of the loop's last evaluation, e.g. BLEU."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[^/|\s](?:[^/|\n]*[^/|\s])?", self.name):
            raise ConfigError(f"an arm's name is {self.name!r}; it stands in a table and names a folder, so it may not hold '/' or '|'")
        if self.config is None and self.measure is None:
            raise ConfigError(f"arm '{self.name}' has neither a config to train nor a measure; give it one of them")
        if self.config is None and (self.rates or self.rate_of or self.prepare or self.build):
            raise ConfigError(f"arm '{self.name}' trains nothing, as it has no config; leave out its rates, rate_of, build and prepare")
        if self.rates and self.rate_of:
            raise ConfigError(f"arm '{self.name}' has rates of its own and takes that of '{self.rate_of}'; leave one of them out")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"arm '{self.name}' has seeds {self.seeds}; give at least one, each once")
        if len(set(self.rates)) < len(self.rates) or not all(rate > 0 and math.isfinite(rate) for rate in self.rates):
            raise ConfigError(f"arm '{self.name}' has rates {self.rates}; they are positive and finite, each once")
        try:
            hash(self)
        except TypeError as error:
            raise ConfigError(f"arm '{self.name}' holds a value that may change ({error}); write tuples, not lists") from None

    @property
    def slug(self) -> str:
        """The name as a part of a folder's name."""
        return re.sub(r"[^\w.=+,-]+", "-", self.name).strip("-")

    @property
    def is_constant(self) -> bool:
        """Whether nothing in it is random: a given model, measured once, that compares with every seed of the others."""
        return self.config is None and not self.needs and len(self.seeds) == 1


@dataclass(frozen=True)
class Column:
    """A metric that the table shows."""

    metric: str
    heading: str = ""
    """Empty means the metric's name."""
    better: Literal["lower", "higher", "neither"] = "lower"
    digits: int = 3
    """After the point."""

    def __post_init__(self) -> None:
        check_choices(self, "Column")


@dataclass(frozen=True)
class Ordering:
    """What the paper leads one to expect: metric of `left` < or <= that of `right`, each an arm's name."""

    left: str
    relation: Literal["<", "<="]
    right: str
    metric: str = "loss"
    text: str = ""
    """The claim in words; empty means the relation itself."""

    def __post_init__(self) -> None:
        check_choices(self, "Ordering")

    def __str__(self) -> str:
        return self.text or f"{self.metric} of {self.left} {self.relation.replace('<=', '≤')} {self.right}"


@dataclass(frozen=True)
class Figure:
    """A plot on the study's page, drawn from its rows."""

    name: str
    """Of the file: docs/results/STUDY-NAME.svg."""
    caption: str
    draw: Callable[[Sequence[Row]], str]
    """(rows of the study, searches included) -> SVG; `study.figures.lines` makes one."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w-]+", self.name):
            raise ConfigError(f"a figure's name is {self.name!r}; it is part of a file's name: letters, digits, - and _")


@dataclass(frozen=True)
class Study:
    """A paper's experiment: arms, the table they make, and the orderings expected of it."""

    name: str
    """Of the results file, docs/results/NAME.jsonl, and of the folder of its runs: 'lora-small'."""
    title: str
    """One line with the paper's name and its number."""
    arms: tuple[Arm, ...]
    columns: tuple[Column, ...] = (Column("loss", "held-out loss"), Column("bits_per_byte", "bits per byte"))
    criterion: str = "loss"
    """The metric by which a learning rate is chosen; lower is better."""
    search_seed: int = 0
    """The seed that the search trains with."""
    orderings: tuple[Ordering, ...] = ()
    about: str = ""
    """Markdown: data, models, what differs from the paper."""
    paper: str = ""
    """The paper's own table, as Markdown."""
    figures: tuple[Figure, ...] = ()
    ranked: bool = False
    """The table's lines go by `criterion`, the best first."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise ConfigError(f"a study's name is {self.name!r}; it names a file: letters, digits, '.', '-' and '_'")
        names = [arm.name for arm in self.arms]
        slugs = [arm.slug for arm in self.arms]
        if not names:
            raise ConfigError(f"study '{self.name}' has no arms")
        for i, arm in enumerate(self.arms):
            if arm.name in names[:i]:
                raise ConfigError(f"study '{self.name}' has two arms named '{arm.name}'; rename one")
            if arm.slug in slugs[:i]:
                raise ConfigError(f"the folders of arms '{names[slugs.index(arm.slug)]}' and '{arm.name}' would have one name; rename one")
            for name in arm.needs:
                self._check_need(arm, name)
            training = [other.name for other in self.arms if other.name != arm.name and other.config is not None]
            if arm.rate_of and arm.rate_of not in training:
                near = nearest(arm.rate_of, training) or ";"
                raise ConfigError(
                    f"arm '{arm.name}' takes the rate of '{arm.rate_of}', which is no other arm that trains{near} {_list(training)}"
                )
        for ordering in self.orderings:
            for name in (ordering.left, ordering.right):
                if name not in names:
                    near = nearest(name, names) or ";"
                    raise ConfigError(f"an ordering of study '{self.name}' names the arm '{name}'{near} {_list(names)}")
            metrics = [column.metric for column in self.columns]
            if ordering.metric not in metrics:
                raise ConfigError(
                    f"an ordering of study '{self.name}' is by '{ordering.metric}', which is none of its columns"
                    f"{nearest(ordering.metric, metrics) or ';'} {_list(metrics)}"
                )
        self.in_order(names)

    def _check_need(self, arm: Arm, name: str) -> None:
        others = [other.name for other in self.arms if other.name != arm.name]
        if name not in others:
            raise ConfigError(f"arm '{arm.name}' needs '{name}', which is no other arm{nearest(name, others) or ';'} {_list(others)}")
        missing = set(arm.seeds) - set(self.arm(name).seeds)
        if missing and len(self.arm(name).seeds) > 1:
            raise ConfigError(
                f"arm '{arm.name}' needs '{name}', which has no seed {min(missing)}; give both the same seeds, or '{name}' only one"
            )

    def arm(self, name: str) -> Arm:
        """The arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)

    def in_order(self, names: Sequence[str]) -> list[Arm]:
        """The arms of these names and those that they need, each after what it needs.

        Raises:
          ConfigError: arms that need each other.
        """
        found: list[Arm] = []

        def add(name: str, path: tuple[str, ...]) -> None:
            arm = self.arm(name)
            if name in path:
                raise ConfigError(f"arms need each other: {' → '.join([*path[path.index(name) :], name])}")
            for other in (*arm.needs, *([arm.rate_of] if arm.rate_of else [])):
                add(other, (*path, name))
            if arm not in found:
                found.append(arm)

        for name in names:
            add(name, ())
        return found


def _list(names: Sequence[str]) -> str:
    return f"there are {', '.join(names)}"
