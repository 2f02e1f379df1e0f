"""What `jaxllm generate` is told, and the model made ready for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple

import jax

from jaxllm.config import ConfigError, MeshConfig
from jaxllm.contract import LM, Params
from jaxllm.data import chat
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.evals.records import encodable
from jaxllm.generate.limits import check_cache
from jaxllm.generate.proxy import Prompt, ProxyFlags, Reader, Steered, expert_prompt, prompts_of_expert
from jaxllm.generate.trace import Written
from jaxllm.models.beam import beam_search
from jaxllm.models.generate import Generator, Memory, check_lengths, completions, generator, sampler
from jaxllm.models.proxy import Trio, proxy_lm
from jaxllm.models.text_stream import TextStream

type OnText = Callable[[int, str], None]
"""Told (row, new text); row = prompt index · num_samples + sample."""


@dataclass(frozen=True)
class GenerateConfig(ProxyFlags):
    """The flags of `jaxllm generate`."""

    prompt: str = ""
    """Text to continue."""
    chat: bool = False
    """Talk in the terminal; with a prompt, one turn of it."""
    system: str = ""
    """System message that opens the chat."""
    file: str = ""
    """Prompts, one JSON object a line."""
    out: str = ""
    """Results of --file, one JSON object a line, in the order of the prompts. Interrupted, the same command goes on."""
    num_tokens: int = 256
    """New tokens at most; less where the context ends."""
    max_length: int = 0
    """Context in tokens, prompt and continuation; 0 means the model's own. Only learned positions forbid more."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most probable token."""
    top_k: int = 0
    """Draw from the k most probable tokens; 0 means all."""
    top_p: float = 1.0
    """Draw from the fewest tokens with this probability together."""
    min_p: float = 0.0
    """Draw from tokens with at least this share of the best one's probability."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens that have been seen, and multiplies negative ones."""
    num_samples: int = 1
    """Continuations of each prompt."""
    num_beams: int = 1
    """More than 1: beam search of this width, which draws nothing."""
    length_penalty: float = 1.0
    """Beam search divides a text's log-probability by its number of tokens to this power."""
    stop: tuple[str, ...] = ()
    """Texts that end a continuation; it is cut before them."""
    stop_ids: tuple[int, ...] = ()
    """Token ids that end a continuation, besides those that the model came with."""
    logprobs: bool = False
    """With --file: write each token's id and log-probability (under the model itself, before temperature and the rest)."""
    trace: str = ""
    """Proxy-tuning: a page (.html) that shows which tokens of what is written the small models made more likely, and by how much."""
    seed: int = 0
    """Same seed, same text, whatever else is in the batch."""
    batch_size: int = 8
    """Prompts of --file at one time."""
    precision: Literal["auto", "float32", "bfloat16", "bfloat16_matmul"] = "auto"
    """auto: float32 on CPU, bfloat16 elsewhere."""
    mesh: MeshConfig = field(default_factory=lambda: MeshConfig(data=1))
    """Devices to spread the model over; one unless told otherwise."""

    def __post_init__(self) -> None:
        for name in ("num_tokens", "num_samples", "num_beams", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "length_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise ConfigError(f"--{name} is {getattr(self, name)}; it must be finite")
        if self.max_length < 0:
            raise ConfigError(f"--max_length is {self.max_length}; it must be at least 1, or 0 for the model's own context")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"--seed is {self.seed}; it must be from 0 to {2**32 - 1:,}")
        for name, texts in {"prompt": (self.prompt,), "system": (self.system,), "stop": self.stop}.items():
            for text in texts:
                encodable(text, f"--{name}")
        if "" in self.stop:
            raise ConfigError("--stop has an empty text, which would end every continuation at once; leave it out")
        self.check_proxy()
        if self.trace and not self.expert:
            raise ConfigError("--trace shows what proxy-tuning changes; give --expert and --anti_expert with it, or leave it out")
        self._refuse_unused()
        if self.file and not self.out:
            raise ConfigError("--file needs --out RESULTS.jsonl, where the results go")
        if self.num_beams > 1 and self.num_samples > self.num_beams:
            raise ConfigError(f"--num_samples is {self.num_samples}, and a beam of {self.num_beams} holds no more than that many texts")
        sampler(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)

    def _refuse_unused(self) -> None:
        """A flag that another one makes meaningless is a mistake: what was asked for would not happen."""
        drawn = ("temperature", "top_k", "top_p", "min_p", "seed")
        unused = {
            "--file": (self.file, ("prompt", "chat", "system")),
            "--chat": (self.chat, ("out", "batch_size", "logprobs", "num_samples", "trace")),
            "--prompt": (self.prompt and not self.chat, ("out", "batch_size", "logprobs", "system")),
            "--num_beams": (self.num_beams > 1, (*drawn, "logprobs")),
            "--num_beams 1": (self.num_beams == 1, ("length_penalty",)),
            "--temperature 0": (self.temperature == 0, (*drawn[1:], "num_samples")),
        }
        usual = {one.name: one.default for one in fields(self)}
        for mode, (holds, names) in unused.items():
            for name in names:
                if holds and getattr(self, name) != usual[name]:
                    raise ConfigError(f"{mode} does not use --{name}; leave out one of them")


