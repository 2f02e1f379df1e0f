"""Long documents as short pieces of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def take(documents: Sequence[str], num_bytes: int) -> list[str]:
    """The first pieces of documents, until there are so many bytes."""
    found: list[str] = []
    for text in documents:
        for piece in cut(text):
            if num_bytes <= 0:
                return found
            found.append(piece)
            num_bytes -= len(piece.encode())
    return found


def cut(text: str, size: int = 600) -> Iterator[str]:
    """Pieces of about `size` characters, after a line where there is one in the second half, else after a space.

    >>> list(cut("one two three", 8))
    ['one two ', 'three']
    """
    while len(text) > size:
        end = next((at + 1 for mark in "\n " if (at := text.rfind(mark, size // 2, size)) > 0), size)
        yield text[:end]
        text = text[end:]
    if text.strip():
        yield text
