"""The schema and defaults of a run: frozen dataclasses, filled from TOML files and overrides.

A config file names only what differs from the defaults below. `load_config` is strict: an unknown
key, a wrong type or an impossible combination raises `ConfigError`, which names the key, the value
and what is allowed, before anything is compiled or written.

Importing this module needs the standard library alone.
"""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, get_args, get_origin

from rwkv_jax.errors import UserError


class ConfigError(UserError):
    """A config that cannot be run: the message names the key, the value and what is allowed."""


MINI_EPOCH = 40320
"""Samples in an official mini-epoch, whatever the batch size."""


_BOUNDS: dict[str, Callable[[Any], bool]] = {
    "at least 1": lambda x: x >= 1,
    "at least 1, or -1 (the rest)": lambda x: x >= 1 or x == -1,
    "0 or more": lambda x: x >= 0,
    "0 (automatic) or more": lambda x: x >= 0,
    "above 0": lambda x: x > 0,
    "at least 0 and below 1": lambda x: 0 <= x < 1,
    "between 0 and 1": lambda x: 0 <= x <= 1,
    "between 512 and 65536": lambda x: 512 <= x <= 65536,
    "between 0 and 4294967295": lambda x: 0 <= x < 2**32,
}
"""The bounds that settings are annotated with, in the words of an error message."""


class _Table:
    """What all tables share: pydantic reads them strictly, and bounds are checked on creation."""

    __pydantic_config__: ClassVar = {"extra": "forbid", "strict": True, "allow_inf_nan": False}

    def __post_init__(self):
        if problems := [*self._out_of_bounds()] or [*self._conflicts()]:
            raise ConfigError("; ".join(problems))

    def _out_of_bounds(self) -> Iterator[str]:
        section = type(self).__name__.removesuffix("Config").lower()
        for key in fields(self):  # pyright: ignore[reportArgumentType]
            if get_origin(key.type) is not Annotated:
                continue
            (kind, bound), value = get_args(key.type), getattr(self, key.name)
            setting = f"{section}.{key.name} = {literal(value)}"
            if kind is int and (not isinstance(value, Integral) or isinstance(value, bool)):
                yield f"{setting}: must be an integer"
            elif not _BOUNDS[bound](value):
                yield f"{setting}: {bound}"
            elif kind is int and value >= 2**31 and key.name not in ("seed", "exit_tokens"):
                yield f"{setting}: at most {2**31 - 1}"

    def _conflicts(self) -> Iterator[str]:
        """Values, each within its bounds, that do not go together."""
        return iter(())


class VersionSettings(NamedTuple):
    """What a config knows of a version of the model, before JAX is imported.

    optional      its settings among those that not all versions have
    ranks         official ranks of low-rank matrices: setting -> function of the width
    ffn_ratio     default hidden width of the channel mix, over `width`
    ffn_multiple  that default is rounded down to a multiple of this
    """

    optional: tuple[str, ...]
    ffn_ratio: float
    ffn_multiple: int = 1
    ranks: Mapping[str, Callable[[int], int]] = MappingProxyType({})


def _root_rank(factor: float) -> Callable[[int], int]:
    """`factor * sqrt(width)`, rounded to a multiple of 32, at least 32."""
    return lambda width: max(32, round(factor * width**0.5 / 32) * 32)


def _doubled_rank(rank: int) -> Callable[[int], int]:
    """`rank`, twice that from width 4096 on."""
    return lambda width: rank * (2 if width >= 4096 else 1)


_RANKS_6 = {"rank_mix": _doubled_rank(32), "rank_w": _doubled_rank(64)}
_RANKS_7 = {f"rank_{x}": _root_rank(y) for x, y in dict(w=2.5, a=2.5, v=1.7, g=5.0).items()}
_RANKS_7A = _RANKS_7 | {"rank_embed": lambda width: 32}
_MATRIX = ("head_size", "state_tuned")  # of versions whose state is a matrix for each head
VERSION_SETTINGS = {
    "4": VersionSettings((), 4),
    "5.0": VersionSettings(_MATRIX, 4),
    "5.1": VersionSettings(_MATRIX, 3.5, 32),
    "5.2": VersionSettings(_MATRIX, 3.5, 32),
    "6": VersionSettings((*_MATRIX, *_RANKS_6), 3.5, 32, _RANKS_6),
    "7": VersionSettings((*_MATRIX, *_RANKS_7), 4, ranks=_RANKS_7),
    "7a": VersionSettings((*_MATRIX, *_RANKS_7A), 4, ranks=_RANKS_7A),
}
"""The versions of the model; everything else about them stands in `rwkv_jax.models`."""


