"""Smaller models out of larger ones: importance, structured pruning, distillation from the model before.

LLM Pruning and Distillation in Practice: The Minitron Approach, arXiv:2408.11796; Compact Language Models via Pruning and Knowledge
Distillation, arXiv:2407.14679.

    importance of a neuron, head or channel = L2 over rows of the mean over tokens of |activation|;  keep the highest
    loss = KL(p_teacher || p_student), both at temperature 1, and no cross-entropy
    the teacher is first trained on a little with the text of the distillation (teacher correction)

What differs here. The paper prunes Llama-3.1-8B to 4B and distils on 94 billion tokens; `small` prunes the 11.2 M parameters of
configs/base.py:teacher to 6.3 M, with text that this teacher has never seen (the documentation of web services), `real` SmolLM2-135M to 90
M. Depth goes by block influence where the paper looks at Winogrande. Every student has the same tokens and searches the same rates; all are
cut out of the teacher as it was, so that correction changes who teaches and nothing else. Bits per byte of WikiText-2 stand for the paper's
tasks in `small`, whose models are at chance there; `real` also answers the first 200 questions of ARC-Easy and PIQA.

    python -m tools.fetch wikitext2-valid          for evaluation only; and `choices` for `real`
    jaxllm train configs/base.py:teacher           the teacher of `small`; python -m tools.fetch smollm2-135m for `real`
    python -m experiments.minitron small           resumes; --list says what is left, and about how long
    python -m experiments.minitron small --teacher CHECKPOINT --target-params 90M      your own: corrected, pruned, distilled
    python -m experiments.minitron search          shapes near one budget, each healed a little, ranked
    python -m experiments.minitron real            SmolLM2-135M to 90 M, one seed
    jaxllm plan experiments/minitron.py:paper --gpus h100:8x32

Results: docs/results/minitron.md, written by the command itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from configs import base
from configs.models import llama3_1_8b, mistral_nemo_12b
from jaxllm import distill, pretrain
from jaxllm.cli import experiment_main
from jaxllm.config import (
    ConfigError,
    DataConfig,
    DistillConfig,
    MeshConfig,
    OptimConfig,
    Precision,
    ScheduleConfig,
    SourceConfig,
    TokenizerConfig,
    TrainConfig,
)
from jaxllm.files import path_of
from jaxllm.step import Experiment
from jaxllm.students import How, shaped, student
from jaxllm.study import Arm, Column, Figure, Ordering, Row, Run, Study
from jaxllm.study.figures import Point, lines, over_rates
from jaxllm.surgery import shapes
from jaxllm.surgery.shapes import Shape

CORRECTED = "corrected teacher"

# ------------------------------------------------------------------------------------------- measures


QUESTIONS = ("arc_easy", "piqa")


def scores(run: Run, questions: Sequence[str] = ()) -> Mapping[str, float]:
    """Losses on the way, WikiText-2, how large it is, and how many of the questions it answers."""
    from jaxllm import measures

    assert run.config is not None
    return {
        **{f"at {step}": loss for step, loss in measures.losses_by_step(run.run_dir).items()},
        "wikitext": measures.held_out(run.run_dir, run.config, on=base.WIKITEXT, max_batches=32)["bits_per_byte"],
        "params_m": shapes.num_params(run.config.model) / 1e6,
        **(measures.choices(run.run_dir, questions) if questions else {}),
    }


def untouched(config: TrainConfig, run: Run, questions: Sequence[str] = ()) -> Mapping[str, float]:
    """The model that all begins with."""
    from jaxllm import measures

    found = measures.held_out(config.init_from, config, max_batches=config.eval_batches)
    return {
        "loss": found["loss"],
        "wikitext": measures.held_out(config.init_from, config, on=base.WIKITEXT, max_batches=32)["bits_per_byte"],
        "params_m": shapes.num_params(config.model) / 1e6,
        **(measures.choices(path_of(config.init_from), questions) if questions else {}),
    }


def curves(rows: Sequence[Row]) -> str:
    """Held-out loss over the steps, mean over the seeds."""
    arms = dict.fromkeys(row["arm"] for row in rows if row["kind"] == "run" and any(name.startswith("at ") for name in row["metrics"]))

    def series(arm: str) -> list[Point]:
        found: dict[int, list[float]] = {}
        for row in rows:
            if row["arm"] == arm and row["kind"] == "run":
                for name, loss in row["metrics"].items():
                    if name.startswith("at ") and loss is not None:
                        found.setdefault(int(name.removeprefix("at ")), []).append(loss)
        return [(float(step), sum(losses) / len(losses), None) for step, losses in sorted(found.items())]

    return lines("Held-out loss while healing", "step", "held-out loss", {arm: series(arm) for arm in arms})


# ------------------------------------------------------------------------------------------- studies

COLUMNS = (
    Column("loss", "held-out loss"), Column("bits_per_byte", "bits per byte"), Column("wikitext", "WikiText-2, bits per byte"),
    Column("params_m", "M parameters", better="neither", digits=1),
)  # fmt: skip
COLUMNS_REAL = (
    *COLUMNS, Column("arc_easy", "ARC-Easy, 200 questions", better="higher"), Column("piqa", "PIQA, 200 questions", better="higher"),
)  # fmt: skip
PAPER = """
| Llama-3.1-8B | MMLU | HellaSwag | GSM8K | Winogrande |
|---|---|---|---|---|
| itself | 65.3 | 81.8 | 48.6 | 77.3 |
| 4B, width | 60.5 | 76.1 | 41.2 | 73.5 |
| 4B, depth | 58.7 | 73.2 | 16.8 | 72.1 |

