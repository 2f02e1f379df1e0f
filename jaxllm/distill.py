"""From `TrainConfig.distill` to what an `Experiment` needs: teachers, their loss, and rows that the student writes itself.

    loss = ce · next-token + Σ over teachers of weight · divergence    (+ α · hidden states)    (+ weight · attention)

A teacher in the step is frozen: placed on the mesh by its own rules, in bfloat16 where the student computes so, never differentiated,
not in checkpoints. A stored one is rows of `Batch.extras`, which `jaxllm teach` wrote. The vocabulary exists a chunk at a time for both.

Sources: arXiv:2407.14679 section 3 and arXiv:2408.11796 (logits alone, hidden states by a learned map, α = L_logits / L_states);
arXiv:2306.13649 (GKD: the student's own rows, λ of them, generalised Jensen–Shannon).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jaxllm import rundir, sharding, tree
from jaxllm.config import ConfigError, DataConfig, DistillConfig, ModelConfig, Precision, TrainConfig
from jaxllm.contract import LM, STUDENT, Batch, Obs, Params
from jaxllm.data.batch import Dataset
from jaxllm.data.taught import Layout, nothing, read_meta
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.files import path_of
from jaxllm.losses.annotate import teacher
from jaxllm.losses.core import Coefficient, LossTransform, adaptive, scale, total
from jaxllm.losses.divergences import KINDS
from jaxllm.losses.sequence import attention_kl, cosine, mse, states
from jaxllm.losses.tokens import next_token, z_loss
from jaxllm.losses.vocab import TokenLoss, View, over_vocab
from jaxllm.models.generate import read_prompts
from jaxllm.models.heads import with_projections
from jaxllm.models.transformer import decoder
from jaxllm.step import Experiment, Frozen, observe


@dataclass(frozen=True)
class Teacher:
    """A model that reads the student's batches in the step."""

    name: str
    """In messages: where it comes from."""
    lm: LM
    load: Callable[[Mesh], Params]
    """Its weights, placed by its own rules."""
    tokenizer: Tokenizer | None
    """None: nothing is known of it, as of a model that is only planned."""

    @property
    def num_params(self) -> int:
        """Of its model."""
        return tree.count(self.lm.param_shapes)


def from_checkpoint(path: str, precision: Precision) -> Teacher:
    """The model in a run directory, a converted folder, or one checkpoint of either.

    Raises:
      ConfigError: nothing there.
    """
    from jaxllm import pretrained

    tokenizer, *_ = pretrained.load_text(path_of(path).expanduser())
    load = lambda mesh: pretrained.load(path, mesh=mesh, precision=precision).params
    return Teacher(path, pretrained.lm_of(path, precision), load, tokenizer)


def of_config(name: str, model: ModelConfig, precision: Precision) -> Teacher:
    """A model with fresh weights: what stands for a published teacher where a run is planned, not made."""
    from jaxllm import pretrained

    lm = decoder(model, precision=precision)

    def load(mesh: Mesh) -> Params:
        params = sharding.pad_vocab(lm.init(jax.random.key(0)), mesh.shape["model"])
        return tree.map_with_path(lambda path, leaf: leaf.astype(pretrained.dtype_of(path, leaf.dtype, precision)), params)

    return Teacher(name, lm, load, None)