@dataclass(frozen=True)
class ModelConfig(_Table):
    """The architecture: everything that decides shapes, and nothing else. Saved with weights.

    Configs are equal if their models are: 0, where it stands for a rule, equals what the rule says.
    """

    version: str = "7"
    """One of `VERSION_SETTINGS`."""
    layers: Annotated[int, "at least 1"] = 12
    width: Annotated[int, "at least 1"] = 768
    vocab_size: Annotated[int, "0 (automatic) or more"] = 0
    """Rows of the embedding; 0 is the tokenizer's number of tokens."""
    ffn_width: Annotated[int, "0 (automatic) or more"] = 0
    """Hidden width of the channel mix; 0 is the official rule, 3.5 or 4 x width."""
    head_size: Annotated[int, "at least 1"] = 64
    """Versions 5 to 7: channels per head."""
    rank_mix: Annotated[int, "0 (automatic) or more"] = 0
    """Version 6: rank of the token shift's low-rank part. All ranks: 0 is the official rule."""
    rank_w: Annotated[int, "0 (automatic) or more"] = 0
    """Versions 6 and 7: rank of the decay; version 7: then of learning rate, value and gate."""
    rank_a: Annotated[int, "0 (automatic) or more"] = 0
    rank_v: Annotated[int, "0 (automatic) or more"] = 0
    rank_g: Annotated[int, "0 (automatic) or more"] = 0
    rank_embed: Annotated[int, "0 (automatic) or more"] = 0
    """Version 7a: side of the square matrix in each token's DeepEmbed."""
    state_tuned: bool = False
    """Versions 5 to 7: documents start from a learnt state."""
    ln0: bool = True
    """Whether embeddings pass the norm `ln0`; false: the table holds them as they come out of
    it."""

    def _conflicts(self) -> Iterator[str]:
        if not (isinstance(self.version, str) and self.version in VERSION_SETTINGS):
            choices, text = one_of(VERSION_SETTINGS), str(self.version)
            hint = f' (text: "{text}")' if text in VERSION_SETTINGS else ""
            yield f"model.version = {literal(self.version)}: {choices}{hint}"
            return
        own = VERSION_SETTINGS[self.version].optional
        others = {name for row in VERSION_SETTINGS.values() for name in row.optional} - {*own}
        unknown = [
            f"model.{key.name}"
            for key in fields(self)
            if key.name in others and getattr(self, key.name) != key.default
        ]
        if unknown:
            yield (
                f'{", ".join(unknown)}: model.version = "{self.version}" has no such setting;'
                " leave it out"
            )
        if "head_size" not in others and self.width % self.head_size:
            yield (
                f"model.width = {self.width} is not a multiple of"
                f" model.head_size = {self.head_size}"
            )

    @property
    def ffn(self) -> int:
        """Hidden width of the channel mix, with the default resolved."""
        of = VERSION_SETTINGS[self.version]
        rule = max(int(of.ffn_ratio * self.width) // of.ffn_multiple, 1) * of.ffn_multiple
        return self.ffn_width or rule

    def rank(self, name: str) -> int:
        """A setting `rank_...`, with the default resolved."""
        return getattr(self, name) or VERSION_SETTINGS[self.version].ranks[name](self.width)

    def _resolved(self) -> tuple:
        ranks = {name: self.rank(name) for name in VERSION_SETTINGS[self.version].ranks}
        return tuple((vars(self) | {"ffn_width": self.ffn} | ranks).values())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ModelConfig) and self._resolved() == other._resolved()

    def __hash__(self) -> int:
        return hash(self._resolved())

    @property
    def heads(self) -> int:
        """Heads of the time mix; in version 4 each channel is one."""
        sized = "head_size" in VERSION_SETTINGS[self.version].optional
        return self.width // self.head_size if sized else self.width