Final loss (arXiv:2408.11796, figure 6): pruned + KD < pruned + LM ≈ pruned at random + KD < from scratch + KD. A corrected teacher
lowers the student's validation loss by more than 6 %.
"""
TITLE = "Minitron, arXiv:2408.11796: pruned, then distilled"
FIGURES = (
    Figure("rates", "Held-out loss over the learning rates that were searched, seed 0.", over_rates("loss", "held-out loss")),
    Figure("curves", "Held-out loss while the pruned models heal, mean over the seeds.", curves),
)

tuning = replace(
    base.teacher,
    name="minitron-small",
    data=replace(
        base.teacher.data,
        sources=tuple(source for source in base.config.data.sources if "botocore" in source.path),
        tokenizer=TokenizerConfig(path="cache://models/base-teacher/tokenizer"),
        batch_size=8,
    ),
    optim=OptimConfig(lr=1e-3, schedule=ScheduleConfig(kind="cosine", warmup_steps=10)),
    init_from="cache://models/base-teacher",
    num_steps=105,
    eval_every=15,
    eval_batches=24,
    save_every=105,
    run_dir="",
)
RATES = (3e-4, 1e-3, 3e-3)
BUDGET = 6_300_000
WIDTH = shapes.near(tuning.model, BUDGET, rank=shapes.nearest_proportions(tuning.model, BUDGET))[0]
DEPTH = Shape.of(tuning.model)._replace(num_layers=4)


def correction(config: TrainConfig) -> TrainConfig:
    """A fifth of the rate that the teacher was trained with: arXiv:2408.11796, section 4."""
    return replace(config, optim=replace(config.optim, lr=base.teacher.optim.lr / 5))


def arm(name: str, shape: Shape, how: How, teacher: str = CORRECTED) -> Arm:
    """A student of `tuning`'s text, cut out of the teacher before its correction."""
    needs = (CORRECTED,) if teacher == CORRECTED else ()
    return Arm(name, shaped(tuning, shape), rates=RATES, needs=needs, prepare=student(how, tuning.init_from, teacher), measure=scores)


BEST = "width, KD"
small = Study(
    name="minitron-small",
    title=TITLE,
    arms=(
        Arm("teacher", seeds=(0,), measure=partial(untouched, tuning)),
        Arm(CORRECTED, correction(tuning), seeds=(0,), measure=scores),
        arm(BEST, WIDTH, "importance"),
        arm("width, KD, teacher not corrected", WIDTH, "importance", tuning.init_from),
        arm("width, text alone", WIDTH, "importance", teacher=""),
        arm("width at random, KD", WIDTH, "random"),
        arm("from scratch, KD", WIDTH, "scratch"),
        arm("depth, KD", DEPTH, "importance"),
    ),
    columns=COLUMNS,
    orderings=(
        Ordering(BEST, "<", "width at random, KD", text="importance beats a random choice"),
        Ordering("width at random, KD", "<", "from scratch, KD", text="a random choice beats fresh weights"),
        Ordering(BEST, "<", "width, text alone", text="the teacher beats the text"),
        Ordering(BEST, "<", "width, KD, teacher not corrected", text="a corrected teacher is better on text that it had not seen"),
        Ordering(BEST, "<=", "depth, KD", text="width is at least as good as depth"),
    ),
    about=f"Teacher: configs/base.py:teacher, {Shape.of(tuning.model)}. Width: {WIDTH}. Depth: {DEPTH}. Text: botocore.",
    paper=PAPER,
    figures=FIGURES,
)

tuning_real = replace(
    base.smollm2, name="minitron-real", optim=replace(tuning.optim, lr=3e-4), num_steps=300, eval_every=100, eval_batches=32
)
BUDGET_REAL = 90_000_000
WIDTH_REAL = shapes.near(tuning_real.model, BUDGET_REAL, rank=shapes.nearest_proportions(tuning_real.model, BUDGET_REAL))[0]
DEPTH_REAL = Shape.of(tuning_real.model)._replace(num_layers=17)


