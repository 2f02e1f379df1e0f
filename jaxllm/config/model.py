"""The shape of a decoder, and every choice in which published models differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxllm.config.errors import ConfigError, check_choices


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (arXiv:2104.09864) and how it is stretched to longer contexts."""

    base: float = 10_000.0
    """Plane i turns by position * base^(-2i / rotated size)."""
    fraction: float = 1.0
    """Share of the head size that is rotated; the rest passes through (GPT-NeoX rotates 0.25)."""
    scaling: Literal["none", "linear", "ntk", "llama3", "yarn"] = "none"
    """linear: arXiv:2306.15595. ntk: base * factor^(n/(n-2)), n planes. llama3: Llama 3.1's piecewise rule.
    yarn: arXiv:2309.00071."""
    factor: float = 1.0
    """How many times longer the context is than the original one."""
    original_max_length: int = 8192
    """Context length, in tokens, of the model before it was stretched (llama3 and yarn)."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths longer than original_max_length / low_freq_factor are divided by `factor`."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths shorter than original_max_length / high_freq_factor are kept."""
    beta_fast: float = 32.0
    """yarn: planes that turn more often than this over the original context are kept."""
    beta_slow: float = 1.0
    """yarn: planes that turn less often than this are divided by `factor`."""
    attention_factor: float | None = None
    """yarn: multiplies cos and sin; None means 0.1 * ln(factor) + 1."""

    def __post_init__(self) -> None:
        check_choices(self, "model.rope")


@dataclass(frozen=True)
class LayerKind:
    """What may differ from one layer to the next. `ModelConfig.layer_pattern` repeats a tuple of these."""

    window: int | None = None
    """Sliding window: a query at i sees keys 0 <= i - j < window. None sees the whole context."""
    rope: RopeConfig | None = None
    """Overrides the model's rotary embedding (Gemma 3's local layers have a base of their own)."""


