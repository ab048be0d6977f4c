"""The schema and the defaults of a run: frozen dataclasses that TOML files and overrides fill.

A config file only names what differs from the defaults below. `load_config` is strict: an unknown
key, a wrong type or an impossible combination raises `ConfigError`, which names the key, the value
and what is allowed, before anything is compiled or written.

Importing this module needs the standard library alone: pydantic is imported by the first parse.
"""

import dataclasses
import json
import os
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from functools import cache
from numbers import Integral
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_origin

from rwkv_jax.errors import UserError


class ConfigError(UserError):
    """A config that cannot be run: the message names the key, the value and what is allowed."""


MINI_EPOCH = 40320
"""Samples of an official mini-epoch, the same whatever the batch."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


class _Strict:
    """What every table has in common: how pydantic reads it."""

    __pydantic_config__: ClassVar = {"extra": "forbid", "strict": True, "allow_inf_nan": False}


_RANKS7 = ("rank_w", "rank_a", "rank_v", "rank_g")
_OWN = {
    "4": (),
    "5.0": (),
    "5.1": (),
    "5.2": (),
    "6": ("rank_mix", "rank_w", "state_tuned"),
    "7": _RANKS7,
    "7a": (*_RANKS7, "rank_embed"),
}
"""Which of the settings that not all versions have each one has."""


_NEEDED = {
    "int_type": "an integer is needed",
    "float_type": "a number is needed",
    "finite_number": "a finite number is needed",
    "bool_type": "true or false is needed",
    "string_type": "a string is needed",
    "dict_type": "a table { source = weight, ... } is needed",
}
"""pydantic's names of wrong types, in words."""


