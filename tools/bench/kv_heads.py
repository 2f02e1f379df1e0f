"""Loss of a model right after its key/value heads were made fewer, by each method, before any uptraining.

    python -m tools.bench.kv_heads smollm2-135m --num_kv_heads 1 --calibration sotu.txt.gz --text wiki.valid.tokens.gz

Rows of the text do not overlap. The calibration text is seen by `svd` alone; it should not be the text that the loss is on.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import pretrained
from jaxllm.cli import setup_jax
from jaxllm.contract import LM, Params
from jaxllm.models.transformer import decoder
from jaxllm.surgery import resize
from tools.kv_heads import text_rows, whole_rows

ROWS = 4
"""At a time."""


def main() -> None:
    """Print a line for each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, or the name of a fetched model")
    parser.add_argument("--num_kv_heads", type=int, nargs="+", default=[1])
    parser.add_argument("--text", type=Path, required=True, help="text or gzip; what the loss is on")
    parser.add_argument("--calibration", type=Path, help="text or gzip; without it svd is left out")
    parser.add_argument("--length", type=int, default=256, help="tokens in a row")
    parser.add_argument("--rows", type=int, default=16, help="rows of the text")
    parser.add_argument("--calibration_rows", type=int, default=32)
    parser.add_argument("--reach", type=int, nargs="+", default=[0, 1024], help="of svd")
    args = parser.parse_args()
    setup_jax()
    model = pretrained.load(args.model if Path(args.model).exists() else pretrained.fetched(args.model))
    text = text_rows(model.tokenizer, args.text, args.rows * args.length, args.length)
    moments = None
    if args.calibration is not None:
        calibration = text_rows(model.tokenizer, args.calibration, args.calibration_rows * args.length, args.length)
        moments = resize.input_moments(model.lm, model.params, (whole_rows(part) for part in parts(calibration)))
    print(f"{args.rows} × {args.length} tokens of {args.text.name}; before: loss {loss(model.lm, model.params, text):.4f}", flush=True)
    methods: list[tuple[resize.How, int]] = [("mean", 0), ("first", 0), ("random", 0)]
    if moments is not None:
        methods += [("svd", reach) for reach in args.reach]
    for number in args.num_kv_heads:
        for how, reach in methods:
            start = time.perf_counter()
            make = partial(resize.kv_heads, key=jax.random.key(0), moments=moments, reach=reach)
            params, config = make(model.params, model.config, number, how)
            seconds = time.perf_counter() - start
            name = f"{how}, reach {reach}" if how == "svd" else how
            print(
                f"{model.config.num_kv_heads} -> {number}  {name:16} loss {loss(decoder(config), params, text):8.4f}  ({seconds:.1f} s)",
                flush=True,
            )


def parts(tokens: np.ndarray) -> list[np.ndarray]:
    """A few rows at a time."""
    return [tokens[i : i + ROWS] for i in range(0, len(tokens), ROWS)]


def loss(lm: LM, params: Params, tokens: np.ndarray) -> float:
    """Mean −log p of the tokens after the first of each row, nats."""

    @jax.jit
    def total(params: Params, tokens: jax.Array) -> jax.Array:
        logits = lm.unembed(params).logits(lm.apply(params, tokens).hidden[:, :-1])
        chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
        return (jax.nn.logsumexp(logits, axis=-1) - chosen).sum()

    return sum(float(total(params, jnp.asarray(part))) for part in parts(tokens)) / (tokens.size - len(tokens))


if __name__ == "__main__":
    main()
