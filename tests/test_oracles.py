"""The oracles: gradients by central differences, whole models against the golden logits."""

from pathlib import Path

import numpy as np
import oracles
import pytest

from rwkv_jax import testing

SMALL = testing.Shape(2, 5, 2, 3)
GOLDEN = Path(__file__).parent / "golden"


def central_differences(loss, x, step=1e-5):
    """d loss(x) / dx, element by element."""
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        gradient[index] = (loss(up) - loss(down)) / (2 * step)
    return gradient


def check_gradients(inputs, loss, gradients):
    for name, x in inputs.items():
        numeric = central_differences(lambda changed, name=name: loss(inputs | {name: changed}), x)
        assert np.abs(numeric).max() > 1e-3, f"{name} does not reach the loss: nothing was checked"
        np.testing.assert_allclose(gradients[name], numeric, rtol=1e-6, atol=1e-7, err_msg=name)


@pytest.fixture
def reset():
    reset = np.zeros((2, 5), bool)
    reset[0, 3] = True
    return reset


def test_wkv4_gradients(reset):
    rng = np.random.default_rng(0)
    inputs = {
        name: x.astype(np.float64) for name, x in testing.wkv4_inputs("typical", SMALL).items()
    }
    sums = oracles.wkv4_sums(*testing.wkv4_state(SMALL))
    inputs |= {"N": sums[0], "D": sums[1]}
    dy, dn, dd = rng.normal(size=(2, 5, 6)), rng.normal(size=(2, 6)), rng.normal(size=(2, 6))

    def loss(x):
        y, (n, d) = oracles.wkv4(x["log_w"], x["k"], x["v"], x["u"], (x["N"], x["D"]), reset)
        return (dy * y).sum() + (dn * n).sum() + (dd * d).sum()

    gradients = oracles.wkv4_grad(
        *(inputs[name] for name in ("log_w", "k", "v", "u")), sums, reset, dy, (dn, dd)
    )
    check_gradients(inputs, loss, gradients)


@pytest.mark.parametrize("draw", [testing.wkv5_inputs, testing.wkv6_inputs])
def test_wkv6_gradients(reset, draw):
    rng = np.random.default_rng(0)
    inputs = {name: x.astype(np.float64) for name, x in draw("typical", SMALL).items()}
    inputs["state"] = testing.matrix_state(SMALL).astype(np.float64)
    inputs["initial"] = rng.normal(size=(2, 3, 3))
    dy, dstate = rng.normal(size=SMALL.heads_shape), rng.normal(size=(2, 2, 3, 3))

    def loss(x):
        y, state = oracles.wkv6(**x, reset=reset)
        return (dy * y).sum() + (dstate * state).sum()

    check_gradients(inputs, loss, oracles.wkv6_grad(**inputs, reset=reset, dy=dy, dstate=dstate))


def test_wkv7_gradients(reset):
    rng = np.random.default_rng(0)
    inputs = {
        name: x.astype(np.float64) for name, x in testing.wkv7_inputs("typical", SMALL).items()
    }
    inputs["state"] = testing.matrix_state(SMALL).astype(np.float64)
    inputs["initial"] = rng.normal(size=(2, 3, 3))
    dy, dstate = rng.normal(size=SMALL.heads_shape), rng.normal(size=(2, 2, 3, 3))

    def loss(x):
        y, state = oracles.wkv7(**x, reset=reset)
        return (dy * y).sum() + (dstate * state).sum()

    check_gradients(inputs, loss, oracles.wkv7_grad(**inputs, reset=reset, dy=dy, dstate=dstate))


@pytest.mark.parametrize("version", oracles.MODELS)
def test_models_reproduce_the_golden_logits(version):
    golden = dict(np.load(GOLDEN / f"rwkv{version}.npz"))
    tensors = {name: x for name, x in golden.items() if "." in name}
    logits = oracles.MODELS[version](tensors, golden["tokens"])
    np.testing.assert_allclose(logits, golden["numpy_fp64"], atol=1e-12)
    np.testing.assert_allclose(logits, golden["pip_fp32"], atol=3e-5)
