"""One training step: accumulation, non-finite values, and that it learns."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkv_jax import models
from rwkv_jax.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from rwkv_jax.data.loader import Batch, Batching, Stream, open_loader
from rwkv_jax.loss import token_nats
from rwkv_jax.toml import load_config
from rwkv_jax.training.objective import hidden_states, objective
from rwkv_jax.training.state import abstract_train_state, init_train_state
from rwkv_jax.training.step import describe_nonfinite, make_train_step

ROOT = Path(__file__).parents[2]
MODELS = {
    version: ModelConfig(version=version, layers=2, width=64, vocab_size=32)
    for version in ("4", "7")
}


def config(version="7", **train):
    """Without L2Wrap, whose gradient is no part of the loss."""
    return Config(
        model=MODELS[version],
        optimizer=OptimizerConfig(peak_lr=3e-3, warmup_steps=0),
        train=TrainConfig(**{"steps": 50, "batch": 4, "context": 16, "l2wrap": 0.0, **train}),
    )


@functools.cache
def compiled_step(version, **train):
    """The step of a config, compiled once."""
    return make_train_step(config(version, **train))


@functools.cache
def first_state(version):
    return jax.device_get(init_train_state(config(version)))


def initial(version="7"):
    """What `init_train_state` returns for all of these configs; a copy, as a step donates it."""
    return jax.tree.map(jnp.array, first_state(version))


def batch(seed=0, b=4, t=16, vocab=32):
    """Every token counts, by a mask that says so: one program for all masks."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab, (b, t + 1)).astype(np.int32)
    return Batch(tokens[:, :-1], tokens[:, 1:], tokens[:, :-1] == 0, np.ones((b, t), bool))


@jax.jit
def forward(params, inputs, reset):
    logits, after = models.forward(params, inputs, cfg=MODELS["7"], reset=reset)
    return jax.nn.log_softmax(logits), after


def read(params, rows):
    """Nats of each target, by version 7's `forward`; the state after 48 tokens."""
    time = rows.inputs.shape[1]
    after_it = (0, 0), (0, 48 - time)  # one program for all lengths
    logp, after = forward(params, np.pad(rows.inputs, after_it), np.pad(rows.reset, after_it))
    logp = np.asarray(logp)[:, :time]
    return -np.take_along_axis(logp, rows.targets[..., None], -1)[..., 0], after


@pytest.mark.parametrize(
    ("version", "masked"),
    [*(pytest.param(v, False, marks=pytest.mark.slow) for v in "47"), ("7", True)],
)
def test_accumulated_gradient_is_the_whole_batchs(version, masked):
    """Also where parts have unequal numbers of tokens that are trained on."""
    rows = batch()
    if masked:
        rows = rows._replace(mask=np.arange(64).reshape(4, 16) % 7 > np.arange(4)[:, None] * 2)
    # One step without momentum: the parameters after it show the gradient.
    results = []
    for parts in (1, 4):
        cfg = dataclasses.replace(
            config(version, accumulate=parts, l2wrap=0.1, z_loss=0.1),
            # With a large eps the update is lr * gradient / eps: no normalisation hides a factor.
            optimizer=OptimizerConfig(eps=1e3, peak_lr=1e3, final_lr=1e3, warmup_steps=0, clip=0.0),
        )
        state = initial(version)
        before = first_state(version).params
        state, metrics = make_train_step(cfg)(state, rows)
        moved = jax.tree.map(lambda new, old: np.asarray(new) - old, state.params, before)
        results.append((moved, float(metrics.loss), float(metrics.grad_norm)))
    (whole, loss, norm), (parts, loss_parts, norm_parts) = results
    assert loss_parts == pytest.approx(loss, rel=1e-6)
    assert norm_parts == pytest.approx(norm, rel=1e-5)
    difference = jax.tree.map(lambda a, b: np.sum((a - b) ** 2), whole, parts)
    total = sum(np.sum(x**2) for x in jax.tree.leaves(whole))
    # The parameters' own rounding is part of the difference.
    assert (sum(jax.tree.leaves(difference)) / total) ** 0.5 < 1e-5


