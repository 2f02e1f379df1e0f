"""Loss of a model right after it was pruned, by importance and at random, before any healing.

    python -m tools.bench.prune smollm2-135m --calibration sotu.txt.gz --text wiki.valid.tokens.gz

Importance is measured on the calibration text, which should not be the text that the loss is on. One axis at a time, and a budget.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxllm import pretrained
from jaxllm.cli import setup_jax
from jaxllm.models.transformer import decoder
from jaxllm.surgery import importance, prune, shapes
from jaxllm.surgery.importance import Scores
from jaxllm.surgery.shapes import Shape
from tools.bench.kv_heads import loss, parts
from tools.kv_heads import text_rows, whole_rows


def main() -> None:
    """Print a line for each change."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, or the name of a fetched model")
    parser.add_argument("--text", type=Path, required=True, help="text or gzip; what the loss is on")
    parser.add_argument("--calibration", type=Path, required=True, help="text or gzip")
    parser.add_argument("--length", type=int, default=256, help="tokens in a row")
    parser.add_argument("--rows", type=int, default=16, help="rows of the text")
    parser.add_argument("--calibration_rows", type=int, default=16)
    parser.add_argument("--share", type=float, default=2 / 3, help="of each axis that stays, and of the parameters")
    args = parser.parse_args()
    setup_jax()
    model = pretrained.load(args.model if Path(args.model).exists() else pretrained.fetched(args.model))
    text = text_rows(model.tokenizer, args.text, args.rows * args.length, args.length)
    calibration = text_rows(model.tokenizer, args.calibration, args.calibration_rows * args.length, args.length)
    scores = importance.measure(model.lm, model.params, (whole_rows(part) for part in parts(calibration)))
    print(f"{args.rows} × {args.length} tokens of {args.text.name}; before: loss {loss(model.lm, model.params, text):.3f}", flush=True)
    for name, by, shape, options in changes(scores, args.share):
        params, config = prune.prune(model.params, model.config, by, shape, **options)
        print(f"{name:36} {shapes.num_params(config) / 1e6:7.1f} M  loss {loss(decoder(config), params, text):7.3f}", flush=True)


def changes(scores: Scores, share: float) -> Iterator[tuple[str, Scores, Shape, dict[str, Any]]]:
    """(name, scores, shape, options of `prune.choose`) of each line."""
    config, whole = scores.config, Shape.of(scores.config)
    near = lambda size: max(8, round(size * share / 8) * 8)
    target = round(shapes.num_params(config) * share)
    made = {
        f"width {near(config.width)}": whole._replace(width=near(config.width)),
        f"feed-forward {near(config.ff_width)}": whole._replace(ff_width=near(config.ff_width)),
        f"{round(config.num_layers * share)} layers": whole._replace(num_layers=round(config.num_layers * share)),
        f"{target / 1e6:.0f} M parameters": shapes.near(config, target, rank=shapes.nearest_proportions(config, target))[0],
    }
    for name, shape in made.items():
        yield f"{name}, importance", scores, shape, {}
        if shape.width < whole.width:
            yield f"{name}, importance, norms mended", scores, shape, {"mend_norms": True}
        yield f"{name}, random", importance.random(config, 0), shape, {}


if __name__ == "__main__":
    main()
