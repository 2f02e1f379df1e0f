"""A smaller model out of a checkpoint, by importance on a calibration text (Minitron): checkpoint to checkpoint, leaf by leaf.

    python -m tools.prune CHECKPOINT OUT --target-params 90M --text FILE         width and feed-forward width for a budget
    python -m tools.prune CHECKPOINT OUT --width 384 --ff-width 1024 --num-heads 6 --num-layers 20 --text FILE
    python -m tools.prune CHECKPOINT OUT --num-layers 20 --depth loss --text FILE
    python -m tools.prune CHECKPOINT OUT --layers 0 1 2 3 28 29                  these layers; no text is needed
    python -m tools.prune CHECKPOINT OUT --width 384 --random 0                  the baseline

Scores are kept in OUT.scores.npz, or in --scores FILE, and used again for as many shapes as you like; those of other weights are refused.
OUT is a folder as every conversion writes it; `python -m tools.convert to-hf OUT FOLDER` makes a Hugging Face folder of it.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import __version__, cli, manifest, pretrained, tree
from jaxllm.config import ConfigError, MeshConfig, ModelConfig
from jaxllm.contract import LM, Batch, Params
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.files import path_of
from jaxllm.flags import parse_flags
from jaxllm.interop import families
from jaxllm.interop.stored import Lazy
from jaxllm.models.transformer import decoder
from jaxllm.surgery import importance, prune, shapes
from jaxllm.surgery.prune import Kept, Plan
from jaxllm.surgery.shapes import Shape
from tools import hf_export
from tools.kv_heads import open_params, text_rows, travelling, whole_rows

PROGRAM = "python -m tools.prune CHECKPOINT OUT"
ROWS = 4
"""That are in memory at a time, with all their intermediates."""


@dataclass(frozen=True)
class Options:
    """Options of pruning."""

    target_params: str = ""
    """Parameters of the result, embeddings included, as 90M or 1.2B: the width and feed-forward width near it whose proportions are
    most like the model's. Layers and heads stay, and whatever else is given."""
    num_layers: int | None = None
    """Layers of the result."""
    width: int | None = None
    """Width of the result's residual stream."""
    num_heads: int | None = None
    """Query heads of the result: equally many of each group, or whole groups."""
    num_kv_heads: int | None = None
    """Key/value heads of the result. None: all, or those of whole groups."""
    ff_width: int | None = None
    """Feed-forward width of the result."""
    tolerance: float = 0.05
    """How far --target_params may be missed, as a share of it."""
    multiple: int | None = None
    """Of the widths that --target_params chooses from. None: 64, and 8 for models narrower than 512."""
    layers: tuple[int, ...] = ()
    """The layers that stay, counted from 0, instead of a choice."""
    depth: Literal["block", "single", "loss"] = "block"
    """block: remove the contiguous block that changes the residual stream least. single: the layers that do, one by one.
    loss: the contiguous block without which the loss on the text is lowest."""
    text: str = ""
    """A file of text (or gzip of it) like that which the model will read."""
    text_tokens: int = 32768
    """How many tokens of it."""
    row_tokens: int = 256
    """Tokens of a row, which is one sample."""
    over_tokens: Literal["mean", "l2", "var"] = "mean"
    """How the activations of a row become one number."""
    over_rows: Literal["mean", "l2", "var"] = "l2"
    """How the numbers of all rows do."""
    neurons: Literal["hidden", "preactivation"] = "hidden"
    """What of a neuron is scored: what the down projection reads, or what goes into the activation."""
    random: int | None = None
    """Choose at random, with this seed."""
    scores: str = ""
    """The file of scores: read where it is there, written where it is not. Empty: OUT.scores.npz."""
    merge_heads: float = 0.0
    """Add to each kept head so many times its difference from a pruned one."""
    mend_norms: bool = False
    """Scale norms for the narrower stream, so that what follows them is as large as it was on the text."""
    mesh: MeshConfig = field(default_factory=lambda: MeshConfig(data=1))
    """The devices that will read the checkpoint: each leaf is written in the parts that they hold. They need not be here."""

    def __post_init__(self) -> None:
        if self.target_params:
            shapes.number_of(self.target_params)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prune one checkpoint; the exit status is 0, or 2 for a user's mistake, which is said in one line."""
    return cli.guarded(act, list(sys.argv[1:] if arguments is None else arguments))