def test_the_objective_can_be_replaced():
    """By one that adds to its results what is written from scratch: as much again."""

    def doubled(params, batch, carried, *, model, train):
        loss, (cross_entropy, _) = objective(params, batch, carried, model=model, train=train)
        hidden, after = hidden_states(params, batch, carried, model=model, train=train)
        nats = jnp.mean(token_nats(hidden, params.head, batch.targets))
        return loss + nats, (cross_entropy + 2 * nats, after)

    seen = []
    for step in (
        compiled_step("7"),
        make_train_step(config("7"), objective=doubled),
    ):
        _, metrics = step(initial("7"), batch())
        numbers = metrics.loss, metrics.objective, metrics.grad_norm, metrics.state_rms
        seen.append(np.array(numbers))
    own, other = seen
    np.testing.assert_allclose(other, own * [3, 2, 2, 1], rtol=1e-5)


STATE = models.init_state(config().model, 1)


@pytest.mark.parametrize(
    "returned",
    [
        lambda x: x,
        lambda x: (x, x),
        lambda x: (x, (x, None)),
        lambda x: None,
        lambda x: (0.5, (x, STATE)),
        lambda x: (x[None], (x, STATE)),
        lambda x: (x, (x[None], STATE)),
        lambda x: (x, (x.astype(jnp.int32), STATE)),
    ],
)
def test_an_objective_with_other_results_is_refused(returned):
    def alone(params, batch, carried, *, model, train):
        return returned(jnp.sum(params.head))

    step = make_train_step(config(), objective=alone)
    with pytest.raises(ValueError, match=r"an objective must return \(loss, \(cross_entropy, stat"):
        step.lower(abstract_train_state(config()), batch())


def test_an_objective_that_is_not_finite_changes_nothing():
    """Though the cross entropy and all gradients are."""

    def undefined(params, batch, carried, *, model, train):
        loss, (cross_entropy, after) = objective(params, batch, carried, model=model, train=train)
        return loss + jnp.log(-jax.lax.stop_gradient(cross_entropy)), (cross_entropy, after)

    state = initial()
    after, metrics = make_train_step(config(), objective=undefined)(
        jax.tree.map(jnp.array, state), batch()
    )
    assert not metrics.finite and np.isfinite(metrics.loss) and np.isfinite(metrics.grad_norm)
    jax.tree.map(np.testing.assert_array_equal, after, state)
    assert describe_nonfinite(metrics, state.params) == "the objective is nan"


@pytest.mark.parametrize("version", [pytest.param("4", marks=pytest.mark.slow), "7"])
def test_learns_a_batch_by_heart(version):
    state = initial(version)
    step = compiled_step(version)
    losses = []
    for _ in range(50):
        state, metrics = step(state, batch())
        losses.append(float(metrics.loss))
    assert losses[0] == pytest.approx(np.log(32), rel=0.2)
    assert losses[-1] < 0.5 * losses[0]
    assert int(state.step) == 50


def test_a_step_that_is_not_finite_changes_nothing_and_says_what():
    state = initial()
    bad = state.params.blocks.att.w0.at[1].set(jnp.nan)
    att = state.params.blocks.att.replace(w0=bad)
    blocks = state.params.blocks.replace(att=att)
    state = state.replace(params=state.params.replace(blocks=blocks))
    before = jax.tree.map(np.asarray, state)
    after, metrics = compiled_step("7")(state, batch())
    assert not metrics.finite
    assert "the loss is nan" in describe_nonfinite(metrics, after.params)
    assert "the gradient is not finite in" in describe_nonfinite(metrics, after.params)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, after), before)


def test_names_the_parameter_whose_gradient_is_not_finite():
    state = initial()
    step = compiled_step("7")
    state, metrics = step(state, batch())
    names = [
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, _ in jax.tree_util.tree_leaves_with_path(state.params)
    ]
    index = names.index("blocks.ffn.key")
    bad = metrics.replace(bad_gradients=metrics.bad_gradients.at[index].set(True))
    assert describe_nonfinite(bad, state.params) == ("the gradient is not finite in blocks.ffn.key")


def test_abstract_state_is_the_states_shape():
    cfg = config()
    actual = jax.eval_shape(lambda: init_train_state(cfg))
    abstract = abstract_train_state(cfg)
    assert jax.tree.structure(actual) == jax.tree.structure(abstract)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(actual)] == [
        (x.shape, x.dtype) for x in jax.tree.leaves(abstract)
    ]


def test_initial_parameters_depend_on_the_seed_only():
    first, again, other = (init_train_state(config(seed=seed)).params.head for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first, models.init_params(MODELS["7"], jax.random.key(1)).head)
    assert not np.array_equal(first, other)