@dataclass(frozen=True)
class DataConfig(_Table):
    """The text, and how it is cut into tokens."""

    source: str = "stdlib"
    """`stdlib` (this interpreter's own library), a file, a folder or a glob (text and JSON, also as
    `.gz` or `.zst`; Parquet), a folder of Hugging Face's `datasets`, or a binidx pair (`.bin` and
    `.idx`)."""
    mixture: dict[str, float] = dataclasses.field(default_factory=dict)
    """Several sources instead: source -> weight, its share of the samples."""
    field: str = "text"
    """The field of JSON records or table rows that holds the text or the turns of a conversation,
    or with a comma a question and its answer; `text`, where they have none: `messages`,
    `instruction,output` and the like (docs/data.md). Empty: JSON is text like any other."""
    strict: bool = False
    """Whether a record without text (null, half a surrogate pair) is an error; otherwise up to 1 %
    of them are left out."""
    document: Literal["file", "line"] = "file"
    """Plain text: one document per file, or one per line."""
    heldout: Annotated[float, "at least 0 and below 1"] = 0.03
    """Fraction of the documents held out for evaluation, chosen by a hash of their path (or
    text)."""
    tokenizer: str = "bpe"
    """`bytes`, `bpe` (trained on the training documents), `world` (RWKV World), or a path to a
    `tokenizer.json` or an RWKV vocabulary (`.txt`)."""
    special_tokens: bool = False
    """Names of special tokens in a text (`<|im_start|>`) are those tokens of the `tokenizer.json`,
    instead of letters."""
    bpe_vocab_size: Annotated[int, "between 512 and 65536"] = 4096
    sampler: Literal["shuffle", "magic_prime", "sequential"] = "shuffle"
    """What a row of the batch reads: windows in random order, each once per epoch; the official
    trainers' windows in their order; or its own part of the text from start to end."""
    packing: Literal["stream", "documents"] = "stream"
    """Windows cut from the stream of documents, or whole documents packed into contexts."""
    reset: bool = True
    """Documents start from a fresh state; false: the state carries over from one document to the
    next, as in the official trainers."""
    train_on: Literal["all", "answers", "spans"] = "all"
    """The tokens whose prediction is trained: all; the assistant's in conversations; or those in
    the field `spans` of a JSON line, [[first, last + 1], ...] in characters."""
    train_stops: bool = True
    """Replies begin as in a chat (flower), and with "answers" are trained with all that it stops
    at, the name of the next role included; false: as before December 2026."""
    template: Literal["g1", "world", "raven", "flower"] = "g1"
    """How conversations are written as text."""
    exit_tokens: Annotated[int, "0 or more"] = 0
    """Tokens after which the learning-rate schedule ends, and with train.steps = 0 the run."""
    cache: str = ""
    """Folder of the token cache; empty: `$XDG_CACHE_HOME/rwkv_jax`, or `~/.cache/rwkv_jax`."""

    @property
    def cache_root(self) -> Path:
        """The folder of the token cache, with the default resolved."""
        if self.cache:
            return Path(self.cache).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rwkv_jax"

    def _conflicts(self) -> Iterator[str]:
        if not self.source:
            yield ("data.source is empty: a path, a glob or 'stdlib'")
        for name, weight in self.mixture.items():
            if not weight > 0:
                yield f"data.mixture: the weight of {literal(name)} is {weight}: above 0"
        if self.mixture and self.source != "stdlib":
            yield (f"data.source = {self.source} and data.mixture: leave one out")
        if len(self.mixture) > 1 and self.sampler != "shuffle":
            yield (
                f'data.sampler = "{self.sampler}" is an order of one source; data.mixture has'
                f" {len(self.mixture)}"
            )
        if self.sampler == "magic_prime" and self.heldout:
            yield (
                f'data.heldout = {self.heldout}: data.sampler = "magic_prime" is the order of all'
                " tokens; set it to 0"
            )
        if self.packing == "documents" and not (self.sampler == "shuffle" and self.reset):
            yield 'data.packing = "documents" needs data.sampler = "shuffle" and data.reset = true'