class Text(NamedTuple):
    """One continuation."""

    text: str
    """Up to the stop string or token."""
    finish: str
    """'stop' or 'length'."""
    ids: list[int]
    """Without the stop token; those of a stop string are among them."""
    logps: list[float]
    """Of each id, under the model itself; empty after beam search."""
    logp: float
    """Their sum."""


@dataclass(frozen=True)
class Writer:
    """A model, its tokenizer and the settings of this command."""

    config: GenerateConfig
    lm: LM
    params: Params
    tokenizer: Tokenizer
    chat_template: str | None
    stop_ids: tuple[int, ...]
    engine: Generator
    mesh: Any
    reader: Reader | None = None
    """Of the expert's prompts, where they are others."""
    trio: Trio | None = None
    """What `lm` is made of under proxy-tuning."""
    written: list[Written] = field(default_factory=list)
    """What --trace is to be made of: all that was continued so far."""

    def texts(
        self, prompts: Sequence[Sequence[int]], on_text: OnText = lambda row, text: None, memory: Memory | None = None
    ) -> list[list[Text]]:
        """`num_samples` continuations of each prompt.

        Args:
          on_text: gets (row, new text) as it becomes certain.
          memory: of one prompt continued once: what it holds is not computed again.

        Raises:
          ConfigError: a prompt that fills the context (says by how much).
        """
        room = self.check(prompts)
        with nullcontext() if self.mesh.size == 1 else jax.set_mesh(self.mesh):
            if self.config.num_beams > 1:
                texts = self._beams(prompts, room, self.context, on_text)
            else:
                texts = self._samples(prompts, room, self.context, on_text, memory)
        if self.config.trace:
            asked = {id(prompt): (prompt, own) for prompt, own in zip(prompts, texts, strict=True)}  # a batch is filled up with its last
            self.written.extend(Written(prompt, expert_prompt(prompt), text.ids) for prompt, own in asked.values() for text in own)
        return texts

    @property
    def context(self) -> int:
        """Tokens of a prompt with its continuation."""
        return self.config.max_length or self.lm.config.max_length

    def check(self, prompts: Sequence[Sequence[int]], num_rows: int = 0) -> list[int]:
        """How many tokens each prompt may be continued by; nothing is computed or allocated yet.

        Args:
          num_rows: prompts that are continued at one time; 0 means all.

        Raises:
          ConfigError: a prompt that is empty or fills the context (says by how much), or a cache that memory does not hold.
        """
        own = [expert_prompt(prompt) for prompt in prompts]  # one text for all: the longer one counts
        room = [max(1, min(self.config.num_tokens, self.context - max(map(len, both)))) for both in zip(prompts, own, strict=True)]
        num_slots = check_lengths(self.lm, list(map(len, prompts)), room, self.context)
        try:
            num_slots = max(num_slots, check_lengths(self.lm, list(map(len, own)), room, self.context))
        except ConfigError as error:
            raise ConfigError(f"as the expert reads it, {error}") from None
        beams = self.config.num_beams > 1
        copies = self.config.num_beams if beams else self.config.num_samples
        check_cache(self.lm, (num_rows or len(prompts)) * copies, num_slots, self.mesh, beams=beams)
        return room

    def _samples(
        self, prompts: Sequence[Sequence[int]], room: Sequence[int], context: int, on_text: OnText, memory: Memory | None
    ) -> list[list[Text]]:
        config = self.config
        rows = [TextStream(config.stop) for _ in range(len(prompts) * config.num_samples)]

        def watch(row: int, token: int) -> bool:
            new = rows[row].push(self.tokenizer.token_bytes(token))
            if new:
                on_text(row, new)
            return rows[row].stopped

        alone = len(rows) == 1 and self.reader is None  # a memory holds what all have read
        done = completions(
            self.engine, self._params_for(prompts), prompts, num_tokens=room, stop_ids=self.stop_ids, num_samples=config.num_samples,
            seed=config.seed, max_length=context, memory=memory if alone else None, watch=watch,
        )  # fmt: skip
        for row, stream in enumerate(rows):
            if rest := stream.close():
                on_text(row, rest)
        texts = [Text(stream.text, one.finish, one.ids, one.logps, sum(one.logps)) for stream, one in zip(rows, done, strict=True)]
        return [texts[start : start + config.num_samples] for start in range(0, len(texts), config.num_samples)]

    def _beams(self, prompts: Sequence[Sequence[int]], room: Sequence[int], context: int, on_text: OnText) -> list[list[Text]]:
        config = self.config
        found = beam_search(
            self.engine, self._params_for(prompts), prompts, num_tokens=room, num_beams=config.num_beams, stop_ids=self.stop_ids,
            ends=lambda ids: self._read(ids).stopped, length_penalty=config.length_penalty, max_length=context,
        )  # fmt: skip
        texts = [[Text(self._read(one.ids).text, one.finish, one.ids, [], one.logp) for one in own[: config.num_samples]] for own in found]
        for number, own in enumerate(texts):
            for sample, text in enumerate(own):
                on_text(number * config.num_samples + sample, text.text)
        return texts

    def _params_for(self, prompts: Sequence[Sequence[int]]) -> Params:
        """The params, with the prompts that the expert reads where it has its own."""
        own = prompts_of_expert(prompts, self.context)
        return {**self.params, "prompts": own} if own else self.params

    def _read(self, ids: Sequence[int]) -> TextStream:
        """The text of these tokens, as far as a stop string."""
        stream = TextStream(self.config.stop)
        for token in ids:
            stream.push(self.tokenizer.token_bytes(token))
        stream.close()
        return stream

    def encode(self, text: str) -> list[int]:
        """A prompt's ids, bos first where the tokenizer has one; eos or bos alone for an empty text."""
        ids = ([] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]) + self.tokenizer.encode(text)
        ids = ids or ([] if self.tokenizer.eos_id is None else [self.tokenizer.eos_id])
        return ids if self.reader is None else Prompt(ids, self.reader.ids(text))

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """A chat's ids, up to where the assistant's next turn begins."""
        ids = chat.prompt_ids(messages, self.tokenizer, self.chat_template)
        return ids if self.reader is None else Prompt(ids, self.reader.chat_ids(messages))


def prepare(model: Any, config: GenerateConfig, mesh: Any, precision: Any) -> Writer:
    """A `pretrained.Pretrained` or `proxy.Steered` as this command uses it; on one CPU device laid out for it."""
    reader, trio = None, None
    if isinstance(model, Steered):
        trio, params = model.trio_for_decoding(mesh, precision)
        reader, lm = model.reader, proxy_lm(*trio)
    else:
        lm, params = model.for_decoding(mesh, precision)
    own = model.config.max_length
    if model.config.position == "learned" and config.max_length > own:
        raise ConfigError(f"--max_length is {config.max_length}, and this model's learned positions end at {own}; lower it")
    if beyond := [token for token in config.stop_ids if not 0 <= token < model.config.vocab_size]:
        raise ConfigError(f"--stop_ids has {beyond[0]}, and this model's tokens are 0 to {model.config.vocab_size - 1}")
    how = sampler(config.temperature, config.top_k, config.top_p, config.min_p, config.repetition_penalty)
    stop_ids = (*model.stop_ids, *config.stop_ids)
    return Writer(config, lm, params, model.tokenizer, model.chat_template, stop_ids, generator(lm, how), mesh, reader, trio)
