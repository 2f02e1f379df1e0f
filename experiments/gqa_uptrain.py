"""Fewer key/value heads for a trained model, and a little more training: MHA to GQA and MQA.

GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints, arXiv:2305.13245.

    W'[k] = (1/r) sum over i < r of W[k r + i]          for keys and values: mean pooling; or the first of them, or fresh ones
    loss  = mean of -log p(x[t+1] | x[<=t])   + kl * KL(p_before || p),   before = the model before its heads were pooled

What differs here. The paper has T5 Large and XXL with 1M steps of pre-training; `small` has configs/base.py's 5.9 M parameters with 1,200
steps, `real` SmolLM2-135M, whose original steps are too many to name a share of (its arms name tokens). A decoder alone, so there is no
encoder to leave as it is. `svd` is ours: each new head with a linear map to each old one (jaxllm/surgery/resize.py). The KL term is ours
too. The rate is constant, as T5's is at its end.

    jaxllm train configs/base.py                  the model before
    python -m tools.fetch wikitext2-valid         for evaluation only
    python -m experiments.gqa_uptrain small       an hour on two cores; resumes. --list says what is left
    python -m experiments.gqa_uptrain real        20 minutes an arm
    jaxllm plan experiments/gqa_uptrain.py:paper --topology v4:4x4x4

Results: docs/results/gqa_uptrain.md, written by the command itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from configs import base
from configs.models import palm_8b, smollm2_135m
from jaxllm import pretrain
from jaxllm.cli import experiment_main
from jaxllm.config import DataConfig, OptimConfig, Precision, ScheduleConfig, SourceConfig, TokenizerConfig, TrainConfig
from jaxllm.files import path_of
from jaxllm.losses.annotate import teacher
from jaxllm.losses.tokens import forward_kl, next_token
from jaxllm.losses.vocab import over_vocab
from jaxllm.step import Experiment, observe
from jaxllm.study import Arm, Column, Ordering, Run, Study

ALPHA = 0.1
"""Share of the original steps that arms are uptrained for; losses at 0, 0.02 and 0.05 are evaluations on the way."""
WIKITEXT = SourceConfig(kind="text", path="cache://data/wikitext2-valid/text")

uptraining = replace(
    base.config,
    name="gqa-small",
    optim=OptimConfig(lr=1e-3, schedule=ScheduleConfig(kind="constant", warmup_steps=5)),
    num_steps=round(ALPHA * base.config.num_steps),
    eval_every=round(ALPHA * base.config.num_steps / 10),
    save_every=round(ALPHA * base.config.num_steps),
    eval_batches=16,
    run_dir="",
    init_from="cache://models/base-small",
)


def converted(run: Run, num_kv_heads: int, how: str) -> str:
    """The model that `run` names in init_from with other heads, as a folder beside the run; made once."""
    import jax

    from jaxllm import pretrained
    from jaxllm.surgery import resize

    assert run.config is not None
    source = run.config.init_from
    folder = path_of(f"cache://models/{source.rpartition('/')[2]}-kv{num_kv_heads}-{how}{f'-{run.seed}' if how == 'random' else ''}")
    if not (folder / "checkpoints").is_dir():
        model = pretrained.load(source)
        moments = input_moments(model, run.config) if how == "svd" else None
        key = jax.random.key(run.seed)
        params, config = resize.kv_heads(model.params, model.config, num_kv_heads, how, key=key, moments=moments)  # type: ignore[arg-type]
        pretrained.save(
            folder, config, params, model.tokenizer, chat_template=model.chat_template, stop_ids=model.stop_ids,
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
    def prepare(run: Run) -> TrainConfig:
        assert run.config is not None
        return replace(run.config, init_from=converted(run, num_kv_heads, how))

    return prepare


def pooled(config: TrainConfig, num_kv_heads: int) -> TrainConfig:
    return replace(config, model=replace(config.model, num_kv_heads=num_kv_heads))


def scores(run: Run) -> Mapping[str, float]:
    """Losses on the way, on WikiText-2, and the cache of 1,024 tokens."""
    from jaxllm import measures
    from jaxllm.surgery.resize import cache_bytes

    assert run.config is not None
    by_step = measures.losses_by_step(run.run_dir)
    part = {
        f"loss_{share:g}": by_step[step] for share in (0.01, 0.02, 0.05) if (step := round(share / ALPHA * run.config.num_steps)) in by_step
    }
    wikitext = replace(run.config, data=replace(run.config.data, held_out=(WIKITEXT,)))
    return {
        **part,
        "wikitext": measures.held_out(run.run_dir, wikitext, max_batches=32)["loss"],
        "cache_mb": cache_bytes(run.config.model, 1, 1024) / 1e6,
    }


def before(run: Run) -> Mapping[str, float]:
    """The model before, untouched."""
    from jaxllm import measures
    from jaxllm.surgery.resize import cache_bytes

    return {
        "loss": measures.held_out(uptraining.init_from, uptraining, max_batches=uptraining.eval_batches)["loss"],
        "wikitext": measures.held_out(
            uptraining.init_from, replace(uptraining, data=replace(uptraining.data, held_out=(WIKITEXT,))), max_batches=32
        )["loss"],
        "cache_mb": cache_bytes(uptraining.model, 1, 1024) / 1e6,
    }


def build(config: TrainConfig, *, precision: Precision, kl: float = 0.0, teacher_from: str = "") -> Experiment:
    """Next-token loss, and with `kl` the divergence from the model in `teacher_from`."""
    if not kl:
        return pretrain.experiment(config, precision=precision)
    from jaxllm import pretrained, tree

    model = pretrained.load(teacher_from)
    loss = over_vocab(chunk=config.loss.chunk, ce=(1.0, next_token()), kl=(kl, forward_kl("before")))
    whole = pretrain.experiment(config, precision=precision, loss=loss)
    look = observe(pretrain.language_model(replace(config, model=model.config), precision))
    return replace(
        whole,
        annotators=(teacher(lambda params, batch: look(params, batch, None), "before"),),
        load_frozen=lambda mesh: {"before": pretrained.load(teacher_from, mesh=mesh).params},
        teacher_flops_per_token=2.0 * tree.count(model.params),
    )


with_kl = partial(build, kl=1.0, teacher_from=uptraining.init_from)

COLUMNS = (
    Column("loss_0.01", "α 0.01"), Column("loss_0.02", "α 0.02"), Column("loss_0.05", "α 0.05"), Column("loss", "α 0.1, held-out loss"),
    Column("wikitext", "WikiText-2 loss"), Column("cache_mb", "cache, MB", digits=2),
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

small = Study(
    name="gqa_uptrain-small",
    title=TITLE,
    arms=(
        Arm("before (8 heads)", seeds=(0,), measure=before),
        Arm("8 heads, trained on", uptraining, measure=scores),
        *(
            Arm(f"1 head, {how}", pooled(uptraining, 1), prepare=start(1, how), measure=scores)
            for how in ("mean", "first", "random", "svd")
        ),
        *(Arm(f"{n} heads, mean", pooled(uptraining, n), prepare=start(n, "mean"), measure=scores) for n in (2, 4)),
        Arm("1 head, mean, KL", pooled(uptraining, 1), build=with_kl, prepare=start(1, "mean"), measure=scores),
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
    about="Base: configs/base.py, 5.9 M parameters, 8 heads. α is the share of its 1,200 steps.",
    paper=PAPER,
)

uptraining_real = replace(
    uptraining, name="gqa-real", model=smollm2_135m, init_from="cache://models/smollm2-135m",
    data=DataConfig(
        sources=base.config.data.sources, mixture="weighted", sequence_length=256, batch_size=2,
        tokenizer=TokenizerConfig(kind="huggingface", path="cache://models/smollm2-135m/tokenizer"),
    ),
    optim=replace(uptraining.optim, lr=1e-4), num_steps=600, eval_every=150, save_every=150, eval_batches=32, remat="minimal",
)  # fmt: skip

real = Study(
    name="gqa_uptrain-real",
    title=TITLE,
    arms=(
        Arm("3 heads, trained on", uptraining_real, seeds=(0,), measure=scores),
        *(
            Arm(f"1 head, {how}", pooled(uptraining_real, 1), seeds=(0,), prepare=start(1, how), measure=scores)
            for how in ("mean", "first", "svd")
        ),
        Arm(
            "1 head, mean, KL",
            pooled(uptraining_real, 1),
            seeds=(0,),
            prepare=start(1, "mean"),
            measure=scores,
            build=partial(build, kl=1.0, teacher_from=uptraining_real.init_from),
        ),
    ),
    columns=(Column("loss", "held-out loss"), Column("wikitext", "WikiText-2 loss"), Column("cache_mb", "cache, MB", digits=2)),
    orderings=(Ordering("1 head, mean", "<=", "1 head, first"),),
    about="Base: SmolLM2-135M-Instruct, from its 4-bit file: 3 key/value heads to 1. One seed: no order is claimed.",
    paper=PAPER,
)

# The seconds-long version needs nothing but Python.
_debug = replace(base.debug, name="gqa-debug", num_steps=10, eval_every=5, eval_batches=2)


def _start_debug(how: str, run: Run) -> TrainConfig:
    """From the arm `before`; its converted model lies in the run's own folder."""
    import jax

    from jaxllm import pretrained
    from jaxllm.surgery import resize

    assert run.config is not None
    folder = run.run_dir.with_name(f"{run.run_dir.name}-start")
    if not (folder / "checkpoints").is_dir():
        model = pretrained.load(run.needs["before"].run_dir)
        params, config = resize.kv_heads(model.params, model.config, 1, how, key=jax.random.key(0))  # type: ignore[arg-type]
        pretrained.save(folder, config, params, model.tokenizer, source={"kind": "kv-heads", "how": how})
    return replace(run.config, init_from=str(folder))


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
    experiment_main(PRESETS, build)
