"""From a `TrainConfig` to the `Experiment` that every paper starts from: a decoder, next-token loss, held-out bits per byte.

A paper's file calls `experiment(config, loss=..., ...)` and changes what it needs with `dataclasses.replace`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import islice
from typing import Any, cast

import jax
from jax.sharding import Mesh
from jaxtyping import Array

from jaxllm import checkpoint, flops, optim, rundir, sharding, tree
from jaxllm.config import ConfigError, Precision, QuantiseConfig, TrainConfig, from_dict
from jaxllm.contract import LM, Batch, Dot, Mean, Obs, Params, Unembedding, dot_in
from jaxllm.data import batch as batches
from jaxllm.data import tokenizer as tokenizers
from jaxllm.data.batch import Dataset, to_global
from jaxllm.evals import perplexity
from jaxllm.files import how_to_get, path_of
from jaxllm.losses.core import LossTransform
from jaxllm.losses.tokens import next_token, z_loss
from jaxllm.losses.vocab import View, over_vocab
from jaxllm.models.attention_kernels import chosen
from jaxllm.models.generate import complete, generator, sampler
from jaxllm.models.heads import TRAINING_ONLY
from jaxllm.models.stack import Reparam
from jaxllm.models.transformer import PRECISIONS, decoder
from jaxllm.step import Experiment, Forward, observe
from jaxllm.surgery import adapters, bitnet, bottleneck, prefix, quantise

PROMPTS = (
    "def fibonacci(n):\n",
    'import os\n\ndef read_lines(path):\n    """Return the lines of a file.',
    "class Stack:\n    def __init__(self):\n",
    "for key, value in ",
)
"""Samples continue these where the experiment has none of its own."""
UNIGRAM_BYTES = 1 << 22
"""Training text that byte frequencies are counted in."""


def next_token_loss(config: TrainConfig) -> LossTransform:
    """next-token cross-entropy + z_loss · (log Z)², one pass over the vocabulary; log Z itself is measured beside."""
    values = config.loss
    terms: dict[str, Any] = {"ce": (1.0, next_token(values.label_smoothing))}
    if values.z_loss:
        terms["z"] = (values.z_loss, z_loss())
    return over_vocab(chunk=values.chunk, **terms, log_z=(0.0, View.log_z))


def choose_precision(config: TrainConfig) -> tuple[Precision, str]:
    """(precision, why): the run's own if it has begun, the user's choice, or what suits the device.

    On CPU float32 activations with bf16 matmul operands pay off only where the processor multiplies bf16 itself,
    so both matmuls are timed on the spot.
    """
    before = rundir.recorded(config).get("precision")
    if config.precision != "auto":
        return cast(Precision, config.precision), "asked for"
    if before is not None:
        return before, "chosen when this run began"
    if jax.default_backend() != "cpu":
        return "bfloat16", "bf16 matrix units"
    if jax.process_count() > 1:
        return "float32", "several CPU processes, which must choose alike without timing"
    plain, half = flops.measured_peak("float32", 1024, 0.1), flops.measured_peak("bfloat16", 1024, 0.1)
    ratio = f"a bf16 matmul runs at {half / plain:.1f} × the speed of a float32 one here"
    return ("bfloat16_matmul", ratio) if half > 1.2 * plain else ("float32", ratio)


def choose_attention(config: TrainConfig, precision: Precision, mesh: Mesh) -> dict[str, str]:
    """{kind of layer: the kernel that its attention runs on} on this mesh.

    Raises:
      ConfigError: none on this platform has what the model asks for; says what to change.
    """
    with jax.set_mesh(mesh):
        platform = sharding.platform()
    rows = config.data.batch_size // config.optim.num_microbatches
    return chosen(
        config.model, platform, length=config.data.sequence_length, dtype=PRECISIONS[precision][1],
        rows=rows // sharding.axis_size(mesh, sharding.BATCH_AXES), model_shards=mesh.shape["model"],
        shard_sequence=config.mesh.shard_sequence,
    )  # fmt: skip