@dataclass(frozen=True)
class ModelConfig(_Strict):
    """The architecture: all that decides shapes, and nothing else; it travels with checkpoints."""

    version: Literal["4", "5.0", "5.1", "5.2", "6", "7", "7a"] = "7"
    layers: int = 12
    width: int = 768
    vocab_size: int = 0
    """Rows of the embedding; 0 takes what the tokenizer needs."""
    ffn_width: int = 0
    """Hidden width of the channel mix; 0 is the official rule, 3.5 or 4 x width."""
    head_size: int = 64
    """Versions 5 to 7: channels per head."""
    rank_mix: int = 0
    """Version 6: rank of the token shift's low-rank part. All ranks: 0 is the official rule."""
    rank_w: int = 0
    """Versions 6 and 7: rank of the decay; version 7: of learning rate, value and gate."""
    rank_a: int = 0
    rank_v: int = 0
    rank_g: int = 0
    rank_embed: int = 0
    """Version 7a: side of the matrix that each token's DeepEmbed holds."""
    state_tuned: bool = False
    """Version 6: documents start from a learnt state."""

    def __post_init__(self):
        # From a file these are settled before; a constructor takes anything.
        if not (isinstance(self.version, str) and self.version in _OWN):
            text = f' (text: "{self.version}")' if str(self.version) in _OWN else ""
            raise ConfigError(f"model.version = {literal(self.version)}: {_one_of(_OWN)}{text}")
        for key in fields(self):
            value = getattr(self, key.name)
            whole = isinstance(value, Integral) and not isinstance(value, bool)
            _require(
                whole or key.type is not int,
                f"model.{key.name} = {literal(value)}: {_NEEDED['int_type']}",
            )
        for name in ("layers", "width"):
            _require(getattr(self, name) >= 1, f"model.{name} = {getattr(self, name)}: at least 1")
        ranks = [field.name for field in fields(self) if field.name.startswith("rank_")]
        for name in ("vocab_size", "ffn_width", *ranks):
            value = getattr(self, name)
            _require(value >= 0, f"model.{name} = {value}: 0 (automatic) or more")
        own = _OWN[self.version]
        strangers = [x for x in (*ranks, "state_tuned") if getattr(self, x) and x not in own]
        strangers += ["head_size"] if self.version == "4" and self.head_size != 64 else []
        _require(
            not strangers,
            f'model.{", model.".join(strangers)}: model.version = "{self.version}" has no such'
            " setting; leave it out",
        )
        _require(
            self.version == "4" or (self.head_size >= 1 and self.width % self.head_size == 0),
            f"model.width = {self.width} is not a multiple of model.head_size = {self.head_size}",
        )

    @property
    def ffn(self) -> int:
        """The channel mix's hidden width, with the default resolved."""
        if self.ffn_width:
            return self.ffn_width
        if self.version in ("5.1", "5.2", "6"):
            return max(int(3.5 * self.width) // 32, 1) * 32
        return 4 * self.width

    @property
    def heads(self) -> int:
        """Versions 5 to 7: heads of the time mix."""
        return self.width // self.head_size


@dataclass(frozen=True)
class DataConfig(_Strict):
    """Which text, cut into which tokens."""

    source: str = "stdlib"
    """`stdlib` (this interpreter's own library), a file, a folder, a glob, `.jsonl[.gz|.zst]`,
    `.parquet`, a folder of Hugging Face's `datasets`, or a binidx pair (`.bin` and `.idx`)."""
    mixture: dict[str, float] = dataclasses.field(default_factory=dict)
    """Several sources instead, each with its weight: the share of the samples that it gives."""
    field: str = "text"
    """The field of a JSON line that holds the text, or the turns of a conversation."""
    document: Literal["file", "line"] = "file"
    """Plain text: one document a file, or one a line."""
    heldout: float = 0.03
    """Share of the documents held out for evaluation, chosen by a hash of their path (or text)."""
    tokenizer: str = "bpe"
    """`bytes`, `bpe` (trained on the training documents), `world` (RWKV World), or a path to a
    `tokenizer.json`."""
    bpe_vocab_size: int = 4096
    sampler: Literal["shuffle", "magic_prime", "sequential"] = "shuffle"
    """What a row reads: windows in random order, each once an epoch; the official trainers' windows
    in theirs; or its own part of the text from end to end."""
    packing: Literal["stream", "documents"] = "stream"
    """Windows cut from the stream of documents, or whole documents packed into contexts."""
    reset: bool = True
    """Documents start from a fresh state; false: what came before flows on, as in the official
    trainers."""
    train_on: Literal["all", "answers", "spans"] = "all"
    """The tokens whose prediction is trained: all; in conversations the assistant's; or those of
    the field `spans` of a JSON line, [[first, last + 1], ...] in characters."""
    template: Literal["g1", "world", "raven"] = "g1"
    """How conversations are written down."""
    exit_tokens: int = 0
    """Tokens after which the learning rate's schedule, and with train.steps = 0 the run, ends."""
    cache: str = ""
    """Folder of the token cache; empty: `$XDG_CACHE_HOME/rwkv_jax`, or `~/.cache/rwkv_jax`."""

    @property
    def cache_root(self) -> Path:
        """The folder that `cache` stands for."""
        if self.cache:
            return Path(self.cache).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rwkv_jax"

    def __post_init__(self):
        _require(bool(self.source), "data.source is empty: a path, a glob or 'stdlib'")
        _require(0 <= self.heldout < 1, f"data.heldout = {self.heldout}: at least 0 and below 1")
        _require(
            512 <= self.bpe_vocab_size <= 65536,
            f"data.bpe_vocab_size = {self.bpe_vocab_size}: between 512 and 65536",
        )
        _require(self.exit_tokens >= 0, f"data.exit_tokens = {self.exit_tokens}: 0 or more")
        for name, weight in self.mixture.items():
            _require(
                weight > 0, f"data.mixture: the weight of {literal(name)} is {weight}: above 0"
            )
        mixed = len(self.mixture) > 1
        _require(
            not (self.mixture and self.source != "stdlib"),
            f"data.source = {self.source} and data.mixture: leave one out",
        )
        _require(
            not (self.mixture and self.tokenizer == "bpe"),
            'data.tokenizer = "bpe" is trained on one source; name another for data.mixture',
        )
        _require(
            not (mixed and self.sampler != "shuffle"),
            f'data.sampler = "{self.sampler}" is an order of one source; data.mixture has'
            f" {len(self.mixture)}",
        )
        _require(
            self.sampler != "magic_prime" or not self.heldout,
            f'data.heldout = {self.heldout}: data.sampler = "magic_prime" is the order of all'
            " tokens; set it to 0",
        )
        _require(
            self.packing == "stream" or (self.sampler == "shuffle" and self.reset),
            'data.packing = "documents" goes with data.sampler = "shuffle" and data.reset = true',
        )


@dataclass(frozen=True)
class OptimizerConfig(_Strict):
    """AdamW and its schedule; the defaults are the official version-7 recipe.

    Source: RWKV-LM, `RWKV-v7/train_temp`.
    """

    peak_lr: float = 6e-4
    final_lr: float = 6e-5
    warmup_steps: int = 10
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-18
    weight_decay: float = 0.001
    clip: float = 1.0
    """Global gradient norm; 0 does not clip."""

    def __post_init__(self):
        for name in ("peak_lr", "final_lr", "eps"):
            value = getattr(self, name)
            _require(value > 0, f"optimizer.{name} = {value}: above 0")
        for name in ("warmup_steps", "weight_decay", "clip"):
            value = getattr(self, name)
            _require(value >= 0, f"optimizer.{name} = {value}: 0 or more")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"optimizer.{name} = {value}: at least 0 and below 1")
        _require(
            self.final_lr <= self.peak_lr,
            f"optimizer.final_lr = {self.final_lr}: at most optimizer.peak_lr = {self.peak_lr}",
        )


