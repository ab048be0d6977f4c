"""Calls of a model from a user's own code: outside of `jit`, in float64, with wrong arguments."""

import dataclasses
import inspect
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from tolerances import relative_rms

import rwkv_jax as rwkv
from rwkv_jax import models, nn
from rwkv_jax.config import ModelConfig
from rwkv_jax.loss import cross_entropy
from rwkv_jax.models import checks
from rwkv_jax.sampling.decode import decoding_layout

CFG = ModelConfig(version="7", layers=2, width=32, vocab_size=23, head_size=16)
TOKENS = jnp.array([[1, 5, 2, 7, 22, 0]])
slow = pytest.mark.slow


def noisy(cfg, dtype=jnp.float32):
    """Parameters without the zeros of a new model."""
    rng = np.random.default_rng(0)
    params = models.init_params(cfg, jax.random.key(0))
    draw = lambda x: np.asarray(x) + 0.1 * rng.standard_normal(x.shape)  # noqa: E731
    return jax.tree.map(lambda x: jnp.asarray(draw(x), dtype), params)


@pytest.fixture(scope="module")
def params():
    return noisy(CFG)


def test_a_second_call_compiles_nothing(params, caplog):
    """With or without a state, under `grad` and `vmap`, whichever equal config it is given."""
    same = dataclasses.replace(CFG, ffn_width=CFG.ffn)
    _, state = models.forward(params, TOKENS, cfg=CFG)
    several = jax.tree.map(lambda x: jnp.stack([x, x]), params)

    def loss(params, cfg):
        return jnp.sum(jnp.square(models.forward(params, TOKENS, state, cfg=cfg)[0]))

    calls = [
        lambda cfg: models.forward(params, TOKENS, cfg=cfg),
        lambda cfg: models.forward(params, TOKENS, state, cfg=cfg),
        lambda cfg: models.head(params, models.backbone(params, TOKENS, cfg=cfg)[0]),
        lambda cfg: jax.grad(loss)(params, cfg),
        lambda cfg: jax.vmap(lambda p: models.forward(p, TOKENS, cfg=cfg))(several),
        lambda cfg: jax.vmap(lambda p: jax.grad(loss)(p, cfg))(several),
    ]
    for call in calls:
        call(CFG)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for call in calls:
            call(same)
    assert not [x.getMessage() for x in caplog.records if "Compiling" in x.getMessage()]


def test_members_of_an_ensemble_are_as_if_alone(params):
    other = jax.tree.map(lambda x: 1.1 * x, params)
    several = jax.tree.map(lambda *x: jnp.stack(x), params, other)
    logits, state = jax.vmap(lambda p: models.forward(p, TOKENS, cfg=CFG))(several)
    for i, one in enumerate((params, other)):
        expected, after = models.forward(one, TOKENS, cfg=CFG)
        assert relative_rms(logits[i], expected) < 1e-5
        assert relative_rms(state.blocks.wkv[i], after.blocks.wkv) < 1e-5


def test_save_and_load_give_an_equal_config(params, tmp_path):
    rwkv.save(tmp_path / "model.safetensors", params, CFG)
    _, cfg = rwkv.load(tmp_path / "model.safetensors")
    assert cfg == CFG and hash(cfg) == hash(CFG) and cfg.rank_w != CFG.rank_w


versions = pytest.mark.parametrize(
    "version", [pytest.param(x, marks=() if x in "47" else slow) for x in models.VERSIONS]
)


def small(version):
    head = {} if version == "4" else {"head_size": 8}
    return ModelConfig(version=version, layers=2, width=16, ffn_width=24, vocab_size=11, **head)


