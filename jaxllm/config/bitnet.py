"""Which projections run with 1-bit or ternary weights, and how their inputs are quantised."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from jaxllm.config.errors import ConfigError, check_choices


@dataclass(frozen=True)
class BitnetConfig:
    """Quantisation-aware training of attention and feed-forward projections. Source: arXiv:2310.11453; b1.58 arXiv:2402.17764."""

    kind: Literal["none", "b1", "b158"] = "none"
    """b1: sign weights ±β. b158: ternary weights 0, ±β. Embeddings, head and norms stay as they are."""
    norm: Literal["none", "layer", "rms"] = "none"
    """What a projection does to its input before quantising it (SubLN): LayerNorm or RMSNorm, without parameters."""
    norm_sites: str = ".*"
    """Regex of the projections that do so, e.g. '.*/(o|down)' where the block has norms before attention and mlp: once, not twice."""
    norm_eps: float = 1e-5
    """Added to the variance (or mean square) under the root."""
    norm_scale: bool = False
    """Those norms have a trained scale for each feature, as microsoft/bitnet-b1.58-2B-4T has."""
    activation_bits: int = 8
    """Inputs become integers from -Q to Q, Q = 2^(bits-1) - 1."""
    activation_scale: Literal["token", "tensor"] = "token"
    """Q is the largest |x| of each token, or of all tokens of the call: then a token's output depends on its micro-batch. The paper
    trains b1 with tensor and infers with token."""
    shifted_sites: str = ""
    """Regex of the projections before a non-linearity ('mlp/up' with gelu, 'mlp/gate' with swiglu) whose inputs are shifted to
    [0, Q] by their minimum, as the paper has it for ReLU. Empty: none."""
    num_groups: int = 1
    """Groups, each with statistics of its own, along the dimension that the mesh axis `model` cuts: outputs of q, k, v, gate and up;
    inputs (weights and activations alike) of o and down. With the size of that axis, statistics stay on their shard."""
    warm_start_steps: int = 0
    """Steps over which a float model becomes a quantised one: weights and inputs are λ·quantised + (1 - λ)·float, λ linear in steps."""
    packing: Literal["bits", "base3"] = "bits"
    """Ternary weights in a checkpoint: 2 bits each, or 5 to a byte in base 3 (1.6 bits). Sign weights take 1 bit."""

    def __post_init__(self) -> None:
        check_choices(self, "bitnet")
        if self.num_groups < 1:
            raise ConfigError(f"bitnet.num_groups is {self.num_groups}; it must be at least 1, 1 for no groups")
        if not 2 <= self.activation_bits <= 8:
            raise ConfigError(f"bitnet.activation_bits is {self.activation_bits}; integers of 2 to 8 bits are supported")
        if self.warm_start_steps < 0:
            raise ConfigError(f"bitnet.warm_start_steps is {self.warm_start_steps}; it cannot be negative, 0 quantises from the first step")
        for name in ("norm_sites", "shifted_sites"):
            pattern = getattr(self, name)
            try:
                compiled = re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"bitnet.{name} '{pattern}' is not a regular expression: {error}") from None
            if pattern and not any(compiled.fullmatch(site) for site in SITES):
                raise ConfigError(f"bitnet.{name} '{pattern}' matches no projection; projections are {', '.join(SITES)}")


SITES = (
    *(f"{branch}/{name}" for branch in ("attention", "cross_attention") for name in "qkvo"),
    *("mlp/gate", "mlp/up", "mlp/down"),
)
"""Names of the projections of a layer."""
