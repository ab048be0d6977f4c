"""RWKV vocabularies in text files: `rwkv_vocab_v20230424.txt`, and others in its format.

A line reads `ID REPR LENGTH`: REPR is a Python literal (str or bytes) that may hold spaces, LENGTH
its length in bytes. Text is encoded greedily: at each place the longest token that fits.
"""

import ast
from collections import defaultdict
from collections.abc import Mapping


def parse_vocabulary(text: str) -> dict[int, bytes]:
    """The bytes of each id. Raises ValueError, which names the line."""
    tokens: dict[int, bytes] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                i, token = _parse_line(line.rstrip("\r"))
                if not token or i < 1 or i in tokens:  # 0 ends a document
                    raise ValueError
            except (ValueError, TypeError, SyntaxError, IndexError, RecursionError) as error:
                raise ValueError(f"line {number} is not `ID REPR LENGTH`: {line[:40]!r}") from error
            tokens[i] = token
    return tokens


def _parse_line(line: str) -> tuple[int, bytes]:
    number, _, rest = line.partition(" ")
    literal, _, length = rest.rpartition(" ")
    plain = literal[0] in "'\"" and "\\" not in literal  # most are: no need to parse them
    token = literal[1:-1] if plain else ast.literal_eval(literal)
    token = token.encode() if isinstance(token, str) else token
    if not isinstance(token, bytes) or len(token) != int(length):
        raise ValueError
    return int(number), token


class LongestMatch:
    """Encodes bytes with a vocabulary that has each single byte, else raises ValueError."""

    def __init__(self, tokens: Mapping[int, bytes]):
        self._ids = {token: i for i, token in tokens.items()}
        missing = [b for b in range(256) if bytes([b]) not in self._ids]
        if missing:
            raise ValueError(f"no token for the single byte {missing[0]:#04x}")
        lengths: dict[bytes, set[int]] = defaultdict(set)
        for token in self._ids:
            lengths[token[:2]].add(len(token))
        self._lengths = {pair: sorted(found, reverse=True) for pair, found in lengths.items()}

    def encode(self, data: bytes) -> list[int]:
        """The ids of the data."""
        ids, place = [], 0
        while place < len(data):
            for length in (*self._lengths.get(data[place : place + 2], ()), 1):
                found = self._ids.get(data[place : place + length])
                if found is not None:
                    ids.append(found)
                    place += length
                    break
        return ids