@pytest.mark.parametrize(
    "version", [pytest.param(x, marks=() if x == "7" else slow) for x in models.VERSIONS]
)
def test_float64_is_float64(version):
    """Logits, states and gradients in every mode, and what float32 approximates."""
    cfg, tokens = small(version), TOKENS % 11
    with jax.enable_x64(True):
        params = noisy(cfg, jnp.float64)
        narrow = jax.tree.map(lambda x: x.astype(jnp.float32), params)
        start = jax.tree.map(lambda x: x.astype(jnp.float32), models.init_state(cfg, 1))

        @jax.jit
        def run(params, state):
            return models.forward(params, tokens, state, cfg=cfg, dtype=jnp.float64)

        logits, state = run(params, start)
        assert {x.dtype for x in jax.tree.leaves((logits, state))} == {np.dtype("float64")}
        wide = jax.tree.map(lambda x: x.astype(jnp.float64), narrow)
        exact, after = run(wide, start)
        rough, _ = models.forward(narrow, tokens, start, cfg=cfg)
        assert rough.dtype == jnp.float32 and 1e-9 < relative_rms(rough, exact) < 1e-5
        # A float64 state makes nothing else float64.
        again, last = models.forward(narrow, tokens, after, cfg=cfg)
        assert {x.dtype for x in jax.tree.leaves((again, last))} == {np.dtype("float32")}

        def loss(params):
            hidden, _ = models.backbone(params, tokens, cfg=cfg, dtype=jnp.float64)
            logits = jnp.sin(models.head(params, hidden))
            return jnp.sum(logits * jnp.arange(logits.size, dtype=float).reshape(logits.shape))

        # In fp64 with steps of 1e-6, differences are good to eight digits.
        check_grads(jax.jit(loss), (params,), order=1, eps=1e-6, rtol=1e-6)


def test_the_loss_is_float64_too():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        hidden, head = (jnp.asarray(rng.normal(size=x)) for x in ((1, 5, 4), (4, 9)))
        targets = jnp.array([[1, 8, 3, 0, 2]])

        @jax.jit
        def loss(hidden, head):
            return cross_entropy(hidden, head, targets, z_loss=0.1)[0]

        assert loss(hidden, head).dtype == jnp.float64
        check_grads(loss, (hidden, head), order=1, modes=["rev"], eps=1e-6, rtol=1e-8)


@versions
def test_forward_over_reverse_with_the_rest_frozen(version):
    """The gradient of the head along a direction of the embedding: both orders of both modes."""
    cfg, tokens = small(version), TOKENS % 11
    with jax.enable_x64(True):
        params = noisy(cfg, jnp.float64)

        def loss(emb, head):
            given = params.replace(emb=emb, head=head)
            logits, _ = models.forward(given, tokens, cfg=cfg, dtype=jnp.float64)
            return jnp.sum(jnp.square(jnp.sin(logits)))

        @jax.jit
        def both(emb, head):
            gradient = lambda emb: jax.grad(loss, 1)(emb, head)  # noqa: E731
            tangent = lambda head: jax.jvp(lambda emb: loss(emb, head), (emb,), (emb,))[1]  # noqa: E731
            return jax.jvp(gradient, (emb,), (emb,))[1], jax.grad(tangent)(head)

        one, other = both(params.emb, params.head)
        assert np.abs(one).max() > 1e-6
        assert relative_rms(one, other) < 1e-9


def wrong_params(params):
    six = models.init_params(small("6"), jax.random.key(0))
    deeper = jax.tree.map(lambda x: jnp.concatenate([x, x[:1]]), params.blocks)
    shallow = models.unstack(params)
    return [
        (six, r"params\.blocks\.att\.time_maa_x is \[2, 16\], .* \(RWKV-7, 2 layers, width 32\)"),
        (params.replace(blocks=deeper), r"params\.blocks\.\S+ is \[3, .* it is \[2, "),
        (params.replace(emb=params.emb[1:]), r"params\.emb is \[22, 32\], .* it is \[23, 32\]"),
        (shallow.replace(blocks=shallow.blocks[:1]), r"params\.blocks\.1\.\S+ is missing, "),
        ((params, CFG), r"params are tuple, not a Model: .*`load`"),
        ({"emb": params.emb}, r"params are dict, not a Model"),
    ]


def test_parameters_of_another_model_are_refused(params):
    backbone = inspect.unwrap(models.backbone)
    for other, message in wrong_params(params):
        with pytest.raises(ValueError, match=message):
            backbone(other, TOKENS, cfg=CFG)
        if isinstance(other, models.Model):
            with pytest.raises(ValueError, match=message):
                jax.eval_shape(lambda p: backbone(p, TOKENS, cfg=CFG), other)


