"""Which smaller shapes a model may be pruned to: parameters in closed form, and all shapes near a budget of them.

Source: arXiv:2407.14679, section 2.3, and arXiv:2408.11796, section 4 (Minitron): enumerate the shapes within ±5 % of the budget, train
each a little, rank. Ranking is the caller's; `nearest_proportions` is ours for who wants one shape without training any.

Letters: L layers, D width, N query heads, K key/value heads, G = N/K, H head size, F feed-forward width, V vocabulary, T longest context.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from typing import NamedTuple

from jaxllm.config import ConfigError, ModelConfig
from jaxllm.surgery.importance import norm_names


class Shape(NamedTuple):
    """The sizes that pruning changes."""

    num_layers: int
    width: int
    num_heads: int
    num_kv_heads: int
    ff_width: int

    @classmethod
    def of(cls, config: ModelConfig) -> Shape:
        """Those of a model."""
        return cls(*(getattr(config, name) for name in cls._fields))

    def __str__(self) -> str:
        heads = f"{self.num_heads} heads" + (f" in {self.num_kv_heads} groups" if self.num_kv_heads != self.num_heads else "")
        return f"{self.num_layers} layers, width {self.width}, {heads}, feed-forward {self.ff_width}"


def num_params(config: ModelConfig) -> int:
    """V·D·(1, or 2 untied) + T·D (learned) + L·(2·D·H·(N + K) + (2, or 3 gated)·D·F + biases + norms) + the last norm.

    >>> num_params(ModelConfig(num_layers=1, width=4, num_heads=2, num_kv_heads=1, head_size=2, ff_width=8, vocab_size=10))
    196
    """
    c = config
    D, N, K, H, F = c.width, c.num_heads, c.num_kv_heads, c.head_size, c.ff_width
    norm = D * (2 if c.norm_bias else 1)
    attention = 2 * D * H * (N + K) + c.qkv_bias * H * (N + 2 * K) + c.attention_out_bias * D
    attention += {"none": 0, "head": 2 * H, "full": H * (N + K)}[c.qk_norm]
    feed_forward = (3 if c.gated else 2) * D * F + c.mlp_bias * ((2 if c.gated else 1) * F + D)
    layer = attention + feed_forward + len(norm_names(c)) * norm
    tables = c.vocab_size * D * (1 if c.tied_embeddings else 2) + (c.position == "learned") * c.max_length * D
    return tables + c.num_layers * layer + c.final_norm * norm


def kv_heads(config: ModelConfig, num_heads: int) -> int:
    """Key/value heads that go with fewer query heads: all of them, with equally many query heads each; else whole groups.

    >>> eight_in_4 = ModelConfig(num_heads=8, num_kv_heads=4)
    >>> kv_heads(eight_in_4, 4), kv_heads(eight_in_4, 6)
    (4, 3)

    Raises:
      ConfigError: neither divides; names the nearest that does.
    """
    if 1 <= num_heads <= config.num_heads:
        if num_heads % config.num_kv_heads == 0:
            return config.num_kv_heads
        if num_heads % config.group_size == 0:
            return num_heads // config.group_size
    raise ConfigError(
        f"num_heads is {num_heads}, and the model has {config.num_heads} in {config.num_kv_heads} groups: heads go by whole groups, or "
        f"equally many of each; choose one of {', '.join(map(str, possible_heads(config)))}"
    )


def possible_heads(config: ModelConfig) -> list[int]:
    """Numbers of query heads that the groups allow."""
    G, K = config.group_size, config.num_kv_heads
    return [n for n in range(1, config.num_heads + 1) if n % K == 0 or n % G == 0]


def multiples(most: int, multiple: int) -> list[int]:
    """`most` itself, and all smaller multiples.

    >>> multiples(20, 8)
    [8, 16, 20]
    """
    return sorted({*range(multiple, most + 1, multiple), most})


def near(
    config: ModelConfig,
    target_params: int,
    *,
    tolerance: float = 0.05,
    multiple: int | None = None,
    num_layers: Sequence[int] = (),
    num_heads: Sequence[int] = (),
    width: Sequence[int] = (),
    ff_width: Sequence[int] = (),
    rank: Callable[[Shape], float] | None = None,
) -> list[Shape]:
    """Every shape within `tolerance` of the budget, the lowest `rank` first (without one: the nearest to the budget).

    Args:
      target_params: of the whole model, embeddings included.
      multiple: of width and feed-forward width; None means 64, and 8 for models narrower than 512.
      num_layers, num_heads: choices; empty keeps the model's (arXiv:2408.11796 kept all heads).
      width, ff_width: choices; empty means all multiples up to the model's.

    Raises:
      ConfigError: a choice larger than the model or heads that its groups forbid; no shape near enough, with the nearest.
    """
    multiple = multiple or (64 if config.width >= 512 else 8)
    axes = {
        "num_layers": list(num_layers) or [config.num_layers],
        "num_heads": list(num_heads) or [config.num_heads],
        "width": list(width) or multiples(config.width, multiple),
        "ff_width": list(ff_width) or multiples(config.ff_width, multiple),
    }
    for name, choices in axes.items():
        check_size(config, name, max(choices))
        check_size(config, name, min(choices))
    groups = {n: kv_heads(config, n) for n in axes["num_heads"]}
    shapes = [Shape(L, D, N, groups[N], F) for L, N, D, F in product(*axes.values())]
    counts = {shape: num_params(replace(config, **shape._asdict())) for shape in shapes}
    miss = {shape: abs(count - target_params) for shape, count in counts.items()}
    found = [shape for shape in shapes if miss[shape] <= tolerance * target_params]
    if not found:
        best = min(shapes, key=lambda shape: miss[shape])
        raise ConfigError(
            f"no shape has {target_params:,} parameters within {tolerance:.0%}: the nearest is {counts[best]:,} ({best}); "
            "ask for that, for a smaller multiple, or for other layers and heads"
        )
    return sorted(found, key=lambda shape: (miss[shape] if rank is None else rank(shape), miss[shape]))


def check_size(config: ModelConfig, name: str, size: int) -> None:
    """Refuse a size that pruning cannot reach.

    Raises:
      ConfigError: larger than the model's, or less than 1.
    """
    if not 1 <= size <= getattr(config, name):
        raise ConfigError(f"{name} is {size}; pruning makes a model smaller, and this one has {getattr(config, name)}: choose 1 to that")


def nearest_proportions(config: ModelConfig, target_params: int) -> Callable[[Shape], float]:
    """A rank: how far from the model's own F/D and from the budget, each as the absolute value of a logarithm of a ratio."""

    def rank(shape: Shape) -> float:
        count = num_params(replace(config, **shape._asdict()))
        slimmer = math.log(shape.ff_width * config.width / (config.ff_width * shape.width))
        return abs(slimmer) + abs(math.log(count / target_params))

    return rank


def number_of(text: str) -> int:
    """A number of parameters in words.

    >>> number_of('90M'), number_of('1.2B'), number_of('260_032')
    (90000000, 1200000000, 260032)
    """
    match = re.fullmatch(r"(\d[\d_]*(?:\.\d+)?)([KMBkmb]?)", text.strip())
    if match is None:
        raise ConfigError(f"a number of parameters is '{text}'; write a number, or one with K, M or B behind it, as in 90M")
    return round(float(match[1].replace("_", "")) * {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}[match[2].upper()])
