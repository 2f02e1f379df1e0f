"""A large model steered by what tuning changed in a small one, on E2E: tables to text.

Tuning Language Models by Proxy, arXiv:2401.08565.

    p = softmax(s_M + α (s_M⁺ − s_M⁻))      M the base, M⁻ a small model of the same tokens, M⁺ that one tuned
    gap closed = (proxy − base) / (base, tuned − base)

What differs here. The paper steers Llama-2 13B and 70B by their 7B sister; here M⁻ is cut out of M (experiments/minitron.py: pruned by
importance, then distilled from M on the text that M was trained on), and M⁺ is M⁻ tuned on E2E. `small`: M of 5.9 M parameters
(configs/base.py), M⁻ of 3 M; `real`: SmolLM2-135M and 90 M. The gap is that of the loss per token of the references, and of their overlap
with what beam 5 writes for 100 tables of dev, as in experiments/lora.py. All three read the plain prompt. `paper` is the tuning of the
paper's expert for GSM8K, Llama-2-7B; planned, not run.

    python -m tools.fetch e2e-nlg                   the data
    jaxllm train configs/base.py                    the base of `small`; python -m tools.fetch smollm2-135m for `real`
    python -m experiments.proxy_tuning small        resumes; --list says what is left, and about how long
    python -m experiments.proxy_tuning real         SmolLM2-135M, one seed
    jaxllm plan experiments/proxy_tuning.py:paper --gpus a100:8x1

Results: docs/results/proxy_tuning.md, written by the command itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from configs import base, table_text
from configs.models import llama2_7b
from jaxllm import pretrain
from jaxllm.cli import experiment_main
from jaxllm.config import DataConfig, MeshConfig, OptimConfig, ScheduleConfig, SourceConfig, TokenizerConfig, TrainConfig
from jaxllm.students import shaped, student
from jaxllm.study import Arm, Column, Figure, Ordering, Row, Run, Study, starting_from
from jaxllm.study.figures import lines
from jaxllm.surgery import shapes
from jaxllm.surgery.shapes import Shape

ANTI, EXPERT, TUNED, BASE = "anti-expert", "expert", "base, tuned", "base"
SCORES = ("loss", "bleu", "rouge_l", "cider")
"""Of which a share of the gap is told, where they were measured."""


def proxy(alpha: float) -> str:
    """Name of an arm."""
    return f"proxy, α {alpha:g}"


# ------------------------------------------------------------------------------------------- measures


def on_task(config: TrainConfig, model: object) -> dict[str, float]:
    """Loss on the task, and what is written for its tables where it has some.

    Args:
      config: of the tuning, whose held-out text is the task.
      model: loaded, or its folder.
    """
    from jaxllm import measures

    found = measures.held_out(model, config, max_batches=config.eval_batches)  # type: ignore[arg-type]
    written = measures.on_tables(model, config) if config.data.held_out else {}  # type: ignore[arg-type]
    return {"loss": found["loss"], **written}


def untouched(config: TrainConfig, run: Run) -> Mapping[str, float]:
    """The base, on the task."""
    return on_task(config, config.init_from or run.needs["given"].run_dir)


def itself(config: TrainConfig, run: Run) -> Mapping[str, float]:
    """What an arm trained, on the task."""
    return on_task(config, run.run_dir)


def steered(config: TrainConfig, alpha: float, run: Run) -> Mapping[str, float]:
    """The base steered by expert and anti-expert, and how much of the gap to the tuned base that closes."""
    from jaxllm import pretrained
    from jaxllm.files import path_of
    from jaxllm.generate.proxy import ProxyFlags, gap_closed
    from jaxllm.generate.proxy import steered as steer

    flags = ProxyFlags(str(run.needs[EXPERT].run_dir), str(run.needs[ANTI].run_dir), alpha)
    whole = pretrained.load(path_of(config.init_from) if config.init_from else run.needs["given"].run_dir)
    found = on_task(config, steer(whole, flags))
    ends = [run.needs[name].metrics for name in (BASE, TUNED)]
    return found | {f"gap_{name}": gap_closed(ends[0][name], found[name], ends[1][name]) for name in SCORES if name in found}


def over_alpha(rows: Sequence[Row]) -> str:
    """Share of the gap closed over α, seed 0."""
    points: dict[str, list[tuple[float, float, float | None]]] = {}
    for row in rows:
        if row["arm"].startswith("proxy, α ") and row["seed"] == 0:
            for name in SCORES:
                if (share := row["metrics"].get(f"gap_{name}")) is not None:
                    points.setdefault(name, []).append((float(row["arm"].rpartition(" ")[2]), share, None))
    return lines("Share of the gap closed", "α", "share", {name: sorted(series) for name, series in points.items()})


# ------------------------------------------------------------------------------------------- studies

COLUMNS = (
    Column("loss", "held-out loss"), Column("gap_loss", "gap closed", better="higher"), Column("bleu", "BLEU", better="higher", digits=1),
    Column("gap_bleu", "gap closed", better="higher"), Column("rouge_l", "ROUGE-L", better="higher"),
    Column("gap_rouge_l", "gap closed", better="higher"), Column("cider", "CIDEr", better="higher", digits=2),
    Column("gap_cider", "gap closed", better="higher"),
)  # fmt: skip
PAPER = """
| | GSM8K | TriviaQA |
|---|---|---|
| 7B expert | 40.6 | 55.8 |
| 13B base | 6.6 | 36.8 |
| 13B proxy, α 1 | 43.9 | 55.9 |
| 13B tuned | 51.0 | 59.5 |
| 70B base | 9.6 | 45.2 |
| 70B proxy, α 1 | 53.9 | 62.7 |
| 70B tuned | 67.9 | 63.1 |

