"""Fewer key/value heads for a trained model, and a little more training: MHA to GQA and MQA.

GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints, arXiv:2305.13245.

    W'[k] = (1/r) sum over i < r of W[k r + i]          for keys and values: mean pooling; or the first of them, or fresh ones
    loss  = mean of -log p(x[t+1] | x[<=t])   + kl * KL(p_before || p),   before = the model before its heads were pooled, kl from 1 to 0

What differs here. The paper has T5 Large and XXL with 1M steps of pre-training; `small` has configs/base.py's 5.9 M parameters with 1,200
steps, `real` SmolLM2-135M, whose original steps are too many to name a share of (its arms name tokens). A decoder alone, so there is no
encoder to leave as it is. `svd` is ours: each new head with a linear map to each old one (jaxllm/surgery/resize.py). The KL term is ours
too. The rate is constant and that of the last step before, as T5's.

    jaxllm train configs/base.py                  the model before
    python -m tools.fetch wikitext2-valid         for evaluation only
    python -m experiments.gqa_uptrain small       resumes; --list says what is left, and about how long
    python -m experiments.gqa_uptrain real        SmolLM2-135M, one seed
    jaxllm plan experiments/gqa_uptrain.py:paper --topology v4:4x4x4

Results: docs/results/gqa_uptrain.md, written by the command itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from configs import base
from configs.models import palm_8b, smollm2_135m
from jaxllm.cli import experiment_main
from jaxllm.config import DataConfig, DistillConfig, ModelConfig, OptimConfig, ScheduleConfig, SourceConfig, TokenizerConfig, TrainConfig
from jaxllm.files import path_of
from jaxllm.study import Arm, Column, Figure, Ordering, Row, Run, Study
from jaxllm.study.figures import Point, lines, points

ALPHA = 0.1
"""Share of the original steps that arms are uptrained for; losses at 0, 0.02 and 0.05 are evaluations on the way."""
ROWS = 8
"""Of the decoding step that is timed."""

uptraining = replace(
    base.config,
    name="gqa-small",
    optim=OptimConfig(lr=3e-4, schedule=ScheduleConfig(kind="constant", warmup_steps=5)),  # the rate that the base ended with
    num_steps=round(ALPHA * base.config.num_steps),
    eval_every=round(ALPHA * base.config.num_steps / 10),
    save_every=round(ALPHA * base.config.num_steps),
    eval_batches=8,
    run_dir="",
    init_from="cache://models/base-small",
)


def converted(source: str, folder: Path, config: TrainConfig, num_kv_heads: int, how: str) -> str:
    """The model in `source` with other heads, as a folder that training starts from; made once.

    Args:
      config: whose seed draws random heads, and whose data calibrate `svd`.
    """
    import jax

    from jaxllm import pretrained
    from jaxllm.surgery import resize

    if not (folder / "checkpoints").is_dir():
        model = pretrained.load(source)
        moments = input_moments(model, config) if how == "svd" else None
        key = jax.random.key(config.seed)
        params, new = resize.kv_heads(model.params, model.config, num_kv_heads, how, key=key, moments=moments)  # type: ignore[arg-type]
        pretrained.save(
            folder, new, params, model.tokenizer, chat_template=model.chat_template, stop_ids=model.stop_ids,
            source={"kind": "kv-heads", "from": source, "how": how, "num_kv_heads": num_kv_heads},
        )  # fmt: skip
    return str(folder)


def input_moments(model: Any, config: TrainConfig) -> Any:
    """Second moments of the layers' inputs on 8 batches of training text."""
    from itertools import islice

    import numpy as np

    from jaxllm import sharding
    from jaxllm.data import batch as batches
    from jaxllm.data.position import Position
    from jaxllm.pretrained import ONE_DEVICE
    from jaxllm.surgery import resize

    dataset, mesh = batches.load(config.data, seed=config.seed), sharding.make_mesh(ONE_DEVICE)
    items = islice(dataset.read(Position(), lambda size: np.arange(size)), 8)
    rows = (batches.to_global(item.batch, mesh, dataset.batch_size(item.batch_id)) for item in items)
    return resize.input_moments(model.lm, model.params, rows)


def start(num_kv_heads: int, how: str) -> Callable[[Run], TrainConfig]:
    """An `Arm.prepare`: from the model in `init_from` with other heads, kept in the cache for all arms that want it."""

    def prepare(run: Run) -> TrainConfig:
        from jaxllm import manifest

        assert run.config is not None
        source = run.config.init_from
        origin = f"{source.rpartition('/')[2]}-{manifest.fingerprint(path_of(source))[:8]}"
        name = f"{origin}-kv{num_kv_heads}-{how}{f'-{run.seed}' if how == 'random' else ''}"
        folder = path_of(f"cache://models/{name}")
        return replace(run.config, init_from=converted(source, folder, run.config, num_kv_heads, how))

    return prepare


def pooled(config: TrainConfig, num_kv_heads: int) -> TrainConfig:
    return replace(config, model=replace(config.model, num_kv_heads=num_kv_heads))


