"""How well a model predicts held-out text, and what has to be beaten for the number to mean something.

Bits per byte does not depend on the tokenizer: `total nats / (ln 2 · bytes of text)`. Beside it stand

    byte unigram      a model that knows how often each byte occurs in the training text, and nothing else
    lzma, per window  a general compressor that sees what the model sees: one context window, from scratch
    lzma, whole text  the same compressor over all of the held-out text at once: it sees far more, so it is the next goal

A compressor is a predictor: a code of n bits for a text is a probability of 2^-n (arXiv:2309.10668).
"""

from __future__ import annotations

import lzma
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from jaxllm.config import ConfigError
from jaxllm.contract import Batch

MAX_DICT_BYTES = 64 * 2**20
"""What lzma's preset 9 looks back on."""


def bits_per_byte(total_nats: float, num_bytes: int) -> float:
    """total_nats / (ln 2 · num_bytes).

    >>> bits_per_byte(8 * math.log(2), 1)
    8.0
    """
    _require_text(num_bytes)
    return float(total_nats) / (math.log(2) * num_bytes)


def byte_unigram_bits(train_bytes: bytes, held_out_bytes: bytes) -> float:
    """Bits per byte of `held_out_bytes` under p(b) = (count of b in train_bytes + 1) / (len(train_bytes) + 256).

    The add-one smoothing keeps a byte that training never saw possible.

    >>> byte_unigram_bits(b'', b'anything')
    8.0
    """
    _require_text(len(held_out_bytes))
    seen, needed = (np.bincount(np.frombuffer(text, np.uint8), minlength=256) for text in (train_bytes, held_out_bytes))
    bits = -np.log2((seen + 1) / (len(train_bytes) + 256))
    return float(needed @ bits / len(held_out_bytes))


def lzma_window_bits(windows: Sequence[tuple[bytes, bytes]]) -> float:
    """Bits per byte of `lzma` when each window is compressed alone: 8 · Σ compressed size / Σ window size.

    A window is the bytes that one row of the evaluation shows a model: (context, target), where the target is what the
    model is scored on and the context is seen and not scored. Both are compressed together, from an empty dictionary,
    and the whole size is divided by the whole length; nothing is subtracted. So

    - with an empty context (rows that do not overlap) this is the same task as the model's: the same bytes, nothing before them;
    - with a context it is the compressor's average over context and target, not its cost of the target given the context,
      which would be lower: the early bytes of a window are the expensive ones.

    It is a real code, so it pays for whole bytes and for LZMA2's framing: 7 bytes a window, which is 0.05 bits per byte
    at 1 KiB. A model starts with knowledge from training and lzma with none; the figure says what the window's own
    repetitions are worth.
    """
    num_bytes = sum(len(context) + len(target) for context, target in windows)
    _require_text(num_bytes)
    return 8 * sum(_lzma_size(context + target) for context, target in windows) / num_bytes


def lzma_whole_bits(text: bytes) -> float:
    """Bits per byte of `lzma` over the whole text at once, looking back up to 64 MiB."""
    _require_text(len(text))
    return 8 * _lzma_size(text) / len(text)


def _lzma_size(data: bytes) -> int:
    """Bytes of `data` as a raw LZMA2 stream at preset 9 | EXTREME: no container, so no header, index or checksum.

    A dictionary larger than the data changes no output byte, and allocating preset 9's 64 MiB for each window
    would take longer than compressing it.
    """
    dict_bytes = min(max(len(data), 4096), MAX_DICT_BYTES)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": dict_bytes}]
    return len(lzma.compress(data, format=lzma.FORMAT_RAW, filters=filters))


def evaluate(loss_sums: Callable[[Batch], tuple[Any, Any]], batches: Iterable[Batch], num_bytes: int) -> dict[str, float]:
    """Mean loss per token over all batches, as perplexity and bits per byte, with standard errors over windows.

    loss = Σ nats / Σ tokens. Its standard error is that of a ratio, because windows differ in how many tokens they score:
    √(W/(W-1) · Σ_w (nats_w - loss · tokens_w)²) / Σ tokens, over W windows (nan for fewer than two).
    Windows of one document are not independent, so the true error is rather larger.

    Args:
      loss_sums: batch -> (summed nats, scored tokens), each `[B]`, one number per row, or one number for the batch,
        which then counts as one window. Summed over all hosts already.
      batches: what to evaluate on, each row once.
      num_bytes: length in bytes of the text that the scored tokens stand for.

    Returns:
      loss, perplexity, bits_per_byte, loss_standard_error, bits_per_byte_standard_error, num_tokens, num_windows.

    Raises:
      ConfigError: there is nothing to evaluate on.
    """
    _require_text(num_bytes)
    pairs = [loss_sums(batch) for batch in batches]  # fetched afterwards, so that the device does not wait for the host
    columns = [np.concatenate([np.atleast_1d(np.asarray(x, np.float64)) for x in column]) for column in zip(*pairs, strict=True)]
    nats, tokens = columns or (np.zeros(0), np.zeros(0))
    nats, tokens = nats[tokens > 0], tokens[tokens > 0]  # padding rows are no windows
    num_windows = len(tokens)
    if not num_windows:
        raise ConfigError("the held-out data has no token to score; raise data.held_out_fraction, or name files in data.held_out")
    loss = float(nats.sum() / tokens.sum())
    spread = np.sum((nats - loss * tokens) ** 2)
    error = math.sqrt(num_windows / (num_windows - 1) * spread) / tokens.sum() if num_windows > 1 else math.nan
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),  # past this a float overflows, and nobody reads the difference
        "bits_per_byte": bits_per_byte(nats.sum(), num_bytes),
        "loss_standard_error": float(error),
        "bits_per_byte_standard_error": bits_per_byte(error * tokens.sum(), num_bytes),
        "num_tokens": int(tokens.sum()),
        "num_windows": num_windows,
    }


def _require_text(num_bytes: int) -> None:
    if num_bytes < 1:
        raise ConfigError("there are no bytes of held-out text; raise data.held_out_fraction, or name files in data.held_out")