@dataclass(frozen=True)
class TrainConfig(_Strict):
    """How the run goes: its length, batch, precision, and what it leaves on disk."""

    output: str = "runs/demo"
    init: str = ""
    """Weights to start from, of any kind that `load` reads; empty: fresh ones. The model is theirs:
    its version has to be stated so, or not at all, and sizes in a config file make way."""
    seed: int = 0
    steps: int = 1000
    """Optimizer steps; the schedule ends at the last one, or at `data.exit_tokens`. 0: as many as
    these ask for."""
    batch: int = 8
    """Sequences per optimizer step, over all accumulation parts."""
    context: int = 512
    """Tokens per sequence."""
    accumulate: int = 1
    """Parts that a batch is computed in; the gradient is that of the whole batch."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type; parameters, optimizer, decay, recurrent state and loss are float32 always."""
    remat: Literal["none", "dots", "wkv", "block", "offload"] = "dots"
    """What the backward pass keeps: everything, the results of matrix products and of the
    recurrence, of the recurrence alone, each layer's input alone; or as `dots`, on the host."""
    wkv: Literal["auto", "scan", "chunked", "associative", "pallas_gpu", "pallas_tpu"] = "auto"
    l2wrap: float = 1e-4
    """Official pull on the largest logit (RWKV-LM `L2Wrap`); 0 is off."""
    z_loss: float = 0.0
    """Weight of the squared log-partition added to the loss."""
    log_every: int = 10
    eval_every: int = 0
    """Steps between evaluations on the held-out documents; 0 evaluates at the end only."""
    eval_tokens: int = 65536
    """Held-out tokens of those evaluations; the last one reads all of them."""
    checkpoint_every: int = 200
    tensorboard: bool = False
    """Writes the metrics for TensorBoard too, into `events` of the run's folder."""
    keep: int = 2
    """Checkpoints kept: the newest ones."""
    carry_state: bool = False
    """A row goes on from the state that the step before left it, without gradient (needs
    data.sampler = "sequential")."""

    def __post_init__(self):
        counts = ("batch", "context", "accumulate", "log_every", "eval_tokens")
        for name in (*counts, "checkpoint_every", "keep"):
            _require(getattr(self, name) >= 1, f"train.{name} = {getattr(self, name)}: at least 1")
        _require(0 <= self.seed < 2**32, f"train.seed = {self.seed}: between 0 and {2**32 - 1}")
        for name in ("steps", "eval_every", "l2wrap", "z_loss"):
            _require(getattr(self, name) >= 0, f"train.{name} = {getattr(self, name)}: 0 or more")
        _require(
            self.batch % self.accumulate == 0,
            f"train.batch = {self.batch} does not divide into train.accumulate = {self.accumulate} "
            "equal parts",
        )
        _require(bool(self.output), "train.output is empty: the run's folder")


@dataclass(frozen=True)
class MeshConfig(_Strict):
    """How many devices share what (`rwkv_jax.sharding`); -1: as many as are left."""

    data: int = 1
    """The batch."""
    fsdp: int = -1
    """The batch, and parameters, gradients and optimizer with it."""
    tensor: int = 1
    """Heads, the channel mix's hidden width, the vocabulary."""
    sequence: int = 1
    """Time."""

    def __post_init__(self):
        sizes = {key.name: getattr(self, key.name) for key in fields(self)}
        for name, size in sizes.items():
            _require(size == -1 or size >= 1, f"mesh.{name} = {size}: at least 1, or -1 (the rest)")
        rest = [f"mesh.{name}" for name, size in sizes.items() if size == -1]
        _require(
            len(rest) < 2, f"{' and '.join(rest)} are -1: one can be what is left, state the others"
        )


