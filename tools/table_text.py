"""Tables with the sentences that say them: E2E NLG and DART, as prompts and completions.

E2E's train references are word-tokenised ("It 's family - friendly ."), its dev references plain, so train is detokenised.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxllm.config import ConfigError, nearest

LABELS = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}
"""Slots of E2E that a prompt calls otherwise, as the data of LoRA's and prefix-tuning's code does."""
_NAMED = ("name", "eatType", "food", "area", "near")
"""Slots of E2E whose values a sentence says as they are."""


def json_lines(records: Iterable[Mapping[str, Any]]) -> str:
    """The records, a line of JSON each."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def slots_of(meaning: str) -> dict[str, str]:
    """The slots of a meaning representation of E2E, in the order given.

    >>> slots_of("name[The Mill], priceRange[£ 20 - 25], near[Café Rouge]")
    {'name': 'The Mill', 'priceRange': '£20-25', 'near': 'Café Rouge'}
    """
    pairs = re.findall(r"(\w[^\[\],]*)\[([^\]]*)\]", meaning)
    return {name: re.sub(r"(?<=\d) - (?=\d)", "-", value.replace("£ ", "£")) for name, value in pairs}


def linearise(slots: Mapping[str, str]) -> str:
    """The prompt of some slots, in their order.

    >>> linearise({"name": "Blue Spice", "eatType": "coffee shop", "area": "city centre"})
    'name : Blue Spice | Type : coffee shop | area : city centre =>'
    """
    return " | ".join(f"{LABELS.get(name, name)} : {value}" for name, value in slots.items()) + " =>"


# --------------------------------------------------------------------------------- detokenisation

_OPEN, _CLOSE = "\ue000", "\ue001"
"""Stand for quotation marks, which sacremoses takes for apostrophes, until it is done."""
_QUOTES = [
    (re.compile(r"(?<!\S)'(?!(?:s|t|re|ll|ve|m|d) ) ?((?:[^\s']+ ){0,3}[^\s']+) ?'(?!\S)"), rf"{_OPEN}\1{_CLOSE}"),  # ' The Mill '
    (re.compile(r"(?<=\w) '(?= s\b)"), "'"),  # It ' s
    (re.compile(r"(?<=\w) '(?!\S)"), _CLOSE),  # customers ' ratings
    (re.compile(r"(?<!\S)'(?=[A-Z])"), _OPEN),
]
# A tokenised dash is one inside a compound, unless a clause begins after it: with one of these, or with a name.
_CLAUSE = "a an and at but even for from has if in is it just located no not or so that the their there they this try we with you"
UNSEEN = "without-chinese-food"
"""A folder beside them, in which train never has the value; dev has few values of a slot that train has too."""
_COMPOUND = "Friendly Star Oriented American Day Food Priced Rated"
_REPAIRS = [
    (re.compile(rf"(?<=\w) - (?!(?:{'|'.join(_CLAUSE.split())})\b)(?=[a-z\d]|(?:{'|'.join(_COMPOUND.split())})\b)"), "-"),
    (re.compile(r"\b((?:[Dd]in|[Tt]ak)e|[Ee]at|[Ss]it|[Ww]alk) - in\b"), r"\1-in"),
    (re.compile(r"(?<=[a-z]-)(\w+) - (?=friendly)"), r"\1-"),  # non-family-friendly
    (re.compile(r"(?<=\w)- (?=[£\w])"), "-"),
    (re.compile(r"£ (?=\d)"), "£"),
    (re.compile(r"' s\b"), "'s"),
    (re.compile(r" +(?=[.,;:!?])"), ""),
    (re.compile(rf"[{_OPEN}{_CLOSE}]"), "'"),
]


def detokenise(texts: Sequence[str]) -> list[str]:
    """Word-tokenised English as plain English: sacremoses, and what it leaves: quotation marks, hyphens, amounts of money.

    What the tokenisation lost stays lost: spaces that a writer left out after a comma or put before a full stop.

    Raises:
      ConfigError: sacremoses is not installed.
    """
    try:
        from sacremoses import MosesDetokenizer
    except ImportError:
        raise ConfigError("to detokenise E2E's train references takes sacremoses: pip install 'jaxllm[experiments]'") from None
    moses = MosesDetokenizer(lang="en")
    plain = []
    for text in texts:
        for pattern, instead in _QUOTES:
            text = pattern.sub(instead, text)
        text = moses.detokenize(text.split())
        for pattern, instead in _REPAIRS:
            text = pattern.sub(instead, text)
        plain.append(text.strip())
    return plain


# ------------------------------------------------------------------------------------------ E2E


def build_e2e(files: list[Path], to: Path) -> dict[str, Any]:
    """train.jsonl and dev_pairs.jsonl: {prompt, completion, slots} for each reference; dev.jsonl: {prompt, references, slots}; `UNSEEN`.

    Args:
      files: train (word-tokenised) and dev, CSV with the columns mr and ref.
    """
    train, dev = (_rows(file) for file in files)
    plain = detokenise([text for _, text in train])
    train = [(slots, text) for (slots, _), text in zip(train, plain, strict=True)]
    (to / "train.jsonl").write_text(json_lines(_pair(linearise(slots), text, slots=slots) for slots, text in train), "utf-8")
    counts = _write_dev(to, [(linearise(slots), text, {"slots": slots}) for slots, text in dev])
    tables = {frozenset(slots.items()) for slots, _ in train}
    shared = tables & {frozenset(slots.items()) for slots, _ in dev}
    (to / UNSEEN).mkdir()
    unseen = hold_out(to, to / UNSEEN, "food", "Chinese")
    return {"train_pairs": len(train), "train_tables": len(tables), **counts, "shared_tables": len(shared), UNSEEN: unseen}


