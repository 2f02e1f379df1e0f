"""Numbers of a trained run beyond its held-out loss, for experiments: texts written against references, sizes, subspaces."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxllm import checkpoint, evaluate, optim, pretrain, pretrained, rundir, sharding, tree
from jaxllm.config import ConfigError, SourceConfig, TokenizerConfig, TrainConfig, from_dict
from jaxllm.contract import LM, Batch, Params
from jaxllm.data import batch as batches
from jaxllm.evals.overlap import ALL, overlap
from jaxllm.files import how_to_get, path_of
from jaxllm.generate.writer import GenerateConfig, prepare
from jaxllm.losses.best import best_of
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


def similarity_of_adapters(small: Path, large: Path, site: str = "layers/attention/q") -> dict[str, float]:
    """Subspace similarity φ(i, j) of two adapters' A at one site, mean over layers: {'phi i j'} for i, j = 1, 2, 4, … and the ranks.

    Source: arXiv:2106.09685 section 7.2.
    """
    a, b = (_by_layer(tree.get(trained_leaves(path)[1], f"{site}/lora_a")) for path in (small, large))
    phi = np.mean([subspace.similarities(one, two) for one, two in zip(a, b, strict=True)], axis=0)
    sizes = [[2**n for n in range(rank.bit_length())] for rank in phi.shape]
    return {f"phi {i} {j}": float(phi[i - 1, j - 1]) for i in sizes[0] for j in sizes[1]}


def amplification_of_adapters(run_dir: Path, site: str = "layers/attention/q") -> dict[str, float]:
    """How much an adapter amplifies what its kernel does in the adapter's directions, and the norms behind that; mean over layers.

    Source: arXiv:2106.09685 section 7.3.
    """
    config, leaves = trained_leaves(run_dir)
    a, b = _by_layer(tree.get(leaves, f"{site}/lora_a")), _by_layer(tree.get(leaves, f"{site}/lora_b"), first=2)
    changes = adapters.scale_of(config.lora, f"{site}/kernel") * np.einsum("lir,lro->lio", a, b)
    merged = _by_layer(tree.get(pretrained.load(run_dir).params, f"{site}/kernel"), first=2).reshape(changes.shape)
    found = [subspace.amplification(kernel - change, change, a.shape[-1]) for kernel, change in zip(merged, changes, strict=True)]
    return {name: float(np.mean([getattr(one, name) for one in found])) for name in ("change", "seen", "own", "random", "factor")}


def _by_layer(leaf: Any, first: int = 0) -> np.ndarray:
    """[L inputs R] of an A [L … R], or [L R outputs] of a B [L R …] with `first` = 2, in float64."""
    values = np.asarray(leaf, np.float64)
    return values.reshape(*values.shape[:2], -1) if first else values.reshape(len(values), -1, values.shape[-1])


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

    Raises:
      ConfigError: `config.data` is in the tokens of another model.
    """
    data = config.data if on is None else replace(config.data, held_out=(on,))
    if not isinstance(model, Pretrained):  # or a tokenizer that is trained on the text would be another where other text is held out
        data = replace(data, tokenizer=tokenizer_of(path_of(model)))
    model, mesh = _loaded(model), sharding.make_mesh(ONE_DEVICE)
    dataset = batches.load(data, seed=config.seed)
    if dataset.tokenizer.fingerprint != model.tokenizer.fingerprint:
        raise ConfigError("the text is in the tokens of another tokenizer than the model's; name the model's own: data.tokenizer.path")
    return pretrain.held_out(model.lm, config)(change(model.params), dataset, mesh, max_batches)


def together(models: Sequence[Pretrained], config: TrainConfig) -> dict[str, float]:
    """Loss and bits per byte of the held-out rows of `config.data` by the mean of some models' next-token probabilities.

    Raises:
      ConfigError: models of unlike tokenizers.
    """
    if len(kinds := {one.tokenizer.fingerprint[:12] for one in models}) > 1:
        raise ConfigError(f"models that speak together have one tokenizer, and these have {', '.join(sorted(kinds))}")
    dataset = batches.load(config.data, seed=config.seed)
    label = [jax.jit(partial(_of_label, one.lm)) for one in models]
    nats, num_tokens = 0.0, 0.0
    for batch in dataset.held_out(config.data.batch_size):
        logp = np.stack([np.asarray(f(one.params, batch), np.float64) for f, one in zip(label, models, strict=True)])
        nats -= float(((np.logaddexp.reduce(logp) - np.log(len(models))) * batch.loss_mask).sum())
        num_tokens += float(np.sum(batch.loss_mask))
    return {"loss": nats / num_tokens, "bits_per_byte": nats / np.log(2) / sum(window.num_bytes for window in dataset.held_out_windows)}


def _of_label(lm: LM, params: Params, batch: Batch) -> jax.Array:
    """log p of every label [B T]."""
    return best_of(lm, 1)(params, batch)[3]


def tokenizer_of(folder: Path) -> TokenizerConfig:
    """The tokenizer that lies in a run directory or a converted folder."""
    own = rundir.root_of(folder) / "tokenizer"
    if (own / "tokenizer.bytes").exists():
        return TokenizerConfig(kind="bytes")
    return TokenizerConfig(kind="sentencepiece" if (own / "tokenizer.model").exists() else "huggingface", path=str(own))


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