@dataclass(frozen=True)
class OptimizerConfig(_Table):
    """The optimizer and its schedule; the defaults are the official version-7 recipe.

    Source: RWKV-LM, `RWKV-v7/train_temp`.
    """

    peak_lr: Annotated[float, "above 0"] = 6e-4
    final_lr: Annotated[float, "above 0"] = 6e-5
    warmup_steps: Annotated[int, "0 or more"] = 10
    beta1: Annotated[float, "at least 0 and below 1"] = 0.9
    beta2: Annotated[float, "at least 0 and below 1"] = 0.99
    eps: Annotated[float, "above 0"] = 1e-18
    weight_decay: Annotated[float, "0 or more"] = 0.001
    clip: Annotated[float, "0 or more"] = 1.0
    """Global gradient norm; 0 does not clip."""
    name: Literal["adamw", "lion", "muon"] = "adamw"
    """Lion wants a third to a tenth of AdamW's rate, and several times its weight decay. Muon
    trains the layers' square and long matrices, at AdamW's rate; AdamW the rest."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """From the peak after the warm-up: half a cosine to final_lr; a line to it; no change; or no
    change until the last part of the run, `decay_share`, and then a line to final_lr."""
    decay_share: Annotated[float, "between 0 and 1"] = 0.2
    """Of "wsd": the share of the steps in which the rate falls."""

    def _conflicts(self) -> Iterator[str]:
        if self.final_lr > self.peak_lr:
            limit = f"at most optimizer.peak_lr = {self.peak_lr}"
            yield f"optimizer.final_lr = {self.final_lr}: {limit}"


@dataclass(frozen=True)
class TrainConfig(_Table):
    """Length, batch and precision of the run, and what it writes to disk."""

    output: str = "runs/demo"
    init: str = ""
    """Weights to start from, in any format that `load` reads; empty: freshly initialised. The model
    and its tokenizer are theirs: what is stated of them must match, or be left out; sizes and
    "bpe" in a config file are ignored."""
    init_moments: bool = False
    """Start from the optimizer's moments of the checkpoint in train.init too, as a branch does."""
    freeze: list[str] = dataclasses.field(default_factory=list)
    """Official names of parameters that are not trained, or not adapted, with `*` and `?`:
    "emb.weight", "blocks.*.ln?.*", "blocks.[0-5].*"."""
    seed: Annotated[int, "between 0 and 4294967295"] = 0
    steps: Annotated[int, "0 or more"] = 1000
    """Optimizer steps; the schedule ends at the last one, or at `data.exit_tokens`. 0: until
    `data.exit_tokens`."""
    epochs: Annotated[float, "0 or more"] = 0.0
    """The length in passes over the data; 0: train.steps says it."""
    batch: Annotated[int, "at least 1"] = 8
    """Sequences per optimizer step, all accumulation parts together."""
    context: Annotated[int, "at least 1"] = 512
    """Tokens per sequence."""
    accumulate: Annotated[int, "at least 1"] = 1
    """Parts that a batch is computed in; the gradient is that of the whole batch."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type; parameters, optimizer, decay, recurrent state and loss are always float32."""
    remat: Literal["none", "dots", "wkv", "block", "offload"] = "dots"
    """What is saved for the backward pass: everything; the results of matrix products and of the
    recurrence; those of the recurrence alone; each layer's input alone; or as `dots`, on the
    host."""
    wkv: Literal[
        "auto", "scan", "chunked", "associative", "pallas_gpu", "pallas_tpu", "mosaic_gpu"
    ] = "auto"
    l2wrap: Annotated[float, "0 or more"] = 1e-4
    """Official pull on the largest logit (RWKV-LM `L2Wrap`); 0 is off."""
    z_loss: Annotated[float, "0 or more"] = 0.0
    """Weight of the squared log-partition added to the loss."""
    log_every: Annotated[int, "at least 1"] = 10
    eval_every: Annotated[int, "0 or more"] = 0
    """Steps between evaluations on the held-out documents; 0 evaluates at the end only."""
    evaluations: Annotated[int, "0 or more"] = 0
    """How many evaluations there are, in equal distances, instead of train.eval_every."""
    eval_tokens: Annotated[int, "at least 1"] = 65536
    """Held-out tokens per such evaluation; the last one reads all of them."""
    checkpoint_every: Annotated[int, "at least 1"] = 200
    logger: Literal["none", "tensorboard", "wandb"] = "none"
    """Where the metrics go besides metrics.jsonl: TensorBoard's files in `events` of the run's
    folder, or Weights & Biases."""
    tensorboard: bool = False
    """The same as logger = "tensorboard"."""
    keep: Annotated[int, "at least 1"] = 2
    """How many checkpoints are kept: the newest ones."""
    keep_best: bool = False
    """Also keep the one that did best on held-out text (a checkpoint is then saved where an
    evaluation is the best so far)."""
    patience: Annotated[int, "0 or more"] = 0
    """Stop after so many evaluations in a row without a new best; 0: never."""
    carry_state: bool = False
    """Each row starts from the state that its previous step ended in, without gradient (needs
    data.sampler = "sequential")."""

    def _conflicts(self) -> Iterator[str]:
        if self.batch % self.accumulate:
            yield (
                f"train.batch = {self.batch} does not divide into train.accumulate ="
                f" {self.accumulate} equal parts"
            )
        if self.init_moments and not self.init:
            yield "train.init_moments = true: whose? name a checkpoint of a run in train.init"
        evaluates = self.eval_every or self.evaluations
        if self.patience and not evaluates:
            yield f"train.patience = {self.patience} counts evaluations: set train.evaluations"
        if self.keep_best and not evaluates:
            yield "train.keep_best = true compares evaluations: set train.evaluations"
        if not self.output:
            yield ("train.output is empty: the run's folder")
        if re.match(r"[a-z][a-z0-9+.-]+://", self.output):
            yield (
                f"train.output = {self.output}: checkpoints are not written to URLs; name a folder"
                " (a bucket can be mounted as one: gcsfuse, mountpoint-s3)"
            )


