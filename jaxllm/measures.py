"""Numbers of a trained run beyond its held-out loss, for experiments: texts written against references, sizes, subspaces."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np

from jaxllm import checkpoint, evaluate, optim, pretrain, pretrained, sharding, tree
from jaxllm.config import ConfigError, SourceConfig, TrainConfig, from_dict
from jaxllm.contract import Params
from jaxllm.data import batch as batches
from jaxllm.evals.overlap import ALL, overlap
from jaxllm.files import how_to_get, path_of
from jaxllm.generate.writer import GenerateConfig, prepare
from jaxllm.metrics import read_lines
from jaxllm.pretrained import ONE_DEVICE, Pretrained
from jaxllm.study import Run
from jaxllm.surgery import adapters, subspace

type Model = Pretrained | str | Path
"""A loaded one, or the folder to load: a run directory or a converted one."""


def _loaded(model: Model) -> Pretrained:
    return model if isinstance(model, Pretrained) else pretrained.load(model)


def written(model: Pretrained, prompts: Sequence[str], *, num_beams: int = 5, num_tokens: int = 80, batch_size: int = 10) -> list[str]:
    """The best continuation of each prompt by beam search, up to a stop token."""
    mesh = sharding.make_mesh(ONE_DEVICE)
    writer = prepare(model, GenerateConfig(num_beams=num_beams, num_tokens=num_tokens, length_penalty=0.9), mesh, "float32")
    first = [] if model.tokenizer.bos_id is None else [model.tokenizer.bos_id]
    ids = [[*first, *model.tokenizer.encode(prompt)] for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # prompts of like length share a batch
    texts: dict[int, str] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        found = writer.texts([ids[i] for i in batch])
        texts |= {i: rows[0].text.strip() for i, rows in zip(batch, found, strict=True)}
    return [texts[i] for i in range(len(ids))]


def against_references(
    model: Model, file: str, *, num_prompts: int = 100, num_beams: int = 5, scores: Sequence[str] = ALL
) -> dict[str, float]:
    """Overlap of what a model writes with the references of some tables of a file, spread evenly over it.

    Args:
      file: JSON lines with `prompt` and `references`; may be a `cache://` path.

    Raises:
      ConfigError: no such file, with the command that brings it.
    """
    path = path_of(file)
    if not path.is_file():
        raise ConfigError(f"no file {file}{how_to_get(file)}")
    lines = path.read_text().splitlines()
    chosen = [json.loads(lines[int(i)]) for i in np.linspace(0, len(lines) - 1, min(num_prompts, len(lines)))]
    texts = written(_loaded(model), [one["prompt"] for one in chosen], num_beams=num_beams)
    return overlap(texts, [one["references"] for one in chosen], scores)


def table_to_text(run: Run) -> dict[str, float]:
    """An `Arm.measure`: what a run writes for 100 tables of the dev set that it is evaluated on, and what must be kept of it."""
    assert run.config is not None
    return {**on_tables(run.run_dir, run.config), **saved_bytes(run.run_dir)}


def on_tables(model: Model, config: TrainConfig) -> dict[str, float]:
    """Overlap of what a model writes with the references of 100 tables of the dev set that `config` is evaluated on."""
    return against_references(model, config.data.held_out[0].path.replace("_pairs", ""))


def trained_leaves(run_dir: Path) -> tuple[TrainConfig, Params]:
    """(config, the leaves that a run trained, unpadded), on one device."""
    _, meta = checkpoint.read_meta(run_dir)
    config = from_dict(TrainConfig, meta["config"])
    lm = pretrain.language_model(config, "float32")
    shapes = lm.param_shapes
    whole = sharding.make_mesh(ONE_DEVICE)
    where = sharding.shardings(sharding.param_specs(shapes, whole), whole)
    template = jax.tree.map(lambda s, w: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=w), shapes, where)
    kept = tree.partition(template, partial(optim.trainable, config.optim))[0]
    return config, checkpoint.load_params(run_dir, kept, ("ema", "trainable")).state


def overlap_of_adapters(small: Path, large: Path, site: str = "layers/attention/q") -> dict[str, float]:
    """Subspace similarity φ of two adapters' A at one site, mean over layers, and how much the smaller one amplifies its kernel.

    Source: arXiv:2106.09685 sections 7.2 and 7.3.
    """
    (config, one), (_, two) = (trained_leaves(path) for path in (small, large))
    a, b = (np.asarray(tree.get(leaves, f"{site}/lora_a"), np.float64) for leaves in (one, two))
    a, b = (x.reshape(len(x), -1, x.shape[-1]) for x in (a, b))
    rank, layers = a.shape[-1], range(len(a))
    phi = np.mean([subspace.similarities(a[i], b[i]) for i in layers], axis=0)
    kernels = tree.get(pretrained.load(small).params, f"{site}/kernel")  # merged: the base's is this minus the change
    scale = adapters.scale_of(config.lora, f"{site}/kernel")
    change = [
        scale * np.tensordot(a[i], np.asarray(tree.get(one, f"{site}/lora_b"), np.float64)[i], 1).reshape(a.shape[1], -1) for i in layers
    ]
    base = [np.asarray(kernels[i], np.float64).reshape(change[i].shape) - change[i] for i in layers]
    amplified = [subspace.amplification(base[i], change[i], rank) for i in layers]
    mean = lambda name: float(np.mean([getattr(one, name) for one in amplified]))
    return {
        "phi_first": float(phi[0, 0]), "phi_all": float(phi[rank - 1, rank - 1]),
        "change": mean("change"), "seen": mean("seen"), "own": mean("own"), "random": mean("random"), "amplification": mean("factor"),
    }  # fmt: skip


def saved_bytes(run_dir: Path) -> Mapping[str, float]:
    """{'trained_mb'}: what must be kept of a run besides the weights that it began from, as float32."""
    return {"trained_mb": tree.num_bytes(trained_leaves(run_dir)[1]) / 1e6}


def held_out(
    model: Model,
    config: TrainConfig,
    *,
    on: SourceConfig | None = None,
    max_batches: int = 0,
    change: Callable[[Params], Params] = lambda params: params,
) -> dict[str, float]:
    """Loss and bits per byte of a model on the held-out rows of `config.data`: what its training would report.

    Args:
      on: the text, in place of what `config.data` holds out.
      max_batches: 0 means all.
      change: what is done to the params first.
    """
    model, mesh = _loaded(model), sharding.make_mesh(ONE_DEVICE)
    dataset = batches.load(config.data if on is None else replace(config.data, held_out=(on,)), seed=config.seed)
    return pretrain.held_out(model.lm, config)(change(model.params), dataset, mesh, max_batches)


def choices(folder: str | Path, tasks: Sequence[str], limit: int = 200) -> dict[str, float]:
    """Share of questions whose right answer is the most probable one, by task, of the first `limit`.

    Args:
      tasks: names of `python -m tools.fetch choices`: arc_easy, piqa, hellaswag.
    """
    paths = {name: f"cache://data/choices/{name}.jsonl.gz" for name in tasks}
    for path in paths.values():
        if not path_of(path).is_file():
            raise ConfigError(f"no file {path}{how_to_get(path)}")
    with tempfile.TemporaryDirectory() as out:
        config = evaluate.EvalConfig(tasks=tuple(str(path_of(path)) for path in paths.values()), limit=limit, out=f"{out}/all.json")
        found = evaluate.evaluate(str(folder), config, bar=io.StringIO())["tasks"]
    return {name: result["metrics"]["accuracy_sum"]["value"] for name, result in zip(paths, found.values(), strict=True)}


def losses_by_step(run_dir: Path) -> dict[int, float]:
    """Held-out loss of each evaluation of a run."""
    return {line["step"]: line["loss"] for line in read_lines(run_dir / "metrics.jsonl") if line["kind"] == "eval"}
