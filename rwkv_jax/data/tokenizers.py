"""Text to token ids and back: bytes, a BPE of the corpus, any `tokenizer.json`, and RWKV
vocabularies.

All decode to bytes, not text: a token may end inside a UTF-8 character. The end-of-document id
decodes to nothing. An id without a token (the last rows of the World vocabulary) decodes to U+FFFD,
in a `tokenizer.json` to nothing, as the package `tokenizers` has it; one out of range is an error.

Special tokens are not recognised in text: `<|endoftext|>` in a document is encoded letter by
letter. `with_special_tokens()` is the same tokenizer with these names as tokens, as prompts have
them.

What a token adds to a text may depend on the tokens before it: vocabularies of words put spaces
between them, and SentencePiece's drop the one before the first. `added` and `StreamDecoder` look at
the last tokens, so what they give, joined, is what decoding all ids gives. Only ids whose bytes are
no UTF-8 may differ: the characters around them are kept, where `tokenizers` drops a whole run.

Of three PyPI packages with the World vocabulary, which give the official ids on the golden texts,
`pyrwkv-tokenizer` (Rust) is used, to encode all but the first prompts, at 54 MB/s of Python source.
Its decoder is not used: it panics on half a character and on unused ids.
"""

import codecs
import copy
import functools
import hashlib
import importlib.resources
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import tokenizers

from rwkv_jax import disk
from rwkv_jax.data.bpe import END_OF_DOCUMENT
from rwkv_jax.data.byte_tokens import as_bytes, as_character, byte_level
from rwkv_jax.data.vocabulary import LongestMatch, parse_vocabulary
from rwkv_jax.errors import UserError

Ids = Sequence[int] | np.ndarray
UNKNOWN = "\ufffd".encode()
META = "meta.json"
HF_FILE = "tokenizer.json"
WORLD_FILE = "rwkv_vocab_v20230424.txt"
EOD_NAMES = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
SHORT = 1 << 14
"""World encodes so many bytes in Python, and only then loads the Rust encoder: its tables take
0.3 s and 218 MB, for which a single prompt need not wait."""

NAMES = ("bytes", "bpe", "world")
"""The tokenizers that are named, not opened from a file."""

NEIGHBOURS = 4
"""The number of tokens before one that can matter to its text."""


class TokenizerError(UserError):
    """A tokenizer that is missing, broken or not usable here; text or ids that it does not have."""


@runtime_checkable
class Tokenizer(Protocol):
    """What training and sampling need of a tokenizer."""

    kind: str
    vocab_size: int
    eod: int
    """The end-of-document id."""
    additive: bool
    """Whether the bytes of ids are those of each id, joined."""
    unused: Sequence[int]
    """Ids below `vocab_size` that are no tokens."""

    def encode(self, text: str) -> list[int]:
        """Ids of the text; never `eod`. Raises TokenizerError for half a surrogate pair."""
        ...

    def with_special_tokens(self, recognise: bool = True) -> "Tokenizer":
        """A copy that parses names of special tokens in a text as those tokens, or with False as
        plain text. Called on a copy, it returns the copy."""
        ...

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, equal to those of `encode`; uses every core where the tokenizer can."""
        ...

    def decode_bytes(self, ids: Ids) -> bytes:
        """Bytes of the tokens; they may start or end inside a UTF-8 character. Raises
        TokenizerError for an id out of range."""
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
    vocab_size: int
    additive = True
    unused: Sequence[int] = ()
    _bytes: Sequence[bytes] | None
    _checksum = _content = ""
    _file = HF_FILE

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def with_special_tokens(self, recognise: bool = True) -> Any:
        return self

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode_bytes(self, ids: Ids) -> bytes:
        assert self._bytes
        return b"".join([self._bytes[i] for i in self._checked(ids)])

    def _checked(self, ids: Ids) -> list[int]:
        checked = [int(i) for i in ids]
        if checked and not 0 <= min(checked) <= max(checked) < self.vocab_size:
            wrong = next(i for i in checked if not 0 <= i < self.vocab_size)
            raise TokenizerError(
                f"token {wrong}: the tokenizer ({self.kind}) has the ids 0 to"
                f" {self.vocab_size - 1:,}; use the one that the tokens were made with"
            )
        return checked

    def save(self, folder: Path) -> None:
        meta = {"kind": self.kind} | ({"checksum": self._checksum} if self._checksum else {})
        folder.mkdir(parents=True, exist_ok=True)
        (folder / META).write_text(json.dumps(meta) + "\n", encoding="utf-8")
        if self._content:
            (folder / self._file).write_text(self._content, encoding="utf-8", newline="")

    def identity(self) -> str:
        return f"{self.kind} {self._checksum}".rstrip()


def utf8(text: str) -> bytes:
    """The text's bytes. Raises TokenizerError for half a surrogate pair, which has none."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"character {error.start:,} of the text is half a surrogate pair, which is not text;"
            ' remove it, or text.encode("utf-8", "replace").decode()'
        ) from None


