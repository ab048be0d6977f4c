"""Whole models: resets, gradients, precision and options, on small random dense weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from markers import each_recurrence, versions
from official_weights import checkpoint
from tolerances import GOLDEN_LOGITS, MODEL_BFLOAT16, assert_close, relative_rms

from rwkv_jax import models
from rwkv_jax.checkpoint.keymaps import from_official, to_official
from rwkv_jax.config import ModelConfig

LENGTH = 41

slowly_all_recurrences = pytest.mark.parametrize(
    "version", [*(pytest.param(version, marks=pytest.mark.slow) for version in "46"), "7"]
)


@functools.cache
def dense(version):
    """Official tensors without a zero (initial ones have many): every path carries signal.

    Two heads of 16: in heads of 8, random outputs may be so alike that the group norm multiplies
    rounding errors tenfold.
    """
    ranks, tuned = (6, 5, 4, 7, 3), version == "6"
    tensors = checkpoint(version, layers=2, width=32, head=16, ffn=96, ranks=ranks, tuned=tuned)
    unused = {"blocks.0.att.v0": (1, 1, 32), "blocks.0.att.v1": (32, 4), "blocks.0.att.v2": (4, 32)}
    if version[0] == "7":
        tensors |= {name: np.full(shape, 0.5, np.float32) for name, shape in unused.items()}
    return tensors


@functools.cache
def weights(version):
    return from_official(dense(version))


def tokens_of(version, seed=0, length=LENGTH):
    """`[1, length]`, all different: an embedding row's gradient is then one token's."""
    rng = np.random.default_rng([seed, list(models.VERSIONS).index(version)])
    return jnp.asarray(rng.permutation(67)[None, :length], jnp.int32)


@functools.cache
def forward(version, **options):
    _, cfg = weights(version)
    return jax.jit(functools.partial(models.forward, cfg=cfg, **options))


def reset_at(*starts):
    return jnp.zeros((1, LENGTH), bool).at[0, jnp.asarray(starts)].set(True)


STARTS = (9, 10, 33)


@pytest.mark.parametrize(
    ("version", "implementation"),
    [
        pytest.param(
            *(version, name),
            marks=() if version == "7" and name == "chunked" else pytest.mark.slow,
        )
        for version in models.VERSIONS
        for name in ("chunked", "scan", "associative")
    ],
)
def test_a_reset_is_a_separate_run(version, implementation):
    """Four documents in one row, one of a single token, against the oracle run on each alone.

    Token shift and WKV must both forget, also the state that the row came with.
    """
    params, _ = weights(version)
    tokens = tokens_of(version)
    _, state = forward(version)(params, tokens_of(version, seed=1))
    run = forward(version, implementation=implementation)
    logits, after = run(params, tokens, state, reset=reset_at(0, *STARTS))
    for start, stop in zip((0, *STARTS), (*STARTS, LENGTH), strict=True):
        expected = oracles.MODELS[version](dense(version), np.asarray(tokens)[0, start:stop])
        np.testing.assert_allclose(logits[0, start:stop], expected, rtol=0, atol=GOLDEN_LOGITS)
    # The state handed on is the last document's.
    _, alone = run(params, tokens[:, STARTS[-1] :], None)
    more = tokens_of(version, seed=2)
    expected, _ = run(params, more, alone)
    np.testing.assert_allclose(run(params, more, after)[0], expected, rtol=0, atol=GOLDEN_LOGITS)


@versions("7")
def test_no_state_is_the_fresh_one(version):
    params, cfg = weights(version)
    tokens = tokens_of(version)
    implied, _ = forward(version)(params, tokens)
    given, state = forward(version)(params, tokens, models.init_state(cfg, 1, params))
    assert np.array_equal(implied, given)
    fresh = models.init_state(cfg, 1, params)
    assert jax.tree.structure(state) == jax.tree.structure(fresh)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, fresh)


@functools.cache
def embedding_gradient(version):
    """(tokens, reset, position) -> each token's largest |gradient| of the logits there."""
    params, cfg = weights(version)
    direction = jnp.asarray(np.random.default_rng(3).normal(size=cfg.vocab_size), jnp.float32)

    @jax.jit
    def gradient(tokens, reset, position):
        def loss(emb):
            logits, _ = models.forward(params.replace(emb=emb), tokens, cfg=cfg, reset=reset)
            return jnp.sum(logits[0, position] * direction)

        return jnp.max(jnp.abs(jax.grad(loss)(params.emb)), axis=1)[tokens[0]]

    return gradient