def experiment(
    config: TrainConfig,
    *,
    precision: Precision,
    loss: LossTransform | None = None,
    prompts: Sequence[str] = PROMPTS,
) -> Experiment:
    """Pre-training, fine-tuning with `config.init_from`, or learning from the teachers of `config.distill`.

    Args:
      precision: out of `choose_precision`.
      loss: None means `next_token_loss(config)`, or `distill.loss`, which is the one taken where there are teachers.
      prompts: what samples continue.
    """
    lm = language_model(config, precision)
    if config.quantise.kind != "none":
        shapes = lm.param_shapes
        quantise.check_frozen(tree.partition(shapes, partial(optim.trainable, config.optim))[0], config.quantise)
    made = Experiment(
        config=config,
        lm=lm,
        loss=loss or next_token_loss(config),
        load_data=batches.load,
        forward=warming_up(config, observe(lm)) if config.bitnet.warm_start_steps else None,
        initial_params=partial(starting_params, config, lm) if config.init_from else None,
        evaluate=held_out(lm, config),
        sample=sampling(lm, prompts),
        finish=baselines,
    )
    if not config.distill.on:
        return made
    from jaxllm import distill

    return distill.experiment(made, precision)


def language_model(config: TrainConfig, precision: Precision) -> LM:
    """The decoder of `config.model` with the surgery that `config` names: 1-bit weights, low-rank deltas, adapter layers, a prefix.

    Raises:
      ConfigError: surgery that does not fit the model.
    """
    plain = dot = dot_in(PRECISIONS[precision][1])
    reparam: Reparam | None = None
    if config.bitnet.kind != "none":
        bitnet.check(config.model, config.bitnet)
        dot, reparam = bitnet.dot(config.bitnet, dot), bitnet.reparam(config.bitnet)
    if config.quantise.kind != "none":
        if reparam is not None or config.lora.dora:
            raise ConfigError(f"quantise.kind is {config.quantise.kind}: kernels in few bits go with neither bitnet nor lora.dora")
        reparam = partial(quantise.dequantise, kind=config.quantise.kind)
    if config.lora.rules:
        dot = adapters.lora_dot(config.lora, dot, plain)
    if config.bottleneck.size:
        dot = bottleneck.bottleneck_dot(dot, plain)
    lm = decoder(
        config.model,
        precision=precision,
        remat=config.remat,
        unroll=config.unroll_layers,
        shard_sequence=config.mesh.shard_sequence,
        dot=dot,
        reparam=reparam,
    )
    lm = lm._replace(unembed=partial(_head, lm, plain))
    if config.bitnet.norm_scale:
        lm = bitnet.with_norm_scales(lm, config.bitnet)
    if config.lora.rules:
        lm = adapters.with_lora(lm, config.lora)
    if config.bottleneck.size:
        lm = bottleneck.with_bottlenecks(lm, config.bottleneck)
    if config.prefix.length:
        lm = prefix.with_prefix(lm, config.prefix)
    return quantise.with_quantised(lm, config.quantise) if config.quantise.kind != "none" else lm


def _head(lm: LM, plain: Dot, params: Params) -> Unembedding:
    """The output head with the plain product, which the vocabulary pass knows, where surgery left it nothing of its own."""
    head = lm.unembed(params)
    return replace(head, dot=plain) if set(head.leaves) == {"kernel"} else head


def warming_up(config: TrainConfig, forward: Callable[..., Obs]) -> Forward:
    """`forward` with weights and inputs that are quantised by degrees, as `bitnet.warm_start_steps` has it."""

    def forward_at(params: Params, batch: Batch, key: Array | None, step: Array) -> Obs:
        return forward(bitnet.with_amount(params, bitnet.amount(config.bitnet, step)), batch, key, step)

    return forward_at


ADDED = rf"{adapters.LEAVES}|{bottleneck.LEAVES}|{prefix.LEAVES}|{TRAINING_ONLY}"
"""Leaves that go beside a model's own."""
FRESH = rf"{ADDED}|{bitnet.NORM_SCALES}"
"""Leaves that start fresh where the weights come from a run without them."""


