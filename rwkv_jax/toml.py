"""Configs as TOML: reading files and command-line overrides strictly, and writing.

Importing this module needs the standard library alone: pydantic is imported by the first parse.
"""

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from rwkv_jax.config import (
    VERSION_SETTINGS,
    Config,
    ConfigError,
    key_literal,
    literal,
    one_of,
)

TYPED = "command line"
"""Origin of a setting that an override gave."""

ELSEWHERE = {
    "optimizer.peak_lr": "lr learning_rate lr_init max_lr",
    "optimizer.final_lr": "lr_final min_lr",
    "optimizer.warmup_steps": "warmup num_warmup_steps warmup_ratio",
    "optimizer.weight_decay": "wd",
    "optimizer.beta1": "adam_beta1",
    "optimizer.beta2": "adam_beta2",
    "optimizer.eps": "adam_eps adam_epsilon",
    "optimizer.clip": "max_grad_norm grad_clip gradient_clip_val",
    "optimizer.schedule": "lr_scheduler lr_scheduler_type lr_schedule scheduler",
    "optimizer.name": "optim optimizer",
    "train.epochs": "num_epochs num_train_epochs epoch_count max_epochs",
    "train.steps": "max_steps total_steps num_steps",
    "train.batch": "batch_size bsz micro_bsz train_batch_size per_device_train_batch_size",
    "train.context": "ctx_len context_length seq_len max_length max_seq_length block_size",
    "train.accumulate": "gradient_accumulation_steps accumulate_grad_batches grad_accum",
    "train.remat": "grad_cp gradient_checkpointing",
    "train.dtype": "precision bf16 fp16 mixed_precision",
    "train.output": "output_dir proj_dir out_dir run_dir",
    "train.init": "load_model model_name model_name_or_path base_model pretrained checkpoint",
    "train.eval_every": "eval_steps eval_interval eval_strategy",
    "train.checkpoint_every": "save_steps save_interval epoch_save",
    "train.log_every": "logging_steps log_interval",
    "train.keep": "save_total_limit",
    "train.keep_best": "load_best_model_at_end",
    "train.patience": "early_stopping early_stopping_patience",
    "train.logger": "wandb report_to use_wandb",
    "train.freeze": "frozen lora lora_r lora_config peft",
    "data.source": "dataset data_file data_path train_file train_data path",
    "data.exit_tokens": "my_exit_tokens",
    "data.train_on": "train_on_inputs mask_prompt assistant_only_loss completion_only_loss",
    "data.template": "chat_template prompt_template",
    "data.packing": "packed sample_packing",
    "model.layers": "n_layer n_layers num_hidden_layers num_layers",
    "model.width": "n_embd hidden_size d_model dim",
    "model.head_size": "head_dim",
}
"""Our settings, and what other trainers call them."""
_OURS = {theirs: ours for ours, names in ELSEWHERE.items() for theirs in names.split()}

_SCHEMA = {
    section.name: {key.name: key.type for key in fields(getattr(Config(), section.name))}
    for section in fields(Config)
}
"""Section -> key -> annotation."""


def load_config(path: Path | str | None, overrides: Sequence[str] = ()) -> Config:
    """The run that a TOML file describes (None: the defaults), with overrides applied.

    An override is `section.key=value`, as typed on a command line; the value is TOML, and anything
    that is not valid TOML is taken as text, so `data.tokenizer=bytes` needs no quotes. A typed
    `optimizer.peak_lr` below the final rate of the file makes that a tenth of it.
    Raises `ConfigError` for a file that cannot be read and for whatever `parse_config` rejects.
    """
    return load_stated(path, overrides)[0]


def load_stated(
    path: Path | str | None, overrides: Sequence[str] = ()
) -> tuple[Config, dict[str, str]]:
    """`load_config`'s result, and the origin of each setting that was given: its name -> the file's
    path, or `TYPED` for an override."""
    tables = {} if path is None else _read_toml(Path(path))
    # The file on its own first, so that an error says which of the two to correct.
    config = parse_config(tables, origin="" if path is None else str(path))
    stated = {f"{section}.{key}": str(path) for section, keys in tables.items() for key in keys}
    if not overrides:
        return config, stated
    stated |= {_apply(tables, override): TYPED for override in overrides}
    if stated.get("optimizer.peak_lr") == TYPED and stated.get("optimizer.final_lr") != TYPED:
        _lower_final_lr(tables["optimizer"], config)
    origin = "overrides" if path is None else f"{path} with overrides"
    return parse_config(tables, origin=origin), stated


