"""Long documents cut into pieces: a tokenizer needs many times the memory of what it encodes."""

import re

from rwkv_jax.data.tokenizers import Tokenizer

LONG_DOCUMENT = 1 << 22
"""Characters of a document after which it is cut before it is encoded."""


def pieces_for(tokenizer: Tokenizer, text: str) -> list[str]:
    """`pieces_of`, if the ids of the pieces together are those of the text. Our BPE and World have
    no token in which a character other than a space follows a line end, and bytes have none of two
    characters; how another vocabulary encodes at a cut is unknown."""
    return [text] if tokenizer.kind in ("file", "txt") else pieces_of(text)


def pieces_of(text: str) -> list[str]:
    """The text cut into pieces of a few MB.

    Cuts lie at a line end before a line that is not indented, which no token of our BPE crosses.
    Text without such a place stays whole."""
    pieces, start = [], 0
    while len(text) - start > LONG_DOCUMENT:
        place = re.compile(r"\n(?=\S)").search(text, start + LONG_DOCUMENT)
        if not place:
            break
        pieces.append(text[start : place.end()])
        start = place.end()
    return [*pieces, text[start:]]
