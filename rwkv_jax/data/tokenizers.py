"""Text to token ids and back: bytes, a BPE of the corpus, any `tokenizer.json`, and the RWKV World
vocabulary.

All decode to bytes, not text: a token may end inside a UTF-8 character. The end-of-document id,
never produced by encoding, decodes to nothing; an id without a token (the last rows of the World
vocabulary) decodes to U+FFFD. Special tokens are not recognised in text: `<|endoftext|>` in a
document is encoded letter by letter.

Three PyPI packages ship the World vocabulary of 2023-04-24 (the same 65,529 tokens); all give the
official ids on the golden texts. `pyrwkv-tokenizer` 0.9.1 (Apache-2.0, Rust) is used: it has wheels
for Python 3.11 to 3.13 on Linux and macOS, x86-64 and arm64, and encodes 54 MB/s of Python source.
Only its encoder is used: its decoder panics on half a character and on unused ids. `rwkv-tokenizer`
is as fast, but has no wheels after Python 3.12; `rwkv` encodes in Python, at 2.6 MB/s.
"""

import ast
import codecs
import functools
import hashlib
import importlib.resources
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import tokenizers
from tokenizers import pre_tokenizers

from rwkv_jax import disk
from rwkv_jax.data.bpe import END_OF_DOCUMENT
from rwkv_jax.errors import UserError

Ids = Sequence[int] | np.ndarray
UNKNOWN = "\ufffd".encode()
META = "meta.json"
HF_FILE = "tokenizer.json"
WORLD_FILE = "rwkv_vocab_v20230424.txt"
EOD_NAMES = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
LONG_DOCUMENT = 1 << 22
"""Characters of a document after which it is cut before it is encoded."""


class TokenizerError(UserError):
    """A tokenizer that is missing, broken or not usable here."""


