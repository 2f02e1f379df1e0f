"""A document as pieces of text that carry loss or do not, and as token ids with their loss flags.

A chat without a template of the tokenizer's own is written as

    <|user|>
    What is 2 + 2?
    <|assistant|>
    4[eos]

where the role lines are plain text, the assistant's turns end with the tokenizer's eos, and a newline
separates turns.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import jinja2
import jinja2.sandbox
import numpy as np

from jaxllm.config import ConfigError
from jaxllm.data.source import Document
from jaxllm.data.tokenizer import Tokenizer

_BATCH_CHARS = 1 << 22


class Piece(NamedTuple):
    """Consecutive text of one kind."""

    text: str
    loss: bool
    special: bool = False
    """Names of special tokens in the text are those tokens: what a template wrote, and nothing of a message's role or content."""
    ends: bool = False
    """eos follows, and carries loss as the text does."""


class Encoded(NamedTuple):
    """One document's tokens."""

    ids: np.ndarray
    loss: np.ndarray | None
    """Whether each token carries loss as a label; None where all do."""


def encode(documents: Sequence[Document], tokenizer: Tokenizer, loss_on: str) -> list[Encoded]:
    """Each document's ids, from bos (where the tokenizer has one) to eos.

    Raises:
      ConfigError: the tokenizer has no eos, or its chat template fails.
    """
    if tokenizer.eos_id is None:
        raise ConfigError(
            "the tokenizer has no eos token to end documents with; name one as eos_token in a tokenizer_config.json beside it"
        )
    split = [
        [part for piece in pieces(document, tokenizer.chat_template, loss_on, tokenizer.special_names) for part in _parts(piece)]
        for document in documents
    ]
    ids = {special: _ids(tokenizer, [p.text for ps in split for p in ps if p.special is special], special) for special in (False, True)}
    return [_join([(part, next(ids[part.special])) for part in parts], tokenizer) for parts in split]


def prompt_ids(messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer, template: str | None) -> list[int]:
    """A chat's ids up to where the assistant's next turn begins, bos first where the tokenizer has one.

    Raises:
      ConfigError: the template refuses these messages, or the tokenizer has no eos to end turns with.
    """
    if template:
        messages, mark = _hidden(messages, template, tokenizer.special_names)
        whole = Piece(_render(messages, template, generation=True), False, special=True)
        ids = [id for piece in _shown(whole, tokenizer.special_names, mark) for id in tokenizer.encode(piece.text, special=piece.special)]
    elif tokenizer.eos_id is None:
        raise ConfigError("a chat needs a chat template or a tokenizer with an eos token, and this checkpoint has neither; use --prompt")
    else:
        ids = []
        for piece in [*_plain(messages, True), Piece("\n<|assistant|>\n", False)]:
            ids += tokenizer.encode(piece.text) + ([tokenizer.eos_id] if piece.ends else [])
    missing = tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]
    return [tokenizer.bos_id, *ids] if missing and tokenizer.bos_id is not None else ids


def _ids(tokenizer: Tokenizer, texts: Sequence[str], special: bool) -> Iterator[np.ndarray]:
    """Each text's ids, encoding a few MB at a time: lists of ids take ten times the room of arrays."""
    start = 0
    while start < len(texts):
        end, chars = start, 0
        while end < len(texts) and chars < _BATCH_CHARS:
            chars += len(texts[end])
            end += 1
        yield from (np.asarray(ids, np.uint32) for ids in tokenizer.encode_batch(texts[start:end], special=special))
        start = end


def _parts(piece: Piece) -> Iterator[Piece]:
    """The piece, or a very long one cut after newlines."""
    start = 0
    while len(piece.text) - start > _BATCH_CHARS:
        newline = piece.text.rfind("\n", start, start + _BATCH_CHARS)
        end = newline + 1 if newline >= start else start + _BATCH_CHARS
        yield piece._replace(text=piece.text[start:end], ends=False)
        start = end
    yield piece._replace(text=piece.text[start:])


def _join(parts: Sequence[tuple[Piece, np.ndarray]], tokenizer: Tokenizer) -> Encoded:
    """One document: bos, the parts, eos; neither twice."""
    assert tokenizer.eos_id is not None
    runs: list[tuple[np.ndarray, bool]] = []
    eos = np.array([tokenizer.eos_id], np.uint32)
    for part, ids in parts:
        runs += [(ids, part.loss), (eos, part.loss)] if part.ends else [(ids, part.loss)]
    if tokenizer.bos_id is not None and runs[0][0][:1].tolist() != [tokenizer.bos_id]:
        runs.insert(0, (np.array([tokenizer.bos_id], np.uint32), False))
    if runs[-1][0][-1:].tolist() != [tokenizer.eos_id]:
        runs.append((eos, parts[-1][0].loss))
    ids = np.concatenate([run for run, _ in runs])
    if all(part.loss for part, _ in parts):
        return Encoded(ids, None)
    return Encoded(ids, np.concatenate([np.full(len(run), loss) for run, loss in runs]))


