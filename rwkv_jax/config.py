"""The schema and the defaults of a run: frozen dataclasses; TOML files and dotted overrides fill them.

A config file only names what differs from the defaults below. `load_config` is strict: an unknown key, a
wrong type or an impossible combination raises `ConfigError`, which names the key, the value and what is
allowed, before anything is compiled or written.
"""

from dataclasses import dataclass, field
from typing import Literal


class ConfigError(ValueError):
    """A config that cannot be run: the message names the key, the value and what is allowed."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True)
class ModelConfig:
    """The architecture: everything that decides shapes, and nothing else. It travels with the checkpoint."""

    version: Literal["4", "7"] = "7"
    layers: int = 12
    width: int = 768
    vocab_size: int = 0
    """Rows of the embedding; 0 takes what the tokenizer needs."""
    ffn_width: int = 0
    """Hidden width of the channel mix; 0 is the official 4 x width."""
    head_size: int = 64
    """Version 7: channels per head."""
    rank_w: int = 0
    """Version 7: ranks of the low-rank decay, in-context learning rate, value and gate; 0 is the official rule."""
    rank_a: int = 0
    rank_v: int = 0
    rank_g: int = 0

    def __post_init__(self):
        for name in ("layers", "width"):
            _require(getattr(self, name) >= 1, f"model.{name} = {getattr(self, name)}: at least 1")
        for name in ("vocab_size", "ffn_width", "rank_w", "rank_a", "rank_v", "rank_g"):
            _require(getattr(self, name) >= 0, f"model.{name} = {getattr(self, name)}: 0 (automatic) or more")
        if self.version == "7":
            _require(
                self.head_size >= 1 and self.width % self.head_size == 0,
                f"model.width = {self.width} is not a multiple of model.head_size = {self.head_size}",
            )
        else:
            given = [f for f in ("rank_w", "rank_a", "rank_v", "rank_g") if getattr(self, f)]
            given += ["head_size"] if self.head_size != 64 else []
            _require(not given, f"model.{', model.'.join(given)}: only version 7 has it, model.version = {self.version}")

    @property
    def ffn(self) -> int:
        """The channel mix's hidden width, with the default resolved."""
        return self.ffn_width or 4 * self.width

    @property
    def heads(self) -> int:
        return self.width // self.head_size


@dataclass(frozen=True)
class DataConfig:
    """Which text, cut into which tokens."""

    source: str = "stdlib"
    """`stdlib` (this interpreter's own library), a file, a folder, a glob, or `.jsonl[.gz|.zst]`."""
    field: str = "text"
    """The field of a JSON line that holds the text."""
    document: Literal["file", "line"] = "file"
    """Plain text: one document a file, or one a line."""
    heldout: float = 0.03
    """Share of the documents held out for evaluation, chosen by a hash of their path (or text)."""
    tokenizer: str = "bpe"
    """`bytes`, `bpe` (trained on the training documents), `world` (RWKV World), or a path to a `tokenizer.json`."""
    bpe_vocab_size: int = 4096
    cache: str = ""
    """Folder of the token cache; empty: `$XDG_CACHE_HOME/rwkv_jax`, or `~/.cache/rwkv_jax`."""

    def __post_init__(self):
        _require(bool(self.source), "data.source is empty: a path, a glob or 'stdlib'")
        _require(0.0 <= self.heldout < 1.0, f"data.heldout = {self.heldout}: at least 0 and below 1")
        _require(
            512 <= self.bpe_vocab_size <= 65536,
            f"data.bpe_vocab_size = {self.bpe_vocab_size}: between 512 and 65536",
        )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule; the defaults are the official version-7 recipe (RWKV-LM, RWKV-v7/train_temp)."""

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
            _require(getattr(self, name) > 0, f"optimizer.{name} = {getattr(self, name)}: above 0")
        for name in ("warmup_steps", "weight_decay", "clip"):
            _require(getattr(self, name) >= 0, f"optimizer.{name} = {getattr(self, name)}: 0 or more")
        for name in ("beta1", "beta2"):
            _require(0 <= getattr(self, name) < 1, f"optimizer.{name} = {getattr(self, name)}: at least 0 and below 1")


@dataclass(frozen=True)
class TrainConfig:
    """How the run goes: its length, batch, precision, and what it leaves on disk."""

    output: str = "runs/demo"
    seed: int = 0
    steps: int = 1000
    """Optimizer steps; the schedule ends at the last one."""
    batch: int = 8
    """Sequences per optimizer step, over all accumulation parts."""
    context: int = 512
    """Tokens per sequence."""
    accumulate: int = 1
    """Parts that a batch is computed in; the gradient is that of the whole batch."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type; parameters, optimizer, decay, recurrent state and loss are float32 always."""
    remat: bool = False
    """Keep only each layer's input and recompute the rest in the backward pass."""
    wkv: Literal["auto", "scan", "chunked", "associative"] = "auto"
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
    keep: int = 2
    """Checkpoints kept: the newest ones."""

    def __post_init__(self):
        for name in ("steps", "batch", "context", "accumulate", "log_every", "eval_tokens", "checkpoint_every", "keep"):
            _require(getattr(self, name) >= 1, f"train.{name} = {getattr(self, name)}: at least 1")
        for name in ("seed", "eval_every", "l2wrap", "z_loss"):
            _require(getattr(self, name) >= 0, f"train.{name} = {getattr(self, name)}: 0 or more")
        _require(
            self.batch % self.accumulate == 0,
            f"train.batch = {self.batch} does not divide into train.accumulate = {self.accumulate} equal parts",
        )
        _require(bool(self.output), "train.output is empty: the run's folder")


@dataclass(frozen=True)
class SampleConfig:
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
class Config:
    """One run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
