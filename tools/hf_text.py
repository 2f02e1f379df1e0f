"""The text side of a Hugging Face folder: its tokenizer, chat template and stop tokens as ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxllm.config import ConfigError
from jaxllm.data import tokenizer as ours
from jaxllm.data.tokenizer import HuggingFace, SentencePiece, Tokenizer
from jaxllm.files import path_of
from jaxllm.interop.hf import read_json
from jaxllm.pretrained import find_stop_ids


def read(folder: Path) -> tuple[Tokenizer | None, str | None]:
    """(tokenizer, chat template) of a folder; None where it has none.

    The tokenizer.json comes first: a tokenizer.model beside it lacks the tokens that were added later. GPT-2's pair of
    vocab.json and merges.txt is read where there is neither.

    Raises:
      ConfigError: a file is damaged.
    """
    config = _optional(folder / "tokenizer_config.json")
    for role, token in _optional(folder / "special_tokens_map.json").items():
        config.setdefault(role, token)
    template = _template(folder, config)
    if (folder / "tokenizer.json").exists():
        tokenizer: Tokenizer = HuggingFace((folder / "tokenizer.json").read_text(), config, str(folder / "tokenizer.json"))
    elif (folder / "tokenizer.model").exists():
        tokenizer = SentencePiece((folder / "tokenizer.model").read_bytes(), str(folder / "tokenizer.model"))
    elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        tokenizer = HuggingFace(_byte_level(folder), config, str(folder / "vocab.json"))
    else:
        return None, template
    return tokenizer, template


def given(path: str) -> tuple[Tokenizer, str | None]:
    """(tokenizer, chat template) of a tokenizer.json, a SentencePiece .model, or a folder with one.

    Raises:
      ConfigError: there is none.
    """
    where = path_of(path).expanduser()
    tokenizer, template = read(where) if where.is_dir() else (None, None)
    tokenizer = tokenizer or ours.load(where)
    return tokenizer, template or tokenizer.chat_template


def stop_ids(folder: Path, config: dict[str, Any], tokenizer: Tokenizer | None, template: str | None) -> tuple[int, ...]:
    """The end-of-text ids of generation_config.json, else of the config, and those that the tokenizer and the template tell."""
    given = _optional(folder / "generation_config.json").get("eos_token_id", config.get("eos_token_id"))
    ids = [i for i in (given if isinstance(given, list) else [given]) if isinstance(i, int) and i >= 0]
    return find_stop_ids(tokenizer, template, ids) if tokenizer is not None else tuple(dict.fromkeys(ids))


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path, "") if path.is_file() else {}


def _template(folder: Path, config: dict[str, Any]) -> str | None:
    """From its own file, or out of tokenizer_config.json: a text, or a list of named ones."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text()
    template = _optional(folder / "chat_template.json").get("chat_template", config.get("chat_template"))
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _byte_level(folder: Path) -> str:
    """The tokenizer.json of a byte-level BPE that is kept as vocab.json and merges.txt."""
    import tokenizers

    try:
        bpe = tokenizers.models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(f"{folder}/vocab.json and merges.txt are not a byte-level BPE ({error}); give --tokenizer PATH") from None
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    special = [name for name in ("<|endoftext|>",) if name in json.loads((folder / "vocab.json").read_text())]
    tokenizer.add_special_tokens(special)
    return tokenizer.to_str()