def arm_real(name: str, shape: Shape, how: How, teacher: str = tuning_real.init_from) -> Arm:
    """A student of SmolLM2-135M."""
    prepare = student(how, tuning_real.init_from, teacher)
    return Arm(name, shaped(tuning_real, shape), seeds=(0,), prepare=prepare, measure=partial(scores, questions=QUESTIONS))


real = Study(
    name="minitron-real",
    title=TITLE,
    arms=(
        Arm("teacher", seeds=(0,), measure=partial(untouched, tuning_real, questions=QUESTIONS)),
        arm_real(BEST, WIDTH_REAL, "importance"),
        arm_real("width, text alone", WIDTH_REAL, "importance", teacher=""),
        arm_real("width at random, KD", WIDTH_REAL, "random"),
        arm_real("depth, KD", DEPTH_REAL, "importance"),
    ),
    columns=COLUMNS_REAL,
    orderings=(Ordering(BEST, "<", "width at random, KD"),),
    about=f"SmolLM2-135M-Instruct, from its 4-bit file, to 90 M parameters: {WIDTH_REAL}; or {DEPTH_REAL}. One seed: no order is claimed.",
    paper=PAPER,
    figures=FIGURES[1:],
)

# Shapes within 5 % of the budget, healed for as many steps as the paper's ranking needs in proportion, ranked by loss.
CANDIDATES = shapes.near(
    tuning.model, BUDGET, num_layers=(4, 6, 8), multiple=32, rank=shapes.nearest_proportions(tuning.model, BUDGET)
)[:12]  # fmt: skip
search = Study(
    name="minitron-search",
    title="Minitron's search: shapes near one budget, healed a little",
    arms=(
        Arm(CORRECTED, correction(tuning), seeds=(0,), measure=scores),
        *(
            Arm(
                str(shape), replace(shaped(tuning, shape), num_steps=30, eval_every=10, save_every=30), seeds=(0,), needs=(CORRECTED,),
                prepare=student("importance", tuning.init_from, CORRECTED), measure=scores,
            )
            for shape in CANDIDATES
        ),
    ),
    columns=COLUMNS,
    about=f"All of {BUDGET:,} parameters within 5 %. One seed and few steps: a ranking to choose by, not a result.",
    ranked=True,
)  # fmt: skip


def shrinking(teacher: str, target_params: str) -> Study:
    """Any checkpoint: corrected on the text, pruned to the budget, distilled. The student is an ordinary run directory."""
    from jaxllm import pretrained

    model = pretrained.model_config(teacher)
    target = shapes.number_of(target_params)
    shape = shapes.near(model, target, rank=shapes.nearest_proportions(model, target))[0]
    own = path_of(teacher) / "tokenizer"
    kind: Any = "sentencepiece" if (own / "tokenizer.model").exists() else "bytes" if (own / "tokenizer.bytes").exists() else "huggingface"
    tokenizer = TokenizerConfig(kind=kind, path="" if kind == "bytes" else str(own))
    config = replace(
        tuning_real, name="minitron", model=model, init_from=teacher, data=replace(tuning_real.data, tokenizer=tokenizer), num_steps=400
    )
    slug = f"{Path(teacher).name}-{target_params}".replace("/", "-")
    return Study(
        name=f"minitron-{slug}",
        title=f"{teacher} to {target_params} parameters: {shape}",
        arms=(
            Arm(CORRECTED, replace(config, optim=replace(config.optim, lr=1e-4)), seeds=(0,), measure=scores),
            Arm(
                "student",
                shaped(config, shape),
                seeds=(0,),
                needs=(CORRECTED,),
                prepare=student("importance", teacher, CORRECTED),
                measure=scores,
            ),
        ),
        columns=COLUMNS,
        about="The student's run directory is a checkpoint like any other: python -m tools.convert to-hf RUN_DIR FOLDER.",
    )  # fmt: skip


