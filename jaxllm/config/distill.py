"""What a run learns from other models, besides or instead of the text. All is off by default."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from jaxllm.config.errors import ConfigError, check_choices


@dataclass(frozen=True)
class DistillConfig:
    """Teachers, and how the student is held against them. The loss is ce · next-token + Σ weight · divergence."""

    teachers: tuple[tuple[str, float], ...] = ()
    """((checkpoint, weight), …): models of the student's tokenizer that read every batch in the step, forward alone."""
    stored: tuple[tuple[str, float], ...] = ()
    """((folder, weight), …): what `jaxllm teach` wrote for this run's data."""
    kind: Literal["forward_kl", "reverse_kl", "jensen_shannon", "total_variation", "soft_ce"] = "forward_kl"
    """Minitron: forward_kl, and no ce. FuseLLM: soft_ce. GKD: jensen_shannon."""
    temperature: float = 1.0
    """Divides the logits of student and teacher; the divergence is multiplied by its square. soft_ce has none."""
    beta: float = 0.5
    """jensen_shannon: the teacher's share of the mixture; near 0 is forward KL, near 1 reverse KL."""
    tail: Literal["rest", "renormalise", "drop", "uniform"] = "rest"
    """What becomes of the probability that a stored teacher does not name (losses/divergences.py)."""
    ce: float = 0.0
    """Weight of the text's own next-token loss."""
    ce_end: float | None = None
    """Its weight at the last step, linear in between; without `weight_end` the teachers' weights then shrink or grow as 1 - ce does."""
    weight_end: float | None = None
    """What the teachers' weights are multiplied by at the last step, linear in between from 1; 0: the text alone has the last word."""
    states: Literal["none", "cosine", "mse"] = "none"
    """Also hold hidden states against the first teacher's, through a map from width to width that is learned and then dropped."""
    state_layers: tuple[tuple[int, int], ...] = ((0, 0), (-1, -1))
    """((student's layer, teacher's), …): the input of a layer counted from 0, the output of one counted from -1."""
    state_weight: float | None = None
    """None: L_logits / L_states of the step before, so that both count alike (arXiv:2407.14679, section 3)."""
    attention_layers: tuple[tuple[int, int], ...] = ()
    """((student's layer, teacher's), …) whose attention distributions are held against each other (arXiv:2002.10957)."""
    attention_weight: float = 1.0
    """Of that divergence."""
    on_policy: float = 0.0
    """Share of rows that the student writes itself, from the row's prompt on, to be judged by the teacher (GKD, arXiv:2306.13649: λ)."""
    on_policy_tokens: int = 64
    """Most tokens that it writes."""
    on_policy_prompt: int = 16
    """Tokens of the row that are its prompt where the data mark none."""
    on_policy_temperature: float = 1.0
    """Of its sampling."""

    def __post_init__(self) -> None:
        check_choices(self, "distill")
        for name, value in (*self.teachers, *self.stored):
            if not name or not (value > 0 and math.isfinite(value)):
                raise ConfigError(f"distill has the teacher ('{name}', {value}); give a folder, and a weight that is positive and finite")
        if not self.on and (self.ce or self.states != "none" or self.attention_layers or self.on_policy):
            raise ConfigError("distill has no teacher: give --distill.teachers CHECKPOINT 1.0, or --distill.stored FOLDER 1.0")
        if (self.states != "none" or self.attention_layers or self.on_policy) and not self.teachers:
            raise ConfigError(
                "distill.states, attention_layers and on_policy need a teacher in the step: --distill.teachers CHECKPOINT 1.0"
            )
        if not 0.0 <= self.on_policy <= 1.0:
            raise ConfigError(f"distill.on_policy is {self.on_policy}; it is a share of rows, from 0 to 1")
        if self.on_policy and (self.ce or self.ce_end or self.stored):
            raise ConfigError(
                "distill.on_policy replaces rows by what the student writes, which the text's loss (ce) and stored predictions do not fit; "
                "set distill.ce to 0 and distill.stored to none"
            )
        if self.on_policy_tokens < 1 or self.on_policy_prompt < 1 or not self.on_policy_temperature > 0:
            raise ConfigError(
                f"distill.on_policy_tokens is {self.on_policy_tokens}, on_policy_prompt {self.on_policy_prompt} and on_policy_temperature "
                f"{self.on_policy_temperature}; the first two are at least 1 and the last is positive"
            )
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ConfigError(f"distill.temperature is {self.temperature}; it must be positive and finite")
        if self.kind == "soft_ce" and self.temperature != 1.0:
            raise ConfigError(
                f"distill.kind 'soft_ce' has no temperature but 1, and distill.temperature is {self.temperature}; set it to 1, or take "
                "kind forward_kl"
            )
        for name in ("ce", "ce_end", "weight_end", "state_weight"):
            value = getattr(self, name)
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise ConfigError(f"distill.{name} is {value}; it must be at least 0 and finite")
        if self.ce_end is not None and self.weight_end is None and self.ce == 1.0:
            raise ConfigError(
                "distill.ce_end scales the teachers' weights by (1 - ce(step)) / (1 - ce), and distill.ce is 1; start below 1, or say with "
                "distill.weight_end what becomes of them"
            )

    @property
    def on(self) -> bool:
        """Whether there is a teacher."""
        return bool(self.teachers or self.stored)
