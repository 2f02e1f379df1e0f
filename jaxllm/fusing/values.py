"""What decides a fusion."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from jaxllm.config import ConfigError, TrainConfig, check_choices
from jaxllm.data.taught import part_of


@dataclass(frozen=True)
class FuseConfig:
    """How teachers become one."""

    k: int = 10
    """Most probable tokens that are kept at each position."""
    how: Literal["spans", "soft", "hard"] = "spans"
    """Which row of a teacher serves which of the target's. spans: the one that has read the same bytes. soft, hard: FuseLLM's dynamic
    programme over the tokens' strings, with its acceptance by MinED or EM."""
    strict: bool = False
    """soft and hard: reject a token of the teacher that serves several of the target's, which the released code does not."""
    vocab: Literal["auto", "first", "exact", "min_edit"] = "auto"
    """Target ids for a teacher's ids. exact: the same bytes. first: those, else the token that the target begins these bytes with.
    min_edit: those, else the nearest by edit distance. auto: first for spans, min_edit for soft, exact for hard."""
    fuse: Literal["min_ce", "avg_ce"] = "min_ce"
    """One teacher for each document, that of least cross-entropy; or the mean of all, weighed by it."""
    per: Literal["byte", "token"] = "byte"
    """What cross-entropy is a mean over. Tokens of unlike tokenizers do not compare; the paper takes them."""
    collisions: Literal["sum", "highest"] = "sum"
    """Of ids that become one: add them up, or keep the most probable alone."""
    unmapped: Literal["tail", "renormalise"] = "tail"
    """What is kept of the probability of ids that become none: it is in the tail; or the others are divided by their sum."""
    rejected: Literal["one_hot", "empty"] = "one_hot"
    """Rows without a row of the teacher: the next token for certain, or nothing known. With avg_ce, of each teacher by itself."""
    changed: Literal["refuse", "skip"] = "refuse"
    """Documents that a tokenizer does not spell as they are, as it normalises them: an error, or no rows inside what differs."""
    workers: int = 2
    """Processes besides this one; 0 works in this one."""
    part: str = "0/1"
    """i/n: this command makes every n-th shard, from the i-th on."""

    def __post_init__(self) -> None:
        check_choices(self, "fusion")
        if self.k < 1 or self.workers < 0:
            raise ConfigError(f"--k is {self.k} and --workers {self.workers}; they must be at least 1 and 0")
        part_of(self.part)

    @property
    def mapping(self) -> Literal["first", "exact", "min_edit"]:
        """`vocab`, decided."""
        if self.vocab != "auto":
            return self.vocab
        return "first" if self.how == "spans" else "min_edit" if self.how == "soft" else "exact"

    def options(self) -> dict[str, Any]:
        """What decides the records."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("workers", "part")} | {"vocab": self.mapping}


PAPER = FuseConfig(how="soft", per="token", collisions="highest", unmapped="renormalise")
"""FuseLLM's: k 10, MinED, MinCE by tokens. The student trains with distill.ce 0.9, the fused teacher at 0.1, kind soft_ce."""


@dataclass(frozen=True)
class Job:
    """All that decides a fusion; it travels to worker processes, which open the data themselves."""

    target: TrainConfig
    out: str
    sources: tuple[tuple[str, TrainConfig], ...]
    config: FuseConfig