@dataclass(frozen=True)
class SampleConfig(_Strict):
    """The text printed at the end of a run."""

    prompt: str = ""
    tokens: int = 160
    temperature: float = 1.0
    top_p: float = 0.7

    def __post_init__(self):
        _require(self.tokens >= 0, f"sample.tokens = {self.tokens}: 0 or more")
        _require(self.temperature >= 0, f"sample.temperature = {self.temperature}: 0 or more")
        _require(0 <= self.top_p <= 1, f"sample.top_p = {self.top_p}: between 0 and 1")


@dataclass(frozen=True)
class Config(_Strict):
    """One run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    def __post_init__(self):
        for section in fields(self):
            for key, value in vars(getattr(self, section.name)).items():
                large = isinstance(value, int) and value >= 2**31
                large &= key not in ("seed", "exit_tokens")
                _require(not large, f"{section.name}.{key} = {value}: at most {2**31 - 1}")
        _require(
            self.train.steps > 0 or self.data.exit_tokens > 0,
            "train.steps = 0 leaves the run's length to data.exit_tokens, which is 0: give one",
        )
        _require(
            not self.train.carry_state or self.data.sampler == "sequential",
            'train.carry_state = true needs data.sampler = "sequential": rows that go on',
        )
        _require(
            self.data.sampler != "magic_prime" or MINI_EPOCH % self.train.batch == 0,
            f"train.batch = {self.train.batch} does not divide {MINI_EPOCH}: data.sampler ="
            ' "magic_prime"'
            " has mini-epochs of so many samples, which are whole steps",
        )


TYPED = "command line"
"""Where overrides come from."""


def load_config(path: Path | str | None, overrides: Sequence[str] = ()) -> Config:
    """The run that a TOML file describes (None: the defaults), with overrides on top.

    An override is `section.key=value`, as typed on a command line; the value is TOML, and what is
    not valid TOML is taken as text, so that `data.tokenizer=bytes` needs no quotes.
    Raises `ConfigError` for a file that cannot be read and for whatever `parse_config` rejects.
    """
    return load_stated(path, overrides)[0]


def load_stated(
    path: Path | str | None, overrides: Sequence[str] = ()
) -> tuple[Config, dict[str, str]]:
    """What `load_config` gives, and where each setting that is no default was stated: its name ->
    the file's path, or `TYPED` for an override."""
    tables = {} if path is None else _read_toml(Path(path))
    # The file on its own first, so that an error says which of the two to mend.
    config = parse_config(tables, origin="" if path is None else str(path))
    stated = {f"{section}.{key}": str(path) for section, keys in tables.items() for key in keys}
    if not overrides:
        return config, stated
    stated |= {_apply(tables, override): TYPED for override in overrides}
    origin = "overrides" if path is None else f"{path} with overrides"
    return parse_config(tables, origin=origin), stated


def parse_config(tables: Mapping[str, Any], *, origin: str = "") -> Config:
    """The run described by nested mappings, as read from TOML; `origin` opens the error message.

    Raises `ConfigError`, one line that joins every problem found, each with its key, its value and
    what is allowed. An integer is a fine float, and a number may name one of a list of strings
    (`model.version = 7`).

    >>> parse_config({"model": {"layers": 2}}).model.layers
    2
    """
    from pydantic import ValidationError

    try:
        # By way of JSON: in strict mode pydantic fills a dataclass from Python instances only.
        return _adapter().validate_json(json.dumps(_spell_choices(tables), default=_unknown_value))
    except ValidationError as error:
        problems = [_problem(details, tables) for details in error.errors(include_url=False)]
        raise ConfigError((f"{origin}: " if origin else "") + "; ".join(problems)) from None


def to_toml(config: Config) -> str:
    """The whole config as TOML, defaults written out; parsing it again gives an equal config."""
    blocks = []
    for section in fields(config):
        table = getattr(config, section.name)
        lines = [f"{key.name} = {literal(getattr(table, key.name))}" for key in fields(table)]
        blocks.append("\n".join([f"[{section.name}]", *lines, ""]))
    return "\n".join(blocks)