def starting_params(config: TrainConfig, lm: LM, mesh: Mesh, branches: Sequence[str] = ("trainable", "frozen")) -> Params:
    """The weights of another run, placed on this mesh: its checkpoint's, and where it froze some, those it started from.

    Adapters that the other run does not have start fresh, from this run's seed.

    Args:
      branches: of the checkpoint, as `checkpoint.load_params` reads them; what that run started from is never an average.

    Raises:
      ConfigError: nothing there; a checkpoint of another architecture (what differs), or of a run whose adapters this one does not
        have; weights that are not those that this run, or the other one, began from.
    """
    if config.quantise.kind != "none":
        return _rounded(config, lm, mesh, branches)
    if not path_of(config.init_from).exists():
        raise ConfigError(
            f"init_from names {config.init_from}, and there is no such run directory or checkpoint{how_to_get(config.init_from)}"
        )
    rundir.check_parent(rundir.recorded(config), config.init_from)
    multiple = mesh.shape["model"]
    shapes = jax.eval_shape(partial(sharding.pad_vocab, multiple=multiple), lm.param_shapes)
    where = sharding.shardings(sharding.param_specs(shapes, mesh, config.mesh.rules), mesh)
    template = jax.tree.map(lambda s, w: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=w), shapes, where)
    _, meta = checkpoint.read_meta(config.init_from)
    parent = from_dict(TrainConfig, meta["config"])
    if parent.bitnet.kind != "none" and config.bitnet.kind == "none":
        raise ConfigError(
            f"the weights of {config.init_from} are used rounded (bitnet.kind {parent.bitnet.kind}), and here they would not be: set "
            f"--bitnet.kind {parent.bitnet.kind}, and the other bitnet options as that run has them"
        )
    parent, bits = replace(parent, quantise=QuantiseConfig()), parent.quantise
    theirs = language_model(parent, "float32")
    their_paths = set(tree.paths(theirs.param_shapes))
    if lost := [path for path in their_paths - set(tree.paths(shapes)) if re.fullmatch(ADDED, path)]:
        raise ConfigError(
            f"{config.init_from} was trained with adapters that this run does not have ({min(lost)}, …); fold them in first: "
            f"python -m tools.convert merge {config.init_from} OUT"
        )
    inherited, fresh = tree.partition(template, lambda path: path in their_paths or not re.fullmatch(FRESH, path))
    trained, frozen = tree.partition(inherited, partial(optim.trainable, parent.optim))
    params = checkpoint.load_params(config.init_from, trained, branches, left_out=TRAINING_ONLY).state
    if frozen:
        rundir.check_parent(rundir.read_json(rundir.root_of(path_of(config.init_from)) / "config.json"), parent.init_from)
        rest = starting_params(parent, theirs, mesh) if parent.init_from else theirs.init(jax.random.key(parent.seed))
        rest = tree.partition(sharding.pad_vocab(rest, multiple), partial(optim.trainable, parent.optim))[1]
        if bits.kind != "none":  # what it was trained beside
            rest = quantise.dequantise(quantise.quantise(rest, bits), bits.kind)
        params = tree.merge(params, jax.device_put(rest, tree.partition(where, set(tree.paths(rest)).__contains__)[0]))
    if fresh:
        own = jax.jit(lambda key: tree.partition(sharding.pad_vocab(lm.init(key), multiple), set(tree.paths(fresh)).__contains__)[0])
        added = own(jax.random.key(config.seed)) | _from_words(config, tree.partition(params, their_paths.__contains__)[0], theirs)
        params = tree.merge(params, jax.device_put(added, tree.partition(where, set(tree.paths(fresh)).__contains__)[0]))
    return params


def _rounded(config: TrainConfig, lm: LM, mesh: Mesh, branches: Sequence[str]) -> Params:
    """`starting_params` with the kernels that `config.quantise` names in few bits, placed by rule."""
    whole = replace(config, quantise=QuantiseConfig())
    params = starting_params(whole, language_model(whole, "float32"), mesh, branches)
    shapes = jax.eval_shape(partial(quantise.quantise, config=config.quantise), params)
    where = sharding.shardings(sharding.param_specs(shapes, mesh, config.mesh.rules), mesh)
    return jax.jit(partial(quantise.quantise, config=config.quantise), out_shardings=where)(params)


