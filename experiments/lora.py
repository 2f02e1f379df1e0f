"""LoRA against full fine-tuning, prefix states, adapter layers and norms alone, on E2E: tables to text.

LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685.

    y = x W + (alpha / r) dropout(x) A B        A [D, r] Gaussian, B [r, E] zero;  only A and B are trained
    loss = mean over the tokens of the reference of  -log p(x[t+1] | table, x[<=t])

What differs here. The models: `small` adapts configs/base.py's 5.9 M parameters and `real` SmolLM2-135M, where the paper has GPT-2
medium; `paper` is GPT-2 medium as published, planned, not run. The paper trains five epochs of 42,000 references; here an arm sees as many
tokens as two cores read in a minute (`small`) or twenty (`real`), the same for all arms. Train references were word-tokenised, and are
detokenised by sacremoses (98.2 % exact on dev, see tools/table_text.py); dev's are as published. BLEU is sacrebleu's 13a, the others those
of jaxllm/evals/overlap.py, METEOR left out because it needs Java; beam 5 on 100 tables of dev. Every arm of which `small` expects an order
searches four learning rates, a factor of three apart; other matrices and ranks take that of r 4 on q and v, and `real` has one rate an
arm. r, alpha and the rest are the paper's. Norms alone stand for BitFit: a model without biases has none to train.
Arms at 24,576 parameters: LoRA r 4 on q and v, prefix of 8 states, adapter layers of width 4 (and norms).

    python -m tools.fetch e2e-nlg             the data
    jaxllm train configs/base.py              the base of `small`; python -m tools.fetch smollm2-135m for `real`
    python -m experiments.lora small          resumes; --list says what is left, and about how long
    python -m experiments.lora real           SmolLM2-135M, one seed
    python -m experiments.lora page           docs/results/lora.md again
    jaxllm plan experiments/lora.py:paper --gpus a100:1x1

Results: docs/results/lora.md, written by the command itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from configs import base, table_text
from configs.models import gpt2_medium
from jaxllm import measures, pretrain
from jaxllm.cli import experiment_main
from jaxllm.config import (
    BottleneckConfig,
    LoraConfig,
    LossConfig,
    MeshConfig,
    OptimConfig,
    PrefixConfig,
    ScheduleConfig,
    TokenizerConfig,
    TrainConfig,
)
from jaxllm.study import Arm, Column, Figure, Ordering, Row, Run, Study, starting_from
from jaxllm.study.figures import lines, over_rates, points
from jaxllm.surgery import adapters, bottleneck, prefix

LORA, SUBSPACES = "LoRA q, v, r 4", "subspaces of r 8 and r 64"
ONLY_NORMS = ((r".*_norm/(scale|bias)", False), (r".*", True))
RATES = {
    "full": (3e-4, 1e-3, 3e-3, 1e-2),
    LORA: (1e-3, 3e-3, 1e-2, 3e-2),
    "prefix 8": (3e-3, 1e-2, 3e-2, 1e-1),
    "adapter layers": (1e-3, 3e-3, 1e-2, 3e-2),
    "norms alone": (1e-3, 3e-3, 1e-2, 3e-2),
}


def lora(rank: int, alpha: float = 32.0, where: str = "[qv]") -> LoraConfig:
    """The paper's setting for E2E: appendix D.3."""
    return LoraConfig(rules=((rf"layers/attention/{where}/kernel", rank, alpha),), dropout=0.1)


tuning = replace(table_text.small, name="lora-small", loss=LossConfig(label_smoothing=0.1))


def subspaces(run: Run) -> Mapping[str, float]:
    """Sections 7.2 and 7.3 on the trained adapters."""
    folder = {rank: run.needs[f"q, v, r {rank}"].run_dir for rank in RANKS}
    factors = {f"factor r {rank}": measures.amplification_of_adapters(folder[rank])["factor"] for rank in RANKS}
    return {**measures.similarity_of_adapters(folder[8], folder[64]), **factors}


def over_rank(rows: Sequence[Row]) -> str:
    """Held-out loss over the rank, mean over seeds."""
    mine = [row for row in rows if row["kind"] == "run" and row["arm"].startswith("q, v, r ")]
    series = {"q and v": points(mine, lambda row: float(row["arm"].rpartition(" ")[2]), "loss")}
    return lines("Held-out loss over the rank", "r", "held-out loss", series, log_x=True)


