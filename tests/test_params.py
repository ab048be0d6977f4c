"""The parameter tables: official initial values, optimizer groups, counts, keys.

The closed forms are written again here, in numpy, from the official trainer's description: version
4 from RWKV-LM `RWKV-v4neo/src/model.py`, versions 5 and 6 from `RWKV-v5/src/model.py`, version 7
from `RWKV-v7/train_temp/src/model.py`. Version 7a has no official trainer.
"""

import dataclasses
import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from markers import each_recurrence, versions

from rwkv_jax import models, params
from rwkv_jax.config import ModelConfig

LAYERS, WIDTH, SIZE = 3, 64, 16
CONFIGS = {
    version: ModelConfig(
        version=version,
        layers=LAYERS,
        width=WIDTH,
        vocab_size=96,
        head_size=64 if version == "4" else SIZE,
        state_tuned=version != "4",
        rank_embed=8 if version == "7a" else 0,
    )
    for version in models.VERSIONS
}


@functools.cache
def initial(version):
    """The initial parameters by path (`blocks.att.w0`), layers on the leading axis."""
    return named(initial_tree(version))


@functools.cache
def initial_tree(version):
    return models.init_params(CONFIGS[version], jax.random.key(0))


def named(tree, is_leaf=None):
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def closed_forms_4(layer):
    up, down = layer / (LAYERS - 1), 1 - layer / LAYERS
    i = np.arange(WIDTH)
    share = i / WIDTH
    return {
        "att.time_decay": -5 + 8 * (i / (WIDTH - 1)) ** (0.7 + 1.3 * up),
        "att.time_first": np.log(0.3) + 0.5 * np.array([(j + 1) % 3 - 1 for j in i]),
        "att.time_mix_k": share**down,
        "att.time_mix_v": share**down + 0.3 * up,
        "att.time_mix_r": share ** (0.5 * down),
        "ffn.time_mix_k": share**down,
        "ffn.time_mix_r": share**down,
    }


def closed_forms_5(version, layer):
    up, down = layer / (LAYERS - 1), 1 - layer / LAYERS
    heads = WIDTH // SIZE
    n = np.arange(WIDTH if version == "5.2" else heads)
    shape = (heads, SIZE) if version == "5.2" else (heads,)
    wave = 0.1 * np.array([(j + 1) % 3 - 1 for j in n]) if version == "5.2" else 0
    found = closed_forms_4(layer)
    del found["att.time_first"]
    found["att.time_decay"] = (-6 + 5 * (n / (len(n) - 1)) ** (0.7 + 1.3 * up)).reshape(shape)
    found["att.ln_x.weight"] = np.full(WIDTH, ((1 + layer) / LAYERS) ** 0.7)
    found["att.ln_x.bias"] = np.zeros(WIDTH)
    if version == "5.0":
        return found | {"att.time_first": np.full(heads, -3.0)}
    faaaa = up * (1 - n / (len(n) - 1)) + wave
    found["att.time_mix_g"] = (np.arange(WIDTH) / WIDTH) ** (0.5 * down)
    return found | {"att.time_faaaa": faaaa.reshape(shape)}


def closed_forms_6(layer):
    up, down = layer / (LAYERS - 1), 1 - layer / LAYERS
    share, old = np.arange(WIDTH) / WIDTH, closed_forms_5("5.2", layer)
    mixes = {
        **dict.fromkeys(["x", "w", "k"], 1 - share**down),
        "v": 1 - (share**down + 0.3 * up),
        **dict.fromkeys(["r", "g"], 1 - share ** (0.5 * down)),
    }
    return {
        **{f"att.time_maa_{name}": x for name, x in mixes.items()},
        "att.time_decay": old["att.time_decay"].ravel(),
        **{name: old[name] for name in ("att.time_faaaa", "att.ln_x.weight", "att.ln_x.bias")},
        "ffn.time_maa_k": 1 - share ** (down**3),
        "ffn.time_maa_r": 1 - share ** (down**3),
    }