def act(words: list[str]) -> int:
    """Pruning, out of the words of the command line."""
    if not words or words[0] in ("-h", "--help"):
        print(f"usage: {(__doc__ or '').split('    ', 1)[1].split('Scores are')[0].rstrip()}\n\n`{PROGRAM} --help` lists the options.")
        return 0 if words else 2
    first_flag = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    places, flags = words[:first_flag], words[first_flag:]
    if len(places) != 2 and not {"-h", "--help"} & set(flags):
        raise ConfigError(f"usage: {PROGRAM} [--OPTION VALUE …]; {len(places)} words were given before the options")
    options = parse_flags(Options(), flags, PROGRAM)
    command(places[0], places[1], options)
    return 0


def command(checkpoint: str, out: str, options: Options) -> None:
    """Write a pruned `checkpoint` to `out`; one layer of one leaf is in memory, but for scores and losses, which run the model.

    Raises:
      ConfigError: nothing there, or a damaged checkpoint; `out` exists; a shape that cannot be had; scores of other weights; no text
        where one is needed; as `prune.keep`.
    """
    folder, target = path_of(checkpoint).expanduser(), path_of(out).expanduser()
    config, params = open_params(folder)
    prune.check(params, config)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists already; name a folder that does not, or remove it first")
    shape = wanted(config, options)
    layers = options.layers or None
    if layers is None and shape.num_layers < config.num_layers and options.depth == "loss":
        layers = by_loss(folder, shape.num_layers, options)
    by_score = shape._replace(num_layers=0) != Shape.of(config)._replace(num_layers=0)
    by_score |= layers is None and shape.num_layers < config.num_layers
    scores = find_scores(folder, target, config, options) if by_score else importance.random(config, 0)
    depth: prune.Depth = "block" if options.depth == "loss" else options.depth
    kept = prune.choose(scores, shape, layers=layers, depth=depth, merge_heads=options.merge_heads, mend_norms=options.mend_norms)
    plan = Plan.of(config, kept)
    if plan.config == config:
        raise ConfigError(f"nothing to prune: the model has {Shape.of(config)} already; say what is to be smaller, or --target_params")
    write(folder, target, params, plan, options, scores if by_score else None)


def write(folder: Path, target: Path, params: tree.Tree, plan: Plan, options: Options, scores: importance.Scores | None) -> None:
    """The folder, and the lines that say what was done."""
    pruned = lazy(params, plan)
    tokenizer, template, stop_ids = pretrained.load_text(folder)
    origin = hf_export.find_origin(folder)
    source = {
        "kind": "prune", "from": str(folder), "family": origin.family, "converter": f"jaxllm {__version__}",
        "before": Shape.of(plan.old)._asdict(), "after": Shape.of(plan.config)._asdict(),
        "scores": None if scores is None else {"how": scores.how, "num_tokens": scores.num_tokens, "fingerprint": scores.fingerprint},
        "merge_heads": options.merge_heads, "mend_norms": options.mend_norms,
        "kept": {name: index.tolist() for name, index in plan.indices.items() if name in "LDNK"},
    }  # fmt: skip
    own: Tokenizer | None = None if isinstance(tokenizer, pretrained.NoTokenizer) else tokenizer
    files = travelling(origin)
    pretrained.save(
        target, plan.config, pruned, own, chat_template=template, stop_ids=stop_ids, source=source, files=files, mesh=options.mesh
    )
    for line in report(plan, scores):
        print(line)
    before, after = tree.count(params), tree.count(pruned)
    print(f"wrote {target}: {Shape.of(plan.old)} -> {Shape.of(plan.config)}; {before:,} -> {after:,} parameters ({after / before:.1%})")
    if origin.family in families.FAMILIES:
        try:
            families.config_to_hf(origin.family, plan.config)
        except ConfigError as error:
            print(f"note: {origin.family} cannot express this shape ({error}); to-hf looks for a family that can")
    sys.stdout.flush()