@runtime_checkable
class Tokenizer(Protocol):
    """What training and sampling need of a tokenizer."""

    kind: str
    vocab_size: int
    eod: int
    """The end-of-document id."""

    def encode(self, text: str) -> list[int]:
        """Ids of the text; never `eod`."""
        ...

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, equal to those of `encode`; uses every core where the tokenizer can."""
        ...

    def decode_bytes(self, ids: Ids) -> bytes:
        """Bytes of the tokens; they may start or end inside a UTF-8 character."""
        ...

    def save(self, folder: Path) -> None:
        """Writes everything `load_tokenizer` needs into the folder."""
        ...

    def identity(self) -> str:
        """Kind and checksum: a string that differs between tokenizers that encode differently."""
        ...


class _Vocabulary:
    """What tokenizers share: the bytes of every id, and a checksum."""

    kind: str
    _bytes: Sequence[bytes] | None
    _checksum = ""

    def decode_bytes(self, ids: Ids) -> bytes:
        assert self._bytes
        return b"".join(self._bytes[int(i)] for i in ids)

    def save(self, folder: Path) -> None:
        meta = {"kind": self.kind} | ({"checksum": self._checksum} if self._checksum else {})
        folder.mkdir(parents=True, exist_ok=True)
        (folder / META).write_text(json.dumps(meta) + "\n", encoding="utf-8")

    def identity(self) -> str:
        return f"{self.kind} {self._checksum}".rstrip()


class ByteTokenizer(_Vocabulary):
    """Id b + 1 for byte b, as in the World vocabulary; 0 ends a document."""

    kind = "bytes"
    vocab_size = 257
    eod = 0
    _bytes = (b"", *(bytes([b]) for b in range(256)))

    def encode(self, text: str) -> list[int]:
        return (np.frombuffer(text.encode(), np.uint8).astype(np.uint16) + np.uint16(1)).tolist()

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]


class WorldTokenizer(_Vocabulary):
    """The RWKV World vocabulary: greedy longest match on UTF-8 bytes; id 0 ends a document."""

    kind = "world"
    vocab_size = 65536
    eod = 0

    def __init__(self):
        text = world_vocabulary().read_text(encoding="utf-8")
        import pyrwkv_tokenizer

        self._encoder = pyrwkv_tokenizer.RWKVTokenizer()
        self._bytes = _world_bytes(text, self.vocab_size)
        self._checksum = hashlib.blake2b(b"\n".join(self._bytes), digest_size=8).hexdigest()

    def encode(self, text: str) -> list[int]:
        return self._encoder.encode(text)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self._encoder.encode_batch(texts)


_world = functools.cache(WorldTokenizer)
"""Reading the vocabulary takes a while, and tokenizers do not change."""


def world_vocabulary() -> Path:
    """The file of the World vocabulary in the package whose encoder is used.

    Raises TokenizerError if the package is not installed.
    """
    try:
        package = importlib.resources.files("pyrwkv_tokenizer")
    except ImportError as error:
        raise TokenizerError(
            "the RWKV World vocabulary comes with a package that is not installed:"
            " pip install pyrwkv-tokenizer"
        ) from error
    return Path(str(package / WORLD_FILE))


def _world_bytes(vocabulary: str, size: int) -> list[bytes]:
    """Bytes of every id. A line reads `ID REPR LENGTH`, REPR a Python literal (str or bytes) that
    may hold spaces."""
    table = [b""] + [UNKNOWN] * (size - 1)
    for line in vocabulary.splitlines():
        number, _, rest = line.partition(" ")
        literal, _, length = rest.rpartition(" ")
        plain = literal[0] != "b" and "\\" not in literal  # most are: no need to parse them
        token = literal[1:-1] if plain else ast.literal_eval(literal)
        token = token.encode() if isinstance(token, str) else token
        if len(token) != int(length):
            raise TokenizerError(
                f"RWKV World vocabulary: id {number} is damaged; reinstall pyrwkv-tokenizer"
            )
        table[int(number)] = token
    return table


class JsonTokenizer(_Vocabulary):
    """A Hugging Face `tokenizer.json`: our own BPE (`kind = "bpe"`) or any other (`"file"`).

    The encoding of such a file need not be lossless (normalisers, unknown tokens).
    """

    def __init__(self, content: str, kind: str, where: object):
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # the Rust side raises nothing narrower
            raise TokenizerError(
                f"{where}: not a tokenizer.json ({str(error).splitlines()[0]});"
                " give one saved by the package tokenizers"
            ) from error
        # A document is encoded whole and as plain text, whatever the file's settings are.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.kind = kind
        self._content, self._checksum = content, _checksum(content)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        ends = [vocabulary[name] for name in EOD_NAMES if name in vocabulary]
        if not ends:
            raise TokenizerError(
                f"{where}: no end-of-document token; add one of {', '.join(EOD_NAMES)} to it"
            )
        self.eod = ends[0]
        self.vocab_size = max(vocabulary.values()) + 1
        self._bytes = _json_bytes(json.loads(content), vocabulary, self.vocab_size)
        if self._bytes:
            self._bytes[self.eod] = b""

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [
            one.ids for one in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ]

    def decode_bytes(self, ids: Ids) -> bytes:
        if self._bytes:
            return super().decode_bytes(ids)
        return self._tokenizer.decode(
            [int(i) for i in ids if i != self.eod], skip_special_tokens=False
        ).encode()

    def save(self, folder: Path) -> None:
        super().save(folder)
        (folder / HF_FILE).write_text(self._content, encoding="utf-8", newline="")


def _json_bytes(description: dict, vocabulary: dict[str, int], size: int) -> list[bytes] | None:
    """Bytes of every id; None for vocabularies whose tokens decode differently depending on their
    neighbours."""
    parts = json.dumps([description.get("decoder"), description.get("pre_tokenizer")])
    added = {token["id"] for token in description.get("added_tokens", [])}
    if '"ByteLevel"' in parts:
        alphabet = _byte_alphabet()

        def token_bytes(token: str) -> bytes:
            return b"".join(alphabet.get(character) or character.encode() for character in token)

    elif '"Metaspace"' in parts or '"ByteFallback"' in parts:

        def token_bytes(token: str) -> bytes:
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                return bytes.fromhex(token[3:5])
            return token.replace("\u2581", " ").encode()

    else:
        return None
    table = [UNKNOWN] * size
    for token, i in vocabulary.items():
        table[i] = token.encode() if i in added else token_bytes(token)
    return table


def _byte_alphabet() -> dict[str, bytes]:
    """The byte of each character of byte-level vocabularies (GPT-2): printable Latin-1 characters
    are their own bytes; the other bytes, in order, are the characters from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [b for b in range(256) if b not in printable]
    alphabet = {chr(b): bytes([b]) for b in printable} | {
        chr(0x100 + i): bytes([b]) for i, b in enumerate(others)
    }
    assert alphabet.keys() == set(pre_tokenizers.ByteLevel.alphabet())
    return alphabet


