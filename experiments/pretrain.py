"""Pre-training from scratch with PaLM's recipe, at three sizes.

PaLM: Scaling Language Modeling with Pathways, arXiv:2204.02311, sections 2 and 5. What the recipe has in common with
GPT-3 (arXiv:2005.14165, section 2 and appendix B): one epoch of mixed text, full rows, a batch that grows, clipping at 1.

    loss    mean over tokens of  -log p(x[t+1] | x[<=t])  +  1e-4 * (log Z[t])^2,    Z = sum of exp(logits)
    block   y = x + MLP(LN(x)) + Attention(LN(x)),  SwiGLU, one key/value head, RoPE, no bias anywhere
    update  p <- (1 - r^2) p - m,   m <- 0.9 m + 0.1 r max(1e-3, RMS(p)) g / sqrt(v),   r = 1e-2 / sqrt(max(k, 10^4) / 10^4)
            v <- b v + (1 - b) g^2,  b = 1 - k^-0.8:  Adafactor, unfactored

What differs here: PaLM's text and its 256k vocabulary are not public, so `paper` reads yours (`--data.sources.0.path`,
`--data.tokenizer.path`), and `debug` and `small` read the running Python's standard library. The step at which the 8B model's
batch grows is not published: here it is where the 540B model's first phase ends in tokens (52.4 billion of 775.9). T5X's
defaults (1e-30 in v, update clipped to RMS 1) stand where the paper is silent. Two of PaLM's ratios are kept when scaling
down: the rate is flat for the first 4 % of the steps, and the first batches have half the rows.

    python -m experiments.pretrain debug      seconds: a byte model that learns something
    python -m experiments.pretrain small      minutes on two cores; the size of configs/quickstart.py
    python -m experiments.pretrain paper      PaLM-8B: planned, not run
    python -m experiments.pretrain paper_540b PaLM-540B, its last phase, for 2 x 3,072 TPU v4: planned, not run

Result of `small` (2026-11-22, 1,146,880 tokens): 2.025 held-out bits per byte, where byte frequencies give 4.595, lzma over the same
windows 3.784, and lzma over all of the held-out text at once 1.868.
"""

from __future__ import annotations

from dataclasses import replace

from configs.models import palm_8b, palm_540b
from jaxllm import pretrain
from jaxllm.cli import experiment_main
from jaxllm.config import (
    DataConfig,
    LossConfig,
    MeshConfig,
    OptimConfig,
    Precision,
    ScheduleConfig,
    SourceConfig,
    SpikeConfig,
    TokenizerConfig,
    TrainConfig,
)
from jaxllm.losses.tokens import next_token, z_loss
from jaxllm.losses.vocab import View, over_vocab
from jaxllm.step import Experiment

optim = OptimConfig(
    name="adafactor_palm",
    lr=1e-2,
    schedule=ScheduleConfig(kind="inverse_sqrt", warmup_steps=10_000),
    b1=0.9,
    decay=((r".*", True),),  # the paper names no exception
    clip_norm=1.0,
    num_microbatches=2,  # the first phase of the ramp runs one of them
)

paper = TrainConfig(
    name="pretrain-paper",
    model=palm_8b,
    data=DataConfig(
        sources=(SourceConfig(kind="array_record", path="data/text/*.array_record"),),
        tokenizer=TokenizerConfig(path="data/tokenizer.model", vocab_size=256_000),
        sequence_length=2048,
        batch_size=512,
        batch_ramp=((100_000, 256),),  # 100,000 x 256 x 2,048 = 52.4 billion tokens
        packing="concatenate",
        segment_mask=False,
    ),
    loss=LossConfig(z_loss=1e-4, chunk=128),
    optim=optim,
    mesh=MeshConfig(data=-1, model=4),
    spike=SpikeConfig(enabled=True, rewind_steps=100, skip_batches=200),
    num_steps=790_000,  # + 690,000 x 512 x 2,048 = 775.9 billion tokens
    precision="bfloat16",
    save_every=1000,
    keep_every=50_000,
)

# The last of the 540B model's three phases, whose step is the largest (the first have 512 and 1,024 rows: with
# --data.batch_ramp 50000 512 65000 1024 --optim.num_microbatches 4 all three run).
paper_540b = replace(
    paper,
    name="pretrain-paper-540b",
    model=palm_540b,
    data=replace(paper.data, batch_size=2048, batch_ramp=()),
    optim=replace(optim, num_microbatches=1),
    mesh=MeshConfig(slice=2, data=256, model=12),
    num_steps=140_000,
)

small = replace(
    paper,
    name="pretrain-small",
    model=replace(
        palm_8b, num_layers=6, width=256, num_heads=4, head_size=64, ff_width=1024, vocab_size=4096, max_length=256, logit_scale=256**-0.5
    ),
    data=DataConfig(
        sources=(SourceConfig(kind="stdlib"),),
        tokenizer=TokenizerConfig(vocab_size=4096),
        sequence_length=256,
        batch_size=16,
        batch_ramp=((40, 8),),
        packing="concatenate",
        segment_mask=False,
    ),
    optim=replace(optim, schedule=ScheduleConfig(kind="inverse_sqrt", warmup_steps=12)),
    mesh=MeshConfig(),
    spike=SpikeConfig(),
    num_steps=300,
    precision="auto",
    save_every=100,
    keep_every=0,
)

debug = replace(
    small,
    name="pretrain-debug",
    model=replace(
        small.model, num_layers=2, width=32, num_heads=2, head_size=16, ff_width=128, vocab_size=259, max_length=64, logit_scale=32**-0.5
    ),
    data=replace(small.data, tokenizer=TokenizerConfig(kind="bytes"), sequence_length=64, batch_ramp=((10, 8),)),
    optim=replace(optim, schedule=ScheduleConfig(kind="inverse_sqrt", warmup_steps=10)),
    num_steps=40,
    precision="float32",
    log_every=10,
    eval_batches=4,
)

# PaLM's figures are of v4; how many of them trained the 8B model is not published.
PAPER_HARDWARE = {
    "paper": ("--topology", "v4:4x8x8"),
    "paper_540b": ("--topology", "v4:12x16x16", "--slices", "2"),
}

PRESETS: dict[str, TrainConfig] = {"debug": debug, "small": small, "paper": paper, "paper_540b": paper_540b}


def build(config: TrainConfig, *, precision: Precision) -> Experiment:
    values = config.loss
    loss = over_vocab(
        chunk=values.chunk,
        ce=(1.0, next_token(values.label_smoothing)),
        z=(values.z_loss, z_loss()),
        log_z=(0.0, View.log_z),  # only measured
    )
    return pretrain.experiment(config, precision=precision, loss=loss)


if __name__ == "__main__":
    experiment_main(PRESETS, build)
