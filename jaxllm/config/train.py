"""How a model is trained: loss terms, optimizer, mesh, and the run as a whole."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from jaxllm.config.adapters import BottleneckConfig, LoraConfig, PrefixConfig, QuantiseConfig
from jaxllm.config.bitnet import BitnetConfig
from jaxllm.config.data import DataConfig
from jaxllm.config.distill import DistillConfig
from jaxllm.config.errors import ConfigError, check_choices
from jaxllm.config.model import ModelConfig

type Precision = Literal["float32", "bfloat16", "bfloat16_matmul"]
"""bfloat16: activations and matmuls. bfloat16_matmul: float32 activations, bf16 matmul operands."""


@dataclass(frozen=True)
class ScheduleConfig:
    """How the learning rate changes over the run."""

    kind: Literal["cosine", "linear", "inverse_sqrt", "wsd", "constant"] = "cosine"
    """wsd: warm-up, stable, decay. inverse_sqrt: peak * sqrt(max(warmup, 1) / max(step, warmup)), PaLM's with
    warmup 10,000."""
    warmup_steps: int = 0
    """Linear from 0 over this many steps (inverse_sqrt: flat at the peak, as PaLM's 1/sqrt(max(k, 10^4)))."""
    decay_steps: int | None = None
    """cosine, linear: steps over which the rate falls, warm-up included; None means all. wsd: length of the final
    decay; None means a tenth of the run."""
    end_ratio: float = 0.1
    """Final rate as a share of the peak."""

    def __post_init__(self) -> None:
        check_choices(self, "optim.schedule")


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer, its schedule, and which leaves it treats how."""

    name: Literal["adamw", "adafactor_palm", "adafactor", "lion", "muon", "sgd"] = "adamw"
    """adafactor_palm: unfactored, with momentum. adafactor: factored, as T5. muon: on kernels of the layers, AdamW elsewhere."""
    lr: float = 1e-3
    """Peak learning rate."""
    schedule: ScheduleConfig = ScheduleConfig()
    b1: float = 0.9
    """Decay of the first moment (momentum)."""
    b2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the second moment's root."""
    weight_decay: float = 0.1
    """Decoupled, times the learning rate. adafactor_palm uses lr^2 instead, as the paper does."""
    decay: tuple[tuple[str, bool], ...] = ((r".*(bias|scale)$", False), (r".*", True))
    """Ordered (path pattern, whether to decay); first match wins."""
    clip_norm: float | None = 1.0
    """Global gradient norm above which gradients are scaled down."""
    freeze: tuple[tuple[str, bool], ...] = ()
    """Ordered (path pattern, whether to freeze); first match wins; unmatched leaves train."""
    lr_scale: tuple[tuple[str, float], ...] = ()
    """Ordered (path pattern, multiplier of the learning rate); first match wins; unmatched leaves have 1."""
    ema_decay: float | None = None
    """Keep an exponential moving average of the weights, used for evaluation."""
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the first moment."""
    num_microbatches: int = 1
    """The batch is cut into this many parts whose gradients add up exactly."""
    noise_scale: bool = False
    """Log the pair whose ratio of averages is the gradient noise scale (arXiv:1812.06162); needs num_microbatches >= 2."""

    def __post_init__(self) -> None:
        check_choices(self, "optim")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ConfigError(f"optim.lr is {self.lr}; it must be positive and finite")
        if self.ema_decay is not None and not 0.0 <= self.ema_decay < 1.0:
            raise ConfigError(f"optim.ema_decay is {self.ema_decay}; it must be in [0, 1), or None for no average")
        if self.num_microbatches < 1:
            raise ConfigError(f"optim.num_microbatches is {self.num_microbatches}; it must be at least 1")
        if self.noise_scale and self.num_microbatches < 2:
            raise ConfigError("optim.noise_scale compares micro-batches; set optim.num_microbatches to 2 or more")


@dataclass(frozen=True)
class MeshConfig:
    """Devices as a grid, slow axis first. At most one size may be -1: all devices that remain."""

    slice: int = 1
    """Data parallel between pods, over the data-centre network."""
    data: int = -1
    """Fully sharded data parallel."""
    model: int = 1
    """Tensor parallel."""
    rules: tuple[tuple[str, tuple[str | None, ...]], ...] = ()
    """Ordered (path pattern, one mesh axis or None per dimension) put before the built-in rules."""
    shard_sequence: bool = False
    """Block boundaries shard T over `model` instead of D."""

    def __post_init__(self) -> None:
        sizes = (self.slice, self.data, self.model)
        if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
            raise ConfigError(f"mesh is {sizes} (slice, data, model); sizes are positive, and at most one is -1 (all that remain)")


@dataclass(frozen=True)
class LossConfig:
    """Terms of the pre-training loss."""

    z_loss: float = 0.0
    """Weight of (log Z)^2 (PaLM: 1e-4)."""
    label_smoothing: float = 0.0
    """Share of the target that is spread evenly over the vocabulary."""
    chunk: int = 128
    """Positions of T whose logits exist at one time. Memory per term: rows * chunk * V * 4 bytes."""


@dataclass(frozen=True)
class SpikeConfig:
    """Rewind and skip batches around a loss spike, as PaLM did. Off by default."""

    enabled: bool = False
    """Whether to rewind."""
    window: int = 100
    """Steps of recent losses that define what is usual."""
    threshold: float = 8.0
    """Robust z-score (distance from the median / (1.4826 * median absolute deviation)) that counts as a spike."""
    rewind_steps: int = 100
    """Restart from the newest checkpoint at least this many steps before the spike."""
    skip_batches: int = 200
    """How many batches are skipped: from the restart on where that covers the spike, else around the spike."""

    def __post_init__(self) -> None:
        for name in ("window", "rewind_steps", "skip_batches"):
            if getattr(self, name) < 1:
                raise ConfigError(f"spike.{name} is {getattr(self, name)}; it must be at least 1")
        if not self.threshold > 0:
            raise ConfigError(f"spike.threshold is {self.threshold}; it must be positive")


@dataclass(frozen=True)
class TrainConfig:
    """One run, whole."""

    name: str = "run"
    """First part of the run directory's name."""
    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    prefix: PrefixConfig = PrefixConfig()
    bottleneck: BottleneckConfig = BottleneckConfig()
    bitnet: BitnetConfig = BitnetConfig()
    quantise: QuantiseConfig = QuantiseConfig()
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    distill: DistillConfig = DistillConfig()
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    spike: SpikeConfig = SpikeConfig()
    num_steps: int = 100
    """Length of the run: optimizer steps."""
    seed: int = 0
    """Of the weights, the order of the data, and dropout."""
    precision: Literal["auto", "float32", "bfloat16", "bfloat16_matmul"] = "auto"
    """bfloat16: activations and matmuls. bfloat16_matmul: float32 activations, bf16 matmul operands.
    auto: bfloat16 on TPU and GPU; on CPU float32 or bfloat16_matmul, whichever is measured faster."""
    remat: Literal["none", "full", "dots", "minimal", "offload", "offload_inputs"] = "full"
    """What the backward pass recomputes: none: nothing. full: everything inside a block. dots: all but the outputs of
    projections. minimal: also keeps the attention's output. offload: as dots, kept in the host's memory. offload_inputs: as
    full, with the blocks' inputs in the host's memory."""
    unroll_layers: int = 1
    """Layers per iteration of the scan over layers."""
    init_from: str = ""
    """A run directory or checkpoint whose weights start this run; the optimizer starts fresh."""

    # What follows does not change the mathematics and is left out of the config's hash.
    run_dir: str = ""
    """Empty means runs/<name>-<8 hex digits of the config's hash>."""
    save_every: int = 100
    """Steps between checkpoints; one is always made at the end."""
    keep_last: int = 2
    """How many of the newest checkpoints to keep."""
    keep_every: int = 0
    """Also keep each checkpoint whose step is a multiple of this; 0 keeps none."""
    log_every: int = 10
    """Steps between progress lines."""
    eval_every: int = 0
    """Steps between evaluations; 0 evaluates at the end only."""
    sample_every: int = 0
    """Steps between samples; 0 samples at the end only."""
    eval_batches: int = 0
    """Held-out batches per evaluation; 0 means all."""
    profile_steps: tuple[int, int] | None = None
    """(first, last) step to profile into the run directory."""
    wandb_project: str = ""
    """If set, metrics also go to Weights & Biases (needs `pip install wandb`)."""
    on_config_change: Literal["refuse", "accept"] = "refuse"
    """What to do when the run directory was made with another config."""

    def __post_init__(self) -> None:
        check_choices(self, "config")
        if self.num_steps < 1:
            raise ConfigError(f"num_steps is {self.num_steps}; it must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed is {self.seed}; it must be from 0 to {2**32 - 1:,}")
        if "/" in self.name or self.name in (".", ".."):
            raise ConfigError(f"name is '{self.name}'; it names a folder in runs/, so it may not hold '/' (--run_dir may)")
        for least, names in (
            (1, ("save_every", "log_every", "keep_last", "unroll_layers")),
            (0, ("keep_every", "eval_every", "sample_every", "eval_batches")),
        ):
            for name in names:
                if getattr(self, name) < least:
                    raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.profile_steps is not None and not 1 <= self.profile_steps[0] <= self.profile_steps[1]:
            raise ConfigError(f"profile_steps is {self.profile_steps}; give the first and the last step, counted from 1")


NOT_HASHED = (
    "mesh", "num_steps", "run_dir", "save_every", "keep_last", "keep_every", "log_every", "eval_every",
    "sample_every", "eval_batches", "profile_steps", "wandb_project", "on_config_change",
)  # fmt: skip
"""Fields of TrainConfig that a run may change without becoming another run. num_steps stretches the learning-rate schedule."""


NOT_HASHED_DATA = ("num_workers", "cache_dir")
"""The same, of DataConfig."""