def experiment(base: Experiment, precision: Precision, teachers: Sequence[Teacher] | None = None, stored_k: int = 0) -> Experiment:
    """`base` with the teachers of its config, and their loss in place of its own.

    Args:
      teachers: those of `config.distill.teachers`, in its order; None reads them from their folders.
      stored_k: tokens that a stored teacher tells at each position, for the plan of a run whose folders are not here.

    Raises:
      ConfigError: a teacher that is not there, of another tokenizer (found when the data are opened; both fingerprints are named), or with
        a shorter context than the data's rows; on-policy rows of data that packs documents.
    """
    config, distill = base.config, base.config.distill
    if teachers is None:
        rundir.check_teachers(config)
    found = [from_checkpoint(path, precision) for path, _ in distill.teachers] if teachers is None else teachers
    models = {_name("teacher", i, found): one for i, one in enumerate(found)}
    stored = {_name("stored", i, distill.stored): path for i, (path, _) in enumerate(distill.stored)}
    shared = {name: _check_fit(config, one) for name, one in models.items()}
    taps = taps_of(distill)
    lm, forward = base.lm, base.forward or observe(base.lm, taps)
    if taps and base.forward is not None:
        raise ConfigError("distill.states and attention_layers need the usual forward pass; leave out bitnet.warm_start_steps")
    if distill.states != "none":
        lm = with_projections(lm, len(distill.state_layers), found[0].lm.config.width)
        forward = projecting(forward, distill.state_layers)
    ends = found[0].tokenizer.eos_id if found and found[0].tokenizer else None
    reads = [partial(observe(one.lm, taps), key=None) for one in models.values()]
    work = sum(2.0 * one.num_params for one in found)
    if distill.on_policy:
        work += 2.0 * distill.on_policy * tree.count(base.lm.param_shapes)
    return replace(
        base,
        lm=lm,
        forward=forward,
        loss=loss(config, shared, tuple(stored)),
        annotators=(*base.annotators, *(teacher(read, name) for name, read in zip(models, reads, strict=True))),
        load_frozen=partial(_load, models, base.load_frozen) if models else base.load_frozen,
        load_data=partial(_load_data, base.load_data, tuple(found), stored),
        extras={**base.extras, **_extras(stored, stored_k)},
        rollout=on_policy(base.lm, config, ends) if distill.on_policy else base.rollout,
        other_flops_per_token=base.other_flops_per_token + work,
    )


def _name(kind: str, index: int, all: Sequence[object]) -> str:
    return kind if len(all) == 1 else f"{kind}_{index + 1}"


def _check_fit(student: TrainConfig, one: Teacher) -> int | None:
    """How many entries the two vocabularies share, or None where they are of one size."""
    theirs, ours = one.lm.config, student.model
    if theirs.max_length < student.data.sequence_length:
        raise ConfigError(
            f"teacher {one.name} has a context of {theirs.max_length} tokens, and data.sequence_length is {student.data.sequence_length}; "
            "shorten the rows to the teacher's"
        )
    if theirs.vocab_size == ours.vocab_size:
        return None
    num = one.tokenizer.num_vocab if one.tokenizer else min(theirs.vocab_size, ours.vocab_size)
    if num > min(theirs.vocab_size, ours.vocab_size):
        raise ConfigError(
            f"teacher {one.name} has {theirs.vocab_size} vocabulary entries and the student {ours.vocab_size}, and the teacher's "
            f"tokenizer {num} tokens; a student of another tokenizer learns from stored predictions that were aligned to its tokens"
        )
    return num


def _load(models: Mapping[str, Teacher], others: Callable[[Mesh], Frozen] | None, mesh: Mesh) -> Frozen:
    return {**(others(mesh) if others else {}), **{name: one.load(mesh) for name, one in models.items()}}


def _extras(stored: Mapping[str, str], k: int) -> dict[str, jax.ShapeDtypeStruct]:
    """What stored teachers put beside each position of a batch, as the folders say, or with `k` choices where there is none."""
    extras: dict[str, jax.ShapeDtypeStruct] = {}
    for name, path in stored.items():
        meta = read_meta(path_of(path))
        best = nothing(Layout(meta.k if meta else k, 2), 1).top._asdict()
        extras |= {f"{name}/{field}": jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for field, x in best.items()}
    return extras


def _load_data(
    load: Callable[..., Dataset], models: Sequence[Teacher], stored: dict[str, str], data: DataConfig, **options: Any
) -> Dataset:
    """The dataset, with stored predictions beside its rows, once teachers and data are known to have one tokenizer."""
    dataset = load(data, **options, **({"taught": stored} if stored else {}))
    for one in models:
        ours, theirs = dataset.tokenizer, one.tokenizer
        if theirs is not None and ours.fingerprint != theirs.fingerprint:
            raise ConfigError(
                f"teacher {one.name} reads tokens of {theirs.fingerprint[:12]} ({theirs.num_vocab}), and the data are in those of "
                f"{ours.fingerprint[:12]} ({ours.num_vocab}); a teacher with another tokenizer enters by stored predictions, aligned to "
                "the student's tokens"
            )
    return dataset


# ---------------------------------------------------------------------------------------------- loss