def closed_forms_7(layer):
    up, down = layer / (LAYERS - 1), 1 - layer / LAYERS
    i = np.arange(WIDTH)
    share, line = i / WIDTH, i / (WIDTH - 1) - 0.5
    z = np.array([(j % SIZE - (SIZE - 1) / 2) / ((SIZE - 1) / 2) for j in i])
    zigzag = np.sign(z) * z**2
    return {
        "att.x_r": 1 - share ** (0.2 * down),
        "att.x_g": 1 - share ** (0.2 * down),
        "att.x_w": 1 - share ** (0.9 * down),
        "att.x_a": 1 - share ** (0.9 * down),
        "att.x_k": 1 - share ** (0.7 * down),
        "att.x_v": 1 - share ** (0.7 * down),
        "att.w0": -6 + 6 * (i / (WIDTH - 1)) ** (1 + up**0.3) + 0.5 + 2.5 * zigzag,
        "att.a0": -0.19 + 0.3 * zigzag + 0.4 * line,
        "att.v0": 0.73 - 0.4 * line,
        "att.k_k": 0.71 - 0.1 * line,
        "att.k_a": np.full(WIDTH, 1.02),
        "att.r_k": np.full((WIDTH // SIZE, SIZE), -0.04),
        "att.ln_x.weight": np.full(WIDTH, ((1 + layer) / LAYERS) ** 0.7),
        "att.ln_x.bias": np.zeros(WIDTH),
        "ffn.x_k": 1 - share ** (down**4),
    }


CLOSED_FORMS = {
    "4": closed_forms_4,
    "5.0": functools.partial(closed_forms_5, "5.0"),
    "5.1": functools.partial(closed_forms_5, "5.1"),
    "5.2": functools.partial(closed_forms_5, "5.2"),
    "6": closed_forms_6,
    "7": closed_forms_7,
    "7a": lambda layer: closed_forms_7(layer) | {"ffn.s0": np.ones(4 * WIDTH)},
}

ZERO = {
    "4": ["att.key", "att.receptance", "att.output", "ffn.value", "ffn.receptance"],
    "5.0": ["att.output", "ffn.value", "ffn.receptance"],
    "7": ["att.w1", "att.a1", "att.v1", "att.g1", "att.output", "ffn.value"],
}
ZERO |= {version: ZERO["5.0"] for version in ("5.1", "5.2")}
ZERO["6"] = [*ZERO["5.0"], "att.time_maa_w1", "att.time_decay_w1"]
ZERO["7a"] = [*ZERO["7"], "ffn.s1"]
ZERO |= {version: [*ZERO[version], "att.time_state"] for version in ZERO if version != "4"}

ORTHOGONAL = {
    "4": {"att.value": 1.0, "ffn.key": 2.0},
    "5.0": {"att.receptance": 1.0, "att.value": 1.0, "att.key": 0.1, "ffn.key": 1.0},
    "7": {
        "att.receptance": 1.0,
        "att.key": 0.1,
        "att.value": 1.0,
        "ffn.key": 1.0,
        "att.w2": 0.1,
        "att.a2": 0.1,
        "att.v2": 0.1,
        "att.g2": 0.1,
    },
}
ORTHOGONAL |= {version: ORTHOGONAL["5.0"] | {"att.gate": 0.1} for version in ("5.1", "5.2", "6")}
ORTHOGONAL["7a"] = ORTHOGONAL["7"] | {"ffn.s2": 0.1, "ffn.s_emb_x": 0.1}

UNIFORM = {
    "6": {"att.time_maa_w2": 0.01, "att.time_decay_w2": 0.01},
    "7a": {"ffn.s_emb": 1e-4},
}

NORMS = ["ln1", "ln2"]


@each_recurrence
def test_closed_forms(version):
    for layer in range(LAYERS):
        for name, expected in CLOSED_FORMS[version](layer).items():
            actual = np.asarray(initial(version)[f"blocks.{name}"][layer])
            np.testing.assert_allclose(
                actual, expected, rtol=1e-5, atol=2e-6, err_msg=f"{name} of layer {layer}"
            )


def check_orthogonal(matrix, gain, name):
    short = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    short = np.asarray(short, np.float64)
    np.testing.assert_allclose(
        short @ short.T, gain**2 * np.eye(len(short)), atol=2e-6 * gain**2, err_msg=name
    )


@each_recurrence
def test_matrices(version):
    values = initial(version)
    for name in ZERO[version]:
        assert not np.any(values[f"blocks.{name}"]), name
    for name, gain in ORTHOGONAL[version].items():
        stacked = values[f"blocks.{name}"]
        for layer in range(LAYERS):
            check_orthogonal(stacked[layer], gain, f"{name} of layer {layer}")
        # Independent draws: the entries of two layers are uncorrelated.
        entries = np.asarray(stacked).reshape(LAYERS, -1)
        assert abs(np.corrcoef(entries)[0, 1]) < 0.1, f"{name}: layers 0 and 1 are alike"
    for name, bound in UNIFORM.get(version, {}).items():
        drawn = np.asarray(values[f"blocks.{name}"])
        assert 0.98 * bound < np.abs(drawn).max() <= bound, name
        np.testing.assert_allclose(drawn.std(), bound / np.sqrt(3), rtol=0.05, err_msg=name)
    for norm in ("ln0", "ln_out", *(f"blocks.{norm}" for norm in NORMS)):
        assert np.all(values[f"{norm}.weight"] == 1), norm
        assert not np.any(values[f"{norm}.bias"]), norm


@each_recurrence
def test_every_parameter_has_an_expected_initial_value(version):
    checked = {
        f"blocks.{name}"
        for name in (
            *CLOSED_FORMS[version](0),
            *ZERO[version],
            *ORTHOGONAL[version],
            *UNIFORM.get(version, {}),
        )
    }
    checked |= {
        f"{norm}.{part}"
        for norm in ("ln0", "ln_out", "blocks.ln1", "blocks.ln2")
        for part in ("weight", "bias")
    }
    assert checked | {"emb", "head"} == set(initial(version))


@versions("7")
def test_embedding_and_head(version):
    emb = np.asarray(initial(version)["emb"])
    assert emb.shape == (96, WIDTH)
    # Uniform in [-1e-4, 1e-4]: the range, and the standard deviation of that distribution.
    assert 0.99e-4 < np.abs(emb).max() <= 1e-4
    np.testing.assert_allclose(emb.std(), 1e-4 / np.sqrt(3), rtol=0.03)
    check_orthogonal(initial(version)["head"], 0.5 * np.sqrt(96 / WIDTH), "head")

    small = dataclasses.replace(CONFIGS[version], layers=1, vocab_size=32)
    tree = models.init_params(small, jax.random.key(0))
    check_orthogonal(tree.head, 0.5, "head of a vocabulary smaller than the width")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)), (
        "one layer: official code divides by zero"
    )