def over_directions(rows: Sequence[Row]) -> str:
    """φ(i, j) over j, for some i."""
    found: dict[str, float] = next((row["metrics"] for row in rows if row["arm"] == SUBSPACES), {})
    grid = {tuple(map(int, name.split()[1:])): value for name, value in found.items() if name.startswith("phi ")}
    series = {f"i = {i}": [(float(j), value, None) for (row, j), value in grid.items() if row == i] for i in sorted({i for i, _ in grid})}
    return lines("Subspace similarity of r 8 and r 64", "j, directions of r 64", "φ(i, j)", series, log_x=True)


def over_amplification(rows: Sequence[Row]) -> str:
    """‖ΔW‖ / ‖Uᵀ W V‖ over the rank."""
    found: dict[str, float] = next((row["metrics"] for row in rows if row["arm"] == SUBSPACES), {})
    series = {"q": [(float(rank), found[f"factor r {rank}"], None) for rank in RANKS if f"factor r {rank}" in found]}
    return lines("Amplification over the rank", "r", "amplification", series, log_x=True)


def adapted(config: TrainConfig, adapter: LoraConfig) -> TrainConfig:
    return replace(config, lora=adapter, optim=replace(config.optim, freeze=adapters.TRAIN_ONLY_LORA))


def methods(config: TrainConfig) -> dict[str, TrainConfig]:
    """Name -> config of the compared ways to tune, at matched parameter counts where they have a size."""
    frozen = lambda rules: replace(config.optim, freeze=rules)
    return {
        "full": config,
        LORA: adapted(config, lora(4)),
        "prefix 8": replace(config, prefix=PrefixConfig(8), optim=frozen(prefix.TRAIN_ONLY_PREFIX)),
        "adapter layers": replace(config, bottleneck=BottleneckConfig(4), optim=frozen(bottleneck.TRAIN_ONLY_ADAPTERS)),
        "norms alone": replace(config, optim=frozen(ONLY_NORMS)),
    }


# Three seeds where an order is expected, one elsewhere.
THREE, ONE = (0, 1, 2), (0,)
WHICH = {"q": (8, ONE), "k": (8, ONE), "v": (8, ONE), "o": (8, ONE), "[qk]": (4, THREE), "[qkvo]": (2, ONE)}
RANKS = {1: THREE, 2: ONE, 8: THREE, 64: ONE}


def placed(name: str, adapter: LoraConfig, seeds: tuple[int, ...]) -> Arm:
    """LoRA elsewhere, or of another rank: with a search of its own where an order is expected of it."""
    search: dict[str, Any] = {"rates": RATES[LORA]} if seeds == THREE else {"rate_of": LORA}
    return Arm(name, adapted(tuning, adapter), seeds=seeds, **search)


COLUMNS = (
    Column("loss", "held-out loss"), Column("bleu", "BLEU", better="higher", digits=1), Column("nist", "NIST", better="higher", digits=2),
    Column("rouge_l", "ROUGE-L", better="higher"), Column("cider", "CIDEr", better="higher", digits=2),
    Column("trained_mb", "MB kept", better="lower", digits=2), Column("phi 1 1", "φ(1, 1)", better="neither"),
    Column("phi 8 64", "φ(8, 64)", better="neither"), Column("factor r 8", "amplification, r 8", better="neither", digits=1),
)  # fmt: skip
PAPER = """
| GPT-2 medium, E2E | BLEU | NIST | METEOR | ROUGE-L | CIDEr |
|---|---|---|---|---|---|
| full (354.92 M) | 68.2 | 8.62 | 46.2 | 71.0 | 2.47 |
| adapter layers (0.37 M) | 66.3 | 8.41 | 45.0 | 69.8 | 2.40 |
| prefix (0.35 M) | 69.7 | 8.81 | 46.1 | 71.4 | 2.49 |
| LoRA (0.35 M) | 70.4 | 8.85 | 46.8 | 71.8 | 2.53 |
"""
TITLE = "LoRA, arXiv:2106.09685: tables to text"