class ByteTokenizer(_Vocabulary):
    """Id b + 1 for byte b, as in the World vocabulary; 0 ends a document."""

    kind = "bytes"
    vocab_size = 257
    eod = 0
    _bytes = (b"", *(bytes([b]) for b in range(256)))

    def encode(self, text: str) -> list[int]:
        return (np.frombuffer(utf8(text), np.uint8).astype(np.uint16) + np.uint16(1)).tolist()


class WorldTokenizer(_Vocabulary):
    """The RWKV World vocabulary: greedy longest match on UTF-8 bytes; id 0 ends a document."""

    kind = "world"
    vocab_size = 65536
    eod = 0

    def __init__(self):
        text = world_vocabulary().read_text(encoding="utf-8")
        try:
            tokens = parse_vocabulary(text)
            self._bytes = _table(tokens, self.vocab_size)
            self._short, self._encoded = LongestMatch(tokens), 0
        except (ValueError, IndexError) as error:
            raise TokenizerError(
                f"RWKV World vocabulary: damaged ({error}); reinstall pyrwkv-tokenizer"
            ) from error
        self._checksum = hashlib.blake2b(b"\n".join(self._bytes), digest_size=8).hexdigest()
        self.unused: Sequence[int] = sorted(set(range(1, self.vocab_size)) - tokens.keys())

    @functools.cached_property
    def _encoder(self) -> Any:
        import pyrwkv_tokenizer

        return pyrwkv_tokenizer.RWKVTokenizer()

    def __getstate__(self) -> dict[str, Any]:
        return {name: x for name, x in vars(self).items() if name != "_encoder"}  # not picklable

    def encode(self, text: str) -> list[int]:
        data = utf8(text)
        self._encoded += len(data)
        return self._short.encode(data) if self._encoded <= SHORT else self._encoder.encode(text)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        for text in texts:
            utf8(text)
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


def _table(tokens: dict[int, bytes], size: int) -> list[bytes]:
    table = [b""] + [UNKNOWN] * (size - 1)
    for i, token in tokens.items():
        table[i] = token
    return table


class TextTokenizer(_Vocabulary):
    """A vocabulary in the format of the World one; id 0 ends a document. Encoded in Python, at
    one or two MB/s."""

    kind = "txt"
    eod = 0
    _file = WORLD_FILE

    def __init__(self, content: str, where: object):
        try:
            tokens = parse_vocabulary(content)
            self._encoder = LongestMatch(tokens)
        except ValueError as error:
            raise TokenizerError(
                f"{where}: not an RWKV vocabulary ({error}); give one like {WORLD_FILE}"
            ) from error
        self.vocab_size = max(tokens) + 1
        self._bytes = _table(tokens, self.vocab_size)
        self.unused: Sequence[int] = sorted(set(range(1, self.vocab_size)) - tokens.keys())
        self._content, self._checksum = content, _checksum(content)

    def encode(self, text: str) -> list[int]:
        return self._encoder.encode(utf8(text))


