"""Proxy-tuning on the command line: two small checkpoints beside a large one, checked, loaded and told what to read.

    jaxllm generate BASE --expert TUNED --anti_expert UNTUNED --prompt "…" --expert_chat True

`ProxyFlags` are the flags, `steered` the model: a `Pretrained` whose LM is `models.proxy.proxy_lm`. So it scores, writes, searches and
keeps a chat's cache by the code that serves one model, and the log-probabilities that are told are the proxy's.

Source: arXiv:2401.08565; prompts of section 3.1: the expert sees a chat template, base and anti-expert the plain prompt.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from jax.sharding import Mesh

from jaxllm import manifest, pretrained
from jaxllm.config import ConfigError, Precision, check_choices
from jaxllm.contract import LM, Params
from jaxllm.data import chat
from jaxllm.data.tokenizer import HuggingFace, SentencePiece, Tokenizer
from jaxllm.evals import generation
from jaxllm.evals.records import encodable
from jaxllm.files import path_of
from jaxllm.models.proxy import Missing, Prompts, Tail, Trio, check_steering, check_vocab_size, own_prompts, proxy_lm
from jaxllm.pretrained import Pretrained


@dataclass(frozen=True)
class ProxyFlags:
    """Steering by two small models, at decoding time."""

    expert: str = ""
    """Proxy-tuning: a small tuned checkpoint, whose difference from --anti_expert is added to the model's logits."""
    anti_expert: str = ""
    """Proxy-tuning: the same small checkpoint, untuned."""
    alpha: float = 1.0
    """Proxy-tuning: the difference is multiplied by this; 0 is the model alone."""
    expert_chat: str = ""
    """Proxy-tuning: the expert reads the prompt as a user's turn of a chat. True: in its own template; else a template, or its file."""
    expert_system: str = ""
    """Proxy-tuning: system message of that chat."""
    expert_prefix: str = ""
    """Proxy-tuning: a prompt that ends so ('Answer:') has this after the user's turn, as the beginning of the expert's answer."""
    plausible: float = 0.0
    """Proxy-tuning: only tokens with at least this share of the best one's probability under the model alone; 0 means all."""
    vocab_tail: Literal["refuse", "ignore"] = "refuse"
    """Proxy-tuning: tables or tokenizers of different length that agree in what they share: 'ignore' steers that alone."""

    def check_proxy(self) -> None:
        """Raise ConfigError for flags of this kind that do not go together."""
        if bool(self.expert) != bool(self.anti_expert):
            given, lacks = ("--expert", "--anti_expert") if self.expert else ("--anti_expert", "--expert")
            raise ConfigError(f"{given} needs {lacks}: what tuning changed is the difference of two models; give both")
        usual = ProxyFlags()
        for name in PROXY:
            if not self.expert and getattr(self, name) != getattr(usual, name):
                raise ConfigError(f"--{name} is of proxy-tuning; give --expert and --anti_expert with it, or leave it out")
        for name in ("expert_system", "expert_prefix"):
            encodable(getattr(self, name), f"--{name}")
            if getattr(self, name) and not self.talks:
                raise ConfigError(f"--{name} is of the expert's chat; give --expert_chat True with it, or leave it out")
        check_choices(self, "proxy-tuning")
        check_steering(self.alpha, self.plausible)

    @property
    def talks(self) -> bool:
        """Whether the expert has prompts of its own."""
        return self.expert_chat not in ("", "False")


PROXY = tuple(one.name for one in fields(ProxyFlags))


def describe(flags: ProxyFlags) -> dict[str, Any]:
    """What decides an answer besides the base: the two checkpoints by the hash of their weights, and how they are used. {} without."""
    if not flags.expert:
        return {}
    weights = {name: manifest.fingerprint(getattr(flags, name)) for name in ("expert", "anti_expert")}
    talk = _template(flags, lambda: pretrained.load_text(path_of(flags.expert).expanduser())[1])
    digest = hashlib.sha256((talk or "plain").encode()).hexdigest()[:8] if flags.talks else ""
    return {name: getattr(flags, name) for name in PROXY} | weights | {"expert_chat": digest}


# --------------------------------------------------------------------------------------------- what the expert reads


class Prompt(list[int]):
    """A prompt's ids as the base reads it, with the expert's beside them."""

    def __init__(self, ids: Sequence[int], expert: Sequence[int]) -> None:
        super().__init__(ids)
        self.expert = list(expert)