@functools.lru_cache(maxsize=4)
def token_sizes(tokenizer: Tokenizer) -> np.ndarray:
    """int64 [vocab]: the length of each token in bytes."""
    ids = range(tokenizer.vocab_size)
    return np.array([len(tokenizer.decode_bytes([i])) for i in ids], np.int64)


def pieces_for(tokenizer: Tokenizer, text: str) -> list[str]:
    """`pieces_of`, if the ids of the pieces together are those of the text. Our BPE and World have
    no token in which a character other than a space follows a line end, and bytes have none of two
    characters; how another vocabulary encodes at a cut is unknown."""
    return [text] if tokenizer.kind == "file" else pieces_of(text)


def pieces_of(text: str) -> list[str]:
    """The text cut into pieces of a few MB, because a tokenizer needs many times the memory of what
    it encodes.

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


def open_tokenizer(name: str, setting: str = "data.tokenizer = ") -> Tokenizer:
    """The tokenizer named by a config: `bytes`, `world`, or the path of a `tokenizer.json` or of
    its folder.

    `bpe` is trained on a corpus by `prepare`. Raises TokenizerError, which begins with `setting`
    and the name if there is no such file.
    """
    if name == "bytes":
        return ByteTokenizer()
    if name == "world":
        return _world()
    path = Path(name).expanduser()
    path = path / HF_FILE if path.is_dir() else path
    if not path.is_file():
        raise TokenizerError(
            f"{setting}{name}: no such file; give a tokenizer.json, or one of bytes, bpe, world"
        )
    return JsonTokenizer(_read_text(path), "file", path)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that `save` wrote into the folder.

    Raises TokenizerError if it is missing, damaged, or the installed World vocabulary is not the
    one it was made with."""
    try:
        meta = json.loads(_read_text(folder / META))
        kind, checksum = meta["kind"], meta.get("checksum")
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise TokenizerError(
            f"{folder / META}: damaged; restore the run's tokenizer folder"
        ) from error
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "world":
        world = _world()
        if world.identity() != f"world {checksum}":
            raise TokenizerError(
                f"{folder}: made with a World vocabulary that differs from the installed one;"
                " install the version of pyrwkv-tokenizer it was made with"
            )
        return world
    if kind not in ("bpe", "file"):
        raise TokenizerError(
            f"{folder / META}: unknown kind {kind!r}; made by a newer rwkv_jax? upgrade it"
        )
    content = _read_text(folder / HF_FILE)
    if _checksum(content) != checksum:
        raise TokenizerError(
            f"{folder / HF_FILE}: damaged or changed since it was saved; restore it"
        )
    return JsonTokenizer(content, kind, folder / HF_FILE)


def _read_text(path: Path) -> str:
    remedy = "restore the tokenizer's files"
    try:
        with disk.reading(path, remedy, TokenizerError):
            return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path}: not UTF-8; {remedy}") from error


def _checksum(content: str) -> str:
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


class StreamDecoder:
    """Decodes ids as they arrive; holds a character back until its last byte has arrived.

    >>> from rwkv_jax.data.tokenizers import ByteTokenizer, StreamDecoder
    >>> stream = StreamDecoder(ByteTokenizer())
    >>> [stream.push([i]) for i in ByteTokenizer().encode("a\u00e9")], stream.finish()
    (['a', '', '\u00e9'], '')
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Ids) -> str:
        """The text completed by these ids."""
        return self._decoder.decode(self._tokenizer.decode_bytes(ids))

    def finish(self) -> str:
        """U+FFFD if the ids stopped inside a character, else nothing."""
        return self._decoder.decode(b"", final=True)