class JsonTokenizer(_Vocabulary):
    """A Hugging Face `tokenizer.json`: our own BPE (`kind = "bpe"`) or any other (`"file"`).

    The encoding of such a file need not be lossless (normalisers, unknown tokens).
    """

    def __init__(self, content: str, kind: str, where: object):
        self._tokenizer = _open(content, where)
        self._tokenizer.encode_special_tokens = True  # that is, as text
        self.kind = kind
        self._variants: dict[bool, JsonTokenizer] | None = {}
        self._content, self._checksum = content, _checksum(content)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        ends = [vocabulary[name] for name in EOD_NAMES if name in vocabulary]
        if not ends:
            names = ", ".join(EOD_NAMES)
            raise TokenizerError(f"{where}: no end-of-document token; add one of {names} to it")
        self.eod = ends[0]
        self.vocab_size = max(vocabulary.values()) + 1
        description = json.loads(content)
        self._bytes = byte_level(description, vocabulary, self.vocab_size)
        self.additive = self._bytes is not None
        if self._bytes:
            self._bytes[self.eod] = b""
        fallback = '"ByteFallback"' in json.dumps(description.get("decoder"))
        self._names: list[str | None] = [None] * self.vocab_size
        for token, i in vocabulary.items():
            self._names[i] = as_character(token) if fallback else token
        self.unused: Sequence[int] = [i for i, name in enumerate(self._names) if name is None]

    def with_special_tokens(self, recognise: bool = True) -> "JsonTokenizer":
        if self._variants is None:
            return self
        if recognise not in self._variants:
            made = copy.copy(self)
            made._variants = None
            if recognise:
                made._tokenizer = _open(self._content, HF_FILE)
            self._variants[recognise] = made
        return self._variants[recognise]

    def encode(self, text: str) -> list[int]:
        utf8(text)
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        for text in texts:
            utf8(text)
        return [
            one.ids for one in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ]

    def decode_bytes(self, ids: Ids) -> bytes:
        if self._bytes:
            return super().decode_bytes(ids)
        names = [self._names[i] for i in self._checked(ids) if i != self.eod]
        tokens = [name for name in names if name is not None]
        decoder = self._tokenizer.decoder
        text = decoder.decode(tokens) if decoder else " ".join(tokens)
        return as_bytes(text)


def _open(content: str, where: object) -> tokenizers.Tokenizer:
    try:
        opened = tokenizers.Tokenizer.from_str(content)
    except Exception as error:  # the Rust side raises nothing narrower
        raise TokenizerError(
            f"{where}: not a tokenizer.json ({str(error).splitlines()[0]});"
            " give one saved by the package tokenizers"
        ) from error
    # A document is encoded whole, whatever the file's settings are.
    opened.no_truncation()
    opened.no_padding()
    return opened


def token_bytes(tokenizer: Tokenizer) -> Sequence[bytes]:
    """Each token, decoded alone."""
    table = tokenizer._bytes if isinstance(tokenizer, _Vocabulary) else None
    return table or [tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size)]


@functools.lru_cache(maxsize=4)
def token_sizes(tokenizer: Tokenizer) -> np.ndarray:
    """int64 [vocab]: the length of each token, decoded alone, in bytes."""
    return np.array(list(map(len, token_bytes(tokenizer))), np.int64)


def added(tokenizer: Tokenizer, before: Ids, ids: Ids) -> bytes:
    """The bytes that `ids` add to a text whose last tokens are `before`."""
    if tokenizer.additive:
        return tokenizer.decode_bytes(ids)
    before = list(before[-NEIGHBOURS:])
    return tokenizer.decode_bytes([*before, *ids])[len(tokenizer.decode_bytes(before)) :]


def sizes_of(tokenizer: Tokenizer, ids: Ids) -> np.ndarray:
    """int64 [tokens]: the bytes that each token of a document adds to its text."""
    if tokenizer.additive:
        return token_sizes(tokenizer)[np.asarray(ids, np.int64)]
    some = [int(i) for i in ids]
    one = (added(tokenizer, some[max(0, i - NEIGHBOURS) : i], [x]) for i, x in enumerate(some))
    return np.array([len(x) for x in one], np.int64)


