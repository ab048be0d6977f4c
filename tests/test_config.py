"""The loader is strict, says in one line what to correct, and `to_toml` is its inverse."""

import dataclasses
import tomllib
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from rwkv_jax.cli.train import DEFAULT
from rwkv_jax.config import (
    Config,
    ConfigError,
    DataConfig,
    EvalConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    SampleConfig,
    TrainConfig,
)
from rwkv_jax.errors import UserError
from rwkv_jax.toml import ELSEWHERE, load_config, parse_config, to_toml

REMATS = 'one of "none", "dots", "wkv", "block", "offload"'
VERSIONS = 'one of "4", "5.0", "5.1", "5.2", "6", "7", "7a"'

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))
TABLES = {
    "model": ModelConfig,
    "data": DataConfig,
    "optimizer": OptimizerConfig,
    "train": TrainConfig,
    "eval": EvalConfig,
    "mesh": MeshConfig,
    "sample": SampleConfig,
}


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Writes x.toml into an empty working directory and returns its name."""
    monkeypatch.chdir(tmp_path)

    def write(text: str | bytes) -> str:
        Path("x.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return "x.toml"

    return write


def message(*arguments) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(*arguments)
    assert isinstance(caught.value, UserError)
    text = str(caught.value)
    assert text.splitlines() == [text], "an error is one line"
    return text


# Reading


def test_an_empty_config_is_the_defaults(file):
    assert load_config(None) == load_config(file("")) == parse_config({}) == Config()


def test_a_file_names_only_what_differs(file):
    path = file('[model]\nversion = "4"\nlayers = 3\n\n[optimizer]\npeak_lr = 1e-3\n')
    expected = Config(
        model=ModelConfig(version="4", layers=3), optimizer=OptimizerConfig(peak_lr=1e-3)
    )
    assert load_config(path) == load_config(Path(path)) == expected


def test_every_setting_can_be_read():
    """Each setting gets a value other than its default, so that none is ignored or swapped."""
    other = {
        "model": dict(version="7a", layers=2, width=96, vocab_size=7, ffn_width=5, head_size=32)
        | dict(rank_w=1, rank_a=2, rank_v=3, rank_g=4, rank_embed=6)
        | dict(rank_mix=0, state_tuned=False, ln0=False),
        "data": dict(source="a", field="b", document="line", heldout=0.5, tokenizer="c")
        | dict(bpe_vocab_size=600, cache="d", mixture={}, sampler="sequential", packing="stream")
        | dict(reset=False, train_on="spans", template="world", exit_tokens=2**40)
        | dict(special_tokens=True, strict=True, train_stops=False),
        "optimizer": dict(peak_lr=2.0, final_lr=1.0, warmup_steps=3, beta1=0.4, beta2=0.5)
        | dict(eps=6.0, weight_decay=7.0, clip=8.0)
        | dict(name="lion", schedule="wsd", decay_share=0.5),
        "train": dict(output="a", init="b", seed=1, steps=2, batch=12, context=4, accumulate=3)
        | dict(dtype="bfloat16", remat="block", wkv="scan", l2wrap=0.5, z_loss=0.25, log_every=6)
        | dict(
            eval_every=7,
            eval_tokens=8,
            tensorboard=True,
            checkpoint_every=9,
            keep=10,
            carry_state=True,
        )
        | dict(init_moments=True, freeze=["a", "b*"], epochs=1.5, logger="wandb", keep_best=True)
        | dict(patience=3, evaluations=5),
        "tune": dict(method="lora", targets=["att.key"], layers="1:2", rank=3, alpha=4.0)
        | dict(rslora=True, lora_plus=16.0, also=["ln"], base="bfloat16"),
        "eval": dict(texts={"x": "a"}, choices={"y": "b"}, lambada={"z": "c"}),
        "mesh": dict(data=-1, fsdp=2, tensor=3, sequence=4),
        "sample": dict(prompt="p", tokens=1, temperature=0.5, top_p=0.25),
    }
    config = parse_config(other)
    assert dataclasses.asdict(config) == other
    for section, table in TABLES.items():
        assert set(other[section]) == {f.name for f in dataclasses.fields(table)}
    sixth = dict(version="6", rank_mix=5, rank_w=7, state_tuned=True)
    model = dataclasses.asdict(parse_config({"model": sixth}).model)
    assert {key: model[key] for key in sixth} == sixth
    mixed = dict(mixture={"a": 0.5, "b": 2.0}, tokenizer="world", packing="documents")
    data = dataclasses.asdict(parse_config({"data": mixed}).data)
    assert {key: data[key] for key in mixed} == mixed


@pytest.mark.parametrize("version", ["5.0", "5.1", "5.2"])
def test_a_version_may_be_written_as_a_number(version):
    assert load_config(None, [f"model.version={version}"]).model.version == version
    assert parse_config({"model": {"version": float(version)}}).model.version == version


@pytest.mark.parametrize("name", ["train.steps", "optimizer.warmup_steps", "model.layers"])
def test_integers_that_no_array_can_hold_are_rejected(name):
    section, key = name.split(".")
    with pytest.raises(ConfigError, match=f"{name} = 9{{20}}: at most 2147483647"):
        parse_config({section: {key: int("9" * 20)}})
    assert parse_config({"train": {"seed": 2**32 - 1}}).train.seed == 2**32 - 1


def test_an_integer_is_a_fine_float():
    clip = parse_config({"optimizer": {"clip": 2}}).optimizer.clip
    assert clip == 2.0 and isinstance(clip, float)


@pytest.mark.parametrize("version", [4, "4"])
def test_a_version_may_be_written_as_an_integer(version):
    assert parse_config({"model": {"version": version}}).model.version == "4"


def test_reading_leaves_its_input_as_it_was():
    tables = {"model": {"version": 7}}
    parse_config(tables)
    assert tables == {"model": {"version": 7}}


# Overrides


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("train.steps=12", "train", "steps", 12),
        ("train.steps = 1_000", "train", "steps", 1000),
        ("optimizer.peak_lr=3e-4", "optimizer", "peak_lr", 3e-4),
        ("optimizer.clip=0", "optimizer", "clip", 0.0),
        ("train.freeze=emb.*, blocks.0.*", "train", "freeze", ["emb.*", "blocks.0.*"]),
        ('train.freeze=["a,b"]', "train", "freeze", ["a,b"]),
        ("train.epochs=3", "train", "epochs", 3.0),
        ("train.freeze=", "train", "freeze", []),
        ("train.remat=block", "train", "remat", "block"),
        ("model.version=4", "model", "version", "4"),
        ('model.version="4"', "model", "version", "4"),
        ("train.dtype=bfloat16", "train", "dtype", "bfloat16"),
        ("data.source=my text/*.py", "data", "source", "my text/*.py"),
        ("data.source=C:\\corpus", "data", "source", "C:\\corpus"),
        ('data.source="quoted"', "data", "source", "quoted"),
        ("data.source=a=b", "data", "source", "a=b"),
        ("data.cache=", "data", "cache", ""),
        ("sample.prompt=42", "sample", "prompt", "42"),
        ("sample.prompt=true", "sample", "prompt", "true"),
        ("sample.prompt=  return ", "sample", "prompt", "  return "),
        ("sample.prompt=1\ntokens=2", "sample", "prompt", "1\ntokens=2"),
        ('sample.prompt="a\\nb"', "sample", "prompt", "a\nb"),
    ],
)
def test_an_override(override, section, key, value):
    found = getattr(getattr(load_config(None, [override]), section), key)
    assert found == value and type(found) is type(value)


def test_a_typed_rate_below_the_final_one_lowers_it(file):
    path = file("[optimizer]\npeak_lr = 1e-3\nfinal_lr = 1e-4\n")
    for typed, rates in (
        (["optimizer.peak_lr=1e-5"], (1e-5, 1e-6)),
        (["optimizer.peak_lr=5e-4"], (5e-4, 1e-4)),
    ):
        found = load_config(path, typed).optimizer
        assert (found.peak_lr, found.final_lr) == pytest.approx(rates)
    assert load_config(None, ["optimizer.peak_lr=1e-5"]).optimizer.final_lr == pytest.approx(1e-6)
    assert "final_lr = 0.001: at most" in message(
        path, ["optimizer.peak_lr=1e-5", "optimizer.final_lr=1e-3"]
    )


def test_overrides_win_over_the_file_and_the_last_one_wins(file):
    path = file("[train]\nsteps = 5\nbatch = 6\n")
    config = load_config(path, ["train.steps=7", "train.steps=8", "sample.tokens=9"])
    assert (config.train.steps, config.train.batch, config.sample.tokens) == (8, 6, 9)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.steps", 'override "train.steps": not written as section.key=value'),
        ("=3", 'override "=3": not written as section.key=value'),
        ("train=3", 'override "train=3": not written as section.key=value'),
        (
            "b.toml",
            'override "b.toml": a second config file; give one, and settings as section.key=value',
        ),
        (
            "train.patience=2",
            "overrides: train.patience = 2 counts evaluations: set train.evaluations",
        ),
        (
            "train.init_moments=true",
            "overrides: train.init_moments = true: whose? name a checkpoint of a run in train.init",
        ),
        ("train.freeze=[1]", "overrides: train.freeze.0 = 1: must be a string"),
        ("eval.texts=3", "overrides: eval.texts = 3: must be a table { name = value, ... }"),
        (
            'eval.texts={"a b"="c"}',
            'overrides: eval: "a b": a name has letters, digits, dots and dashes only',
        ),
        (
            "train.output=gs://bucket/run",
            "overrides: train.output = gs://bucket/run: checkpoints are"
            " not written to URLs; name a folder (a bucket can be mounted as one: gcsfuse,"
            " mountpoint-s3)",
        ),
        (
            "steps=3",
            'override "steps=3": steps is not a section; did you mean train.steps? '
            "(allowed: model, data, optimizer, train, tune, eval, mesh, sample)",
        ),
        (
            "trian.steps=3",
            "overrides: trian is not a section; did you mean train? "
            "(allowed: model, data, optimizer, train, tune, eval, mesh, sample)",
        ),
        (
            "sample.top_q=0.5",
            "overrides: sample.top_q is not a setting; did you mean top_p? "
            "(allowed: prompt, tokens, temperature, top_p)",
        ),
        (
            "sample.a.b=1",
            'overrides: sample."a.b" is not a setting; allowed: prompt, tokens, temperature, top_p',
        ),
        ("train.steps=many", 'overrides: train.steps = "many": must be an integer'),
        ("train.steps=", 'overrides: train.steps = "": must be an integer'),
        ("train.steps=1e3", "overrides: train.steps = 1000.0: must be an integer"),
        ("train.steps=1\nx=2", 'overrides: train.steps = "1\\nx=2": must be an integer'),
        ("train.remat=true", f'overrides: train.remat = "true": {REMATS}'),
        ("optimizer.clip=nan", "overrides: optimizer.clip = nan: must be a finite number"),
        (
            "model.version=5",
            f'overrides: model.version = "5": {VERSIONS}',
        ),
        (
            "train.steps=0",
            "overrides: train.steps = 0 leaves the run's length to data.exit_tokens, which is 0:"
            " set one",
        ),
        ("train.batch=0", "overrides: train.batch = 0: at least 1"),
        (
            "data.mixture=3",
            "overrides: data.mixture = 3: must be a table { name = value, ... }",
        ),
        ("data.mixture={a='b'}", 'overrides: data.mixture.a = "b": must be a number'),
        (
            "train.carry_state=true",
            'overrides: train.carry_state = true needs data.sampler = "sequential": rows that'
            " continue",
        ),
    ],
)
def test_a_wrong_override(override, expected):
    assert message(None, [override]) == expected


def test_an_error_says_whether_file_or_overrides_are_wrong(file):
    path = file("[model]\nwidth = 128\n")
    wrong = "model.width = 100 is not a multiple of model.head_size = 64"
    assert message(path, ["model.width=100"]) == f"x.toml with overrides: {wrong}"
    path = file("[model]\nwidth = 100\n")
    assert message(path, ["train.steps=3"]) == f"x.toml: {wrong}"


# Rejecting


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "[optimizer]\npeek_lr = 1",
            "optimizer.peek_lr is not a setting; did you mean peak_lr? (allowed: peak_lr, "
            "final_lr, warmup_steps, beta1, beta2, eps, weight_decay, clip, name, schedule,"
            " decay_share)",
        ),
        (
            "[sample]\ncontext = 1",
            "sample.context is not a setting; did you mean train.context? "
            "(allowed: prompt, tokens, temperature, top_p)",
        ),
        (
            "[sample]\nzzz = 1",
            "sample.zzz is not a setting; allowed: prompt, tokens, temperature, top_p",
        ),
        (
            '[sample]\n"a\\nb" = 1',
            'sample."a\\nb" is not a setting; allowed: prompt, tokens, temperature, top_p',
        ),
        (
            "steps = 3",
            "steps is not a section; did you mean train.steps? "
            "(allowed: model, data, optimizer, train, tune, eval, mesh, sample)",
        ),
        ("train = 3", "train = 3: must be a table [train]"),
        ('[train]\nsteps = "many"', 'train.steps = "many": must be an integer'),
        ("[train]\nsteps = 1.0", "train.steps = 1.0: must be an integer"),
        ("[train]\nsteps = true", "train.steps = true: must be an integer"),
        ("[train]\nsteps = [1]", "train.steps = [1]: must be an integer"),
        ("[train]\nremat = 1", f"train.remat = 1: {REMATS}"),
        ("[data]\nheldout = '0.1'", 'data.heldout = "0.1": must be a number'),
        ("[data]\nheldout = true", "data.heldout = true: must be a number"),
        ("[data]\nsource = 3", "data.source = 3: must be a string"),
        ("[data]\nsource = 1979-05-27", "data.source = 1979-05-27: must be a string"),
        ("[optimizer]\neps = inf", "optimizer.eps = inf: must be a finite number"),
        (
            '[model]\nversion = "5"',
            f'model.version = "5": {VERSIONS}',
        ),
        (
            "[model]\nversion = 5",
            f"model.version = 5: {VERSIONS}",
        ),
        (
            "[model]\nversion = true",
            f"model.version = true: {VERSIONS}",
        ),
        ("[train]\ndtype = 'float16'", 'train.dtype = "float16": one of "float32", "bfloat16"'),
        (
            "[sample]\ntokens = 1.5\n\n[train]\nbatch = 3\naccumulate = 2",
            "train.batch = 3 does not divide into train.accumulate = 2 equal parts; "
            "sample.tokens = 1.5: must be an integer",
        ),
        (
            "[train]\nsteps = many\n",
            "not valid TOML: Invalid value (at line 2, column 9): steps = many",
        ),
        (b"# caf\xe9", "byte 5 is not UTF-8; TOML is UTF-8 text"),
    ],
)
def test_a_wrong_file(file, text, expected):
    assert message(file(text)) == f"x.toml: {expected}"


@pytest.mark.parametrize(
    ("section", "settings", "expected"),
    [
        ("mesh", {"data": 0}, "mesh.data = 0: at least 1, or -1 (the rest)"),
        (
            "mesh",
            {"data": -1, "fsdp": -1},
            "mesh.data and mesh.fsdp are -1: only one can be the rest, set the others",
        ),
        ("model", {"layers": 0}, "model.layers = 0: at least 1"),
        ("model", {"width": -64}, "model.width = -64: at least 1"),
        ("model", {"vocab_size": -1}, "model.vocab_size = -1: 0 (automatic) or more"),
        (
            "model",
            {"head_size": 0},
            "model.head_size = 0: at least 1",
        ),
        (
            "model",
            {"version": "4", "rank_w": 8, "head_size": 32},
            'model.head_size, model.rank_w: model.version = "4" has no such setting; leave it out',
        ),
        (
            "model",
            {"version": "4", "rank_mix": 8, "state_tuned": True},
            'model.rank_mix, model.state_tuned: model.version = "4" has no such setting;'
            " leave it out",
        ),
        ("data", {"source": ""}, "data.source is empty: a path, a glob or 'stdlib'"),
        ("data", {"heldout": 1.0}, "data.heldout = 1.0: at least 0 and below 1"),
        ("data", {"bpe_vocab_size": 511}, "data.bpe_vocab_size = 511: between 512 and 65536"),
        ("optimizer", {"peak_lr": 0.0}, "optimizer.peak_lr = 0.0: above 0"),
        (
            "optimizer",
            {"peak_lr": 1e-5},
            "optimizer.final_lr = 6e-05: at most optimizer.peak_lr = 1e-05",
        ),
        ("optimizer", {"clip": -1.0}, "optimizer.clip = -1.0: 0 or more"),
        ("optimizer", {"beta2": 1.0}, "optimizer.beta2 = 1.0: at least 0 and below 1"),
        ("train", {"keep": 0}, "train.keep = 0: at least 1"),
        ("train", {"seed": -1}, "train.seed = -1: between 0 and 4294967295"),
        ("train", {"seed": 2**32}, "train.seed = 4294967296: between 0 and 4294967295"),
        ("train", {"output": ""}, "train.output is empty: the run's folder"),
        ("sample", {"top_p": 1.5}, "sample.top_p = 1.5: between 0 and 1"),
        ("sample", {"temperature": -0.5}, "sample.temperature = -0.5: 0 or more"),
    ],
)
def test_impossible_values_fail_in_python_and_in_a_file_alike(section, settings, expected):
    with pytest.raises(ConfigError) as caught:
        TABLES[section](**settings)
    assert str(caught.value) == expected
    with pytest.raises(ConfigError) as caught:
        parse_config({section: settings}, origin="here")
    assert str(caught.value) == f"here: {expected}"


def test_a_file_that_cannot_be_read(file):
    assert message("configs/nowhere.toml") == (
        "configs/nowhere.toml: no such file; give a TOML file"
    )
    file("")
    assert message("y.toml") == "y.toml: no such file; did you mean x.toml?"
    Path("folder").mkdir()
    assert message("folder").startswith("folder: cannot be read (")


@pytest.mark.parametrize(
    "text, near, key",
    [
        ("[train]\nsteps = 1\nsteps = 2\n", "Cannot overwrite a value", "steps = "),
        ("[train]\nsteps = 1\n[train]\nbatch = 2\n", "Cannot declare", "[train]"),
        ("[train]\nsteps 5\n", "Expected '='", "steps 5"),
    ],
)
def test_invalid_toml_is_shown(file, text, near, key):
    found = message(file(text))
    assert found.startswith(f"x.toml: not valid TOML: {near}") and key in found
    assert ("given twice" in found) == ("overwrite" in near)


@pytest.mark.parametrize(
    "theirs, ours",
    [("lr", "optimizer.peak_lr"), ("num_train_epochs", "train.epochs"), ("wandb", "train.logger")]
    + [(theirs, ours) for ours, names in ELSEWHERE.items() for theirs in names.split()],
)
def test_settings_of_other_trainers_are_named(theirs, ours):
    section, key = ours.split(".")
    assert key in {f.name for f in dataclasses.fields(TABLES[section])}
    for place in ("train.", "optimizer.", "" if theirs not in TABLES else "data."):
        assert f"did you mean {ours}?" in message(None, [f"{place}{theirs}=1"])


# Writing


def number(low: float, high: float, **bounds):
    return st.floats(low, high, allow_nan=False, **bounds)


def drawn(table: type, **strategies):
    """Instances of a config table: small numbers and any text, unless a strategy is given."""
    chosen = {}
    for name, kind in get_type_hints(table).items():
        if name in strategies or name.startswith("__"):
            continue
        if get_origin(kind) is Literal:
            chosen[name] = st.sampled_from(get_args(kind))
        else:
            chosen[name] = {
                bool: st.booleans(),
                int: st.integers(1, 10**9),
                float: number(0, 1, exclude_min=True, exclude_max=True),
                str: st.text(min_size=1),
                list[str]: st.lists(st.text(), max_size=3),
            }[kind]
    return st.builds(table, **chosen | strategies)


MODELS = st.one_of(
    drawn(
        ModelConfig,
        version=st.just("7a"),
        head_size=st.just(32),
        width=st.just(96),
        rank_mix=st.just(0),
        state_tuned=st.just(False),
    ),
    st.builds(ModelConfig, version=st.just("6"), state_tuned=st.booleans()),
    st.builds(ModelConfig, version=st.just("4"), layers=st.integers(1, 99)),
)
VALID = {"bpe_vocab_size": st.integers(512, 65536), "cache": st.text()}
DATA = st.one_of(
    drawn(
        DataConfig,
        mixture=st.just({}),
        packing=st.just("stream"),
        sampler=st.sampled_from(["shuffle", "sequential"]),
        **VALID,
    ),
    drawn(
        DataConfig,
        source=st.just("stdlib"),
        mixture=st.dictionaries(st.text(min_size=1), number(0, 9, exclude_min=True), min_size=2),
        tokenizer=st.just("world"),
        sampler=st.just("shuffle"),
        reset=st.just(True),
        **VALID,
    ),
)
CONFIG = st.builds(
    Config,
    model=MODELS,
    data=DATA,
    optimizer=drawn(OptimizerConfig, peak_lr=number(1, 1e300)),
    train=drawn(
        TrainConfig, accumulate=st.just(1), carry_state=st.just(False), evaluations=st.just(0)
    ),
    eval=st.builds(EvalConfig, texts=st.dictionaries(st.from_regex(r"\A[a-z.]+\Z"), st.text())),
    mesh=drawn(MeshConfig, data=st.sampled_from([-1, 3])),
    sample=drawn(SampleConfig, prompt=st.text()),
)


# The type checks of lists draw an element.
@pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisDeprecationWarning")
@given(CONFIG)
def test_written_and_read_again_is_the_same(tmp_path_factory, config):
    path = tmp_path_factory.mktemp("config") / "config.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    assert load_config(path) == config


@pytest.mark.parametrize("text", ['"', "\\", "\x7f", "\x00\x1f", "a\r\nb\n", "\u2028\x85", "é 🙂"])
def test_awkward_text_survives_writing(tmp_path, text):
    config = Config(sample=SampleConfig(prompt=text))
    (tmp_path / "config.toml").write_text(to_toml(config), encoding="utf-8")
    assert load_config(tmp_path / "config.toml").sample.prompt == text


@given(st.text(), st.text(st.characters(exclude_characters="=")), st.text())
def test_any_override_is_accepted_or_rejected_in_one_line(section, key, value):
    assume(section not in TABLES)
    for override in (f"{section}.{key}={value}", f"train.{key}={value}", f"train.seed={value}"):
        try:
            load_config(None, [override])
        except ConfigError as error:
            assert "\n" not in str(error) and str(error)


# The files in configs/


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_of_the_project_loads_and_says_how_to_run_it(path):
    config = load_config(path)
    assert config.train.output == f"runs/{path.stem}", "two configs must not share a folder"
    name = "" if path.stem == "demo" else f" configs/{path.name}"
    assert path.read_text().startswith(f"# python train.py{name}")


def test_the_configs_that_must_be_there():
    assert {"demo", "demo-rwkv4", "rwkv7-0.1b"} <= {path.stem for path in CONFIGS}


def test_the_rwkv4_demo_is_the_demo_but_for_its_version():
    demo = load_config(ROOT / "configs/demo.toml")
    sibling = load_config(ROOT / "configs/demo-rwkv4.toml")
    assert (demo.model.version, sibling.model.version) == ("7", "4")
    assert sibling.data == demo.data
    assert (sibling.train.batch, sibling.train.context) == (demo.train.batch, demo.train.context)


def test_the_0_1b_config_is_the_official_recipe():
    config = load_config(ROOT / "configs/rwkv7-0.1b.toml")
    model, train, optimizer = config.model, config.train, config.optimizer
    assert (model.layers, model.width, model.vocab_size, model.head_size) == (12, 768, 65536, 64)
    assert (train.context, train.batch, train.dtype) == (512, 16, "bfloat16")
    data = config.data
    assert (train.steps, data.exit_tokens) == (0, 1_498_226_207), "one pass over MiniPile"
    assert (data.sampler, data.packing, data.reset) == ("magic_prime", "stream", False)
    assert data.heldout == 0
    assert optimizer == OptimizerConfig(6e-4, 6e-5, 10, 0.9, 0.99, 1e-18, 0.001, 1.0)
    assert config.data.tokenizer == "world"


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"version": "8"}, f'model.version = "8": {VERSIONS}'),
        ({"version": 7}, f'model.version = 7: {VERSIONS} (text: "7")'),
        ({"layers": 2.5}, "model.layers = 2.5: must be an integer"),
        ({"vocab_size": True}, "model.vocab_size = true: must be an integer"),
        ({"width": 100}, "model.width = 100 is not a multiple of model.head_size = 64"),
    ],
)
def test_the_constructor_is_as_strict_as_a_file(settings, expected):
    """Without the type checks that tests add to every call."""
    model = object.__new__(ModelConfig)
    vars(model).update(dataclasses.asdict(ModelConfig()) | settings)
    with pytest.raises(ConfigError) as caught:
        model.__post_init__()
    assert str(caught.value) == expected


def test_the_default_config_is_in_the_package():
    """So that `python -m rwkv_jax train` works wherever it is installed."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert DEFAULT.name in pyproject["tool"]["setuptools"]["package-data"]["rwkv_jax"]
    assert DEFAULT.parent == ROOT / "rwkv_jax"
    assert load_config(DEFAULT) == load_config(ROOT / "configs" / "demo.toml")