# ----------------------------------------------------------------------------------------------- shape


def wanted(config: ModelConfig, options: Options) -> Shape:
    """The shape that the options ask for."""
    sizes = {name: getattr(options, name) for name in Shape._fields}
    given = {name: size for name, size in sizes.items() if size is not None}
    if options.layers and given.setdefault("num_layers", len(options.layers)) != len(options.layers):
        raise ConfigError(f"--layers names {len(options.layers)} layers and --num_layers is {options.num_layers}; give one of them")
    if "num_heads" in given:
        given.setdefault("num_kv_heads", shapes.kv_heads(config, given["num_heads"]))
    elif "num_kv_heads" in given:
        given["num_heads"] = given["num_kv_heads"] * config.group_size
    for name, size in given.items():
        shapes.check_size(config, name, size)
    if not options.target_params:
        return Shape.of(config)._replace(**given)
    if "num_heads" in given and shapes.kv_heads(config, given["num_heads"]) != given["num_kv_heads"]:
        raise ConfigError("--target_params chooses among shapes whose groups follow from their heads; leave --num_kv_heads out")
    target = shapes.number_of(options.target_params)
    choices = {name: [size] for name, size in given.items() if name != "num_kv_heads"}
    rank = shapes.nearest_proportions(config, target)
    found = shapes.near(config, target, tolerance=options.tolerance, multiple=options.multiple, rank=rank, **choices)
    count = shapes.num_params(replace(config, **found[0]._asdict()))
    print(f"{len(found)} shapes have {target:,} parameters within {options.tolerance:.0%}; taking {found[0]}: {count:,}", flush=True)
    return found[0]


# ---------------------------------------------------------------------------------------------- scores