def decoding(model: ModelConfig, num_kv_heads: int, context: int, run: Run) -> Mapping[str, float]:
    """What decoding costs with `context` tokens in the cache: bytes of a row, and the time of a step beside that with all heads."""
    import jax.numpy as jnp

    from jaxllm.generate.timing import in_turn
    from jaxllm.surgery.resize import cache_bytes

    del run
    fewer = replace(model, num_kv_heads=num_kv_heads)
    _, timed = in_turn((model, fewer), ROWS, context, "float32", rounds=15)
    return {
        "cache_mb": cache_bytes(fewer, 1, context, jnp.dtype(jnp.float32).itemsize) / 1e6,
        "decode_ms": 1e3 * timed.seconds,
        "decode_share": timed.share,
    }


def wikitext(model: str | Path, config: TrainConfig) -> float:
    """Loss on WikiText-2, which nothing here was trained on."""
    from jaxllm import measures

    return measures.held_out(model, config, on=base.WIKITEXT, max_batches=32)["loss"]


def scores(run: Run) -> Mapping[str, float]:
    """Losses on the way, and what share of the loss that surgery cost has come back, beside the untouched model trained as long."""
    from jaxllm import measures

    assert run.config is not None
    config, last = run.config, run.config.num_steps
    by_step = measures.losses_by_step(run.run_dir)
    shares = {share: by_step[step] for share in (0.01, 0.02, 0.05) if (step := round(share / ALPHA * last)) in by_step}
    numbers = {f"loss_{share:g}": loss for share, loss in shares.items()} | {"wikitext": wikitext(run.run_dir, config)}
    numbers["loss_0"] = measures.held_out(config.init_from, config, max_batches=config.eval_batches)["loss"]
    for other in run.needs.values():
        untouched = measures.losses_by_step(other.run_dir)[last]
        numbers["recovered"] = (numbers["loss_0"] - by_step[last]) / (numbers["loss_0"] - untouched)
    return numbers


def before(config: TrainConfig, run: Run) -> Mapping[str, float]:
    """The model before, neither cut nor trained on."""
    from jaxllm import measures

    del run
    found = measures.held_out(config.init_from, config, max_batches=config.eval_batches)
    return {"loss": found["loss"], "loss_0": found["loss"], "wikitext": wikitext(config.init_from, config)}


def over_share(rows: Sequence[Row]) -> str:
    """Held-out loss over α, mean over the seeds."""
    arms = dict.fromkeys(row["arm"] for row in rows if row["kind"] == "run")

    def series(arm: str) -> list[Point]:
        mine = [row for row in rows if row["arm"] == arm and row["kind"] == "run"]
        named = {share: "loss" if share == ALPHA else f"loss_{share:g}" for share in (0.0, 0.01, 0.02, 0.05, ALPHA)}
        return [point for share, metric in named.items() for point in points(mine, lambda row, at=share: at, metric)]  # type: ignore[misc]

    return lines("Held-out loss over the share of the original steps", "α", "held-out loss", {arm: series(arm) for arm in arms})


def with_kl(config: TrainConfig) -> TrainConfig:
    """Next-token loss, and the divergence from the model before surgery, whose weight falls from 1 to 0."""
    return replace(config, distill=DistillConfig(teachers=((config.init_from, 1.0),), ce=1.0, weight_end=0.0))


COST = (
    Column("recovered", "of the loss recovered", better="higher"), Column("wikitext", "WikiText-2 loss"),
    Column("cache_mb", "cache, MB a row", digits=2), Column("decode_ms", "ms a step of 8 rows", digits=1),
    Column("decode_share", "of the step with all heads", digits=2),
)  # fmt: skip
COLUMNS = (
    Column("loss_0", "α 0"), Column("loss_0.01", "α 0.01"), Column("loss_0.02", "α 0.02"), Column("loss_0.05", "α 0.05"),
    Column("loss", "α 0.1, held-out loss"), *COST,
)  # fmt: skip
PAPER = """
| | average of seven tasks | seconds a sample |
|---|---|---|
| MHA-XXL | 47.2 | 1.51 |
| MQA-XXL, α 0.05 | 46.6 | 0.24 |
| GQA-8-XXL, α 0.05 | 47.1 | 0.28 |

To MQA at α 0.05 (T5-Large, read off a chart): mean 55.5, first 55.4, random 55.2.
"""
TITLE = "GQA, arXiv:2305.13245: fewer key/value heads"
WHOLE = "no surgery, trained on"
HOW = ("mean", "first", "random", "svd")
HEADS = (*((f"1 head, {how}", 1, how) for how in HOW), ("2 heads, mean", 2, "mean"), ("4 heads, mean", 4, "mean"))

