"""Proxy-tuning of a model behind an interface: answers of one token, known by their most probable alternatives alone.

    python -m tools.steer ANSWERS.jsonl OUT.jsonl --expert TUNED --anti_expert UNTUNED --alpha 1

A line of ANSWERS.jsonl is a question that the large model was asked, and what its interface returned for the next token:

    {"prompt": "…\\nAnswer:", "choices": [" A", " B", " C"], "top": {" A": -0.4, " B": -1.3, " the": -2.9}, "answer": " B"}

`choices` are the answers in question, each one token to the small models; `top` is token -> log-probability, often of five; `answer`,
which may be left out, is the right one. A line of OUT.jsonl is the same with `steered`, the log-probability of each choice among
themselves (empty where no choice is in `top`), and `chosen`, the best. Nothing else of the large model is needed.

Source: arXiv:2401.08565, section 6.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxllm import cli
from jaxllm.config import ConfigError, check_choices
from jaxllm.evals import records
from jaxllm.files import path_of, write_atomic
from jaxllm.flags import parse_flags
from jaxllm.models.proxy import Missing, check_steering

PLACES = "ANSWERS.jsonl OUT.jsonl"


@dataclass(frozen=True)
class Options:
    """Who steers, and how."""

    expert: str = ""
    """A small tuned checkpoint."""
    anti_expert: str = ""
    """The same small checkpoint, untuned."""
    alpha: float = 1.0
    """The difference of the two is multiplied by this; 0 is the large model alone."""
    missing: Missing = "drop"
    """A choice that is not in `top`: drop leaves it out, floor gives it the least log-probability there."""

    def __post_init__(self) -> None:
        check_choices(self, "steering")
        check_steering(self.alpha, 0.0)


@dataclass(frozen=True)
class Asked:
    """A question, and the interface's answer."""

    prompt: str
    choices: tuple[str, ...]
    top: Mapping[str, float]
    answer: str | None
    line: Mapping[str, Any]

    @classmethod
    def of(cls, values: dict[str, Any]) -> Asked:
        """Of one line.

        Raises:
          ConfigError: a field that is missing or of another kind, fewer than two choices, an answer that is none of them.
        """
        prompt, choices, top = (records.field(values, name, kind) for name, kind in (("prompt", str), ("choices", list), ("top", dict)))
        if len(choices) < 2 or len(set(map(str, choices))) < len(choices) or not all(isinstance(one, str) and one for one in choices):
            raise ConfigError(f"choices are {records.shown(choices)}; they are at least two different texts")
        if wrong := [name for name, value in top.items() if isinstance(value, bool) or not isinstance(value, int | float)]:
            raise ConfigError(f"top has {wrong[0]!r}: {records.shown(top[wrong[0]])}, which is no log-probability")
        answer = values.get("answer")
        if answer is not None and answer not in choices:
            raise ConfigError(f"answer is {records.shown(answer)}, which is none of the choices {records.shown(choices)}")
        return cls(prompt, tuple(choices), top, answer, values)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status is 0, or 2 for a user's mistake, which is said in one line."""
    return cli.guarded(act, list(sys.argv[1:] if arguments is None else arguments))


def act(words: list[str]) -> int:
    """Steer a file of answers."""
    if not words or words[0] in ("-h", "--help"):
        print((__doc__ or "").strip())
        return 0 if words else 2
    places, flags = words[:2], words[2:]
    if len(places) < 2 or any(word.startswith("-") for word in places):
        raise ConfigError(f"usage: python -m tools.steer {PLACES} --expert TUNED --anti_expert UNTUNED")
    options = parse_flags(Options(), flags, f"python -m tools.steer {PLACES}")
    if not (options.expert and options.anti_expert):
        raise ConfigError("--expert and --anti_expert go together: what tuning changed is the difference of two models")
    asked = records.parse(Path(places[0]), Asked.of)
    lines = steered(asked, options)
    write_atomic(Path(places[1]), "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
    print(summary(asked, lines, places[1]), flush=True)
    return 0


def steered(asked: Sequence[Asked], options: Options) -> list[dict[str, Any]]:
    """The lines of OUT.jsonl.

    Raises:
      ConfigError: a checkpoint that is not there, or a choice of several tokens to it.
    """
    from jaxllm.generate.proxy import steer_answers

    expert, anti = (logps(folder, asked) for folder in (options.expert, options.anti_expert))
    lines = []
    for one, of_expert, of_anti in zip(asked, expert, anti, strict=True):
        found = steer_answers(one.top, of_expert, of_anti, options.alpha, options.missing)
        lines.append({**one.line, "steered": found, "chosen": next(iter(found), None)})
    return lines


def logps(folder: str, asked: Sequence[Asked]) -> list[dict[str, float]]:
    """Log-probability of every choice after its prompt under a checkpoint."""
    from jaxllm import pretrained
    from jaxllm.evals import likelihood

    model = pretrained.load(path_of(folder), precision="float32")
    requests = likelihood.encode_pairs(model.tokenizer, [(one.prompt, choice) for one in asked for choice in one.choices])
    texts = [choice for one in asked for choice in one.choices]
    for request, text in zip(requests, texts, strict=True):
        if (num := len(request.continuation)) != 1:
            raise ConfigError(f"the choice {text!r} is {num} tokens to {folder}, and an interface tells of one; write choices of one token")
    scores = iter(likelihood.score(likelihood.scorer(model.lm), model.params, requests))
    return [{choice: next(scores).log_prob for choice in one.choices} for one in asked]


def summary(asked: Sequence[Asked], lines: Sequence[Mapping[str, Any]], out: str) -> str:
    """One line: how many were answered, and how many rightly, with and without steering."""
    answered = [(one, line) for one, line in zip(asked, lines, strict=True) if line["chosen"] is not None]
    said = f"wrote {out}: {len(answered)} of {len(asked)} questions have a choice in `top`"
    known = [(one, line) for one, line in answered if one.answer is not None]
    if not known:
        return said
    best = lambda one: max((choice for choice in one.choices if choice in one.top), key=one.top.__getitem__, default=None)
    before = sum(best(one) == one.answer for one, _ in known)
    after = sum(line["chosen"] == one.answer for one, line in known)
    return f"{said}; right: {after} of {len(known)} steered, {before} before"


if __name__ == "__main__":
    sys.exit(main())