@dataclass(frozen=True)
class Reader:
    """A prompt as a user's turn of a chat with the expert."""

    tokenizer: Tokenizer
    template: str | None
    system: str = ""
    prefix: str = ""

    def ids(self, text: str) -> list[int]:
        """Of a prompt; a response prefix at its end stays outside the template."""
        cut = self.prefix and text.endswith(self.prefix)
        turn = {"role": "user", "content": text[: -len(self.prefix)] if cut else text}
        return self.chat_ids([turn]) + (self.tokenizer.encode(self.prefix) if cut else [])

    def chat_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Of a chat; --expert_system opens one that has no system message."""
        opens = self.system and not (messages and messages[0]["role"] == "system")
        opening = [{"role": "system", "content": self.system}] if opens else []
        return chat.prompt_ids([*opening, *messages], self.tokenizer, self.template)


def _template(flags: ProxyFlags, own: Callable[[], str | None]) -> str | None:
    """The template that --expert_chat means; None is the plain form."""
    given = flags.expert_chat
    if not flags.talks or given == "True":
        return own() if given == "True" else None
    if "{{" in given or "{%" in given:
        return given
    try:
        return path_of(given).expanduser().read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--expert_chat is {given!r}: neither True (the expert's own template), nor a Jinja template with '{{{{' in it, nor a file "
            f"that can be read ({getattr(error, 'strerror', None) or error})"
        ) from None


def expert_prompt(prompt: Sequence[int]) -> Sequence[int]:
    """What the expert reads in place of `prompt`."""
    return prompt.expert if isinstance(prompt, Prompt) else prompt


def prompts_of_expert(prompts: Sequence[Sequence[int]], max_length: int) -> dict[str, Prompts]:
    """params['prompts'] of `proxy_lm` for these; {} where the expert reads what the base does."""
    if not prompts or not all(isinstance(prompt, Prompt) for prompt in prompts):
        return {}
    return {"expert": own_prompts(list(map(expert_prompt, prompts)), prompts, max_length)}


# -------------------------------------------------------------------------------------------------------- loading


@dataclass(frozen=True)
class Steered(Pretrained):
    """A base with its steering: config, lm and params are the proxy's, the tokenizer is the base's."""

    trio: Trio
    parts: Mapping[str, Pretrained] = field(default_factory=dict)
    reader: Reader | None = None
    """None where the expert reads what the base does."""

    def expert_ids(self, writer: generation.Writer, prompt: generation.Prompt) -> list[int]:
        """What the expert reads in place of this prompt, or its end where there is no room for more."""
        assert self.reader is not None, "the expert reads what the base does"
        return self.reader.ids(prompt.text)[-max(1, writer.max_length - prompt.max_tokens) :]

    def trio_for_decoding(self, mesh: Mesh, precision: Precision) -> tuple[Trio, Params]:
        """The three as decoding is fastest."""
        made = {name: part.for_decoding(mesh, precision) for name, part in self.parts.items()}
        lms: dict[str, Any] = {name: lm for name, (lm, _) in made.items()}
        return self.trio._replace(**lms), {name: params for name, (_, params) in made.items()}

    def for_decoding(self, mesh: Mesh, precision: Precision) -> tuple[LM, Params]:
        """As `Pretrained.for_decoding`, all three."""
        trio, params = self.trio_for_decoding(mesh, precision)
        return proxy_lm(*trio), params


def steered(
    base: Pretrained, flags: ProxyFlags, *, checkpoint: str = "", max_length: int = 0, mesh: Mesh | None = None,
    precision: Precision | None = None,
) -> Steered:  # fmt: skip
    """`base` steered as the flags say. Vocabularies and contexts are compared before a weight of the small models is read.

    Args:
      checkpoint: where the base came from: if one of the others is the same folder, it is not loaded again.
      max_length: the context that was asked for; 0 means the base's own.

    Raises:
      ConfigError: another vocabulary (the first token that differs is named), a shorter context, a checkpoint that is not there.
    """
    folders = {"expert": flags.expert, "anti": flags.anti_expert}
    texts = {}
    for name, folder in folders.items():
        flag = "--expert" if name == "expert" else "--anti_expert"
        config = pretrained.model_config(folder)
        texts[name] = pretrained.load_text(path_of(folder).expanduser())
        check_vocab_size(f"model of {flag}", config.vocab_size, base.config.vocab_size, flags.vocab_tail)
        check_vocabularies(base.tokenizer, texts[name][0], f"{flag} {folder}", flags.vocab_tail)
        hard = config.position == "learned"
        if config.max_length < (max_length or base.config.max_length) and (hard or not max_length):
            raise ConfigError(
                f"{flag} {folder} has a context of {config.max_length} tokens, and {max_length or base.config.max_length} are asked for; "
                f"all three read the same continuation: give --max_length {config.max_length}"
            )
    parts = {"base": base}
    for name, folder in folders.items():
        same = next((had for had, other in {"base": checkpoint, **folders}.items() if other == folder and had in parts), None)
        parts[name] = parts[same] if same else pretrained.load(folder, mesh=mesh, precision=precision)
    trio = Trio(base.lm, parts["expert"].lm, parts["anti"].lm, flags.alpha, flags.plausible, flags.vocab_tail)
    lm = proxy_lm(*trio)
    tokenizer, own, stop_ids = texts["expert"]
    reader = Reader(tokenizer, _template(flags, lambda: own), flags.expert_system, flags.expert_prefix) if flags.talks else None
    stops = dict.fromkeys((*base.stop_ids, *(stop for stop in stop_ids if stop < base.config.vocab_size)))  # a chat expert ends its turns
    weights = {name: part.params for name, part in parts.items()}
    return Steered(
        lm.config, lm, weights, base.tokenizer, base.chat_template, tuple(stops), base.train, trio=trio, parts=parts, reader=reader
    )  # fmt: skip


def check_vocabularies(ours: Tokenizer, theirs: Tokenizer, whose: str, tail: Tail = "refuse") -> None:
    """Refuse tokenizers in which one id is two strings, special tokens by name; and of different length unless tails are ignored.

    Raises:
      ConfigError: they differ: where first, and how.
    """
    if ours.fingerprint == theirs.fingerprint:
        return
    for id in range(min(ours.num_vocab, theirs.num_vocab)):
        one, other = ours.token_bytes(id), theirs.token_bytes(id)
        if one and one == other:
            continue
        name, their_name = _name(ours, id), _name(theirs, id)  # a special token spells nothing, but is called something
        if (one or other or (name and their_name)) and name != their_name:
            raise ConfigError(
                f"token {id} is {one or name!r} to the base and {other or their_name!r} to {whose}; proxy-tuning adds logits token by "
                "token, so that all three models must have one vocabulary"
            )
    if ours.num_vocab != theirs.num_vocab and tail != "ignore":
        raise ConfigError(
            f"the base's tokenizer has {ours.num_vocab} tokens and that of {whose} {theirs.num_vocab}; what they share agrees: "
            "--vocab_tail ignore steers that, and leaves the rest to the base"
        )


def _name(tokenizer: Tokenizer, id: int) -> str | None:
    """What a tokenizer's file calls a token; of plain bytes, which have no file, the byte itself or nothing."""
    match tokenizer:
        case HuggingFace():
            return tokenizer._plain.id_to_token(id)
        case SentencePiece():
            return tokenizer._processor.id_to_piece(id)
    return tokenizer.token_bytes(id).decode(errors="backslashreplace") or None


