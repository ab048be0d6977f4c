"""The golden files: logits of official code for random dense weights, reproduced in every mode.

A difference here means that the model computes something else than RWKV does.
`tests/golden/make.py` made the files and says where the numbers come from.
"""

import functools
from itertools import pairwise
from pathlib import Path

import jax
import numpy as np
import pytest
from compiling import as_users_do
from markers import each_recurrence, versions
from tolerances import GOLDEN_LOGITS

from rwkv_jax import models
from rwkv_jax.checkpoint.keymaps import from_official, to_official
from rwkv_jax.wkv import IMPLEMENTATIONS

FOLDER = Path(__file__).parents[1] / "golden"

every_version = pytest.mark.parametrize("version", models.VERSIONS)
every_layout = pytest.mark.parametrize("layout", ["stacked", "unstacked"])


@functools.cache
def golden(version):
    """The file's tensors (float32), its tokens `[1, t]`, and both sets of logits `[1, t, V]`."""
    arrays = dict(np.load(FOLDER / f"rwkv{version}.npz"))
    tensors = {name: x.astype(np.float32) for name, x in arrays.items() if "." in name}
    return (
        tensors,
        arrays["tokens"][None].astype(np.int32),
        arrays["numpy_fp64"][None],
        arrays["pip_fp32"][None],
    )


@functools.cache
def loaded(version):
    return from_official(golden(version)[0])


unstack = jax.jit(models.unstack)
"""One program instead of one for each shape."""


@functools.cache
def compiled(version, implementation, layout, jit=jax.jit):
    """(tokens, state) -> (logits, state) with the golden weights."""
    params, cfg = loaded(version)
    params = unstack(params) if layout == "unstacked" else params
    run = jit(functools.partial(models.forward, cfg=cfg, implementation=implementation))
    return lambda tokens, state=None: run(params, tokens, state)


def check(version, logits):
    _, _, exact, official = golden(version)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, exact, rtol=0, atol=GOLDEN_LOGITS)
    np.testing.assert_allclose(logits, official, rtol=0, atol=GOLDEN_LOGITS)


@every_version
@pytest.mark.parametrize(
    ("implementation", "layout"),
    [
        pytest.param("scan", "unstacked", marks=pytest.mark.slow),
        ("chunked", "stacked"),
        pytest.param("associative", "stacked", marks=pytest.mark.slow),
    ],
)
def test_whole_sequence(version, implementation, layout):
    """Compiled as users do: with every optimisation."""
    logits, _ = compiled(version, implementation, layout, as_users_do)(golden(version)[1])
    check(version, logits)


@versions("4", "7")
@pytest.mark.parametrize(
    ("implementation", "layout"), [(None, "stacked"), (None, "unstacked"), ("chunked", "stacked")]
)
def test_token_by_token(version, implementation, layout):
    run, tokens = compiled(version, implementation, layout), golden(version)[1]
    params, cfg = loaded(version)
    state, rows = models.init_state(cfg, 1, params), []
    state = unstack(state) if layout == "unstacked" else state
    for t in range(tokens.shape[1]):
        logits, state = run(tokens[:, t : t + 1], state)
        rows.append(logits)
    check(version, np.concatenate(rows, 1))


@versions("7")
def test_cut_at_random_places(version):
    """Three pieces, the state handed from one implementation to the next."""
    tokens = golden(version)[1]
    rng = np.random.default_rng(list(models.VERSIONS).index(version))
    inner = sorted(rng.choice(np.arange(2, tokens.shape[1]), 2, replace=False).tolist())
    state, pieces = None, []
    for (start, stop), implementation in zip(
        pairwise([0, *inner, tokens.shape[1]]), IMPLEMENTATIONS[:3], strict=True
    ):
        logits, state = compiled(version, implementation, "stacked")(tokens[:, start:stop], state)
        pieces.append(logits)
    check(version, np.concatenate(pieces, 1))


@versions("7")
def test_layouts_convert_into_each_other(version):
    """A state continues in the other layout, and `stack` undoes `unstack`."""
    params, cfg = loaded(version)
    tokens = golden(version)[1]
    first, state = compiled(version, None, "stacked")(tokens[:, :17])
    second, unstacked = compiled(version, None, "unstacked")(tokens[:, 17:], unstack(state))
    check(version, np.concatenate([first, second], 1))
    stack = jax.jit(models.stack)
    for tree in (params, state, stack(unstacked)):
        again = stack(unstack(tree))
        assert jax.tree.structure(again) == jax.tree.structure(tree)
        assert all(map(np.array_equal, jax.tree.leaves(again), jax.tree.leaves(tree)))
    assert len(unstack(params).blocks) == cfg.layers


@each_recurrence
def test_rows_of_a_batch_are_alone(version):
    """The golden sequence in the middle of a batch of others."""
    tokens = golden(version)[1]
    batch = np.concatenate([np.roll(tokens, 3, 1), tokens, tokens[:, ::-1]])
    logits, _ = compiled(version, None, "stacked")(batch)
    check(version, logits[1:2])


@every_version
def test_official_names_round_trip(version):
    """Every tensor comes back bit for bit; version 7 adds only layer 0's unused v0, v1, v2."""
    tensors = golden(version)[0]
    params, cfg = loaded(version)
    back = to_official(params, cfg)
    unused = {f"blocks.0.att.v{i}" for i in range(3)} if version[0] == "7" else set()
    assert set(back) == set(tensors) | unused
    for name, x in tensors.items():
        assert back[name].dtype == x.dtype
        assert np.array_equal(back[name], x), name
    assert not any(np.any(back[name]) for name in unused)

    again, again_cfg = from_official(back)
    assert again_cfg == cfg
    assert jax.tree.structure(again) == jax.tree.structure(params)
    assert all(map(np.array_equal, jax.tree.leaves(again), jax.tree.leaves(params)))


@every_version
def test_prefix_and_key_order_do_not_matter(version):
    tensors = golden(version)[0]
    prefixed = {f"_forward_module.{name}": tensors[name] for name in sorted(tensors, reverse=True)}
    params, cfg = from_official(prefixed)
    expected, expected_cfg = loaded(version)
    assert cfg == expected_cfg
    assert all(map(np.array_equal, jax.tree.leaves(params), jax.tree.leaves(expected)))


@every_version
def test_a_broken_file_is_named(version):
    """One line that names the tensor, whatever is wrong with it."""
    tensors = golden(version)[0]
    name = "blocks.1.att.output.weight"
    missing = {key: x for key, x in tensors.items() if key != name}
    misshapen = tensors | {name: tensors[name][:, 1:]}
    extra = tensors | {"blocks.1.att.surprise": np.zeros(3, np.float32)}
    for broken, culprit in ((missing, name), (misshapen, name), (extra, "blocks.1.att.surprise")):
        with pytest.raises(ValueError, match=culprit.replace(".", r"\.")) as caught:
            from_official(broken)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="RWKV"):
        from_official({"weight": np.zeros((2, 2), np.float32)})