CONTEXT = base.model.max_length
small = Study(
    name="gqa_uptrain-small",
    title=TITLE,
    arms=(
        Arm("before (8 heads)", seeds=(0,), measure=partial(before, uptraining)),
        Arm(WHOLE, uptraining, measure=scores),
        *(Arm(name, pooled(uptraining, n), prepare=start(n, how), needs=(WHOLE,), measure=scores) for name, n, how in HEADS),
        Arm("1 head, mean, KL", with_kl(pooled(uptraining, 1)), prepare=start(1, "mean"), needs=(WHOLE,), measure=scores),
        *(Arm(f"decoding, {n} of 8 heads", seeds=(0,), measure=partial(decoding, base.model, n, CONTEXT)) for n in (8, 4, 2, 1)),
    ),
    columns=COLUMNS,
    orderings=(
        Ordering("1 head, mean", "<=", "1 head, first", "loss_0.05"),
        Ordering("1 head, first", "<=", "1 head, random", "loss_0.05"),
        Ordering("1 head, svd", "<=", "1 head, mean", "loss_0.05", "ours is better than the paper's mean"),
        Ordering("2 heads, mean", "<=", "1 head, mean", "loss_0.05"),
        Ordering("4 heads, mean", "<=", "2 heads, mean", "loss_0.05"),
        Ordering("1 head, mean, KL", "<=", "1 head, mean", "loss", "the KL term helps"),
    ),
    about="Base: configs/base.py, 5.9 M parameters, 8 heads. α is the share of its 1,200 steps. Decoding: 8 rows with a full cache of "
    f"{CONTEXT} tokens, in turn with the model of all heads.",
    paper=PAPER,
    figures=(Figure("share", "Held-out loss over α, the share of the original steps; mean and standard error over seeds.", over_share),),
)

uptraining_real = replace(base.smollm2, name="gqa-real", optim=replace(uptraining.optim, lr=1e-4), eval_every=100, eval_batches=32)

CONTEXT_REAL = 2048
real = Study(
    name="gqa_uptrain-real",
    title=TITLE,
    arms=(
        Arm("before (3 heads)", seeds=(0,), measure=partial(before, uptraining_real)),
        Arm(WHOLE, uptraining_real, seeds=(0,), measure=scores),
        *(
            Arm(f"1 head, {how}", pooled(uptraining_real, 1), seeds=(0,), prepare=start(1, how), needs=(WHOLE,), measure=scores)
            for how in ("mean", "first", "svd")
        ),
        Arm("1 head, mean, KL", with_kl(pooled(uptraining_real, 1)), seeds=(0,), prepare=start(1, "mean"), needs=(WHOLE,), measure=scores),
        *(Arm(f"decoding, {n} of 3 heads", seeds=(0,), measure=partial(decoding, smollm2_135m, n, CONTEXT_REAL)) for n in (3, 1)),
    ),
    columns=(Column("loss_0", "loss at once"), Column("loss", "held-out loss"), *COST),
    orderings=(Ordering("1 head, mean", "<=", "1 head, first"),),
    about="Base: SmolLM2-135M-Instruct, from its 4-bit file: 3 key/value heads to 1. One seed: no order is claimed.",
    paper=PAPER,
)

# The seconds-long version needs nothing but Python.
_debug = replace(base.debug, name="gqa-debug", num_steps=10, eval_every=5, eval_batches=2)


def _start_debug(how: str, run: Run) -> TrainConfig:
    """From the arm `before`; its converted model lies beside the run."""
    assert run.config is not None
    source, folder = str(run.needs["before"].run_dir), run.run_dir.with_name(f"{run.run_dir.name}-start")
    return replace(run.config, init_from=converted(source, folder, run.config, 1, how))


debug = Study(
    name="gqa_uptrain-debug",
    title=TITLE,
    arms=(
        Arm("before", base.debug, seeds=(0,)),
        *(
            Arm(f"1 head, {how}", pooled(_debug, 1), seeds=(0,), needs=("before",), prepare=partial(_start_debug, how))
            for how in ("mean", "first", "random")
        ),
    ),
    orderings=(Ordering("1 head, mean", "<=", "1 head, random"),),
)

# T5 XXL is an encoder-decoder; a decoder alone of like size stands for it: PaLM-8B's shape with 64 heads of 64, to 8 of them.
paper = TrainConfig(
    name="gqa_uptrain-paper",
    model=replace(palm_8b, num_heads=64, head_size=64, num_kv_heads=8),
    data=DataConfig(
        sources=(SourceConfig(kind="array_record", path="data/text/*.array_record"),),
        tokenizer=TokenizerConfig(path="data/tokenizer.model", vocab_size=256_000),
        sequence_length=512,
        batch_size=2048,
        packing="concatenate",
    ),
    optim=OptimConfig(name="adafactor", lr=1e-3, schedule=ScheduleConfig(kind="constant"), weight_decay=0.0),
    num_steps=50_000,  # α 0.05 of T5's million
    precision="bfloat16",
    init_from="data/mha-pooled",
)

PRESETS: dict[str, TrainConfig | Study] = {"debug": debug, "small": small, "real": real, "paper": paper}

if __name__ == "__main__":
    experiment_main(PRESETS)