def pieces(document: Document, template: str | None, loss_on: str, special_names: tuple[str, ...] = ()) -> list[Piece]:
    """The document's text in order; a prompt carries no loss, and with loss_on 'assistant' only the assistant's turns do.

    Spaces at the end of a prompt move to the completion, where tokenizers expect them: ' Paris', not 'Paris'.

    Args:
      special_names: the tokenizer's, the longest first.

    >>> pieces(Document(text='Paris', prompt='Capital of France? '), None, 'completion')[1].text
    ' Paris'
    """
    if document.messages:
        everything = loss_on != "assistant"
        if not template:
            return _plain(document.messages, everything)
        messages, mark = _hidden(document.messages, template, special_names)
        return [part for piece in _templated(messages, template, everything) for part in _shown(piece, special_names, mark)]
    if not document.prompt:
        return [Piece(document.text, True)]
    prompt = document.prompt.rstrip(" ")
    return [Piece(prompt, False), Piece(document.prompt[len(prompt) :] + document.text, True)]


def _plain(messages: Sequence[Mapping[str, str]], everything: bool) -> list[Piece]:
    out: list[Piece] = []
    for turn, message in enumerate(messages):
        assistant = message["role"] == "assistant"
        out.append(Piece(("\n" if turn else "") + f"<|{message['role']}|>\n", everything))
        out.append(Piece(message["content"], everything or assistant, ends=assistant))
    return out


def _templated(messages: Sequence[Mapping[str, str]], template: str, everything: bool) -> list[Piece]:
    """The rendered chat, cut where an assistant's turn begins and ends.

    A turn's text is what rendering one message more adds, so the template must write turns one after the other.
    """
    whole = _render(messages, template)
    out: list[Piece] = []
    done = 0
    for turn, message in enumerate(messages):
        if message["role"] != "assistant" or everything:
            continue
        before, after = _render(messages[:turn], template, generation=True), _render(messages[: turn + 1], template)
        if not (whole.startswith(after) and after.startswith(before)):
            raise ConfigError(
                "the tokenizer's chat template rewrites earlier turns, so loss_on 'assistant' cannot find them; use loss_on 'all'"
            )
        out += [Piece(whole[done : len(before)], False, special=True), Piece(after[len(before) :], True, special=True)]
        done = len(after)
    return [piece for piece in (*out, Piece(whole[done:], everything, special=True)) if piece.text]


def _hidden(messages: Sequence[Mapping[str, str]], template: str, names: tuple[str, ...]) -> tuple[Sequence[Mapping[str, str]], str]:
    """(the messages with mark, number, mark for each of these names in them, so that the template's are all that rendering shows; mark).

    The mark is a character that occurs nowhere else, or '' where no message holds a name.
    """
    text = "\n".join(value for message in messages for value in message.values() if isinstance(value, str))
    if not any(name in text for name in names):
        return messages, ""
    mark = next(char for char in map(chr, range(0xE000, 0xF900)) if char not in text + template)
    hide = lambda match: f"{mark}{names.index(match[0])}{mark}"
    change = lambda value: re.sub(_any_of(names), hide, value) if isinstance(value, str) else value
    return [{key: change(value) for key, value in message.items()} for message in messages], mark


def _shown(piece: Piece, names: tuple[str, ...], mark: str) -> Iterator[Piece]:
    """The piece with hidden names back in it, as text; cut, where a message held any, at the names that the template wrote."""
    if not mark:
        yield piece
        return
    show = lambda match: names[int(match[1])]
    for number, text in enumerate(re.split(f"({_any_of(names)})", piece.text)):
        if text:
            yield piece._replace(text=re.sub(f"{mark}([0-9]+){mark}", show, text), special=number % 2 == 1)


def _any_of(names: Sequence[str]) -> str:
    return "|".join(map(re.escape, names))


def _render(messages: Sequence[Mapping[str, str]], template: str, generation: bool = False) -> str:
    try:
        return _compile(template).render(messages=messages, add_generation_prompt=generation, bos_token="", eos_token="")
    except jinja2.TemplateError as error:
        raise ConfigError(f"the tokenizer's chat template fails on this chat ({error}); check the roles and their order") from None


@lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _refuse
    return environment.from_string(template)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
