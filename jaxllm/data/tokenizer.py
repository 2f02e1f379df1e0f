"""Text to token ids and back: SentencePiece (trained here or given), Hugging Face `tokenizers`, or plain bytes.

A tokenizer that this file trains is lossless: `decode(encode(s)) == s` for any `s` that UTF-8 can
spell. Nothing is normalised, white space is kept, what the vocabulary lacks falls back to byte tokens, and
every digit is its own token (PaLM, arXiv:2204.02311, section 4).
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
import tokenizers

from jaxllm.config import ConfigError, TokenizerConfig
from jaxllm.files import how_to_get, path_of

_SPACE = "\u2581"  # SentencePiece writes a space so, and would read this character back as a space
_UNSAFE = re.compile("[\0\u2581\u2585]")  # SentencePiece's trainer drops any sentence that holds one of these
_SENTENCE_CHARS = 2000
_EOS_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[SEP]")


class Tokenizer(Protocol):
    """What the project asks of a tokenizer. Ids are below `num_vocab`."""

    num_vocab: int
    bos_id: int | None
    """Put before every document; None where the tokenizer's models were trained without."""
    eos_id: int | None
    """Ends every document."""
    pad_id: int | None
    fingerprint: str
    """Hash of everything that decides the ids."""
    chat_template: str | None
    """Jinja template of a chat, if the tokenizer brings one."""
    special_names: tuple[str, ...]
    """What `encode` reads as special tokens where it is asked to, the longest first."""

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of `text`, without bos and eos. `special` reads names of special tokens in it as those tokens."""
        ...

    def encode_batch(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        """`encode` of each text, in parallel."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text; bos, eos and padding are left out."""
        ...

    def token_bytes(self, id: int) -> bytes:
        """The bytes of text that one token stands for; none for a special token."""
        ...

    def save(self, folder: Path) -> None:
        """Write what `load(folder)` needs."""
        ...


def load(path: str | Path) -> Tokenizer:
    """The tokenizer in `path`: a SentencePiece .model, a tokenizer.json, or a folder that holds either.

    Raises:
      ConfigError: nothing there, or not a tokenizer.
    """
    given, path = path, path_of(path).expanduser()
    names = ("tokenizer.model", "tokenizer.json", "tokenizer.bytes")
    file = next((path / name for name in names if (path / name).exists()), None) if path.is_dir() else path
    if file is None or not file.exists():
        raise ConfigError(
            f"no tokenizer at '{path}'; give a SentencePiece .model, a tokenizer.json, or a folder with {' or '.join(names[:2])}"
            f"{how_to_get(given)}"
        )
    if file.suffix == ".bytes":
        return ByteTokenizer()
    if file.suffix != ".json":
        return SentencePiece(file.read_bytes(), str(file))
    extra = file.parent / "tokenizer_config.json"
    template = file.parent / "chat_template.jinja"
    try:
        config = json.loads(extra.read_text()) if extra.exists() else {}
        if template.exists():
            config["chat_template"] = template.read_text()
        return HuggingFace(file.read_text(), config, str(file))
    except UnicodeDecodeError as error:
        raise ConfigError(f"a file of the tokenizer in {file.parent} is not UTF-8 text ({error}); bring it anew") from None


def from_config(config: TokenizerConfig) -> Tokenizer | None:
    """The tokenizer that `config` names, or None if one is to be trained on the corpus.

    Raises:
      ConfigError: the path is of another kind, or missing.
    """
    if config.kind == "bytes":
        return ByteTokenizer()
    if not config.path:
        if config.kind == "huggingface":
            raise ConfigError(
                "data.tokenizer.kind 'huggingface' needs data.tokenizer.path, a tokenizer.json; only SentencePiece is trained here"
            )
        return None
    tokenizer = load(config.path)
    wanted = SentencePiece if config.kind == "sentencepiece" else HuggingFace
    if not isinstance(tokenizer, wanted):
        other = "huggingface" if config.kind == "sentencepiece" else "sentencepiece"
        raise ConfigError(f"data.tokenizer.path '{config.path}' is not a {config.kind} tokenizer; set data.tokenizer.kind to '{other}'")
    return tokenizer