@dataclass(frozen=True)
class TuneConfig(_Table):
    """What of a model is trained: all of it, or something small beside it (docs/tuning.md)."""

    method: Literal["full", "lora", "state"] = "full"
    """All parameters (but train.freeze); a low-rank change of matrices; or the state that documents
    start from (versions 5 to 7). The last two leave the weights in train.init as they are, and a
    checkpoint holds no copy of them."""
    targets: list[str] = dataclasses.field(default_factory=lambda: ["att", "ffn"])
    """Matrices that are changed, by official names without the layer, with `*` and `?`: "att.key",
    "ffn.*"; "att" and "ffn" are all of a mix."""
    layers: str = ""
    """Layers whose matrices are changed, "12:24" for 12 to 23; empty: all."""
    rank: Annotated[int, "at least 1"] = 16
    alpha: Annotated[float, "above 0"] = 32.0
    """The change is scaled by alpha / rank."""
    rslora: bool = False
    """Scale it by alpha / sqrt(rank) (arXiv:2312.03732)."""
    lora_plus: Annotated[float, "above 0"] = 1.0
    """The learning rate of the second matrix over that of the first (arXiv:2402.12354: 16)."""
    also: list[str] = dataclasses.field(default_factory=list)
    """Parameters that are trained whole besides, by names as in targets; "ln" is all norms."""
    base: Literal["stored", "float32", "bfloat16"] = "stored"
    """The type in which the frozen weights are held: that of the file, or another."""

    def _conflicts(self) -> Iterator[str]:
        if self.layers and not re.fullmatch(r"(-?\d+)?:(-?\d+)?", self.layers):
            yield f"tune.layers = {literal(self.layers)}: two numbers with a colon, as 12:24"
        lora = self.method == "lora"
        used = ("base",) if self.method == "state" else ()
        for key in () if lora else dataclasses.fields(self):
            default = key.default_factory() if callable(key.default_factory) else key.default
            value = getattr(self, key.name)
            if key.name not in ("method", *used) and value != default:
                setting = f"tune.{key.name} = {literal(value)}"
                yield f'{setting}: has no effect with tune.method = "{self.method}"; set "lora"'
        if lora and not (self.targets or self.also):
            yield 'tune.targets is empty: there is nothing to train; name some, as "att"'