@versions("4", "7")
def test_low_precision_never_enters(version):
    assert {str(leaf.dtype) for leaf in initial(version).values()} == {"float32"}
    abstract = named(models.abstract_params(CONFIGS[version]))
    assert {name: (x.shape, x.dtype) for name, x in abstract.items()} == {
        name: (x.shape, x.dtype) for name, x in initial(version).items()
    }


_ATT = [f"blocks.att.{m}" for m in ("key", "output", "receptance", "value")]
_FFN = ["blocks.ffn.key", "blocks.ffn.value", "emb", "head"]
_OLD = [*_ATT, *_FFN, "blocks.ffn.receptance"]
DECAYED = {
    "4": _OLD,
    "5.0": _OLD,
    "5.1": [*_OLD, "blocks.att.gate"],
    "5.2": [*_OLD, "blocks.att.gate"],
    "6": [*_OLD, "blocks.att.gate"],
    "7": [*_ATT, *_FFN],
    "7a": [*_ATT, *_FFN, "blocks.ffn.s_emb", "blocks.ffn.s_emb_x"],
}


def expected_group(version, name, ndim):
    """(learning-rate factor, decay) as the official trainers sort their names; first match wins.

    Except for a learnt state, which that of version 6 decays, towards zero."""
    if "time_state" in name:
        return 1.0, False
    if version[0] == "7":
        return (2.0, False) if "att.w0" in name else (1.0, name in DECAYED[version])
    if version != "4" and name.endswith(("_w1", "_w2")):
        return 1.0, False
    if "time_mix" in name or "time_maa" in name or "time_faaaa" in name:
        return 1.0, False
    if "time_decay" in name:
        return 2.0, False
    if "time_first" in name:
        return 3.0, False
    return 1.0, ndim >= 2


@each_recurrence
def test_optimizer_groups(version):
    table = named(models.specs(CONFIGS[version]), is_leaf=params.is_spec)
    groups = {name: (spec.lr_scale, spec.decay) for name, spec in table.items()}
    assert groups == {
        name: expected_group(version, name, len(spec.shape)) for name, spec in table.items()
    }
    # The tables themselves, so that the rule above cannot agree by matching nothing.
    decayed = sorted(name for name, (_, decay) in groups.items() if decay)
    assert decayed == sorted(DECAYED[version])
    faster = {name: scale for name, (scale, _) in groups.items() if scale != 1.0}
    expected = {"blocks.att.w0": 2.0} if version[0] == "7" else {"blocks.att.time_decay": 2.0}
    if version in ("4", "5.0"):
        expected["blocks.att.time_first"] = 3.0
    assert faster == expected


