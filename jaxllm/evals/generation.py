"""Tasks that are judged by what a model writes: GSM8K's final number, and HumanEval's programs.

Source: GSM8K arXiv:2110.14168, with worked solutions as examples arXiv:2201.11903; HumanEval and pass@k arXiv:2107.03374.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

import numpy as np

from jaxllm.config import ConfigError
from jaxllm.contract import Params
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.models.beam import beam_search
from jaxllm.models.generate import Generator, completions

_TAIL = 8
"""Tokens beyond a stop string's bytes that are decoded to look for it."""


@dataclass(frozen=True)
class Prompt:
    """A text to continue."""

    text: str
    stop: tuple[str, ...] = ()
    """The continuation ends before the first of these."""
    max_tokens: int = 256
    special: bool = False
    """Names of special tokens in the text are those tokens (a chat template's output)."""


@dataclass(frozen=True)
class Writer:
    """What continues prompts: a compiled generator with everything that belongs to it."""

    generate: Generator
    params: Params
    tokenizer: Tokenizer
    stop_ids: tuple[int, ...]
    max_length: int
    """Tokens of a prompt with its continuation; a longer prompt loses its beginning."""
    batch_rows: int = 8
    num_beams: int = 1
    """More than 1: beam search of this width takes the place of sampling, for one continuation of each prompt."""
    length_penalty: float = 0.6
    """Of beam search, with T5's offset of 5: GPT-3's."""