Gap closed: 84.0 % (13B) and 86.9 % (70B), means of the two tasks.
"""
TITLE = "Proxy-tuning, arXiv:2401.08565: steered at decoding"
FIGURES = (Figure("alpha", "Share of the gap that α closes, seed 0.", over_alpha),)


def arms_of(
    tuning: TrainConfig, healing: TrainConfig, shape: Shape, alphas: Mapping[float, tuple[int, ...]], *,
    rates: Mapping[str, tuple[float, ...]], seeds: tuple[int, ...], given: str = "",
) -> tuple[Arm, ...]:  # fmt: skip
    """The base, the two small models, the tuned base, and the base steered with each α.

    Args:
      tuning: trains on the task, from the base; `healing` trains the student of that shape on the base's own text.
      rates: of EXPERT and TUNED.
      given: an arm whose run is the base, in place of `tuning.init_from`.
    """
    needs = (given,) if given else ()
    start = starting_from(given) if given else None
    cut = student("importance", given or tuning.init_from, given or tuning.init_from)
    return (
        Arm(BASE, seeds=(0,), needs=needs, measure=partial(untouched, tuning)),
        Arm(TUNED, tuning, rates=rates[TUNED], seeds=seeds, needs=needs, prepare=start, measure=partial(itself, tuning)),
        Arm(ANTI, shaped(healing, shape), seeds=(0,), needs=needs, prepare=cut, measure=partial(itself, tuning)),
        Arm(
            EXPERT, shaped(tuning, shape), rates=rates[EXPERT], seeds=seeds, needs=(ANTI,), prepare=starting_from(ANTI),
            measure=partial(itself, tuning),
        ),
        *(
            Arm(proxy(alpha), seeds=of_alpha, needs=(*needs, BASE, TUNED, ANTI, EXPERT), measure=partial(steered, tuning, alpha))
            for alpha, of_alpha in alphas.items()
        ),
        Arm(HALF, seeds=(0,), measure=half),
    )  # fmt: skip


HALF = "half of the gap"


def half(run: Run) -> Mapping[str, float]:
    """What the gap closed is compared with."""
    del run
    return {f"gap_{name}": 0.5 for name in SCORES}


ORDERINGS = (
    Ordering(HALF, "<", proxy(1), "gap_loss", text="steering closes more than half of the gap"),
    Ordering(proxy(1), "<", BASE, text="steered, the base is better than it was"),
    Ordering(proxy(1), "<", EXPERT, text="the steered base is better than the expert that steers it"),
    Ordering(TUNED, "<=", proxy(1), text="tuning the base itself is at least as good"),
)
THREE, ONE = (0, 1, 2), (0,)

tuning = replace(table_text.small, name="proxy-small")
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
SHAPE = shapes.near(tuning.model, 3_000_000, rank=shapes.nearest_proportions(tuning.model, 3_000_000))[0]
healing = replace(
    base.config, name="proxy-student", optim=replace(base.config.optim, lr=1e-3, schedule=ScheduleConfig(kind="cosine", warmup_steps=10)),
    num_steps=120, run_dir="", save_every=120, eval_batches=8,
)  # fmt: skip
small = Study(
    name="proxy_tuning-small",
    title=TITLE,
    arms=arms_of(
        tuning, healing, SHAPE, {0.25: ONE, 0.5: ONE, 1: THREE, 1.5: ONE, 2: ONE}, rates={EXPERT: RATES, TUNED: RATES}, seeds=THREE
    ),
    columns=COLUMNS,
    orderings=ORDERINGS,
    about=f"Base: configs/base.py, {Shape.of(tuning.model)}. Anti-expert: {SHAPE}, distilled from the base for 120 steps.",
    paper=PAPER,
    figures=FIGURES,
)

tuning_real = replace(table_text.real, name="proxy-real")
SHAPE_REAL = shapes.near(base.smollm2.model, 90_000_000, rank=shapes.nearest_proportions(base.smollm2.model, 90_000_000))[0]
healing_real = replace(
    base.smollm2, name="proxy-student", optim=replace(healing.optim, lr=3e-4), num_steps=400, save_every=100, eval_batches=32
)
real = Study(
    name="proxy_tuning-real",
    title=TITLE,
    arms=arms_of(tuning_real, healing_real, SHAPE_REAL, {0.5: ONE, 1: ONE, 1.5: ONE}, rates={EXPERT: (3e-4,), TUNED: (1e-4,)}, seeds=ONE),
    columns=COLUMNS,
    orderings=ORDERINGS,
    about=f"Base: SmolLM2-135M-Instruct, from its 4-bit file. Anti-expert: {SHAPE_REAL}. One seed: no order is claimed.",
    paper=PAPER,
    figures=FIGURES,
)

_debug = replace(table_text.debug, name="proxy-debug", eval_batches=2)
debug = Study(
    name="proxy_tuning-debug",
    title=TITLE,
    arms=(
        Arm("given", base.debug, seeds=ONE),
        *arms_of(
            _debug, replace(base.debug, num_steps=10), Shape.of(base.debug.model)._replace(width=24, ff_width=32), {0.5: ONE, 1: ONE},
            rates={EXPERT: (), TUNED: ()}, seeds=ONE, given="given",
        ),
    ),
    columns=COLUMNS[:2],
    orderings=ORDERINGS,
    figures=FIGURES,
)  # fmt: skip

# ------------------------------------------------------------------------------------------- the paper

paper = TrainConfig(
    name="proxy-paper",
    model=llama2_7b,
    data=DataConfig(
        sources=(SourceConfig(kind="jsonl", path="data/gsm8k/train.jsonl", prompt_field="question", field="answer", loss_on="completion"),),
        tokenizer=TokenizerConfig(kind="huggingface", path="data/llama2/tokenizer.json"),
        sequence_length=2048,
        batch_size=128,
    ),
    optim=OptimConfig(lr=2e-5, schedule=ScheduleConfig(kind="linear", warmup_steps=5, end_ratio=0.0), b2=0.999, weight_decay=0.0),
    mesh=MeshConfig(data=8),
    num_steps=117,  # 2 epochs of 7,473 problems
    init_from="llama2-7b",
    precision="bfloat16",
)
PAPER_HARDWARE = {"paper": ("--gpus", "a100:8x1")}

PRESETS: dict[str, TrainConfig | Study] = {"debug": debug, "small": small, "real": real, "paper": paper}
build = pretrain.experiment

if __name__ == "__main__":
    experiment_main(PRESETS, build)