@versions("7")
@pytest.mark.parametrize(
    ("starts", "position"), [((), 40), ((), 20), ((), 0), ((9, 10, 33), 32), ((9, 10, 33), 9)]
)
def test_causality_by_gradient(version, starts, position):
    """Logits see every token from their document's start up to their own, and no other."""
    reset = reset_at(*starts) if starts else jnp.zeros((1, LENGTH), bool)
    seen = np.asarray(embedding_gradient(version)(tokens_of(version), reset, position))
    first = max((start for start in starts if start <= position), default=0)
    visible = [first <= t <= position for t in range(LENGTH)]
    assert np.all(seen[visible] > 0)
    # In chunks the decay's gradient is a difference of sums, of which rounding may remain.
    assert np.all(seen[np.logical_not(visible)] <= 1e-6 * seen.max())


@versions("4", "7")
def test_gradients_against_the_oracle(version):
    """Every tensor's gradient along a random direction, against the oracle's differences."""
    params, cfg = weights(version)
    tokens = tokens_of(version, length=12)
    rng = np.random.default_rng(5)
    cotangent = rng.normal(size=(12, cfg.vocab_size))

    @jax.jit
    def gradient(params):
        def loss(params):
            logits, _ = models.forward(params, tokens, cfg=cfg, implementation="chunked")
            return jnp.sum(logits[0] * jnp.asarray(cotangent, jnp.float32))

        return jax.grad(loss)(params)

    gradients = to_official(gradient(params), cfg)
    tensors = {name: x.astype(np.float64) for name, x in dense(version).items()}
    step = 1e-5
    for name, x in tensors.items():
        direction = rng.normal(size=x.shape)
        up, down = (
            (
                oracles.MODELS[version](
                    tensors | {name: x + sign * step * direction}, np.asarray(tokens)[0]
                )
                * cotangent
            ).sum()
            for sign in (1, -1)
        )
        expected, actual = (up - down) / (2 * step), (gradients[name] * direction).sum()
        size = np.linalg.norm(gradients[name])
        if version[0] == "7" and name.startswith("blocks.0.att.v") and name[-1] in "012":
            assert size == 0 and expected == 0, f"{name} takes no part"
            continue
        assert size > 0, name
        # The scale of a directional derivative is the gradient's norm; it may itself be near 0.
        assert abs(actual - expected) < 2e-4 * size, f"{name}: {actual} against {expected}"


@functools.cache
def loss_gradient(version, remat, layout, implementation="chunked"):
    params, cfg = weights(version)
    params = models.unstack(params) if layout == "unstacked" else params
    tokens = tokens_of(version)

    def loss(params):
        options = {
            "cfg": cfg,
            "remat": remat,
            "implementation": implementation,
            "reset": reset_at(9, 33),
        }
        logits, _ = models.forward(params, tokens, **options)
        return -jnp.mean(
            jnp.sum(
                jax.nn.log_softmax(logits[0, :-1]) * jax.nn.one_hot(tokens[0, 1:], cfg.vocab_size),
                -1,
            )
        )

    gradient = jax.jit(jax.grad(loss))(params)
    return to_official(models.stack(gradient) if layout == "unstacked" else gradient, cfg)