def write(
    writer: Writer,
    prompts: Sequence[Prompt],
    *,
    num_samples: int = 1,
    seed: int = 0,
    done: Mapping[int, list[str]] | None = None,
    on_batch: Callable[[dict[int, list[str]]], None] = lambda texts: None,
) -> list[list[str]]:
    """`num_samples` continuations of every prompt, each up to its stop. Prompts of like length go together.

    Args:
      done: texts by index of prompt, from an earlier call; a batch that adds nothing to them is left out.
      on_batch: is given the texts of each batch as it is finished.

    Raises:
      ConfigError: a prompt is empty, or asks for a continuation that alone fills the context.
    """
    texts = dict(done or {})
    rows = [encode_prompt(writer, i, prompt) for i, prompt in enumerate(prompts)]
    order = sorted(range(len(prompts)), key=lambda i: (prompts[i].max_tokens, -len(rows[i]), i))
    assert writer.num_beams == 1 or num_samples == 1, "beam search gives one text"
    width = max(1, writer.batch_rows // max(num_samples, writer.num_beams))
    for first in range(0, len(order), width):
        batch = order[first : first + width]
        if all(i in texts for i in batch):
            continue
        new = dict(zip(batch, _write_batch(writer, [prompts[i] for i in batch], [rows[i] for i in batch], num_samples, seed), strict=True))
        texts.update(new)
        on_batch(new)
    return [texts[i] for i in range(len(prompts))]


def encode_prompt(writer: Writer, i: int, prompt: Prompt) -> list[int]:
    """Prompt number `i` in tokens, from the beginning of text, or its end where there is no room for more."""
    room = writer.max_length - prompt.max_tokens
    if room < 1:
        raise ConfigError(
            f"a continuation of {prompt.max_tokens} tokens leaves no room for a prompt in a context of {writer.max_length}; "
            "lower --max_new_tokens"
        )
    bos, own = writer.tokenizer.bos_id, writer.tokenizer.encode(prompt.text, special=prompt.special)
    row = own if bos is None or own[:1] == [bos] else [bos, *own]
    if not row:
        raise ConfigError(f"prompt {i} is empty; give at least one character")
    return row[-room:]


def _write_batch(writer: Writer, prompts: Sequence[Prompt], rows: Sequence[Sequence[int]], num_samples: int, seed: int) -> list[list[str]]:
    decode, num_tokens = writer.tokenizer.decode, [prompt.max_tokens for prompt in prompts]
    if writer.num_beams > 1:
        stop = prompts[0].stop
        assert all(prompt.stop == stop for prompt in prompts), "the prompts of a task end alike"
        best = beam_search(
            writer.generate, writer.params, rows, num_tokens=num_tokens, num_beams=writer.num_beams, stop_ids=writer.stop_ids,
            ends=lambda ids: _ended(decode, ids, stop), length_penalty=writer.length_penalty, offset=5, max_length=writer.max_length,
        )  # fmt: skip
        return [[cut(decode(beams[0].ids), stop)] for beams in best]
    tails: list[list[int]] = [[] for _ in range(len(rows) * num_samples)]

    def watch(row: int, token: int) -> bool:
        tails[row].append(token)
        return _ended(decode, tails[row], prompts[row // num_samples].stop)

    found = completions(
        writer.generate, writer.params, rows, num_tokens=num_tokens, stop_ids=writer.stop_ids,
        num_samples=num_samples, seed=seed, max_length=writer.max_length, watch=watch,
    )  # fmt: skip
    texts = [cut(decode(one.ids), prompts[one.prompt].stop) for one in found]
    return [texts[i : i + num_samples] for i in range(0, len(texts), num_samples)]


def _ended(decode: Callable[[Sequence[int]], str], ids: Sequence[int], stop: Sequence[str]) -> bool:
    """Whether the last token completes a stop string."""
    tail = decode(ids[-(max(len(text.encode()) for text in stop) + _TAIL) :]) if stop else ""
    return any(text in tail for text in stop)


def cut(text: str, stop: Sequence[str]) -> str:
    """`text` before the first stop string in it.

    >>> cut('one. two; three', [';', '.'])
    'one'
    """
    return text[: min([at for one in stop if (at := text.find(one)) >= 0], default=len(text))]


# --------------------------------------------------------------------------------------------- GSM8K

_NUMBER = re.compile(r"-?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


def final_number(text: str) -> str | None:
    """The answer of a worked solution: the number after '####' if there is one, else the last number.

    Thousands separators, dollar signs and trailing zeros do not count; None where there is no number.

    >>> final_number('16 - 7 = 9 eggs.\\n#### $1,018.50 a day'), final_number('so it is 9.'), final_number('none')
    ('1018.5', '9', None)
    """
    marked = text.split("####")
    found = _NUMBER.findall(marked[1]) if len(marked) > 1 else []
    number = found[0] if found else next(reversed(_NUMBER.findall(text)), None)
    if number is None:
        return None
    try:
        value = Decimal(number.replace("$", "").replace(",", ""))
    except InvalidOperation:
        return None
    return format(value.normalize() + 0, "f")


def worked(record: Mapping[str, Any]) -> str:
    """A GSM8K record as a solved example, without the calculator's <<…>> annotations."""
    return f"{unsolved(record)} {re.sub('<<[^>]*>>', '', record['answer'])}"


def unsolved(record: Mapping[str, Any]) -> str:
    """The question of a GSM8K record as a prompt."""
    return f"Question: {record['question']}\nAnswer:"


GSM8K_STOP = ("\nQuestion:", "\n\nQ")


# ----------------------------------------------------------------------------------------- HumanEval

HUMAN_EVAL_STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n@", "\nassert")
"""The first line that is not indented ends the function."""


def program(record: Mapping[str, Any], completion: str) -> str:
    """The completed function with the tests of a HumanEval record."""
    return f"{record['prompt']}{completion}\n{record['test']}\ncheck({record['entry_point']})\n"


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right: 1 − C(n − c, k) / C(n, k).

    Source: arXiv:2107.03374, equation 1.

    >>> pass_at_k(5, 1, 1), pass_at_k(4, 2, 2), pass_at_k(3, 1, 3)
    (0.2, 0.8333333333333334, 1.0)
    """
    if not 0 <= num_correct <= num_samples or not 1 <= k <= num_samples:
        raise ConfigError(f"pass@{k} needs at least {k} samples, and {num_samples} were drawn ({num_correct} right); raise --num_samples")
    draws = math.comb(num_samples, k)
    return (draws - math.comb(num_samples - num_correct, k)) / draws


def several_k(num_samples: int) -> list[int]:
    """The k of pass@k that are reported for n samples: 1, 10, 100 up to n.

    >>> several_k(20)
    [1, 10]
    """
    return [k for k in np.logspace(0, 2, 3).astype(int).tolist() if k <= num_samples]
