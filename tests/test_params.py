"""The parameter tables: official initial values, optimizer groups, counts, keys.

The closed forms are written again here, in numpy, from the official trainer's description: version
4 from RWKV-LM `RWKV-v4neo/src/model.py`, version 7 from `RWKV-v7/train_temp/src/model.py`.
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
from compiling import quick_jit

from rwkv_jax import models, params
from rwkv_jax.config import ModelConfig

LAYERS, WIDTH, SIZE = 3, 64, 16
CONFIGS = {
    "4": ModelConfig(version="4", layers=LAYERS, width=WIDTH, vocab_size=96),
    "7": ModelConfig(version="7", layers=LAYERS, width=WIDTH, vocab_size=96, head_size=SIZE),
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


CLOSED_FORMS = {"4": closed_forms_4, "7": closed_forms_7}

ZERO = {
    "4": ["att.key", "att.receptance", "att.output", "ffn.value", "ffn.receptance"],
    "7": ["att.w1", "att.a1", "att.v1", "att.g1", "att.output", "ffn.value"],
}

ORTHOGONAL = {
    "4": {"att.value": 1.0, "ffn.key": 2.0},
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

NORMS = ["ln1", "ln2"]


@pytest.mark.parametrize("version", ["4", "7"])
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


@pytest.mark.parametrize("version", ["4", "7"])
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
    for norm in ("ln0", "ln_out", *(f"blocks.{norm}" for norm in NORMS)):
        assert np.all(values[f"{norm}.weight"] == 1), norm
        assert not np.any(values[f"{norm}.bias"]), norm


@pytest.mark.parametrize("version", ["4", "7"])
def test_every_parameter_has_an_expected_initial_value(version):
    checked = {
        f"blocks.{name}"
        for name in (*CLOSED_FORMS[version](0), *ZERO[version], *ORTHOGONAL[version])
    }
    checked |= {
        f"{norm}.{part}"
        for norm in ("ln0", "ln_out", "blocks.ln1", "blocks.ln2")
        for part in ("weight", "bias")
    }
    assert checked | {"emb", "head"} == set(initial(version))


@pytest.mark.parametrize("version", ["4", "7"])
def test_embedding_and_head(version):
    emb = np.asarray(initial(version)["emb"])
    assert emb.shape == (96, WIDTH)
    # Uniform in [-1e-4, 1e-4]: the range, and the standard deviation of that distribution.
    assert 0.99e-4 < np.abs(emb).max() <= 1e-4
    np.testing.assert_allclose(emb.std(), 1e-4 / np.sqrt(3), rtol=0.03)
    check_orthogonal(initial(version)["head"], 0.5 * np.sqrt(96 / WIDTH), "head")

    small = ModelConfig(version=version, layers=1, width=WIDTH, vocab_size=32)
    tree = models.init_params(small, jax.random.key(0))
    check_orthogonal(tree.head, 0.5, "head of a vocabulary smaller than the width")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)), (
        "one layer: official code divides by zero"
    )


@pytest.mark.parametrize("version", ["4", "7"])
def test_low_precision_never_enters(version):
    assert {str(leaf.dtype) for leaf in initial(version).values()} == {"float32"}
    abstract = named(models.abstract_params(CONFIGS[version]))
    assert {name: (x.shape, x.dtype) for name, x in abstract.items()} == {
        name: (x.shape, x.dtype) for name, x in initial(version).items()
    }


def expected_group(version, name, ndim):
    """(learning-rate factor, decay) as the official trainers sort their names; first match wins."""
    if version == "7":
        if "att.w0" in name:
            return 2.0, False
        matrices = {
            "emb",
            "head",
            *(f"blocks.att.{m}" for m in ("receptance", "key", "value", "output")),
        }
        return 1.0, name in matrices | {"blocks.ffn.key", "blocks.ffn.value"}
    if "time_mix" in name:
        return 1.0, False
    if "time_decay" in name:
        return 2.0, False
    if "time_first" in name:
        return 3.0, False
    return 1.0, ndim >= 2


@pytest.mark.parametrize("version", ["4", "7"])
def test_optimizer_groups(version):
    table = named(models.specs(CONFIGS[version]), is_leaf=params.is_spec)
    groups = {name: (spec.lr_scale, spec.decay) for name, spec in table.items()}
    assert groups == {
        name: expected_group(version, name, len(spec.shape)) for name, spec in table.items()
    }
    # The tables themselves, so that the rule above cannot agree by matching nothing.
    decayed = sorted(name for name, (_, decay) in groups.items() if decay)
    matrices = [f"blocks.att.{m}" for m in ("key", "output", "receptance", "value")]
    ffn = ["key", "value"] if version == "7" else ["key", "receptance", "value"]
    assert decayed == sorted([*matrices, *(f"blocks.ffn.{m}" for m in ffn), "emb", "head"])
    faster = {name: scale for name, (scale, _) in groups.items() if scale != 1.0}
    v4_faster = {"blocks.att.time_decay": 2.0, "blocks.att.time_first": 3.0}
    assert faster == ({"blocks.att.w0": 2.0} if version == "7" else v4_faster)


def test_official_sizes():
    """The 0.1B of version 7 with layer 0's unused v0, v1, v2, and the 169M of version 4."""
    small = ModelConfig(version="7", layers=12, width=768, vocab_size=65536)
    assert params.count(models.specs(small)) == 191_084_544
    pile = ModelConfig(version="4", layers=12, width=768, vocab_size=50277)
    assert params.count(models.specs(pile)) == 169_342_464


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


@pytest.mark.parametrize("version", ["4", "7"])
def test_the_initial_model_is_finite_and_undecided(version):
    """The official initial values predict nearly uniformly, with finite gradients everywhere."""
    cfg, tree = CONFIGS[version], initial_tree(version)
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (2, 31))
    tokens = jnp.asarray(tokens, jnp.int32)

    def loss(tree):
        logits, _ = models.forward(tree, tokens[:, :-1], cfg=cfg)
        chosen = jax.nn.one_hot(tokens[:, 1:], cfg.vocab_size)
        return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * chosen, -1))

    value, gradient = quick_jit(jax.value_and_grad(loss))(tree)
    assert abs(float(value) - np.log(cfg.vocab_size)) < 0.3
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))


@pytest.mark.parametrize("version", ["4", "7"])
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