def loss(config: TrainConfig, shared: Mapping[str, int | None], stored: Sequence[str] = ()) -> LossTransform:
    """The loss of `config.distill`.

    Args:
      shared: name of each teacher in the step -> tokens that its table and the student's have in common; None: they are of one size.
      stored: names of stored teachers.
    """
    distill = config.distill
    terms: dict[str, tuple[Coefficient, TokenLoss]] = {"ce": (text_weight(config), next_token(config.loss.label_smoothing))}
    if config.loss.z_loss:
        terms["z"] = (config.loss.z_loss, z_loss())
    weights = [weight for _, weight in (*distill.teachers, *distill.stored)]
    names = [*shared, *stored]
    for name, weight in zip(names, weights, strict=True):
        terms[name] = teacher_weight(config, weight), divergence(distill, name, shared.get(name))
    text = over_vocab(chunk=config.loss.chunk, **terms, log_z=(0.0, View.log_z))
    parts: dict[str, LossTransform] = {"text": text}
    if distill.states != "none":
        first = names[0]
        match = {"cosine": cosine, "mse": mse}[distill.states](states(tap=PROJECTED, layer=None), teacher_states(first, distill))
        ratio = lambda means: means[f"text/{first}"].value / means["states"].value
        parts["states"] = adaptive(ratio, match) if distill.state_weight is None else scale(distill.state_weight, match)
    if distill.attention_layers:
        parts["attention"] = scale(distill.attention_weight, attention_kl(distill.attention_layers, names[0]))
    return text if len(parts) == 1 else total(**parts)


def divergence(distill: DistillConfig, name: str, shared: int | None) -> TokenLoss:
    """Of `distill.kind`, from one teacher."""
    options: dict[str, Any] = {"shared": shared}
    if distill.kind != "soft_ce":
        options["temperature"] = distill.temperature
    if distill.kind == "jensen_shannon":
        options["beta"] = distill.beta
    return KINDS[distill.kind](name, tail=distill.tail, **options)


def text_weight(config: TrainConfig) -> Coefficient:
    """`distill.ce`, or the line from there to `ce_end` over the run."""
    first, last = config.distill.ce, config.distill.ce_end
    return first if last is None else lambda step: _line(first, last, step, config)


def teacher_weight(config: TrainConfig, weight: float) -> Coefficient:
    """A teacher's weight: on the line to `weight_end` of it over the run, or scaled as 1 - ce is where that changes."""
    distill, last = config.distill, config.distill.weight_end
    if last is None:
        if distill.ce_end is None:
            return weight
        last = (1.0 - distill.ce_end) / (1.0 - distill.ce)
    return lambda step: weight * _line(1.0, last, step, config)


def _line(first: float, last: float, step: Array, config: TrainConfig) -> Array:
    return first + (last - first) * jnp.minimum(step / config.num_steps, 1.0)


# ------------------------------------------------------------------------------------- hidden states

PROJECTED = "projected"
"""Tap of the student's layers in the teacher's width, [P B T E]."""


def taps_of(distill: DistillConfig) -> tuple[str, ...]:
    """What must be seen of student and teachers."""
    found = {"q", "k"} if distill.attention_layers else set()
    if distill.states != "none":
        found |= {_tap(layer) for pair in distill.state_layers for layer in pair}
    return tuple(sorted(found))


def _tap(layer: int) -> str:
    return "block_input" if layer >= 0 else "block_output"


def teacher_states(name: str, distill: DistillConfig) -> Callable[[Obs], Float[Array, "P B T E"]]:
    """The teacher's layers that the student's are held against."""
    readers = [states(name, _tap(layer), layer) for _, layer in distill.state_layers]
    return lambda obs: jnp.stack([read(obs) for read in readers])


def projecting(forward: Callable[..., Obs], pairs: tuple[tuple[int, int], ...]) -> Callable[..., Obs]:
    """`forward` that also leaves the student's layers in the teacher's width."""

    def look(params: Params, batch: Batch, key: Array | None, step: Array) -> Obs:
        obs = forward(params, batch, key, step)
        seen = obs.taps[STUDENT]
        ours = jnp.stack([seen[_tap(layer)][layer] for layer, _ in pairs])
        projected = jnp.einsum("PBTD,PDE->PBTE", ours.astype(jnp.float32), params["projections"]["kernel"])
        return obs.replace(taps={**obs.taps, STUDENT: {**seen, PROJECTED: projected}})

    return look