def parse_config(tables: Mapping[str, Any], *, origin: str = "") -> Config:
    """The run described by nested mappings, as read from TOML; `origin` opens the error message.

    Raises `ConfigError`, one line that joins every problem found, each with its key, its value and
    what is allowed. An integer is accepted for a float, and a number for `model.version`.

    >>> parse_config({"model": {"layers": 2}}).model.layers
    2
    """
    from pydantic import ValidationError

    model = tables.get("model")
    if isinstance(model, Mapping) and str(model.get("version")) in VERSION_SETTINGS:
        tables = {**tables, "model": {**model, "version": str(model["version"])}}
    try:
        # By way of JSON: in strict mode pydantic fills a dataclass from Python instances only.
        return _adapter().validate_json(json.dumps(tables, default=_unsupported))
    except ValidationError as error:
        problems = [_problem(details, tables) for details in error.errors(include_url=False)]
        raise ConfigError((f"{origin}: " if origin else "") + "; ".join(problems)) from None


def to_toml(config: Config) -> str:
    """The whole config as TOML, defaults included; parsing it again gives an equal config."""
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
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        near = get_close_matches(path.name, _configs(path.parent), n=1)
        hint = f"; did you mean {path.with_name(near[0])}?" if near else "; give a TOML file"
        raise ConfigError(f"{path}: no such file{hint}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give a TOML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8; TOML is UTF-8 text") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}{_line(path, str(error))}") from None


def _line(path: Path, message: str) -> str:
    """The line that an error of tomllib is about, such as a key that is given twice."""
    place = re.search(r"at line (\d+)", message)
    lines = path.read_text(encoding="utf-8-sig", errors="replace").split("\n")
    number = int(place[1]) if place else 0
    # A key that is given twice is noticed at its end, which may be the start of the next line.
    found = next((x.strip() for x in reversed(lines[:number]) if x.strip()), "")
    twice = "; a key or a section is given twice" if "overwrite" in message else ""
    return f": {found[:60]}{twice}" if found else ""


def _configs(folder: Path) -> list[str]:
    return [path.name for path in folder.glob("*.toml") if path.name != "pyproject.toml"]


def _apply(tables: dict[str, Any], override: str) -> str:
    """Applies an override to the tables in place; returns the name of its setting."""
    name, equals, text = override.partition("=")
    section, dot, key = (part.strip() for part in name.partition("."))
    if not (equals and dot):
        bare = equals and section and section not in _SCHEMA
        why = _unknown(section) if bare else "not written as section.key=value"
        if not equals and name.endswith(".toml"):
            why = "a second config file; give one, and settings as section.key=value"
        raise ConfigError(f"override {literal(override)}: {why}")
    value = _parse_value(text)
    kind = _SCHEMA.get(section, {}).get(key)
    if (kind is str or get_origin(kind) is Literal) and not isinstance(value, str):
        value = text  # sample.prompt=42 is the text "42"
    if kind == list[str] and not isinstance(value, list):
        value = [part.strip() for part in text.split(",") if part.strip()]
    tables[section] = {**tables.get(section, {}), key: value}
    return f"{section}.{key}"


def _lower_final_lr(table: dict[str, Any], config: Config) -> None:
    """Makes the final rate a tenth of a peak that was typed, if it would be above that."""
    peak, final = table["peak_lr"], table.get("final_lr", config.optimizer.final_lr)
    if isinstance(peak, int | float) and 0 < peak < final:
        table["final_lr"] = peak / 10


def _parse_value(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if parsed.keys() == {"value"} else text


def _unsupported(value: Any) -> Any:
    return [str(value)]  # a date, say: no setting takes it, and a list fails every type


_NEEDED = {
    "int_type": "must be an integer",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be a string",
    "dict_type": "must be a table { name = value, ... }",
    "list_type": 'must be a list of strings ["...", ...]',
}
"""pydantic's type errors in words."""


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
        needed = f"must be a table [{where[0]}]"
    elif where == ("model", "version"):
        needed = one_of(VERSION_SETTINGS)
    elif kind == "literal_error":
        needed = one_of(get_args(_SCHEMA[where[0]][where[1]]))
    else:
        needed = _NEEDED.get(kind, details["msg"])
    return f"{'.'.join(map(str, where))} = {literal(value)}: {needed}"


def _unknown(section: str, key: str | None = None) -> str:
    """An error message for a name that is not in the schema, with the one probably meant."""
    name = section if key is None else key
    allowed = list(_SCHEMA) if key is None else list(_SCHEMA[section])
    elsewhere = [f"{other}.{name}" for other, keys in _SCHEMA.items() if name in keys]
    elsewhere += [_OURS[name]] if name in _OURS else []
    likely = elsewhere[:1] or get_close_matches(name, allowed, n=1)
    remedy = f"did you mean {likely[0]}? (allowed: {{}})" if likely else "allowed: {}"
    written = ".".join(key_literal(part) for part in (section, key) if part is not None)
    noun = "section" if key is None else "setting"
    return f"{written} is not a {noun}; {remedy.format(', '.join(allowed))}"