@slowly_all_recurrences
@pytest.mark.parametrize(
    ("remat", "layout", "implementation"),
    [
        ("block", "unstacked", "chunked"),
        pytest.param("dots", "stacked", "scan", marks=pytest.mark.slow),
        pytest.param("wkv", "stacked", "chunked", marks=pytest.mark.slow),
        pytest.param("offload", "stacked", "chunked", marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_options_leave_the_gradient_alone(version, remat, layout, implementation):
    """Rematerialised or not, layers scanned or in a loop, chunks or tokens: one gradient."""
    expected = loss_gradient(version, "none", "stacked")
    for name, x in loss_gradient(version, remat, layout, implementation).items():
        assert_close(x, expected[name], "float32", name=name)


@slowly_all_recurrences
@pytest.mark.slow
def test_remat_keeps_less(version):
    """The backward pass holds one layer's intermediates under "block", not every layer's; "dots"
    and "wkv" are between."""
    cfg = ModelConfig(version=version, layers=8, width=64, ffn_width=64, vocab_size=32)
    abstract = models.abstract_params(cfg)
    tokens = jax.ShapeDtypeStruct((1, 128), jnp.int32)

    def temporaries(remat):
        def loss(params, tokens):
            return jnp.sum(models.forward(params, tokens, cfg=cfg, remat=remat)[0])

        compiled = jax.jit(jax.grad(loss)).lower(abstract, tokens).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    none, dots, wkv, block = (temporaries(x) for x in ("none", "dots", "wkv", "block"))
    assert dots < 0.75 * none
    assert wkv < 0.9 * dots
    assert block < 0.75 * dots and block < wkv
    assert block < 0.5 * none


@versions("7")
@pytest.mark.parametrize("layout", ["stacked", "unstacked"])
def test_bfloat16_keeps_the_state_in_float32(version, layout):
    """Logits near the float32 ones, and a float32 state that float32 code can take on."""
    params, cfg = weights(version)
    tokens = tokens_of(version)
    exact, _ = forward(version)(params, tokens)
    mine = models.unstack(params) if layout == "unstacked" else params
    logits, state = forward(version, dtype=jnp.bfloat16)(mine, tokens)
    assert logits.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(state)} == {np.dtype("float32")}
    assert 1e-3 < relative_rms(logits, exact) < MODEL_BFLOAT16
    state = models.stack(state) if layout == "unstacked" else state
    more, _ = forward(version)(params, tokens_of(version, seed=1), state)
    assert np.isfinite(more).all()

    backbone = jax.jit(functools.partial(models.backbone, cfg=cfg, dtype=jnp.bfloat16))
    hidden, _ = backbone(params, tokens)
    assert hidden.dtype == jnp.bfloat16
    assert models.head(params, hidden).dtype == jnp.float32


@versions("7")
def test_forward_is_head_of_backbone(version):
    params, cfg = weights(version)
    tokens = tokens_of(version)
    hidden, _ = jax.jit(functools.partial(models.backbone, cfg=cfg))(params, tokens)
    np.testing.assert_allclose(
        models.head(params, hidden), forward(version)(params, tokens)[0], atol=1e-5
    )


@each_recurrence
def test_unknown_implementation(version):
    params, cfg = weights(version)
    with pytest.raises(ValueError, match="scan, chunked, associative"):
        models.forward(params, tokens_of(version), cfg=cfg, implementation="flash")


@versions("7")
def test_weights_of_two_bytes_mean_their_values(version):
    """Parameters may stay as a bfloat16 file has them: the logits are those of the same numbers."""
    params, _ = weights(version)
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    same = jax.tree.map(lambda x: x.astype(jnp.float32), low)
    logits, _ = forward(version)(low, tokens_of(version))
    expected, _ = forward(version)(same, tokens_of(version))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=GOLDEN_LOGITS)


@functools.cache
def learnt(version):
    """Official tensors and parameters without a learnt state, their config, and such a state
    [layers, h, v, k]."""
    tensors = {name: x for name, x in dense(version).items() if "time_state" not in name}
    params, cfg = from_official(tensors)
    shape = (cfg.layers, cfg.heads, cfg.head_size, cfg.head_size)
    state = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    return tensors, params, cfg, jnp.asarray(state)


def lay(params, state):
    """The parameters with a learnt state."""
    att = dataclasses.replace(params.blocks.att, time_state=state)
    return dataclasses.replace(params, blocks=dataclasses.replace(params.blocks, att=att))


def matrix_versions(*quick):
    return pytest.mark.parametrize(
        "version",
        [
            pytest.param(version, marks=() if version in quick else pytest.mark.slow)
            for version in models.VERSIONS
            if version != "4"
        ],
    )


CUT = 17


def packed(version, laid):
    """Logits, and the state after them, of two documents in a row that start from a learnt one."""
    cfg = learnt(version)[2]
    return models.forward(laid, tokens_of(version), cfg=cfg, reset=reset_at(CUT))


def apart(version, state):
    """The same in two rows of an ordinary model, from the learnt state as a given one."""
    _, params, cfg, _ = learnt(version)
    fresh = models.init_state(cfg, 2)
    wkv = jnp.broadcast_to(state[:, None], fresh.blocks.wkv.shape)
    start = dataclasses.replace(fresh, blocks=dataclasses.replace(fresh.blocks, wkv=wkv))
    tokens, lengths = tokens_of(version)[0], jnp.array([CUT, LENGTH - CUT])
    rows = jnp.stack([jnp.pad(tokens[:CUT], (0, LENGTH - 2 * CUT)), tokens[CUT:]])
    logits, after = models.forward(params, rows, start, cfg=cfg, lengths=lengths)
    both = jnp.concatenate([logits[0, :CUT], logits[1]])[None]
    return both, jax.tree.map(lambda x: x[:, 1:], after)


@matrix_versions("5.2", "6", "7")
def test_a_learnt_state_is_one_that_is_given(version):
    """Laid onto the parameters of an ordinary model: the row, and a reset, start from it."""
    tensors, params, cfg, state = learnt(version)
    laid = models.unstack(lay(params, state))
    logits, after = jax.jit(functools.partial(packed, version))(laid)
    expected, last = jax.jit(functools.partial(apart, version))(state)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=GOLDEN_LOGITS)
    for x, y in zip(*map(jax.tree.leaves, (models.stack(after), last)), strict=True):
        assert_close(x, y, "float32")
    named = tensors | {f"blocks.{i}.att.time_state": np.asarray(x) for i, x in enumerate(state)}
    exact = oracles.MODELS[version](named, np.asarray(tokens_of(version))[0, :CUT])
    np.testing.assert_allclose(logits[0, :CUT], exact, rtol=0, atol=GOLDEN_LOGITS)

    written = to_official(lay(params, state), cfg)
    assert all(np.array_equal(written[name], x) for name, x in named.items())
    tuned, tuned_cfg = from_official(written)
    assert tuned_cfg == models.as_tuned(cfg, laid) == dataclasses.replace(cfg, state_tuned=True)
    assert np.array_equal(tuned.blocks.att.time_state, state)