# ----------------------------------------------------------------------------------------- on policy


def on_policy(lm: LM, config: TrainConfig, end: int | None) -> Callable[[Params, Frozen, Batch, Array], Batch]:
    """`Experiment.rollout`: a share of the rows goes on from its prompt as the student writes it.

    A row's prompt ends where its loss begins, or has `on_policy_prompt` tokens where all of it carries loss. What the student writes,
    up to its end-of-text token or `on_policy_tokens`, carries the loss; no gradient passes through the choice of tokens.

    Args:
      end: id of the end of text; None where there is none.
    """
    distill = config.distill
    if config.data.packing != "none":
        raise ConfigError(
            f"distill.on_policy lets the student go on with a row, and data.packing '{config.data.packing}' puts several documents into "
            "one; set data.packing to none"
        )

    def rollout(params: Params, frozen: Frozen, batch: Batch, key: Array) -> Batch:
        del frozen
        which, draw = jax.random.split(key)
        own = jax.random.bernoulli(which, distill.on_policy, (batch.tokens.shape[0],)) & jnp.any(batch.loss_mask > 0, axis=1)
        lengths = prompt_lengths(batch, distill.on_policy_prompt)
        written = write(lm, params, batch, lengths, draw, distill.on_policy_tokens, distill.on_policy_temperature, end)
        pick = lambda ours, theirs: jnp.where(own.reshape(-1, *[1] * (ours.ndim - 1)), theirs, ours)
        names = ("tokens", "labels", "loss_mask", "segment_ids", "positions")
        return batch.replace(**{name: pick(getattr(batch, name), getattr(written, name)) for name in names})

    return rollout


def prompt_lengths(batch: Batch, least: int) -> Int[Array, " B"]:
    """Tokens of each row that are given: up to the first prediction that carries loss, at least `least` where that is the first one."""
    first = jnp.argmax(batch.loss_mask > 0, axis=1)
    inputs = jnp.sum(batch.segment_ids > 0, axis=1)
    return jnp.clip(jnp.where(first > 0, first + 1, least), 1, jnp.maximum(inputs, 1))


def write(
    lm: LM, params: Params, batch: Batch, lengths: Int[Array, " B"], key: Array, num_tokens: int, temperature: float, end: int | None
) -> Batch:
    """Rows that hold their prompts and what the model writes after them, up to the end of the row; the loss is on what it wrote."""
    num_rows, length = batch.tokens.shape
    hidden, cache = read_prompts(lm, params, batch.tokens, lengths, length)

    def one(carry: Any, i: Array) -> tuple[Any, tuple[Array, Array]]:
        hidden, cache, alive = carry
        logits = lm.unembed(params).logits(hidden).astype(jnp.float32) / temperature
        token = jax.random.categorical(jax.random.fold_in(key, i), logits).astype(jnp.int32)
        here = alive & (lengths + i <= length)  # the last label lies one beyond the last input
        out = lm.apply(params, token[:, None], positions=jnp.minimum(lengths + i, length - 1)[:, None], cache=cache)
        alive = here if end is None else here & (token != end)
        return (out.hidden[:, 0], out.cache, alive), (token, here)

    _, (tokens, real) = jax.lax.scan(one, (hidden, cache, jnp.ones(num_rows, bool)), jnp.arange(min(num_tokens, length)))
    tokens, real = tokens.T, real.T
    places = lengths[:, None] + jnp.arange(tokens.shape[1])
    rows = jnp.arange(num_rows)[:, None]
    whole = jnp.pad(batch.tokens, ((0, 0), (0, 1))).at[rows, jnp.where(real, places, length + 1)].set(tokens, mode="drop")
    wrote = jnp.zeros(whole.shape, bool).at[rows, jnp.where(real, places, length + 1)].set(True, mode="drop")
    index = jnp.arange(length)
    inputs = index < lengths[:, None] + real.sum(axis=1, keepdims=True)
    return batch.replace(
        tokens=whole[:, :-1],
        labels=whole[:, 1:],
        loss_mask=wrote[:, 1:].astype(jnp.float32),
        segment_ids=inputs.astype(jnp.int32),
        positions=jnp.broadcast_to(index, whole[:, :-1].shape).astype(jnp.int32),
    )