small = Study(
    name="lora-small",
    title=TITLE,
    arms=(
        *(Arm(name, config, rates=RATES[name], measure=measures.table_to_text) for name, config in methods(tuning).items()),
        *(placed(f"{where.strip('[]')}, r {rank}", lora(rank, where=where), seeds) for where, (rank, seeds) in WHICH.items()),
        *(placed(f"q, v, r {rank}", lora(rank), seeds) for rank, seeds in RANKS.items()),
        Arm(SUBSPACES, measure=subspaces, needs=tuple(f"q, v, r {rank}" for rank in RANKS), seeds=(0,)),
    ),
    columns=COLUMNS,
    orderings=(
        Ordering(LORA, "<=", "full", text="LoRA is within noise of full fine-tuning, or better"),
        Ordering(LORA, "<=", "adapter layers"),
        Ordering(LORA, "<=", "prefix 8"),
        Ordering(LORA, "<=", "qk, r 4", text="q and v rather than q and k, at one parameter count"),
        Ordering("q, v, r 8", "<=", "q, v, r 1", text="more rank does not hurt"),
    ),
    about="Base: configs/base.py, 5.9 M parameters. Every arm trains on the same number of tokens.",
    paper=PAPER,
    figures=(
        Figure("rates", "Held-out loss over the learning rates that were searched, seed 0.", over_rates("loss", "held-out loss")),
        Figure("rank", "Held-out loss over the rank of LoRA on q and v.", over_rank),
        Figure("subspaces", "Similarity φ(i, j) of the first i directions of A at r 8 with the first j at r 64, q, mean over layers.",
               over_directions),
        Figure("amplification", "How much LoRA amplifies what its kernel does in LoRA's own directions, q, mean over layers.",
               over_amplification),
    ),
)  # fmt: skip

tuning_real = replace(table_text.real, name="lora-real", loss=tuning.loss)
REAL_RATES = {"full": 1e-4, LORA: 2e-3, "prefix 8": 1e-2, "adapter layers": 2e-3, "norms alone": 2e-3}

real = Study(
    name="lora-real",
    title=TITLE,
    arms=tuple(
        Arm(name, replace(config, optim=replace(config.optim, lr=REAL_RATES[name])), seeds=(0,), measure=measures.table_to_text)
        for name, config in methods(tuning_real).items()
    ),
    columns=COLUMNS[:6],
    orderings=(Ordering(LORA, "<=", "full"),),
    about="Base: SmolLM2-135M-Instruct, from its 4-bit file. One seed, one rate an arm: no order is claimed.",
    paper=PAPER,
)

_debug = replace(table_text.debug, name="lora-debug", optim=replace(table_text.OPTIM, lr=3e-3))

debug = Study(
    name="lora-debug",
    title=TITLE,
    arms=(
        Arm("base", base.debug, seeds=(0,)),
        *(Arm(name, config, seeds=(0,), needs=("base",), prepare=starting_from("base")) for name, config in methods(_debug).items()),
    ),
    orderings=(Ordering(LORA, "<=", "base"),),
)

paper = TrainConfig(
    name="lora-paper",
    model=replace(gpt2_medium, embedding_dropout=0.1, residual_dropout=0.1, attention_dropout=0.1),
    lora=lora(4),
    data=replace(
        table_text.E2E, tokenizer=TokenizerConfig(kind="huggingface", path="data/gpt2/tokenizer.json"), sequence_length=512, packing="none"
    ),
    loss=LossConfig(label_smoothing=0.1),
    optim=OptimConfig(
        lr=2e-4,
        schedule=ScheduleConfig(kind="linear", warmup_steps=500, end_ratio=0.0),
        weight_decay=0.01,
        b2=0.999,
        freeze=adapters.TRAIN_ONLY_LORA,
    ),
    mesh=MeshConfig(data=1),
    num_steps=26_290,  # 5 epochs of 42,061 references in batches of 8
    init_from="data/gpt2-medium",
)

PRESETS: dict[str, TrainConfig | Study] = {"debug": debug, "small": small, "real": real, "paper": paper}
build = pretrain.experiment

if __name__ == "__main__":
    experiment_main(PRESETS, build)