def text_size(tokenizer: Tokenizer, ids: np.ndarray) -> int:
    """The bytes of documents, each ended by its id."""
    if tokenizer.additive:
        return int(token_sizes(tokenizer)[ids].sum())
    ends = np.flatnonzero(ids == tokenizer.eod)
    return sum(len(tokenizer.decode_bytes(document)) for document in np.split(ids, ends))


def open_tokenizer(name: str, setting: str = "data.tokenizer = ") -> Tokenizer:
    """The tokenizer named by a config: `bytes`, `world`, or the path of a `tokenizer.json`, of an
    RWKV vocabulary (`.txt`), or of the folder of one.

    `bpe` is trained on a corpus by `prepare`. Raises TokenizerError, which begins with `setting`
    and the name if there is no such file.
    """
    if name == "bytes":
        return ByteTokenizer()
    if name == "world":
        return _world()
    path = Path(name).expanduser()
    if path.is_dir():
        files = [path / file for file in (HF_FILE, WORLD_FILE) if (path / file).is_file()]
        if not files and (path / META).is_file():
            return load_tokenizer(path)  # of a run
        path = files[0] if files else path / HF_FILE
    if not path.is_file():
        raise TokenizerError(
            f"{setting}{name}: no such file; give a tokenizer.json, or one of bytes, bpe, world"
        )
    content = _read_text(path)
    listed = path.suffix.lower() == ".txt" or re.match(r"\s*\d+ b?['\"]", content)
    if content.lstrip().startswith("{") or not listed:
        return JsonTokenizer(content, "file", path)
    try:
        world, official = _world(), world_vocabulary().read_text(encoding="utf-8")
    except TokenizerError:  # its package is not installed
        return TextTokenizer(content, path)
    if content == official:
        return world
    found = TextTokenizer(content, path)
    spare = [UNKNOWN] * (world.vocab_size - found.vocab_size)
    return world if [*(found._bytes or ()), *spare] == world._bytes else found


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
    if kind not in ("bpe", "file", "txt"):
        raise TokenizerError(
            f"{folder / META}: unknown kind {kind!r}; made by a newer rwkv_jax? upgrade it"
        )
    path = folder / (WORLD_FILE if kind == "txt" else HF_FILE)
    content = _read_text(path)
    if _checksum(content) != checksum:
        raise TokenizerError(f"{path}: damaged or changed since it was saved; restore it")
    return TextTokenizer(content, path) if kind == "txt" else JsonTokenizer(content, kind, path)


def _read_text(path: Path) -> str:
    remedy = "restore the tokenizer's files"
    try:
        with disk.reading(path, remedy, TokenizerError):
            return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path}: not UTF-8; {remedy}") from error


def _checksum(content: str) -> str:
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


class StreamDecoder:
    """Decodes ids as they arrive; holds a character back until its last byte has arrived. `before`
    are the last tokens of the text that the ids continue.

    >>> from rwkv_jax.data.tokenizers import ByteTokenizer, StreamDecoder
    >>> stream = StreamDecoder(ByteTokenizer())
    >>> [stream.push([i]) for i in ByteTokenizer().encode("a\u00e9")], stream.finish()
    (['a', '', '\u00e9'], '')
    """

    def __init__(self, tokenizer: Tokenizer, before: Ids = ()):
        self._tokenizer = tokenizer
        self._before = self._last(before)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Ids) -> str:
        """The text completed by these ids."""
        data = added(self._tokenizer, self._before, ids)
        self._before = self._last([*self._before, *ids])
        return self._decoder.decode(data)

    def finish(self) -> str:
        """U+FFFD if the ids stopped inside a character, else nothing. Another text may follow."""
        self._before = []
        return self._decoder.decode(b"", final=True)

    @property
    def whole(self) -> bool:
        """Whether the ids so far end with a whole character."""
        return not self._decoder.getstate()[0]

    def _last(self, ids: Ids) -> list[int]:
        """The last tokens of the document that the ids end in."""
        last = [int(i) for i in ids[-NEIGHBOURS:]]
        while self._tokenizer.eod in last:
            del last[: last.index(self._tokenizer.eod) + 1]
        return last
