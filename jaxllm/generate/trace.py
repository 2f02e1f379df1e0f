"""What proxy-tuning changed in a text: per token the probability under the base and under the proxy, and whether greedy decoding would
have gone another way.

    Δ_t = p_proxy(x_t) − p_M(x_t)

`trace` reads given texts, written by whomever, in one pass of each model over whole rows; `boosted` and `share_changed` sum up, and
`write_page` makes one self-contained page of it (`jaxllm generate … --trace page.html`).

Source: arXiv:2401.08565, section 5 (Δ_t, the token types that are boosted most, the share of predictions that change).
Letters: B rows, T row length, D model width, N predictions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxllm.contract import LM, Params
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.files import write_atomic
from jaxllm.models.generate import bucket
from jaxllm.models.proxy import Trio, proxy_lm
from jaxllm.models.text_stream import TextStream
from jaxllm.report import PAGE
from jaxllm.report_figures import escape

CHUNK = 64
"""Predictions that have logits at one time."""
SHOWN = 100
"""Texts on a page; its numbers are of all."""


@dataclass(frozen=True)
class Trace:
    """One continuation, token by token."""

    ids: list[int]
    base: Float[np.ndarray, " N"]
    """p_M(x_t)."""
    proxy: Float[np.ndarray, " N"]
    """p_proxy(x_t)."""
    changed: Bool[np.ndarray, " N"]
    """Whether the proxy's most probable token is another than the base's."""

    @property
    def delta(self) -> Float[np.ndarray, " N"]:
        """Δ_t."""
        return self.proxy - self.base


class Written(NamedTuple):
    """A text to be traced: what base (and anti-expert) and expert read before it, and its tokens."""

    prompt: Sequence[int]
    expert_prompt: Sequence[int]
    ids: Sequence[int]


def trace(trio: Trio, params: Params, texts: Sequence[Written], *, batch_rows: int = 8, mesh: Any = None) -> list[Trace]:
    """Δ_t of every token of every text, by whole rows and without a cache; before temperature, top-p and other processors.

    Args:
      params: {'base': …, 'expert': …, 'anti': …}.
      batch_rows: rows of one pass; texts of like length go together.
      mesh: that the params lie on.
    """
    found: dict[int, Trace] = {n: Trace([], *(np.zeros(0, kind) for kind in (float, float, bool))) for n in range(len(texts))}
    order = sorted((n for n, text in enumerate(texts) if text.ids), key=lambda n: -len(texts[n].prompt) - len(texts[n].ids))
    run = _compiled(trio)
    with nullcontext() if mesh is None or mesh.size == 1 else jax.set_mesh(mesh):
        for first in range(0, len(order), batch_rows):
            batch = [texts[n] for n in order[first : first + batch_rows]]
            hidden = [
                _states(
                    run, name, params, [(text.expert_prompt if name == "expert" else text.prompt, text.ids) for text in batch], batch_rows
                )
                for name in trio.models
            ]
            targets = np.concatenate([np.asarray(text.ids, np.int32) for text in batch])
            columns = _predictions(run, params, hidden, targets)
            ends = np.cumsum([len(text.ids) for text in batch])[:-1]
            parts = zip(*(np.split(column, ends) for column in columns), strict=True)
            found |= {n: Trace(list(texts[n].ids), *part) for n, part in zip(order[first : first + batch_rows], parts, strict=True)}
    return [found[n] for n in range(len(texts))]


@lru_cache(maxsize=4)
def _compiled(trio: Trio) -> dict[str, Callable[..., Any]]:
    """Hidden states of each model, and what is said of some of them."""
    proxy = proxy_lm(*trio)

    def states(lm: LM) -> Callable[..., Any]:
        def run(params: Params, tokens: Int[Array, "B T"], lengths: Int[Array, " B"]) -> Float[Array, "B T D"]:
            segments = (jnp.arange(tokens.shape[1]) < lengths[:, None]).astype(jnp.int32)
            return lm.apply(params, tokens, segment_ids=segments).hidden

        return jax.jit(run)

    def predict(params: Params, hidden: Sequence[Float[Array, "N D"]], targets: Int[Array, " N"]) -> tuple[Array, ...]:
        pair = trio.base.unembed(params["base"]).logits(hidden[0]), proxy.unembed(params).logits(jnp.concatenate(hidden, -1))
        base, steered = (jnp.take_along_axis(jax.nn.softmax(logits, -1), targets[:, None], 1)[:, 0] for logits in pair)
        return base, steered, jnp.argmax(pair[0], -1) != jnp.argmax(pair[1], -1)

    return {**{name: states(lm) for name, lm in trio.models.items()}, "predict": jax.jit(predict)}


def _states(
    run: Mapping[str, Callable[..., Any]], name: str, params: Params, rows: Sequence[tuple[Sequence[int], Sequence[int]]], num_rows: int
) -> Float[Array, "N D"]:
    """The states that predict each token of each continuation, row after row."""
    longest = max(len(prompt) + len(ids) for prompt, ids in rows) - 1
    tokens, lengths = np.zeros((num_rows, bucket(longest)), np.int32), np.zeros(num_rows, np.int32)
    where = []
    for b, (prompt, ids) in enumerate(rows):
        read = [*prompt, *ids[:-1]]
        tokens[b, : len(read)], lengths[b] = read, len(read)
        where.append(b * tokens.shape[1] + np.arange(len(prompt) - 1, len(read)))
    hidden = run[name](params[name], tokens, lengths)
    return hidden.reshape(-1, hidden.shape[-1])[np.concatenate(where)]


def _predictions(run: Mapping[str, Callable[..., Any]], params: Params, hidden: Sequence[Array], targets: np.ndarray) -> list[np.ndarray]:
    """(p_M, p_proxy, changed) of each target, a chunk at a time."""
    parts = []
    for first in range(0, len(targets), CHUNK):
        size = min(CHUNK, len(targets) - first)
        pad = lambda x, first=first, size=size: jnp.pad(x[first : first + size], [(0, CHUNK - size)] + [(0, 0)] * (x.ndim - 1))
        given = {name: params[name] for name in ("base", "expert", "anti")}
        found = run["predict"](given, [pad(one) for one in hidden], pad(jnp.asarray(targets)))
        parts.append([np.asarray(column)[:size] for column in found])
    return [np.concatenate(columns) for columns in zip(*parts, strict=True)]


# ------------------------------------------------------------------------------------------------- what it comes to


class Boost(NamedTuple):
    """One token type, over all texts."""

    id: int
    times: int
    delta: float
    """Mean Δ_t."""


def boosted(traces: Iterable[Trace], min_count: int = 1) -> list[Boost]:
    """Token types by their mean Δ_t, most boosted first; those that come at least `min_count` times (the paper: 100)."""
    ids, deltas = _columns(traces)
    kinds, inverse, counts = np.unique(ids, return_inverse=True, return_counts=True)
    means = np.bincount(inverse, deltas, len(kinds)) / np.maximum(counts, 1)
    rows = [Boost(int(kind), int(count), float(mean)) for kind, count, mean in zip(kinds, counts, means, strict=True) if count >= min_count]
    return sorted(rows, key=lambda row: (-row.delta, row.id))


def _columns(traces: Iterable[Trace]) -> tuple[np.ndarray, np.ndarray]:
    whole = list(traces)
    nothing = [np.zeros(0)]
    return np.concatenate([*nothing, *(one.ids for one in whole)]).astype(int), np.concatenate([*nothing, *(one.delta for one in whole)])


def share_changed(traces: Iterable[Trace]) -> float:
    """Share of predictions whose most probable token changed; 0 of none."""
    changed = np.concatenate([np.zeros(0, bool), *(one.changed for one in traces)])
    return float(changed.mean()) if len(changed) else 0.0


# --------------------------------------------------------------------------------------------------------- the page

_CSS = """.text { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 0 2rem; line-height: 1.75; }
.text .read { color: var(--muted); }
.text b { font-weight: inherit; border-radius: 2px; }
.text .changed { border-bottom: 2px solid var(--ink); }
.key b { padding: 0.1rem 0.4rem; font-weight: 400; }
"""


def write_page(path: Path, traces: Sequence[Trace], texts: Sequence[Written], tokenizer: Tokenizer, title: str, note: str) -> None:
    """One page, without scripts or anything from elsewhere: numbers, the texts coloured by Δ_t, the token types boosted most.

    Args:
      note: a line about the models.
    """
    num_tokens = sum(len(one.ids) for one in traces)
    mean = float(np.mean(np.concatenate([one.delta for one in traces]))) if num_tokens else 0.0
    header = (
        f'<p class="eyebrow">{escape(note)}</p>\n<h1>{escape(title)}</h1>\n<p class="headline"><span class="figure">'
        f'{share_changed(traces):.1%}</span> <span class="unit">of greedy predictions changed<br>'
        f'<span class="muted">{num_tokens:,} tokens in {len(traces):,} text{"s" * (len(traces) != 1)}, mean Δ {mean:+.3f}</span>'
        "</span></p>\n"
    )
    shown = "".join(_text(one, text, tokenizer) for one, text in zip(traces[:SHOWN], texts[:SHOWN], strict=True))
    left = f'<p class="note">The first {SHOWN} of {len(traces):,} texts.</p>' if len(traces) > SHOWN else ""
    sections = {"Texts": f"{_key()}{shown}{left}", "Token types": _table(traces, tokenizer)}
    body = "".join(f"<section>\n<h2>{name}</h2>\n{what}</section>\n" for name, what in sections.items())
    css = resources.files("jaxllm").joinpath("report.css").read_text(encoding="utf-8") + _CSS
    footer = "Δ = probability of the token under the proxy − under the base alone, before temperature and top-p. Point at a token for both."
    write_atomic(path, PAGE.format(title=escape(title), css=css, header=header, body=body, footer=footer).encode(errors="replace"))


def _key() -> str:
    samples = " ".join(f'<b style="{_colour(delta)}">{delta:+.1f}</b>' for delta in (-0.8, -0.4, 0.0, 0.4, 0.8))
    return f'<p class="key note">Δ {samples}, underlined where the most probable token changed</p>\n'


def _colour(delta: float) -> str:
    """More probable in the colour of training, less in the other one; stronger for more."""
    return f"background: color-mix(in srgb, var(--{'train' if delta > 0 else 'held'}) {min(abs(delta), 1.0) * 70:.0f}%, transparent)"


def _text(one: Trace, text: Written, tokenizer: Tokenizer) -> str:
    """A prompt and its continuation; a character of several tokens shows with the last of them."""
    stream, spans = TextStream(), []
    for t, token in enumerate(one.ids):
        new = stream.push(tokenizer.token_bytes(token)) or ""
        mark = ' class="changed"' if one.changed[t] else ""
        hint = f"{one.base[t]:.3f} → {one.proxy[t]:.3f}"
        spans.append(f'<b{mark} style="{_colour(one.delta[t])}" title="{hint}">{escape(new)}</b>')
    prompt = escape(tokenizer.decode(text.prompt))
    return f'<p class="text"><span class="read">{prompt}</span>{"".join(spans)}{escape(stream.close())}</p>\n'


def _table(traces: Sequence[Trace], tokenizer: Tokenizer, num_rows: int = 20) -> str:
    """The token types that are boosted most: of those that come ten times at least where twenty do, else of all."""
    rows = boosted(traces, 10)
    least = 10 if len(rows) >= num_rows else 1
    rows = (rows if least > 1 else boosted(traces))[:num_rows]
    cells = "".join(
        f'<tr><td>{escape(repr(tokenizer.token_bytes(row.id).decode(errors="replace")))}</td><td class="number">{row.id}</td>'
        f'<td class="number">{row.times:,}</td><td class="number">{row.delta:+.3f}</td></tr>\n'
        for row in rows
    )
    head = '<tr><th>token</th><th class="number">id</th><th class="number">times</th><th class="number">mean Δ</th></tr>'
    said = f'<p class="note">The {len(rows)} with the highest mean Δ, of those that come at least {least} ×.</p>\n'
    return f"{said}<table>\n{head}\n{cells}</table>\n"