@pytest.mark.slow
def test_the_official_0_1b_step_compiles_in_the_memory_its_config_states():
    cfg = load_config(ROOT / "configs" / "rwkv7-0.1b.toml")
    state = abstract_train_state(cfg)
    assert sum(x.size for x in jax.tree.leaves(state.params)) == 191_084_544
    shape = cfg.train.batch, cfg.train.context
    ints = jax.ShapeDtypeStruct(shape, jnp.int32)
    step = make_train_step(cfg)
    compiled = step.lower(state, Batch(ints, ints, jax.ShapeDtypeStruct(shape, jnp.bool_)))
    memory = compiled.compile().memory_analysis()
    assert memory.argument_size_in_bytes < 2.15 * 2**30
    assert memory.alias_size_in_bytes > 2.13 * 2**30, "the state is not updated in place"
    assert memory.temp_size_in_bytes < 3.5 * 2**30


def test_a_masked_loss_is_the_mean_over_its_tokens():
    rows, step = batch(), compiled_step("7")
    nats, _ = read(first_state("7").params, rows)
    for mask in (np.arange(64).reshape(4, 16) % 3 == 0, np.arange(64).reshape(4, 16) == 5):
        _, metrics = step(initial(), rows._replace(mask=mask))
        assert float(metrics.loss) == pytest.approx(nats[mask].mean(), rel=1e-5)
    nothing = rows._replace(mask=np.zeros((4, 16), bool))
    _, metrics = step(initial(), nothing)
    assert float(metrics.loss) == float(metrics.grad_norm) == 0


@pytest.mark.parametrize("version", [pytest.param("4", marks=pytest.mark.slow), "7"])
def test_documents_of_a_pack_do_not_see_each_other(version):
    """Through the whole step: training on one document is bit-exactly the same whatever
    documents are beside it."""
    lengths = (5, 9, 2, 14, 7, 16, 5, 6)
    rng = np.random.default_rng(0)
    documents = [np.append(rng.integers(1, 32, n - 1), 0) for n in lengths]
    tokens = np.concatenate(documents).astype(np.uint16)
    settings = {"seed": 0, "batch": 4, "context": 16, "vocab_size": 32, "packing": "documents"}

    def trained(number, tokens):
        """On one document alone, of all that the batch holds."""
        ends = np.cumsum(lengths)
        mask = np.zeros(len(tokens), bool)
        mask[ends[number] - lengths[number] : ends[number]] = True
        loader = open_loader([Stream("", tokens, 0, mask=mask)], Batching(**settings))
        assert loader.epoch == (4,)
        rows = loader.read(0)
        assert rows.mask.sum() == lengths[number] and rows.reset.sum() == 8
        state, metrics = compiled_step(version)(initial(version), rows)
        return jax.tree.map(np.asarray, (metrics.loss, state.params))

    for number in (0, 3, 6):
        others = tokens.copy()
        for other in set(range(len(lengths))) - {number}:
            end = sum(lengths[: other + 1])
            others[end - lengths[other] : end - 1] = rng.integers(1, 32, lengths[other] - 1)
        same = jax.tree.map(np.array_equal, trained(number, tokens), trained(number, others))
        assert all(jax.tree.leaves(same))
    differ = jax.tree.map(np.array_equal, trained(0, tokens), trained(3, tokens))
    assert not any(jax.tree.leaves(differ[0]))


@pytest.mark.parametrize("parts", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_rows_start_from_their_states(parts):
    """The losses of a text read in pieces are those of the text read at once."""
    still = OptimizerConfig(eps=1e9, peak_lr=1e-9, final_lr=1e-9, warmup_steps=0)
    carried = {"carry_state": True, "accumulate": parts}
    cfg = Config(
        model=MODELS["7"],
        data=DataConfig(sampler="sequential"),
        optimizer=still,
        train=TrainConfig(steps=50, batch=4, context=16, **carried),
    )
    whole = batch(t=48)
    state = init_train_state(cfg)
    params = jax.tree.map(np.array, state.params)  # copies: a step donates its state
    assert jax.tree.map(np.shape, state) == jax.tree.map(np.shape, abstract_train_state(cfg))
    step, losses = make_train_step(cfg), []
    for start in (0, 16, 32):
        state, metrics = step(state, Batch(*(x[:, start : start + 16] for x in whole)))
        losses.append(float(metrics.loss))
    nats, after = read(params, whole)
    assert losses == pytest.approx(nats.reshape(4, 3, 16).mean((0, 2)), rel=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), state.carried, after
    )