@dataclass(frozen=True)
class EvalConfig(_Table):
    """What is measured at every evaluation besides the held-out text: name -> source or file."""

    texts: dict[str, str] = dataclasses.field(default_factory=dict)
    """Bits per byte of other texts, each as data.source."""
    choices: dict[str, str] = dataclasses.field(default_factory=dict)
    """Accuracy on files of multiple choice, as `eval --choices` reads them."""
    lambada: dict[str, str] = dataclasses.field(default_factory=dict)
    """Accuracy on files of texts whose last word is to be found, as `eval --lambada`."""

    def _conflicts(self) -> Iterator[str]:
        names = [*self.texts, *self.choices, *self.lambada]
        for name in {x for x in names if names.count(x) > 1}:
            yield f"eval: two sets are called {literal(name)}; give each a name of its own"
        for name in names:
            if not re.fullmatch(r"[\w.-]+", name):
                yield f"eval: {literal(name)}: a name has letters, digits, dots and dashes only"


@dataclass(frozen=True)
class MeshConfig(_Table):
    """Devices along each mesh axis (`rwkv_jax.sharding`); -1: as many as are left.

    Each axis names what it shards.
    """

    data: Annotated[int, "at least 1, or -1 (the rest)"] = 1
    """The batch."""
    fsdp: Annotated[int, "at least 1, or -1 (the rest)"] = -1
    """The batch, and with it parameters, gradients and optimizer state."""
    tensor: Annotated[int, "at least 1, or -1 (the rest)"] = 1
    """Heads, the channel mix's hidden width, the vocabulary."""
    sequence: Annotated[int, "at least 1, or -1 (the rest)"] = 1
    """Time."""

    def _conflicts(self) -> Iterator[str]:
        rest = [f"mesh.{name}" for name, size in vars(self).items() if size == -1]
        if len(rest) > 1:
            yield f"{' and '.join(rest)} are -1: only one can be the rest, set the others"


@dataclass(frozen=True)
class SampleConfig(_Table):
    """The text printed at the end of a run."""

    prompt: str = ""
    tokens: Annotated[int, "0 or more"] = 160
    temperature: Annotated[float, "0 or more"] = 1.0
    top_p: Annotated[float, "between 0 and 1"] = 0.7


@dataclass(frozen=True)
class Config(_Table):
    """One run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    def _conflicts(self) -> Iterator[str]:
        if not (self.train.steps or self.data.exit_tokens):
            yield "train.steps = 0 leaves the run's length to data.exit_tokens, which is 0: set one"
        if self.tune.method == "state" and self.train.carry_state:
            yield 'tune.method = "state" tunes where documents start: set train.carry_state = false'
        if self.train.carry_state and self.data.sampler != "sequential":
            yield 'train.carry_state = true needs data.sampler = "sequential": rows that continue'
        if self.data.sampler == "magic_prime" and MINI_EPOCH % self.train.batch:
            yield (
                f"train.batch = {self.train.batch} does not divide {MINI_EPOCH}: data.sampler ="
                ' "magic_prime" has mini-epochs of that many samples, which must be whole steps'
            )


def one_of(choices: Iterable[str]) -> str:
    """What is allowed, where that is a list of strings."""
    return "one of " + ", ".join(literal(choice) for choice in choices)


def key_literal(name: str) -> str:
    """A key as TOML writes it."""
    return name if re.fullmatch(r"[\w-]+", name, re.ASCII) else literal(name)


def literal(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        pairs = ", ".join(f"{key_literal(key)} = {literal(x)}" for key, x in value.items())
        return f"{{ {pairs} }}" if pairs else "{}"
    if isinstance(value, list):
        return f"[{', '.join(map(literal, value))}]"
    if isinstance(value, str):  # TOML's escapes are JSON's, and it wants DEL escaped too
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value)