ROW = jnp.zeros((1, 6), bool)
STATE = models.init_state(CFG, 1)
WHOLE = jax.tree.map(lambda x: x.astype(jnp.int32), STATE.blocks)
WRONG = [
    ({"tokens": [[1, 2, 3]]}, r"tokens must be an array, got list"),
    ({"tokens": jnp.ones((1, 6))}, r"tokens must be integers, got float32"),
    ({"tokens": ROW}, r"tokens must be integers, got bool"),
    ({"tokens": jnp.arange(6)}, r"tokens must be \[b, t\], .* got shape \(6,\)"),
    ({"tokens": np.array([[0, 300]])}, r"there is no id 300, ids are 0 to 22"),
    ({"tokens": jnp.array([[1, -100]])}, r"there is no id -100, .*give lengths"),
    ({"reset": ROW[0]}, r"reset must be bool \[b, t\], here \[1, 6\], .* got bool \[6\]"),
    ({"reset": ROW.astype(jnp.int32)}, r"reset must be bool .* got int32 \[1, 6\]"),
    ({"reset": [[False] * 6]}, r"reset must be an array, got list"),
    ({"lengths": jnp.array([99])}, r"lengths must be 0 to 6, the number of tokens, got 99"),
    ({"lengths": jnp.array([-1])}, r"lengths must be 0 to 6, .* got -1"),
    (
        {"lengths": jnp.array([[3]])},
        r"lengths must be integers \[b\], here \[1\], .* got int32 \[1, 1\]",
    ),
    ({"lengths": jnp.array([3.0])}, r"lengths must be integers .* got float32 \[1\]"),
    ({"state": [np.zeros(3)]}, r"state is list, not a State: .*rwkv_jax\.states"),
    ({"tokens": None}, r"tokens must be an array, got NoneType"),
    ({"state": STATE.replace(blocks=WHOLE)}, r"the state must be floating point, got int32"),
    ({"dtype": jnp.int32}, r"dtype int32: a model computes in float32, bfloat16"),
    ({"dtype": None}, r"dtype None: a model computes in"),
    ({"dtype": "half a float"}, r"dtype 'half a float'"),
    ({"dtype": jnp.float8_e4m3fn}, r"dtype float8_e4m3fn: a model"),
    ({"dtype": jnp.float64}, r'float64: call jax\.config\.update\("jax_enable_x64", True\)'),
]


@pytest.mark.parametrize(("given", "message"), WRONG, ids=[message for _, message in WRONG])
def test_arguments_that_do_not_belong_together_are_a_sentence(params, given, message):
    with pytest.raises(ValueError, match=message) as raised:
        inspect.unwrap(models.backbone)(params, **({"tokens": TOKENS, "cfg": CFG} | given))
    assert "\n" not in str(raised.value)


def test_a_version_is_no_config():
    with pytest.raises(ValueError, match="cfg is str, not a ModelConfig"):
        checks.check_config("7")


def test_parameters_of_another_model_are_refused_wherever_they_are_taken(params):
    """Also where they are laid out for decoding, or named by their fingerprint."""
    other = dataclasses.replace(CFG, layers=1)
    for run in (decoding_layout, rwkv.fingerprint):
        for given in (params, models.unstack(params)):
            with pytest.raises(ValueError, match="give the cfg of these params"):
                run(given, other)
    whole = jax.tree.map(lambda x: x.astype(jnp.int32), params)
    with pytest.raises(ValueError, match="params must be floating point, got int32"):
        models.forward(whole, TOKENS, cfg=CFG)


def test_integers_of_all_kinds_are_ids(params):
    expected, _ = models.backbone(params, TOKENS, cfg=CFG)
    backbone = inspect.unwrap(models.backbone)
    for kind in (np.uint8, np.uint16, np.int16, np.int64):
        hidden, _ = backbone(params, np.asarray(TOKENS, kind), cfg=CFG)
        np.testing.assert_array_equal(hidden, expected)


def test_x64_changes_no_initial_value():
    cfg = small("7a")
    expected = models.init_params(cfg, jax.random.key(3))
    with jax.enable_x64(True):
        params = models.init_params(cfg, jax.random.key(3))
        jax.tree.map(np.testing.assert_array_equal, params, expected)
        assert nn.precise_dtype(jnp.bfloat16) == jnp.float32