_debug = replace(base.debug, name="minitron-debug", num_steps=10, eval_every=5, eval_batches=2)
_NARROW = Shape.of(_debug.model)._replace(width=24, ff_width=_debug.model.ff_width // 2)
_WAYS: tuple[tuple[str, How, str], ...] = (
    (BEST, "importance", CORRECTED), ("width, text alone", "importance", ""), ("width at random, KD", "random", CORRECTED),
    ("from scratch, KD", "scratch", CORRECTED),
)  # fmt: skip
debug = Study(
    name="minitron-debug",
    title=TITLE,
    arms=(
        Arm(CORRECTED, base.debug, seeds=(0,)),
        *(
            Arm(name, shaped(_debug, _NARROW), seeds=(0,), needs=(CORRECTED,), prepare=student(how, CORRECTED, teacher))
            for name, how, teacher in _WAYS
        ),
        Arm(
            "depth, KD", shaped(_debug, Shape.of(_debug.model)._replace(num_layers=1)), seeds=(0,), needs=(CORRECTED,),
            prepare=student("importance", CORRECTED, CORRECTED),
        ),
    ),
    orderings=(Ordering(BEST, "<=", "from scratch, KD"),),
)  # fmt: skip

# ------------------------------------------------------------------------------------------- the paper

PUBLISHED = {"llama3.1-8b": llama3_1_8b, "mistral-nemo-12b": mistral_nemo_12b}
"""Teachers of the paper's runs by the name that stands in their configurations."""

paper = TrainConfig(
    name="minitron-paper-4b-width",
    model=replace(llama3_1_8b, width=3072, ff_width=9216),
    distill=DistillConfig(teachers=(("llama3.1-8b", 1.0),)),
    data=DataConfig(
        sources=(SourceConfig(kind="array_record", path="data/text/*.array_record"),),
        tokenizer=TokenizerConfig(kind="huggingface", path="data/llama3/tokenizer.json"),
        sequence_length=8192,
        batch_size=1152,
    ),
    optim=OptimConfig(lr=1e-4, schedule=ScheduleConfig(kind="cosine", warmup_steps=40, end_ratio=0.1), num_microbatches=1),
    mesh=MeshConfig(data=32, model=8),
    num_steps=9_961,  # 94 billion tokens
    precision="bfloat16",
)
paper_depth = replace(paper, name="minitron-paper-4b-depth", model=replace(llama3_1_8b, num_layers=16))
paper_nemo = replace(
    paper,
    name="minitron-paper-8b",
    model=replace(mistral_nemo_12b, width=4096, ff_width=11_520),
    distill=DistillConfig(teachers=(("mistral-nemo-12b", 1.0),)),
    data=replace(paper.data, tokenizer=TokenizerConfig(kind="huggingface", path="data/nemo/tokenizer.json"), batch_size=768),
    optim=replace(paper.optim, schedule=ScheduleConfig(kind="cosine", warmup_steps=60, end_ratio=4.5e-3)),
    num_steps=60_399,  # 380 billion tokens
)
PAPER_HARDWARE = dict.fromkeys(("paper", "paper_depth", "paper_nemo"), ("--gpus", "h100:8x32"))


def build(config: TrainConfig, *, precision: Precision) -> Experiment:
    """The usual experiment; a teacher of the paper stands in by its shape alone, to be planned."""
    published = [PUBLISHED[path] for path, _ in config.distill.teachers if path in PUBLISHED]
    if not published:
        return pretrain.experiment(config, precision=precision)
    plain = pretrain.experiment(replace(config, distill=DistillConfig()), precision=precision)
    teachers = [distill.of_config(path, model, precision) for (path, _), model in zip(config.distill.teachers, published, strict=True)]
    return distill.experiment(replace(plain, config=config), precision, teachers)


PRESETS: dict[str, TrainConfig | Study] = {
    "debug": debug, "small": small, "real": real, "search": search,
    "paper": paper, "paper_depth": paper_depth, "paper_nemo": paper_nemo,
}  # fmt: skip


def from_words(words: list[str]) -> dict[str, TrainConfig | Study]:
    """PRESETS; where `--teacher CHECKPOINT --target-params N` is among the words, which are taken out, `small` is about that checkpoint.

    Raises:
      ConfigError: one of the two without the other, or without its value; another preset.
    """
    given: dict[str, str] = {}
    words[:] = [part for word in words for part in (word.split("=", 1) if word.startswith(("--teacher=", "--target")) else [word])]
    for name in ("--teacher", "--target-params"):
        for flag in (name, name.replace("-params", "_params")):
            if flag in words:
                at = words.index(flag)
                if at + 1 >= len(words):
                    raise ConfigError(f"{flag} needs a value, e.g. --teacher runs/A --target-params 90M")
                given[name] = words[at + 1]
                del words[at : at + 2]
    if not given:
        return PRESETS
    if len(given) < 2:
        raise ConfigError("--teacher CHECKPOINT and --target-params N go together, e.g. --teacher runs/A --target-params 90M")
    if words[:1] != ["small"]:
        raise ConfigError(f"--teacher goes with `small`, not with {' '.join(words[:1]) or 'nothing'}: it has its own text and steps")
    return {**PRESETS, "small": shrinking(given["--teacher"], given["--target-params"])}


if __name__ == "__main__":
    experiment_main(PRESETS, build, from_words)
