"""What adapters add to a model: low-rank deltas and prefix states. All are off by default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxllm.config.errors import ConfigError, check_choices


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank deltas beside kernels: y = x·W + s·(dropout(x)·A)·B. Source: arXiv:2106.09685, section 4.1."""

    rules: tuple[tuple[str, int, float], ...] = ()
    """Ordered (path pattern, rank R, alpha); the first match wins, rank 0 leaves a kernel alone; empty means no LoRA.
    The paper's: (('layers/attention/[qv]/kernel', 4, 32.0),)."""
    scale: Literal["rank", "sqrt_rank"] = "rank"
    """s = alpha / R, or alpha / √R as rsLoRA has it (arXiv:2312.03732)."""
    dropout: float = 0.0
    """Rate on the branch's input; the base's product sees no dropout."""
    init: Literal["gaussian", "kaiming"] = "gaussian"
    """A's entries: normal with standard deviation 1/R, or uniform within ±1/√fan_in as the released code has it. B starts at 0."""
    dora: bool = False
    """Columns of W + s·A·B are normalised and scaled by a trained magnitude (arXiv:2402.09353)."""

    def __post_init__(self) -> None:
        check_choices(self, "lora")
        for pattern, rank, alpha in self.rules:
            if rank < 0 or not alpha > 0:
                raise ConfigError(f"lora.rules has ('{pattern}', {rank}, {alpha}); a rank is at least 0 and alpha is positive")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"lora.dropout is {self.dropout}; it must be in [0, 1)")


@dataclass(frozen=True)
class BottleneckConfig:
    """Adapter layers, small MLPs behind projections: y + gelu(y·down)·up. Source: arXiv:1902.00751, section 2.1."""

    size: int = 0
    """Width R of the MLP; 0 means none."""
    sites: tuple[str, ...] = ("attention/o", "mlp/down")
    """Projections that one stands behind."""

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ConfigError(f"bottleneck.size is {self.size}; it must be at least 1, or 0 for no adapter layers")


@dataclass(frozen=True)
class PrefixConfig:
    """Trained key/value states that every layer sees before the text. Source: arXiv:2101.00190, section 4."""

    length: int = 0
    """P, states per layer; 0 means none."""
    hidden: int = 0
    """Width of the MLP that makes the states while training (the paper: 512); 0 trains the states themselves."""
    place: Literal["before", "infix", "embedding"] = "before"
    """before: seen by all tokens. infix: seen from the end of the prompt on. embedding: P trained input embeddings instead of states."""
    separator: int | None = None
    """infix: id of the token that ends a prompt."""
    init_text: str = ""
    """Start from this text's activations, tokenised and repeated to P tokens; empty: at random."""
    shift_positions: bool = True
    """Whether the text's positions start at P, as in PEFT, where a prefix lies in the cache; else at 0."""

    def __post_init__(self) -> None:
        check_choices(self, "prefix")
        if self.length < 0 or self.hidden < 0:
            raise ConfigError(f"prefix.length is {self.length} and prefix.hidden is {self.hidden}; neither can be negative")
        if self.place == "infix" and self.length and self.separator is None:
            raise ConfigError("prefix.place is infix: prefix.separator must be the id of the token that ends a prompt")


@dataclass(frozen=True)
class QuantiseConfig:
    """A frozen base kept in few bits under adapters, as QLoRA does. Source: arXiv:2305.14314, section 3."""

    kind: Literal["none", "int8", "int4", "nf4"] = "none"
    """Of the numbers of a kernel. nf4: the 16 quantiles of a normal distribution."""
    tile: int = 64
    """Inputs that share a scale."""
    where: str = "layers/.*/kernel"
    """Path pattern of the kernels; they must not train."""

    def __post_init__(self) -> None:
        check_choices(self, "quantise")
        if self.tile < 1:
            raise ConfigError(f"quantise.tile is {self.tile}; it must be at least 1")