def find_scores(folder: Path, target: Path, config: ModelConfig, options: Options) -> importance.Scores:
    """Scores at random, out of the file, or measured now and left in the file."""
    if options.random is not None:
        return importance.random(config, options.random)
    path = path_of(options.scores).expanduser() if options.scores else target.with_name(f"{target.name}.scores.npz")
    fingerprint = manifest.fingerprint(folder)
    if path.exists():
        scores = importance.load(path, fingerprint)
        importance.check(scores, config)
        for asked in (importance.described(options.over_tokens, options.over_rows, options.neurons), _text_name(options)):
            if asked not in scores.how:
                raise ConfigError(f"{path} holds scores by {scores.how}, and asked for is {asked}: give the same, or another --scores")
        print(f"scores: {path} ({scores.how}; {scores.num_tokens:,} tokens)", flush=True)
        return scores
    model, batches = opened(folder, options)
    scores = importance.measure(
        model.lm, model.params, batches, over_tokens=options.over_tokens, over_rows=options.over_rows, neurons=options.neurons,
        fingerprint=fingerprint,
    )  # fmt: skip
    scores = scores._replace(how=f"{scores.how}, {_text_name(options)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    importance.save(path, scores)
    print(f"scores: measured on {scores.num_tokens:,} tokens of {options.text}, kept in {path}", flush=True)
    return scores


def _text_name(options: Options) -> str:
    """The calibration text and how much of it is read, in few letters; empty where none is given."""
    if not options.text:
        return ""
    amounts = f" {options.text_tokens} {options.row_tokens}".encode()
    return f"text {hashlib.sha256(path_of(options.text).expanduser().read_bytes() + amounts).hexdigest()[:8]}"


def opened(folder: Path, options: Options) -> tuple[pretrained.Pretrained, list[Batch]]:
    """The model, and the calibration text as rows that do not overlap."""
    if not options.text:
        raise ConfigError("what matters shows on a text: give --text FILE, text like that which the model will read (or --random SEED)")
    model = pretrained.load(folder, precision="float32")
    length = min(options.row_tokens, model.config.max_length)
    rows = text_rows(model.tokenizer, path_of(options.text).expanduser(), options.text_tokens, length)
    return model, [whole_rows(rows[i : i + ROWS]) for i in range(0, len(rows), ROWS)]


def by_loss(folder: Path, num_layers: int, options: Options) -> tuple[int, ...]:
    """The layers around the contiguous block without which the text's loss is lowest; a line for each block."""
    model, batches = opened(folder, options)
    build = lru_cache(maxsize=8)(lambda config: _summed_loss(decoder(config, precision="float32")))

    def loss(layers: tuple[int, ...]) -> float:
        params, config = prune.keep(model.params, model.config, Kept(layers=layers))
        return sum(float(build(config)(params, batch)) for batch in batches) / sum(batch.labels[:, 1:].size for batch in batches)

    depth = model.config.num_layers
    losses = importance.ablation(loss, depth, depth - num_layers)
    for start, value in enumerate(losses):
        print(f"without layers {start} to {start + depth - num_layers - 1}: loss {value:.4f}", flush=True)
    return importance.outside(depth, int(losses.argmin()), depth - num_layers)


def _summed_loss(lm: LM) -> Callable[[Params, Batch], jax.Array]:
    """Σ −log p of the tokens after the first of each row, nats."""

    @jax.jit
    def total(params: Params, batch: Batch) -> jax.Array:
        logits = lm.unembed(params).logits(lm(params, batch).hidden[:, :-1])
        chosen = jnp.take_along_axis(logits, batch.tokens[:, 1:, None], axis=-1)[..., 0]
        return (jax.nn.logsumexp(logits, axis=-1) - chosen).sum()

    return total


# ---------------------------------------------------------------------------------------------- leaves


def lazy(params: tree.Tree, plan: Plan) -> tree.Tree:
    """`prune.keep` of leaves that are read slice by slice, as leaves that are."""

    def leaf(path: str, old: Any) -> Any:
        if not plan.changes(path):
            return old
        shape = jax.eval_shape(partial(plan.apply, path), jax.ShapeDtypeStruct(old.shape, old.dtype)).shape
        return Lazy(shape, old.dtype, partial(_part, path, old, plan))

    return tree.map_with_path(leaf, params)


def _part(path: str, old: Any, plan: Plan, index: tuple[slice, ...]) -> np.ndarray:
    """A part of a pruned leaf: whole layers of the old one are read, one at a time, or the rows of a table."""
    first, *rest = index
    letter = prune.dims_of(path, plan.old)[0]
    if letter != "L":
        part = np.asarray(old[first] if letter in "VT" else old[:])
        return np.ascontiguousarray(plan.apply(path, part)[(slice(None) if letter in "VT" else first, *rest)])
    layers = plan.indices.get("L", np.arange(plan.old.num_layers))
    parts = [
        plan.apply(path, np.asarray(old[int(layers[new]) : int(layers[new]) + 1]), new)[(slice(None), *rest)]
        for new in range(first.start, first.stop)
    ]
    return np.concatenate(parts)


# ---------------------------------------------------------------------------------------------- report


def report(plan: Plan, scores: importance.Scores | None) -> list[str]:
    """A line for each axis: how many stay, and how much of the score with them; by layer, from the least to the most."""
    lines = []
    layers = plan.indices.get("L", np.arange(plan.old.num_layers))
    if "L" in plan.indices:
        lines.append(f"layers kept: {' '.join(map(str, layers.tolist()))}")
    for letter, name in (("N", "heads"), ("F", "neurons"), ("D", "channels")):
        if letter not in plan.indices or scores is None:
            continue
        index, values = plan.indices[letter], getattr(scores, name)
        values = values if values.ndim == 1 else values[layers]
        share = np.take_along_axis(values, index, -1).sum(-1) / np.maximum(values.sum(-1), 1e-30)
        spread = f" ({share.min():.1%} to {share.max():.1%} by layer)" if share.ndim else ""
        lines.append(f"{name}: {index.shape[-1]} of {values.shape[-1]} kept, with {share.mean():.1%} of the score{spread}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