# ---------------------------------------------------------------------------------------------- for experiments


def gap_closed(base: float, proxy: float, tuned: float) -> float:
    """(proxy − base) / (tuned − base): the share of what direct tuning of the large model gains. Not clipped: a proxy may gain more.

    >>> round(gap_closed(6.6, 26.4, 32.4), 6)
    0.767442

    Raises:
      ConfigError: direct tuning gained nothing.
    """
    if tuned == base:
        raise ConfigError(f"base and tuned are both {base}: there is no gap to close")
    return (proxy - base) / (tuned - base)


def steer_answers(
    top: Mapping[str, float], expert: Mapping[str, float], anti: Mapping[str, float], alpha: float = 1.0, missing: Missing = "drop"
) -> dict[str, float]:
    """Answers of one token, best first, with their log-probability among themselves; the base is behind an interface.

    Args:
      top: token -> log-probability, as the interface returned them (often five).
      expert, anti: answer -> logit or log-probability of each answer in question, of the two small models.
      missing: an answer that is not in `top` is left out, or has the least log-probability of `top`. With 'drop' and none in it the
        result is empty: the paper leaves such questions out (1.8 % of RealTimeQA's).

    Raises:
      ConfigError: answers that only one small model knows, a number that is not finite, or nothing in `top` to floor at.

    Source: arXiv:2401.08565, section 6 (GPT-3.5 by its top five).

    >>> list(steer_answers({"A": -0.4, "B": -1.2, "the": -3.0}, {"A": 0.0, "B": 2.0, "C": 9.0}, {"A": 0.5, "B": 0.5, "C": 0.5}))
    ['B', 'A']
    """
    check_steering(alpha, 0.0)
    if set(expert) != set(anti):
        raise ConfigError(f"expert and anti differ in their answers: {', '.join(sorted(set(expert) ^ set(anti)))}; give both the same")
    for name, values in {"top": top, "expert": expert, "anti": anti}.items():
        for token, value in values.items():
            if not math.isfinite(value):
                raise ConfigError(f"{name} has {token!r}: {value}; log-probabilities here are finite: leave out what has none")
    if missing == "floor" and not top:
        raise ConfigError("top is empty, and 'floor' takes the least of it; ask the interface for log-probabilities, or take 'drop'")
    floor = min(top.values()) if missing == "floor" else -math.inf
    scores = {answer: top.get(answer, floor) + alpha * (expert[answer] - anti[answer]) for answer in expert}
    known = {answer: score for answer, score in scores.items() if score > -math.inf}
    if not known:
        return {}
    highest = max(known.values())
    log_z = highest + math.log(sum(math.exp(score - highest) for score in known.values()))
    return {answer: known[answer] - log_z for answer in sorted(known, key=lambda answer: -known[answer])}