def test_official_sizes():
    """The 0.1B of version 7 with layer 0's unused v0, v1, v2, and the 169M of version 4."""
    small = ModelConfig(version="7", layers=12, width=768, vocab_size=65536)
    assert params.count(models.specs(small)) == 191_084_544
    pile = ModelConfig(version="4", layers=12, width=768, vocab_size=50277)
    assert params.count(models.specs(pile)) == 169_342_464
    # 1.6B and 3B of version 6, and the ranks of its 7B.
    for layers, width, billions in ((24, 2048, 1.6), (32, 2560, 3.1)):
        finch = ModelConfig(version="6", layers=layers, width=width, vocab_size=65536)
        assert params.count(models.specs(finch)) / 1e9 == pytest.approx(billions, abs=0.05)
    att = models.specs(ModelConfig(version="6", layers=1, width=4096, vocab_size=8)).blocks.att
    assert att.time_maa_w2.shape == (5, 64, 4096) and att.time_decay_w2.shape == (128, 4096)
    assert ModelConfig(version="6", width=2048).ffn == 7168


@pytest.mark.parametrize(
    ("width", "ranks"),
    [
        (64, (32, 32, 32, 32)),
        (768, (64, 64, 32, 128)),
        (1024, (64, 64, 64, 160)),
        (2048, (128, 128, 64, 224)),
        (2560, (128, 128, 96, 256)),
        (4096, (160, 160, 96, 320)),
    ],
)
def test_official_ranks(width, ranks):
    att = models.specs(ModelConfig(version="7", layers=1, width=width, vocab_size=8)).blocks.att
    assert tuple(getattr(att, f"{j}1").shape[-1] for j in "wavg") == ranks
    assert tuple(getattr(att, f"{j}2").shape[-2] for j in "wavg") == ranks


def test_adding_a_parameter_or_a_layer_reshuffles_no_other():
    spec = params.ParamSpec((4, 4), params.orthogonal(), layers=2)
    key = jax.random.key(3)
    before = params.init({"b": spec, "d": {"e": spec}}, key)
    after = params.init({"a": spec, "b": spec, "c": spec, "d": {"e": spec, "f": spec}}, key)
    assert np.array_equal(before["b"], after["b"])
    assert np.array_equal(before["d"]["e"], after["d"]["e"])
    assert not np.array_equal(before["b"], before["d"]["e"]), "two parameters share one draw"

    deeper = params.init({"b": dataclasses.replace(spec, layers=3)}, key)
    assert np.array_equal(deeper["b"][:2], before["b"])
    assert not np.array_equal(deeper["b"][2], before["b"][1])


def test_the_key_decides():
    spec = params.ParamSpec((4, 4), params.orthogonal(), layers=2)
    first, again, other = (
        params.init({"a": spec}, jax.random.key(seed))["a"] for seed in (0, 0, 1)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize(
    "version", ["7", *(pytest.param(x, marks=pytest.mark.slow) for x in ("4", "5.1", "6", "7a"))]
)
def test_the_initial_model_is_finite_and_undecided(version):
    """The official initial values predict nearly uniformly, with finite gradients everywhere."""
    cfg, tree = CONFIGS[version], initial_tree(version)
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (2, 31))
    tokens = jnp.asarray(tokens, jnp.int32)

    def loss(tree):
        logits, _ = models.forward(tree, tokens[:, :-1], cfg=cfg)
        chosen = jax.nn.one_hot(tokens[:, 1:], cfg.vocab_size)
        return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * chosen, -1))

    value, gradient = jax.jit(jax.value_and_grad(loss))(tree)
    assert abs(float(value) - np.log(cfg.vocab_size)) < 0.3
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    "version", [*(pytest.param(x, marks=pytest.mark.slow) for x in ("4", "6")), "7a"]
)
@pytest.mark.slow
def test_initialising_ends_on_a_small_machine(version):
    """On as many threads as there are cores, without the virtual devices that this suite runs on.

    Several batched QRs in one program can starve XLA's thread pool on the CPU, and wait for ever.
    """
    program = (
        "import jax, sys; from rwkv_jax import models; from rwkv_jax.config import ModelConfig; "
        "cfg = ModelConfig(version=sys.argv[1], layers=4, width=64, vocab_size=80); "
        "jax.block_until_ready(models.init_params(cfg, jax.random.key(0)))"
    )
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    subprocess.run(
        [sys.executable, "-c", program, version], env=environment, timeout=60, check=True
    )


@each_recurrence
def test_an_ensemble_is_its_members(version):
    """Under vmap too, where several batched QR factorisations never end on a CPU."""
    cfg, keys = CONFIGS[version], jax.random.split(jax.random.key(0), 2)
    many = jax.vmap(lambda key: models.init_params(cfg, key))(keys)
    one = models.init_params(cfg, keys[1])
    for x, y in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
        np.testing.assert_array_equal(x[1], y)