@cache
def _adapter():
    from pydantic import TypeAdapter

    return TypeAdapter(Config)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = get_close_matches(path.name, _configs(path.parent), n=1)
        hint = f"; did you mean {path.with_name(near[0])}?" if near else "; give a TOML file"
        raise ConfigError(f"{path}: no such file{hint}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give a TOML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8; TOML is UTF-8 text") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def _configs(folder: Path) -> list[str]:
    return [path.name for path in folder.glob("*.toml") if path.name != "pyproject.toml"]


def _apply(tables: dict[str, Any], override: str) -> str:
    """Puts an override into the tables; returns the setting's name."""
    name, equals, text = override.partition("=")
    section, dot, key = (part.strip() for part in name.partition("."))
    if not (equals and dot):
        bare = equals and section and section not in _SCHEMA
        why = _unknown(section) if bare else "not written as section.key=value"
        raise ConfigError(f"override {literal(override)}: {why}")
    value = _parse_value(text)
    kind = _SCHEMA.get(section, {}).get(key)
    if (kind is str or get_origin(kind) is Literal) and not isinstance(value, str):
        value = text  # sample.prompt=42 is the text "42"
    tables[section] = {**tables.get(section, {}), key: value}
    return f"{section}.{key}"


def _parse_value(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if parsed.keys() == {"value"} else text


def _spell_choices(tables: Mapping[str, Any]) -> dict[str, Any]:
    """The tables, with a number that names one of a list of strings written as that string."""
    spelled = dict(tables)
    for section, table in tables.items():
        if isinstance(table, Mapping):
            listed = {key: get_args(kind) for key, kind in _SCHEMA.get(section, {}).items()}
            spelled[section] = {
                key: str(value)
                if type(value) in (int, float) and str(value) in listed.get(key, ())
                else value
                for key, value in table.items()
            }
    return spelled


def _unknown_value(value: Any) -> Any:
    return [str(value)]  # a date, say: no setting takes it, and as a list it fails every type


def _problem(details: Any, tables: Mapping[str, Any]) -> str:
    """One of pydantic's errors as `key = value: what is needed`."""
    where, kind = details["loc"], details["type"]
    if kind == "value_error":
        return str(details["ctx"]["error"])  # from a __post_init__ above, already in our words
    if kind == "unexpected_keyword_argument":
        return _unknown(*where)
    if not where:
        return details["msg"]
    value: Any = tables
    for step in where:
        value = value[step]
    if kind == "dataclass_type":
        needed = f"a table [{where[0]}] is needed"
    elif kind == "literal_error":
        needed = _one_of(get_args(_SCHEMA[where[0]][where[1]]))
    else:
        needed = _NEEDED.get(kind, details["msg"])
    return f"{'.'.join(where)} = {literal(value)}: {needed}"


def _unknown(section: str, key: str | None = None) -> str:
    """Says that a name is not in the schema, and which one was probably meant."""
    name = section if key is None else key
    allowed = list(_SCHEMA) if key is None else list(_SCHEMA[section])
    elsewhere = [f"{other}.{name}" for other, keys in _SCHEMA.items() if name in keys]
    likely = elsewhere[:1] or get_close_matches(name, allowed, n=1)
    remedy = f"did you mean {likely[0]}? (allowed: {{}})" if likely else "allowed: {}"
    written = ".".join(_key(part) for part in (section, key) if part is not None)
    noun = "section" if key is None else "setting"
    return f"{written} is not a {noun}; {remedy.format(', '.join(allowed))}"


def _one_of(choices: Iterable[str]) -> str:
    return "one of " + ", ".join(literal(choice) for choice in choices)


def _key(name: str) -> str:
    return name if re.fullmatch(r"[\w-]+", name, re.ASCII) else literal(name)


def literal(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        pairs = ", ".join(f"{_key(key)} = {literal(x)}" for key, x in value.items())
        return f"{{ {pairs} }}" if pairs else "{}"
    if isinstance(value, str):  # TOML's escapes are JSON's, and it wants DEL escaped too
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value)


_SCHEMA = {
    section.name: {key.name: key.type for key in fields(getattr(Config(), section.name))}
    for section in fields(Config)
}
"""Section -> key -> type."""