# ----------------------------------------------------------------------------------- SentencePiece


class SentencePiece:
    """A SentencePiece model.

    SentencePiece reads U+2581 as a space. In a model that adds no space of its own, text is split at that
    character and its three byte tokens go in between, which decode to the character itself.
    """

    chat_template: str | None = None
    special_names: tuple[str, ...] = ()

    def __init__(self, model: bytes, where: str = "tokenizer") -> None:
        self._model = model
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ConfigError(f"{where} is not a SentencePiece model ({error}); give a .model file") from None
        self.num_vocab: int = self._processor.get_piece_size()
        if not self.num_vocab:
            raise ConfigError(f"{where} is an empty SentencePiece model; give a .model file")
        self.bos_id, self.eos_id, self.pad_id = (
            None if id < 0 else id for id in (self._processor.bos_id(), self._processor.eos_id(), self._processor.pad_id())
        )
        self.fingerprint = hashlib.sha256(model).hexdigest()
        bytes_of_space = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        plain = self._processor.normalize("a") == "a"
        self._space_ids = bytes_of_space if plain and all(map(self._processor.is_byte, bytes_of_space)) else None

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of `text`; SentencePiece has no special tokens in text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        """`encode` of each text, in parallel."""
        if self._space_ids is None:
            return self._processor.encode(list(texts), num_threads=-1)
        split = [text.split(_SPACE) for text in texts]
        encoded = iter(self._processor.encode([part for parts in split for part in parts], num_threads=-1))
        out = []
        for parts in split:
            ids = next(encoded)
            for _ in parts[1:]:
                ids = [*ids, *self._space_ids, *next(encoded)]
            out.append(ids)
        return out

    def decode(self, ids: Iterable[int]) -> str:
        """The text; control tokens are left out."""
        return self._processor.decode([int(id) for id in ids])

    def token_bytes(self, id: int) -> bytes:
        """A byte token's byte, nothing for a control or unknown token, else the piece with its spaces."""
        if self._processor.is_control(id) or self._processor.is_unknown(id):
            return b""
        piece = self._processor.id_to_piece(id)
        return bytes([int(piece[3:5], 16)]) if self._processor.is_byte(id) else piece.replace(_SPACE, " ").encode()

    def save(self, folder: Path) -> None:
        """Write `tokenizer.model`."""
        (folder / "tokenizer.model").write_bytes(self._model)