@dataclass(frozen=True)
class ModelConfig:
    """One decoder for every family: what differs between them is a value here.

    Source of each choice: `configs/models.py`, which has one row per published model.
    """

    num_layers: int = 2
    """L."""
    width: int = 64
    """D, the width of the residual stream."""
    num_heads: int = 4
    """N, query heads."""
    num_kv_heads: int = 4
    """K, key/value heads; N is a multiple of K. K = N is multi-head, K = 1 multi-query attention."""
    head_size: int = 16
    """H. Not derived from width / num_heads: PaLM-540B and Mistral-NeMo differ."""
    ff_width: int = 256
    """F, hidden width of the feed-forward layer."""
    vocab_size: int = 512
    """V, the logical vocabulary. The mesh may pad it in memory; padded rows are never visible."""
    max_length: int = 512
    """Longest context in tokens. A hard limit with learned positions."""

    # Norms
    norm: Literal["rms", "layer"] = "rms"
    """rms: x / √(mean x² + eps), times w. layer: LayerNorm, which also subtracts the mean."""
    norm_placement: Literal["before", "after", "both", "after_residual"] = "before"
    """before: x + f(n(x)). after: x + n(f(x)) (OLMo 2). both: x + n(f(n(x))) (Gemma 3).
    after_residual: n(x + f(x)) (GPT-1)."""
    norm_eps: float = 1e-6
    """Added to the mean square (or variance) under the root."""
    norm_plus_one: bool = False
    """Scale by 1 + w instead of w (Gemma)."""
    norm_bias: bool = False
    """LayerNorm adds a bias."""
    final_norm: bool = True
    """A norm after the last block (GPT-1 has none)."""
    qk_norm: Literal["none", "head", "full"] = "none"
    """Norm on queries and keys: over each head (Qwen 3), or over all heads at once (OLMo 2)."""

    # Block
    block: Literal["serial", "parallel"] = "serial"
    """parallel: x + attention(n(x)) + mlp(n(x)) (PaLM, GPT-NeoX)."""
    parallel_norms: Literal[1, 2] = 1
    """Parallel blocks share one norm (PaLM) or have one for each branch (GPT-NeoX)."""
    activation: Literal["swiglu", "geglu", "geglu_tanh", "reglu2", "gelu", "gelu_tanh", "relu2"] = "swiglu"
    """swiglu, geglu and reglu2 multiply by a gate; tanh is the approximation of GELU, relu2 is max(x, 0)²."""
    qkv_bias: bool = False
    """Biases on queries, keys and values."""
    attention_out_bias: bool = False
    """A bias on the attention's output projection."""
    mlp_bias: bool = False
    """Biases in the feed-forward layer."""

    # Positions and attention
    position: Literal["rope", "learned", "alibi", "none"] = "rope"
    """rope: rotary. learned: a table of max_length rows. alibi: a penalty on distance (arXiv:2108.12409)."""
    rope: RopeConfig = RopeConfig()
    """Rotary position embedding."""
    layer_pattern: tuple[LayerKind, ...] = (LayerKind(),)
    """Repeated over the layers: layer l is of kind l mod len(layer_pattern)."""
    mask: Literal["causal", "bidirectional", "prefix"] = "causal"
    """prefix: positions marked in Batch.prefix_mask see each other both ways, the rest is causal."""
    attention_scale: float | None = None
    """Multiplies q.k; None means head_size^-0.5."""
    attention_soft_cap: float | None = None
    """Attention scores become cap * tanh(score / cap)."""
    cross_attention: bool = False
    """Each block also attends to a memory given to `apply` (the decoder of an encoder-decoder)."""
    memory_width: int | None = None
    """Width of that memory; None means `width`."""

    # Embeddings and output
    tied_embeddings: bool = True
    """One matrix looks tokens up and makes logits."""
    embedding_scale: float = 1.0
    """Multiplies the looked-up embeddings (Gemma: width^0.5). Never touches the unembedding."""
    logit_scale: float = 1.0
    """Multiplies the logits (PaLM: width^-0.5)."""
    logit_soft_cap: float | None = None
    """Logits become cap * tanh(logit / cap)."""

    # Regularisation and init
    embedding_dropout: float = 0.0
    """Probability of dropping an entry of the embeddings."""
    attention_dropout: float = 0.0
    """Probability of dropping an attention weight."""
    residual_dropout: float = 0.0
    """Probability of dropping an entry of a branch's output."""
    init: Literal["normal", "fan_in"] = "normal"
    """normal: N(0, init_std), residual outputs divided by sqrt(2L) (GPT-2).
    fan_in: std n_in^-0.5, embeddings N(0, 1) (PaLM)."""
    init_std: float = 0.02
    """Standard deviation for init normal."""

    @property
    def group_size(self) -> int:
        """G = N / K, query heads per key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def gated(self) -> bool:
        """Whether the feed-forward layer has a gate matrix beside the up matrix."""
        return self.activation in ("swiglu", "geglu", "geglu_tanh", "reglu2")

    @property
    def has_dropout(self) -> bool:
        """Whether a training pass draws random numbers."""
        return max(self.embedding_dropout, self.attention_dropout, self.residual_dropout) > 0

    def kind(self, layer: int) -> LayerKind:
        """The kind of layer number `layer`, counted from 0."""
        return self.layer_pattern[layer % len(self.layer_pattern)]

    def __post_init__(self) -> None:
        check_choices(self, "model")
        sizes = ("num_layers", "width", "num_heads", "num_kv_heads", "head_size", "ff_width", "vocab_size", "max_length")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name} is {getattr(self, name)}; it must be at least 1")
        if self.num_heads % self.num_kv_heads:
            divisors = [k for k in range(1, self.num_heads + 1) if self.num_heads % k == 0]
            raise ConfigError(
                f"model.num_kv_heads is {self.num_kv_heads}, which does not divide model.num_heads = {self.num_heads}; "
                f"choose one of {', '.join(map(str, divisors))}"
            )
        if not self.layer_pattern:
            raise ConfigError("model.layer_pattern is empty; give at least one LayerKind, e.g. (LayerKind(),)")
        for kind in self.layer_pattern:
            if kind.window is not None and kind.window < 1:
                raise ConfigError(f"model.layer_pattern has window {kind.window}; a window is at least 1, or None for no window")
        for name in ("embedding_dropout", "attention_dropout", "residual_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(f"model.{name} is {getattr(self, name)}; it must be in [0, 1)")
        if self.block == "parallel" and self.cross_attention:
            raise ConfigError("model.cross_attention needs serial blocks; set model.block to 'serial'")
        for rope in (self.rope, *(kind.rope for kind in self.layer_pattern if kind.rope is not None)):
            rotated = round(self.head_size * rope.fraction)
            least = 4 if rope.scaling == "ntk" else 2
            if self.position == "rope" and (rotated % 2 or rotated < least or rope.fraction > 1):
                raise ConfigError(
                    f"model.head_size * rope.fraction is {self.head_size * rope.fraction:g}; rotary embeddings turn pairs, so it "
                    f"must be an even number from {least} to {self.head_size}"
                )