def _from_words(config: TrainConfig, params: Params, lm: LM) -> Params:
    """{'prefix': …} that starts from the activations of `prefix.init_text`, where there is one."""
    if not (config.prefix.length and config.prefix.init_text):
        return {}
    tokenizer = tokenizers.from_config(config.data.tokenizer)
    if tokenizer is None:
        raise ConfigError("prefix.init_text needs the tokenizer of the weights: name it with --data.tokenizer.path")
    return {"prefix": prefix.from_text(lm, params, config.prefix, tokenizer.encode(config.prefix.init_text))}


def held_out(lm: LM, config: TrainConfig) -> Callable[..., dict[str, Any]]:
    """The evaluation function of an Experiment: loss, perplexity and bits per byte of the held-out rows."""
    scores = over_vocab(chunk=config.loss.chunk, ce=(0.0, next_token()))
    forward = observe(lm)

    @jax.jit
    def sums(params: Params, batch: Batch) -> Mean:
        mean = scores.update(forward(params, batch, None), (), scores.weigh(batch))[1]["ce"]
        return Mean(*(sharding.constrain(x, "") for x in mean))

    def evaluate(params: Params, dataset: Dataset, mesh: Mesh, max_batches: int = 0) -> dict[str, Any]:
        if not dataset.held_out_windows:
            return {}
        size = config.data.batch_size // config.optim.num_microbatches
        rows = dataset.held_out(size, partial(sharding.host_rows, mesh))
        batches = (to_global(batch, mesh, size) for batch in islice(rows, max_batches or None))
        limit = max_batches * size or math.inf
        num_bytes = sum(window.num_bytes for window in dataset.held_out_windows if window.row < limit)
        return perplexity.evaluate(partial(sums, params), batches, num_bytes)

    return evaluate


def sampling(lm: LM, prompts: Sequence[str]) -> Callable[[Params, Dataset, Mesh], list[dict[str, str]]]:
    """The sampling function of an Experiment: continuations of the prompts at temperature 0.8 with top-k 40."""
    generate = cache(lambda: generator(lm, sampler(0.8, top_k=40)))  # at the first samples: not every model generates

    def samples(params: Params, dataset: Dataset, mesh: Mesh) -> list[dict[str, str]]:
        tokenizer = dataset.tokenizer
        ids = [tokenizer.encode(prompt) for prompt in prompts]
        stop = [i for i in (tokenizer.eos_id,) if i is not None]
        new = complete(generate(), params, ids, num_tokens=64, stop_ids=stop)
        return [{"prompt": prompt, "completion": tokenizer.decode(ids)} for prompt, ids in zip(prompts, new, strict=True)]

    return samples


def baselines(dataset: Dataset, evaluation: dict[str, Any]) -> dict[str, Any]:
    """What simpler predictors make of the same held-out bytes: {"baselines": [{"name", "bits_per_byte", "note"}]}; process 0 alone."""
    del evaluation
    if jax.process_index():
        return {}
    text = {(window.document, window.first): dataset.window_bytes(window) for window in dataset.held_out_windows}
    held = b"".join(text[window] for window in sorted(text))
    windows = [(b"", target) for target in text.values()]
    train = bytearray()
    for document in dataset.train_texts():
        train += document.encode()
        if len(train) >= UNIGRAM_BYTES:
            break
    rows = (
        ("byte unigram", perplexity.byte_unigram_bits(bytes(train[:UNIGRAM_BYTES]), held), "byte frequencies of the training text"),
        ("lzma, per window", perplexity.lzma_window_bits(windows), "the same bytes visible as to the model"),
        ("lzma, whole text", perplexity.lzma_whole_bits(held), "sees all of the held-out text at once: the next goal"),
    )
    return {"baselines": [{"name": name, "bits_per_byte": bits, "note": note} for name, bits, note in rows]}