def train_sentencepiece(documents: Iterable[str], vocab_size: int, *, max_bytes: int | None = None) -> SentencePiece:
    """A lossless BPE of `vocab_size` tokens: pad 0, bos 1, eos 2, unknown 3 (never produced), 256 bytes, then pieces.

    Args:
      documents: text, read until `max_bytes` of it.

    Raises:
      ConfigError: a vocabulary too small for the 260 fixed tokens, or larger than the text can fill.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(documents, max_bytes), model_writer=model, vocab_size=vocab_size, model_type="bpe",
            byte_fallback=True, split_digits=True, normalization_rule_name="identity", add_dummy_prefix=False,
            remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, max_sentence_length=1 << 20,
            pad_id=0, bos_id=1, eos_id=2, unk_id=3, num_threads=2, minloglevel=2,
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        limit = re.search(r"<= (\d+)", str(error))
        fix = f"at most {limit[1]}" if limit else "more text, or a size between 300 and what the text can fill"
        raise ConfigError(f"no tokenizer of data.tokenizer.vocab_size {vocab_size} can be trained on this text; it needs {fix}") from None
    return SentencePiece(model.getvalue())


def _sentences(documents: Iterable[str], max_bytes: int | None) -> Iterator[str]:
    """Training text in pieces of a few lines, without what the trainer cannot digest.

    A digit beyond ASCII becomes a sentence of its own, because the trainer's `split_digits` knows 0 to 9 only.
    """
    left = max_bytes if max_bytes is not None else float("inf")
    for document in documents:
        start = 0
        while start < len(document) and left > 0:
            end = start + _SENTENCE_CHARS
            newline = document.rfind("\n", start, end)
            end = newline + 1 if newline > start and end < len(document) else end
            for sentence in _UNSAFE.split(document[start:end]):
                parts = [sentence] if sentence.isascii() else re.split(r"((?![0-9])[\d\u00b2\u00b3\u00b9\u2070-\u2089])", sentence)
                yield from filter(None, parts)
            left -= len(document[start:end].encode())
            start = end
        if left <= 0:
            return


# ------------------------------------------------------------------------------------ Hugging Face


class HuggingFace:
    """A tokenizer.json, with bos, eos, padding and chat template from the tokenizer_config.json beside it.

    Some byte-level vocabularies lack bytes (SmolLM2's lacks 21), which the library drops without a word. Text that
    needs one is refused here.
    """

    def __init__(self, definition: str, config: dict[str, Any], where: str = "tokenizer.json") -> None:
        self._definition, self._config = definition, config
        try:
            self._plain = self._open()
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(f"{where} is not a Hugging Face tokenizer ({error}); give the tokenizer.json of a fast tokenizer") from None
        self._plain.encode_special_tokens = True
        vocab = self._plain.get_vocab(with_added_tokens=True)
        self.num_vocab = 1 + max(vocab.values())
        self.eos_id = self._special("eos_token", *_EOS_NAMES)
        self.pad_id = self._special("pad_token", "<pad>", "[PAD]", "<|pad|>")
        added = self._plain.encode("", add_special_tokens=True).ids  # what the model saw in training
        bos = self._special("bos_token", "[CLS]")
        self.bos_id = bos if bos is not None and (added[:1] == [bos] or config.get("add_bos_token")) else None
        special = {token.content for token in self._plain.get_added_tokens_decoder().values() if token.special}
        self.special_names = tuple(sorted(special, key=lambda name: (-len(name), name)))
        self.chat_template = config.get("chat_template") if isinstance(config.get("chat_template"), str) else None
        self.fingerprint = hashlib.sha256(json.dumps([definition, self.bos_id, self.eos_id, self.chat_template]).encode()).hexdigest()

    def _open(self) -> tokenizers.Tokenizer:
        tokenizer = tokenizers.Tokenizer.from_str(self._definition)
        tokenizer.no_truncation()  # a tokenizer.json may carry both, and would lose text silently
        tokenizer.no_padding()
        return tokenizer

    @cached_property
    def _with_special(self) -> tokenizers.Tokenizer:
        return self._open()

    def _special(self, role: str, *usual: str) -> int | None:
        """The id of a special token: as configured, else the first usual name that the vocabulary has."""
        named = self._config.get(role)
        if isinstance(named, dict):
            named = named.get("content")
        if not isinstance(named, str | None):
            raise ConfigError(f"the tokenizer's {role} is {named!r}; it must be a token's text")
        names = (named,) if named else usual
        return next((id for name in names if (id := self._plain.token_to_id(name)) is not None), None)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of `text`, without bos and eos.

        Raises:
          ConfigError: the vocabulary lacks a byte of `text`; which, and where.
        """
        ids = (self._with_special if special else self._plain).encode(text, add_special_tokens=False).ids
        self._refuse_lost(text, ids, "the text")
        return ids

    def encode_batch(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        """`encode` of each text, in parallel.

        Raises:
          ConfigError: the vocabulary lacks a byte of a text; which, and where.
        """
        tokenizer = self._with_special if special else self._plain
        out = [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
        for number, (text, ids) in enumerate(zip(texts, out, strict=True)):
            self._refuse_lost(text, ids, f"text {number}")
        return out

    @cached_property
    def _lacking(self) -> bytes:
        """Bytes that have no token and would be dropped: of a byte-level BPE without an unknown token."""
        parts = json.loads(self._definition)
        byte_level = '"ByteLevel"' in json.dumps([parts.get("pre_tokenizer"), parts.get("normalizer")])
        if not byte_level or parts["model"].get("unk_token") is not None:
            return b""
        vocab = self._plain.get_vocab(with_added_tokens=False)
        return b"".join(sorted(byte for char, byte in _BYTE_OF.items() if char not in vocab))

    def _refuse_lost(self, text: str, ids: Sequence[int], which: str) -> None:
        """Refuse `text` if `ids` have fewer of the lacking bytes than it: a longer token may hold one, an added one may too."""
        if not self._lacking:
            return
        spelled = text if self._plain.normalizer is None else self._plain.normalizer.normalize_str(text)
        data = spelled.encode()
        if len(data.translate(None, self._lacking)) == len(data):
            return
        added = self._plain.get_added_tokens_decoder()
        kept = b"".join(added[id].content.encode() if id in added else self.token_bytes(id) for id in ids)
        lost = bytes(byte for byte in self._lacking if data.count(byte) > kept.count(byte))
        if not lost:
            return
        differ = (i for i, (a, b) in enumerate(zip(data, kept, strict=False)) if a != b)
        same = next(differ, len(kept))  # up to here nothing is lost, unless a space was put before it
        place = re.compile(b"[" + re.escape(lost) + b"]")
        found = place.search(data, same) or place.search(data)
        assert found is not None
        at, byte = len(data[: found.start()].decode(errors="ignore")), found[0][0]
        raise ConfigError(
            f"this tokenizer has no token for byte 0x{byte:02X}, which character {at} of {which} needs "
            f"({spelled[at]!r} in {spelled[max(0, at - 10) : at + 11]!r}); remove it, or take a tokenizer with all 256 bytes"
        )

    def decode(self, ids: Iterable[int]) -> str:
        """The text; special tokens are left out."""
        return self._plain.decode([int(id) for id in ids], skip_special_tokens=True)

    @cached_property
    def _bytes(self) -> dict[int, bytes]:
        """Each token's bytes, by the kind of its decoder: byte-level, byte fallback and metaspace, or WordPiece."""
        decoder = json.dumps(json.loads(self._definition).get("decoder"))
        added = self._plain.get_added_tokens_decoder()
        out = {}
        for piece, id in self._plain.get_vocab(with_added_tokens=True).items():
            if id in added:
                out[id] = b"" if added[id].special else piece.encode()
            elif '"ByteLevel"' in decoder:
                out[id] = b"".join(_BYTE_OF.get(char, char.encode()) for char in piece)
            elif '"ByteFallback"' in decoder and re.fullmatch("<0x[0-9A-F]{2}>", piece):
                out[id] = bytes([int(piece[3:5], 16)])
            elif '"WordPiece"' in decoder:
                out[id] = (piece[2:] if piece.startswith("##") else f" {piece}").encode()
            else:
                out[id] = piece.replace(_SPACE, " ").encode()
        return out

    def token_bytes(self, id: int) -> bytes:
        """The bytes of text that one token stands for. Exact for byte-level tokenizers that do not normalise."""
        return self._bytes.get(id, b"")

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`."""
        (folder / "tokenizer.json").write_text(self._definition)
        (folder / "tokenizer_config.json").write_text(json.dumps(self._config, indent=1))


def _byte_alphabet() -> dict[str, bytes]:
    """GPT-2's printable stand-in for each byte: itself if it is a visible Latin-1 character, else the next one from U+0100."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): bytes([byte]) for byte in visible} | {chr(0x100 + i): bytes([byte]) for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


# -------------------------------------------------------------------------------------------- bytes


class ByteTokenizer:
    """Ids 0 to 255 are bytes of UTF-8; bos 256, eos 257, padding 258.

    >>> ByteTokenizer().encode('hé')
    [104, 195, 169]
    """

    num_vocab = 259
    bos_id: int | None = 256
    eos_id: int | None = 257
    pad_id: int | None = 258
    fingerprint = "bytes"
    chat_template: str | None = None
    special_names: tuple[str, ...] = ()

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """The bytes of `text`."""
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        """The bytes of each text."""
        return [list(text.encode()) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text; a sequence that is not UTF-8 decodes to U+FFFD."""
        return bytes(int(id) for id in ids if id < 256).decode(errors="replace")

    def token_bytes(self, id: int) -> bytes:
        """One byte, or none for a special token."""
        return bytes([id]) if id < 256 else b""

    def save(self, folder: Path) -> None:
        """Write `tokenizer.bytes`, an empty file."""
        (folder / "tokenizer.bytes").touch()