@pytest.mark.slow
@matrix_versions("5.2", "6", "7")
def test_gradients_of_a_learnt_state(version):
    """They are those of the given states that it stands for."""
    _, params, _, state = learnt(version)
    mine, theirs = (
        jax.jit(jax.grad(lambda state, run=run: jnp.sum(jnp.sin(run(state)[0]))))(state)
        for run in (
            lambda state: packed(version, lay(params, state)),
            functools.partial(apart, version),
        )
    )
    assert_close(mine, theirs, "float32")


def test_a_learnt_state_of_another_shape_is_refused():
    _, params, cfg, state = learnt("7")
    with pytest.raises(ValueError, match=r"time_state is \[2, 2, 16\], but .* \[2, 2, 16, 16\]"):
        models.check_params(lay(params, state[..., 0]), cfg)
    tuned = models.as_tuned(cfg, lay(params, state))
    with pytest.raises(ValueError, match=r"time_state is missing, but in a model of cfg"):
        models.check_params(params, tuned)


def test_a_state_of_another_model_is_refused():
    """Instead of an error of shapes from deep inside, or none."""
    params, cfg = weights("7")
    tokens = tokens_of("7")
    _, other_cfg = weights("5.2")
    with pytest.raises(ValueError, match=r"state is of version 5\.2, the model of 7"):
        models.forward(params, tokens, models.init_state(other_cfg, 1), cfg=cfg)
    with pytest.raises(ValueError, match="does not fit 1 rows of a model of 2 layers"):
        models.forward(params, tokens, models.init_state(cfg, 2), cfg=cfg)
    deeper = dataclasses.replace(cfg, layers=3)
    with pytest.raises(ValueError, match="an array is"):
        models.forward(params, tokens, models.init_state(deeper, 1), cfg=cfg)
    _, tuned_cfg = weights("6")
    with pytest.raises(ValueError, match="state-tuned"):
        models.init_state(tuned_cfg, 1)


def test_a_state_of_another_layout_is_refused():
    params, cfg = weights("7")
    tokens, state = tokens_of("7"), models.unstack(models.init_state(cfg, 1))
    with pytest.raises(ValueError, match="`stack` or `unstack` one"):
        models.forward(params, tokens, state, cfg=cfg)
    shallow = dataclasses.replace(state, blocks=state.blocks[:1])
    with pytest.raises(ValueError, match="it has 3 arrays, not 6"):
        models.forward(models.unstack(params), tokens, shallow, cfg=cfg)


def test_tokens_without_a_row_or_a_column_are_refused():
    params, cfg = weights("7")
    for shape in ((1, 0), (0, 3)):
        with pytest.raises(
            ValueError, match=rf"must be \[b, t\], .* got shape \({shape[0]}, {shape[1]}\)"
        ):
            models.forward(params, jnp.zeros(shape, jnp.int32), cfg=cfg)