def hold_out(source: Path, to: Path, slot: str, value: str) -> dict[str, int]:
    """Write E2E NLG without a value of a slot in train: train.jsonl; dev cut in two by it, as tables and as pairs.

    Out of train go the tables with that value, and the references that name it (a writer may say what the table does not).

    Raises:
      ConfigError: no such slot; a value that train and dev do not both have.
    """
    train, pairs, tables = (_records(source / name) for name in ("train.jsonl", "dev_pairs.jsonl", "dev.jsonl"))
    slots = sorted({name for record in train for name in record["slots"]})
    if slot not in slots:
        raise ConfigError(f"E2E has no slot '{slot}'{nearest(slot, slots) or ';'} slots: {', '.join(slots)}")
    both = sorted({r["slots"].get(slot, "") for r in train} & {r["slots"].get(slot, "") for r in pairs} - {""})
    if value not in both:
        raise ConfigError(
            f"train and dev of E2E do not both have {slot} '{value}'{nearest(value, both) or ';'} both have: {', '.join(both)}"
        )
    has = lambda record: record["slots"].get(slot) == value
    # A rating is called high where a price is meant, and anything may be family-friendly: of these a name says nothing.
    named = re.compile(rf"\b{re.escape(value)}\b", re.IGNORECASE) if slot in _NAMED else re.compile(r"(?!)")
    kept = [record for record in train if not has(record) and not named.search(record["completion"])]
    parts = {
        "train": kept,
        "dev_seen": [record for record in tables if not has(record)],
        "dev_unseen": [record for record in tables if has(record)],
        "dev_seen_pairs": [record for record in pairs if not has(record)],
        "dev_unseen_pairs": [record for record in pairs if has(record)],
    }
    for name, records in parts.items():
        (to / f"{name}.jsonl").write_text(json_lines(records), "utf-8")
    with_value = sum(map(has, train))
    return {name: len(records) for name, records in parts.items()} | {
        "train_with_it": with_value, "train_naming_it_only": len(train) - with_value - len(kept)
    }  # fmt: skip


def _records(file: Path) -> list[dict[str, Any]]:
    with open(file, encoding="utf-8", newline="\n") as stream:
        return [json.loads(line) for line in stream]


def _rows(file: Path) -> list[tuple[dict[str, str], str]]:
    with open(file, encoding="utf-8-sig", newline="") as stream:
        return [(slots_of(row["mr"]), " ".join(row["ref"].split())) for row in csv.DictReader(stream)]


def _pair(prompt: str, text: str, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": f" {text}", **more}


def _write_dev(to: Path, rows: Sequence[tuple[str, str, dict[str, Any]]]) -> dict[str, int]:
    """dev_pairs.jsonl, a line for each reference, and dev.jsonl, a line for each table; rows are (prompt, reference, more)."""
    tables: dict[str, dict[str, Any]] = {}
    for prompt, text, more in rows:
        tables.setdefault(prompt, {"prompt": prompt, "references": [], **more})["references"].append(text)
    (to / "dev_pairs.jsonl").write_text(json_lines(_pair(prompt, text, **more) for prompt, text, more in rows), "utf-8")
    (to / "dev.jsonl").write_text(json_lines(tables.values()), "utf-8")
    return {"dev_pairs": len(rows), "dev_tables": len(tables)}


# ------------------------------------------------------------------------------------------ DART


def build_dart(files: list[Path], to: Path) -> dict[str, Any]:
    """train.jsonl, dev_pairs.jsonl, dev.jsonl as of E2E, out of DART's dev part alone: a fifth of its tables, by hash, is dev.

    A prompt is `subject : relation : object | … =>`. Tables with the same triples in another order are in the same part.
    """
    train: list[tuple[str, str, dict[str, Any]]] = []
    dev: list[tuple[str, str, dict[str, Any]]] = []
    for entry in json.loads(files[0].read_text("utf-8")):
        triples = [" : ".join(" ".join(part.split()) for part in triple) for triple in entry["tripleset"]]
        prompt, part = " | ".join(triples) + " =>", dev if _in_dev(triples) else train
        for note in entry["annotations"]:
            if text := " ".join(note["text"].split()):
                part.append((prompt, text, {"source": note["source"]}))
    (to / "train.jsonl").write_text(json_lines(_pair(prompt, text, **more) for prompt, text, more in train), "utf-8")
    counts = _write_dev(to, dev)
    return {"train_pairs": len(train), "train_tables": len({prompt for prompt, _, _ in train}), **counts}


def _in_dev(triples: Sequence[str]) -> bool:
    """A fifth of all sets of triples."""
    return int.from_bytes(hashlib.sha256("\n".join(sorted(triples)).encode()).digest()[:8]) % 5 == 0
