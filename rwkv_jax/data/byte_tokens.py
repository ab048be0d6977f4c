"""How the tokens of a `tokenizer.json` spell single bytes: by GPT-2's alphabet, or as `<0xE4>`."""

import json
import re
from collections.abc import Mapping
from typing import Any

from tokenizers import pre_tokenizers

FIRST = 0x10FF00
"""While tokens are joined, this character and the 255 after it, which no vocabulary has, stand for
bytes that are no text by themselves."""


def byte_level(
    description: Mapping[str, Any], vocabulary: Mapping[str, int], size: int
) -> list[bytes] | None:
    """Bytes of every id of a byte-level vocabulary; None for others, whose tokens may decode
    differently depending on their neighbours."""
    decides = description.get("decoder") or description.get("pre_tokenizer")
    if '"ByteLevel"' not in json.dumps(decides):
        return None
    alphabet = byte_alphabet()
    added = {token["id"] for token in description.get("added_tokens", [])}
    table = [b""] * size
    for token, i in vocabulary.items():
        spelt = [alphabet[c] for c in token if c in alphabet]
        whole = i in added or len(spelt) < len(token)
        table[i] = token.encode() if whole else b"".join(spelt)
    return table


def byte_alphabet() -> dict[str, bytes]:
    """The byte of each character of byte-level vocabularies (GPT-2): printable Latin-1 characters
    are their own bytes; the other bytes, in order, are the characters from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [b for b in range(256) if b not in printable]
    alphabet = {chr(b): bytes([b]) for b in printable} | {
        chr(0x100 + i): bytes([b]) for i, b in enumerate(others)
    }
    assert alphabet.keys() == set(pre_tokenizers.ByteLevel.alphabet())
    return alphabet


def as_character(token: str) -> str:
    """A character for a token like `<0xE4>`; other tokens are returned as they are."""
    if not re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
        return token
    byte = int(token[3:5], 16)
    return chr(byte if byte < 128 else FIRST + byte)


def as_bytes(text: str) -> bytes:
    """The text's bytes, with those that `as_character` made characters of."""
    parts = re.split(f"([{chr(FIRST)}-{chr(FIRST + 255)}]+)", text)
    encoded = [part.encode() for part in parts]
    encoded[1::2] = (bytes(ord(c) - FIRST for c in run) for run in parts[1::2])
    return b"".join(encoded)
