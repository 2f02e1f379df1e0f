"""Models of different domains and tokenizers, fused into one of them.

Knowledge Fusion of Large Language Models, arXiv:2401.10491 (FuseLLM).

    L = λ L_CLM + (1 − λ) (−Σ_v P(v) log Q(v)),   λ = 0.9
    P = P^j*, j* = argmin_j CE_j (MinCE), or Σ_j softmax_j(exp(−CE_j)) P^j (AvgCE), of each text

with P^j what source j expects, at the target's positions and in its ids (jaxllm/align, jaxllm/fusing). Sources speak once, through
`jaxllm teach`. The target is among them, as in the paper, and passes as it is.

What differs here. The paper fuses three 7B models on MiniPile; `small` has configs/domains.py's models of 3 M parameters and
SmolLM2-135M, the model of code as target, and 0.63 MB of text from the three domains that none of the small ones has seen, in pieces of
600 bytes; `real` has SmolLM2-135M as target and the small ones as sources. Ours is fused by bytes read, the arm `paper's alignment` as the
released code does it, with the target's row predicting the next token, where that code has the current one. Weight merging and the
ensemble need one tokenizer and one shape, so they join models that went on from the target on one domain each. There is no ensemble over
unlike tokenizers: a text's stretches between shared boundaries depend on what follows them, so that a mean of their probabilities is no
distribution over texts.

    jaxllm train configs/domains.py:code           and :bible, :sotu
    python -m tools.fetch smollm2-135m
    python -m experiments.fusellm small            resumes; --list says what is left, and about how long
    python -m experiments.fusellm real             SmolLM2-135M as target, one seed
    jaxllm plan experiments/fusellm.py:paper --gpus a100-40:8x1

Results: docs/results/fusellm.md, written by the command itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from configs import base, domains
from configs.models import llama2_7b
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
from jaxllm.fusing.values import PAPER, FuseConfig
from jaxllm.step import Experiment
from jaxllm.study import Arm, Column, Ordering, Run, Study

LAMBDA = 0.9


@dataclass(frozen=True)
class Setting:
    """Models, and the text to go on with."""

    name: str
    """Of the folders in the cache."""
    domains: tuple[tuple[str, TrainConfig], ...]
    """Name -> what was trained; its held-out documents make the text."""
    sources: tuple[tuple[str, TrainConfig], ...]
    """Name -> configuration of every source; its run_dir or init_from is the model, unless an arm of that name is."""
    target: str
    mix_bytes: int
    """Of each domain, to train on."""
    held_bytes: int
    """Of each domain, to evaluate on."""
    k: int = 10


# ---------------------------------------------------------------------------------------------- text


def texts(setting: Setting) -> Path:
    """The folder of mix/DOMAIN.jsonl and held/DOMAIN.jsonl, made once: pieces of documents that the domain's model has not seen."""
    from jaxllm.data import batch as batches
    from jaxllm.data import cache as caching
    from jaxllm.data.pieces import take

    def write(to: Path) -> None:
        for name, config in setting.domains:
            documents = [*batches.load(config.data, seed=config.seed).held_out_texts()]
            mix, held = take(documents, setting.mix_bytes), take(documents[::-1], setting.held_bytes)
            if sum(len(text.encode()) for text in documents) < setting.mix_bytes + setting.held_bytes or set(mix) & set(held):
                raise ConfigError(f"{name} holds out too little text; lower mix_bytes or held_bytes")
            for part, some in (("mix", mix), ("held", held)):
                (to / f"{part}-{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in some))

    key = caching.key("texts 1", [[name, repr(config.data)] for name, config in setting.domains], setting.mix_bytes, setting.held_bytes)
    return caching.folder(path_of(f"cache://data/{setting.name}-{key[:8]}"), write)


def data_of(setting: Setting, tokenizer: TokenizerConfig, only: str = "") -> DataConfig:
    """The mixed text, or one domain of it, under a tokenizer."""
    folder = texts(setting)
    source = lambda part, name: SourceConfig(kind="jsonl", path=str(folder / f"{part}-{name}.jsonl"))
    names = [name for name, _ in setting.domains]
    return DataConfig(
        sources=tuple(source("mix", name) for name in names if only in ("", name)),
        held_out=tuple(source("held", name) for name in names),
        tokenizer=tokenizer,
        sequence_length=setting.domains[0][1].data.sequence_length,
        batch_size=setting.domains[0][1].data.batch_size,
    )


# --------------------------------------------------------------------------------------------- models


def model_of(setting: Setting, name: str, run: Run) -> str:
    """A source's model: the arm of that name, or the one that its configuration leaves in the cache."""
    config = dict(setting.sources)[name]
    return str(run.needs[name].run_dir) if name in run.needs else config.run_dir or config.init_from


def under(setting: Setting, name: str, run: Run, only: str = "") -> TrainConfig:
    """A source's configuration with the mixed text in its tokens."""
    config = dict(setting.sources)[name]
    tokenizer = config.data.tokenizer
    if tokenizer.kind != "bytes":
        tokenizer = replace(tokenizer, path=f"{model_of(setting, name, run)}/tokenizer")
    return replace(config, data=data_of(setting, tokenizer, only))


def taught_of(setting: Setting, name: str, run: Run) -> tuple[str, TrainConfig]:
    """(folder of what a source expects of the mixed text, its configuration); computed once for a model."""
    from jaxllm import manifest
    from jaxllm.data import batch as batches
    from jaxllm.data.taught import open_taught
    from jaxllm.teach import TeachConfig, teach

    config, model = under(setting, name, run), model_of(setting, name, run)
    folder = f"cache://taught/{setting.name}-{name}-{manifest.fingerprint(path_of(model))[:12]}-k{setting.k}"
    dataset = batches.load(config.data, seed=0)
    try:
        open_taught(folder, dataset.corpora, dataset.tokenizer)
    except ConfigError:
        teach(model, config, folder, TeachConfig(k=setting.k))
    return folder, config


def start(setting: Setting, run: Run, only: str = "") -> TrainConfig:
    """An `Arm.prepare`: from the target, on the mixed text or one domain of it."""
    assert run.config is not None
    return replace(run.config, data=under(setting, setting.target, run, only).data, init_from=model_of(setting, setting.target, run))


def with_fusion(setting: Setting, names: Sequence[str], fusion: FuseConfig, run: Run) -> TrainConfig:
    """An `Arm.prepare`: as `start`, with the fused predictions of these sources in the place of their description."""
    config = start(setting, run)
    return replace(config, distill=replace(config.distill, stored=((fused(setting, names, fusion, run), config.distill.stored[0][1]),)))


def fused(setting: Setting, names: Sequence[str], fusion: FuseConfig, run: Run) -> str:
    """The folder of what these sources expect of the mixed text together, in the target's tokens; computed once."""
    from jaxllm.data import cache as caching
    from jaxllm.fusing import fuse_taught

    sources = [taught_of(setting, name, run) for name in names]
    out = f"cache://fused/{setting.name}-{caching.key([folder for folder, _ in sources], fusion.options())}"
    fuse_taught(under(setting, setting.target, run), out, sources, fusion)
    return out


# -------------------------------------------------------------------------------------------- measures


def by_domain(setting: Setting, models: Sequence[Any], config: TrainConfig) -> dict[str, float]:
    """Loss and bits per byte of all domains together, and bits per byte of each, by the mean probability of some loaded models.

    Args:
      config: with the text in the models' tokens.
    """
    from jaxllm import measures

    score = lambda held: measures.together(models, replace(config, data=replace(config.data, held_out=held)))
    each = {name: score((one,))["bits_per_byte"] for (name, _), one in zip(setting.domains, config.data.held_out, strict=True)}
    return score(config.data.held_out) | {f"bpb_{name}": bits for name, bits in each.items()}


def untouched(setting: Setting, name: str, run: Run) -> Mapping[str, float]:
    """An `Arm.measure` of a source as it is."""
    from jaxllm import pretrained

    found = by_domain(setting, [pretrained.load(model_of(setting, name, run))], under(setting, name, run))
    if name != setting.target:
        found.pop("loss")  # of other tokens
    return found


def trained(setting: Setting, run: Run) -> Mapping[str, float]:
    """An `Arm.measure`: bits per byte by domain; what was fused, and from whom."""
    from jaxllm import pretrained

    assert run.config is not None
    found = by_domain(setting, [pretrained.load(run.run_dir)], run.config)
    for folder, _ in run.config.distill.stored:
        found |= {f"won_{name}": one["share"] for name, one in said_of(setting, folder).items()}
    return found


def said_of(setting: Setting, folder: str) -> dict[str, dict[str, float]]:
    """What `fuse_taught` counted, by source."""
    said = json.loads((path_of(folder) / "statistics.json").read_text())["all"]["sources"]
    names = [name for name, _ in setting.sources]
    return {next(name for name in names if f"/{setting.name}-{name}-" in path): one for path, one in said.items()}


def alignment(setting: Setting, fusion: FuseConfig, run: Run) -> Mapping[str, float]:
    """An `Arm.measure`: how a way to align does on all rows of the sources that have other tokens than the target."""
    names = [name for name, _ in setting.sources if name != setting.target]
    said = said_of(setting, fused(setting, names, replace(fusion, fuse="avg_ce"), run))
    rows = sum(one["rows"] for one in said.values())
    mean = lambda what: sum(one["rows"] * one[what] for one in said.values()) / rows
    return {"accept": mean("accept_rate"), "mapped": mean("mapped_mass")}


def merged(setting: Setting, how: str, run: Run) -> Mapping[str, float]:
    """An `Arm.measure`: the target and the models that went on from it on one domain, as one.

    Raises:
      ConfigError: models of unlike tokenizers or shapes.
    """
    import numpy as np

    from jaxllm.surgery import merging

    base_model, *others = experts(setting, run)
    start, tuned = base_model.params, [one.params for one in others]
    if how == "linear":
        params = merging.linear([start, *tuned])
    elif how == "TIES":
        params = merging.ties(start, tuned)
    else:
        rng = np.random.default_rng(run.seed)
        params = merging.linear([start, *(merging.dare(start, one, 0.9, rng) for one in tuned)])
    return by_domain(setting, [replace(base_model, params=params)], under(setting, setting.target, run))


def experts(setting: Setting, run: Run) -> list[Any]:
    """The target, and each model that went on from it on another domain."""
    from jaxllm import pretrained

    others = [str(need.run_dir) for name, need in run.needs.items() if name.startswith("target on ")]
    models = [pretrained.load(folder) for folder in (model_of(setting, setting.target, run), *others)]
    if len(kinds := {one.tokenizer.fingerprint[:12] for one in models}) > 1:
        raise ConfigError(f"the models to be joined have different tokenizers: {', '.join(sorted(kinds))}")
    return models


def ensemble(setting: Setting, run: Run) -> Mapping[str, float]:
    """An `Arm.measure`: the mean of the next-token probabilities of the models that are merged elsewhere."""
    return by_domain(setting, experts(setting, run), under(setting, setting.target, run))


# ------------------------------------------------------------------------------------------------ arms

CLM, MIN_CE, AVG_CE, PAPERS, KD = "causal LM", "FuseLLM, MinCE", "FuseLLM, AvgCE", "FuseLLM, the paper's alignment", "KD from one teacher"
RISING = "FuseLLM, MinCE, λ to 1"
SPANS, EDIT, EXACT = "alignment by bytes", "alignment by edit distance (the paper's)", "alignment by equal strings"


def arms_of(
    setting: Setting,
    config: TrainConfig,
    one_teacher: str,
    *,
    rates: tuple[float, ...],
    seeds: tuple[int, ...] = (0, 1, 2),
    needs: tuple[str, ...] = (),
    short: bool = False,
) -> tuple[Arm, ...]:
    """Every arm.

    Args:
      one_teacher: the source of the arm KD.
      rates: that each arm which trains on the mixed text searches.
      needs: arms that are models of `setting`.
      short: no merging, no ensemble, no other schedule.
    """
    names = tuple(name for name, _ in setting.sources)
    fusion = FuseConfig(k=setting.k, workers=0)  # seconds; processes take as long to begin

    def learning(name: str, names: tuple[str, ...], fusion: FuseConfig, rate_of: str = "", **options: Any) -> Arm:
        described = json.dumps([names, fusion.options()])  # the folder is known once it is made
        learns = DistillConfig(stored=((described, 1 - LAMBDA),), ce=LAMBDA, kind="soft_ce", **options)
        return Arm(
            name, replace(config, distill=learns), rates=() if rate_of else rates, rate_of=rate_of, seeds=seeds, needs=needs,
            prepare=partial(with_fusion, setting, names, fusion), measure=partial(trained, setting),
        )  # fmt: skip

    as_it_is = partial(Arm, seeds=(0,), needs=needs)
    papers = replace(PAPER, k=setting.k, workers=0)
    arms = [
        as_it_is(f"{setting.target}, the target, untouched", measure=partial(untouched, setting, setting.target)),
        *(as_it_is(f"source {name}", measure=partial(untouched, setting, name)) for name in names if name != setting.target),
        Arm(CLM, config, rates=rates, seeds=seeds, needs=needs, prepare=partial(start, setting), measure=partial(trained, setting)),
        learning(MIN_CE, names, fusion),
        learning(AVG_CE, names, replace(fusion, fuse="avg_ce")),
        learning(PAPERS, names, papers, tail="renormalise"),
        learning(KD, (one_teacher,), fusion),
        *(
            as_it_is(name, measure=partial(alignment, setting, how))
            for name, how in ((SPANS, fusion), (EDIT, papers), (EXACT, replace(papers, how="hard")))
        ),
    ]
    if short:
        return tuple(arms)
    others = [name for name, _ in setting.domains if name != setting.target]
    joined = tuple(f"target on {name}" for name in others)
    arms.append(learning(RISING, names, fusion, rate_of=MIN_CE, ce_end=1.0))
    arms += [
        Arm(f"target on {name}", config, rate_of=CLM, seeds=seeds, needs=needs,
            prepare=partial(start, setting, only=name), measure=partial(trained, setting))
        for name in others
    ]  # fmt: skip
    arms += [Arm(f"merged, {how}", seeds=seeds, needs=(*needs, *joined), measure=partial(merged, setting, how)) for how in MERGES]
    arms.append(Arm(ENSEMBLE, seeds=seeds, needs=(*needs, *joined), measure=partial(ensemble, setting)))
    return tuple(arms)


MERGES, ENSEMBLE = ("linear", "TIES", "DARE"), "ensemble of probabilities"


def columns_of(setting: Setting) -> tuple[Column, ...]:
    return (
        Column("bits_per_byte", "bits per byte"),
        *(Column(f"bpb_{name}", f"of {name}") for name, _ in setting.domains),
        Column("accept", "rows accepted", better="higher"),
        Column("mapped", "mass mapped", better="higher"),
        *(Column(f"won_{name}", f"won by {name}", better="neither", digits=2) for name, _ in setting.sources),
    )


def orderings_of(setting: Setting) -> tuple[Ordering, ...]:
    by = "bits_per_byte"
    return (
        Ordering(CLM, "<", f"{setting.target}, the target, untouched", by),
        Ordering(MIN_CE, "<=", CLM, by, "fusion is no worse than the text alone"),
        Ordering(MIN_CE, "<", CLM, by, "fusion is better than the text alone"),
        Ordering(MIN_CE, "<=", AVG_CE, by),
        Ordering(MIN_CE, "<=", PAPERS, by, "by bytes is no worse than the paper's alignment"),
        Ordering(EDIT, "<=", SPANS, "accept", "by bytes accepts at least as many rows"),
        Ordering(MIN_CE, "<=", KD, by, "several teachers are no worse than one"),
        *(Ordering(MIN_CE, "<=", f"merged, {how}", by) for how in MERGES),
        Ordering(MIN_CE, "<=", ENSEMBLE, by),
    )


TITLE = "FuseLLM, arXiv:2401.10491: models of different tokenizers fused into one"
PAPER_TABLE = """
| average | BBH | CommonSense | MultiPL-E |
|---|---|---|---|
| OpenLLaMA, MPT, Llama-2 (7B each) | 33.87, 33.38, 39.70 | 59.78, 61.13, 63.76 | 18.11, 17.26, 14.63 |
| Llama-2 CLM | 40.44 | 63.86 | 14.83 |
| KD from Llama-2-13B | 40.88 | 64.41 | 15.45 |
| FuseLLM | **41.75** | **64.56** | **15.56** |

Three Pythia models of one domain each, bits a byte (Phil, NIH, USPTO; mean): base 0.728, ensemble 0.726, merged 0.711, FuseLLM **0.703**.
"""

# Each run: 60 steps of 16 rows of 256, about 215,000 tokens without padding: the mixed text once. Runs: five arms with 3 rates and 2 more
# seeds, λ to 1 and two experts with 3 seeds: 34, of 7.4 M tokens together.
_small = Setting(
    "fusellm-small",
    domains=(("code", domains.code), ("bible", domains.bible), ("sotu", domains.sotu)),
    sources=(("code", domains.code), ("bible", domains.bible), ("sotu", domains.sotu), ("smollm2", base.smollm2)),
    target="code",
    mix_bytes=210_000,
    held_bytes=60_000,
)
going_on = replace(
    domains.code,
    name="fusellm-small",
    optim=OptimConfig(lr=1e-3, schedule=ScheduleConfig(kind="cosine", warmup_steps=5)),
    num_steps=60,
    eval_every=60,
    save_every=60,
    eval_batches=0,
    run_dir="",
)
small = Study(
    name="fusellm-small",
    title=TITLE,
    arms=arms_of(_small, going_on, "smollm2", rates=(5e-4, 1e-3, 2e-3)),
    columns=columns_of(_small),
    criterion="bits_per_byte",
    orderings=orderings_of(_small),
    about="Target: configs/domains.py's model of code, 2.9 M parameters. Sources: itself, those of the Bible and of presidents' addresses, "
    "and SmolLM2-135M-Instruct, with four tokenizers. Text: 210 kB of each domain, 60 kB more of each to evaluate on, none of it seen by "
    "the small models. Merged and ensemble: the target, and two models that went on from it on the Bible and on the addresses alone, each "
    "for as many tokens as every other arm, so that together they have seen twice as many.",
    paper=PAPER_TABLE,
)

_real = replace(_small, name="fusellm-real", target="smollm2")
real = Study(
    name="fusellm-real",
    title=TITLE,
    arms=tuple(
        arm
        for arm in arms_of(
            _real,
            replace(
                base.smollm2,
                name="fusellm-real",
                data=replace(base.smollm2.data, batch_size=going_on.data.batch_size),
                optim=replace(going_on.optim, lr=1e-4, num_microbatches=8),
                num_steps=60,
                eval_every=60,
                save_every=10,
                eval_batches=0,
            ),
            "bible",
            rates=(),
            seeds=(0,),
            short=True,
        )
        if arm.name not in (AVG_CE, PAPERS)
    ),
    columns=columns_of(_real),
    criterion="bits_per_byte",
    about="Target: SmolLM2-135M-Instruct; sources: itself and the three small models of configs/domains.py, each better than it on its own "
    "domain or not at all. One seed: no order is claimed.",
    paper=PAPER_TABLE,
)

# ----------------------------------------------------------------------------------------------- debug


_debug_domains = (("code", domains.debug_code), ("bible", domains.debug_bible), ("sotu", domains.debug_sotu))
_debug = Setting("fusellm-debug", _debug_domains, _debug_domains, "code", mix_bytes=8_000, held_bytes=2_000)
_debug_config = replace(
    domains.debug_code,
    name="fusellm-debug",
    optim=OptimConfig(lr=1e-3, schedule=ScheduleConfig(kind="cosine", warmup_steps=1)),
    num_steps=8,
    eval_every=8,
    eval_batches=0,
)
debug = Study(
    name="fusellm-debug",
    title=TITLE,
    arms=(
        *(Arm(name, config, seeds=(0,)) for name, config in _debug_domains),
        *arms_of(_debug, _debug_config, "sotu", rates=(1e-3,), seeds=(0,), needs=tuple(name for name, _ in _debug_domains)),
    ),
    columns=columns_of(_debug),
    criterion="bits_per_byte",
    orderings=orderings_of(_debug),
)

# ----------------------------------------------------------------------------------------------- paper

# 1.8 billion tokens, once; DeepSpeed ZeRO's shards are ours over `data`. Each device has one row at a time.
paper = TrainConfig(
    name="fusellm-paper",
    model=llama2_7b,
    distill=DistillConfig(stored=(("data/fused", 1 - LAMBDA),), ce=LAMBDA, kind="soft_ce", tail="renormalise"),
    data=DataConfig(
        sources=(SourceConfig(kind="parquet", path="data/minipile/train-*.parquet"),),
        tokenizer=TokenizerConfig(path="data/llama-2-7b/tokenizer.model"),
        sequence_length=2048,
        batch_size=128,
        packing="concatenate",
    ),
    optim=OptimConfig(
        lr=1e-5,
        b2=0.95,
        weight_decay=0.1,
        clip_norm=1.0,
        num_microbatches=16,
        schedule=ScheduleConfig(kind="cosine", warmup_steps=55, end_ratio=0.0),
        moment_dtype="bfloat16",
    ),
    mesh=MeshConfig(data=8),
    num_steps=6_866,
    eval_every=500,
    save_every=500,
    remat="full",
    precision="bfloat16",
    init_from="data/llama-2-7b",
)


def build(config: TrainConfig, *, precision: Precision) -> Experiment:
    """The usual experiment; the paper's stored predictions, which are not here, are planned by their number."""
    made = pretrain.experiment(replace(config, distill=DistillConfig()), precision=precision)
    return distill.experiment(replace(made, config=config), precision, (), stored_k=PAPER.k)


PRESETS: dict[str, TrainConfig | Study] = {"debug": debug, "small": small, "real": real, "paper": paper}

if __name__ == "__main__":
    experiment_main(PRESETS, build)
