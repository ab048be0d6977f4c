"""A recurrence's kernel as a JAX function: its forward and backward passes, its gradient, and XLA's
form in programs for other platforms."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rwkv_jax.typing import Array, Callable, PyTree
from rwkv_jax.wkv.device import by_platform
from rwkv_jax.wkv.gradient import with_gradient
from rwkv_jax.wkv.pallas.partition import partitioned


class Forward(NamedTuple):
    """The inputs of a forward pass: arrays, the letters of their dimensions, or refs."""

    x: Any  # what each token has of its own, a named tuple
    shared: Any  # what all tokens of a row share
    state: Any
    starts: Any  # which document each token belongs to; None if none starts


class Outputs(NamedTuple):
    """The outputs of a forward pass."""

    y: Any
    after: Any  # the state after the last token
    entering: Any  # the states that enter the chunks; None if no gradient is taken


class Backward(NamedTuple):
    """The inputs of a backward pass."""

    x: Any
    shared: Any
    entering: Any
    dy: Any
    dstate: Any
    starts: Any


class Gradients(NamedTuple):
    """The outputs of a backward pass; of `shared`, one gradient a row."""

    x: Any
    shared: Any
    state: Any


def pass_letters(
    *, tokens: str, shared: str, state: str, entering: PyTree, starts: str
) -> dict[str, tuple[PyTree, PyTree]]:
    """The letters of the inputs and outputs of both passes: b rows, h heads (or channels, where
    they do not mix), c chunks, t tokens, s tokens of a chunk, n, v, k channels of a head, m those
    of all heads."""
    return {
        "forward": (Forward(tokens, shared, state, starts), Outputs(tokens, state, entering)),
        "backward": (
            Backward(tokens, shared, entering, tokens, state, starts),
            Gradients(tokens, shared, state),
        ),
    }


def letters_of(outputs: Outputs | Gradients, letters: PyTree) -> PyTree:
    """The letters of the outputs that there are."""
    kept = isinstance(outputs, Gradients) or outputs.entering is not None
    return letters if kept else letters._replace(entering=None)


class Algebra(NamedTuple):
    """An operator's algebra of one chunk, as its drivers call it."""

    operator: str
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    starts: Callable[[Any, int], Array | None]
    """(masks, tokens a chunk) -> `Forward.starts`."""


class Driver(NamedTuple):
    """How kernels run on one platform.

    platform     XLA's name: "cuda" or "tpu"
    letters      what `pass_letters` returns
    run          (kernel, "forward" or "backward", inputs, shapes of the outputs, interpret)
                 -> outputs
    multiple     (heads, channels of a head) -> `run` takes a multiple of so many heads
    pack         (states that enter the chunks [chunks, *state], x) -> `Outputs.entering`
    unpack       the inverse of `pack`, in float32
    unsupported  x -> why there is no kernel for these inputs; None if there is one
    program      (x, tokens a chunk) -> the rows, tokens and heads (or channels) of inputs that a
                 single program of the grid computes (of each core, where several share it)
    on_host      whether it is interpreted by callbacks to the host, which XLA does not partition
    """

    platform: str
    letters: dict[str, tuple[PyTree, PyTree]]
    run: Callable[..., Any]
    multiple: Callable[[int, int], int]
    pack: Callable[[Any, Any], Any]
    unpack: Callable[[Any, Any], Any]
    unsupported: Callable[[Any], str | None]
    program: Callable[[Any, int], tuple[int, int, int]]
    on_host: bool = False


class Passes(NamedTuple):
    """A recurrence and its gradient; `args` are (x, shared, state, masks), where masks have no
    gradient."""

    primal: Callable[..., Any]  # *args -> (y, state)
    forward: Callable[..., Any]  # *args -> (y, state), residuals
    backward: Callable[..., Any]  # args, residuals, cotangents -> gradients of args


class Kernel(NamedTuple):
    """An operator's recurrence on one platform."""

    algebra: Algebra
    driver: Driver
    size: int
    """Tokens a chunk."""


def passes(kernel: Kernel, interpret: bool) -> Passes:
    """The kernel on arrays of any number of rows and heads, for whole chunks."""
    return Passes(
        partial(_forward, kernel, interpret, False),
        partial(_forward, kernel, interpret, True),
        partial(_backward, kernel, interpret),
    )


def _forward(
    kernel: Kernel, interpret: bool, keep: bool, x: Any, shared: Any, state: Any, masks: Any
) -> Any:
    inputs = Forward(x, _by_row(shared, x), state, kernel.algebra.starts(masks, kernel.size))

    def run(inputs: Forward) -> Outputs:
        after = jax.tree.map(_float32, inputs.state)
        outputs = Outputs(_same(inputs.x.v), after, _entering(kernel, inputs) if keep else None)
        return kernel.driver.run(kernel, "forward", inputs, outputs, interpret)

    like = Outputs(x.v, state, _entering(kernel, inputs) if keep else None)
    out = _partitioned(kernel, "forward", run, inputs, like, interpret)
    return ((out.y, out.after), out.entering) if keep else (out.y, out.after)


def _backward(kernel: Kernel, interpret: bool, args: Any, entering: Any, cotangents: Any) -> Any:
    x, shared, state, masks = args
    starts = kernel.algebra.starts(masks, kernel.size)
    dy, dstate = cotangents
    inputs = Backward(x, _by_row(shared, x), entering, dy, dstate, starts)

    def run(inputs: Backward) -> Gradients:
        dx = jax.tree.map(_same, inputs.x)
        outputs = Gradients(dx, *jax.tree.map(_float32, (inputs.shared, inputs.dstate)))
        return kernel.driver.run(kernel, "backward", inputs, outputs, interpret)

    out = _partitioned(kernel, "backward", run, inputs, Gradients(x, shared, state), interpret)
    dshared = jax.tree.map(lambda z, u: jnp.sum(z, 0).astype(u.dtype), out.shared, shared)
    return out.x, dshared, out.state, None


def _partitioned(
    kernel: Kernel, name: str, run: Callable, inputs: Any, outputs: Any, interpret: bool
) -> Any:
    driver, n = kernel.driver, inputs.x.v.shape[-1]
    letters, out_letters = driver.letters[name]
    return partitioned(
        run,
        inputs,
        letters,
        jax.tree.broadcast(letters_of(outputs, out_letters), outputs),
        lambda h: driver.multiple(h, n),
        platform="host" if interpret and driver.on_host else driver.platform,
    )


def _by_row(shared: Any, x: Any) -> Any:
    return jax.tree.map(lambda u: jnp.broadcast_to(u, (x.v.shape[0], *u.shape)), shared)


def _same(x: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _float32(x: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, jnp.float32)


def _entering(kernel: Kernel, inputs: Forward) -> Any:
    chunks = inputs.x.v.shape[1] // kernel.size
    states = jax.tree.map(
        lambda z: jax.ShapeDtypeStruct((chunks, *z.shape), jnp.float32), inputs.state
    )
    return jax.eval_shape(kernel.driver.pack, states, inputs.x)


def recurrence(
    kernel: Kernel,
    named: bool,
    passes: Callable[[bool], Passes],
    xla: Passes,
    reference: Callable[..., Any],
) -> Callable[..., Any]:
    """(x, shared, state, masks) -> (y, state) with its gradient, by `passes(interpret)`.

    Programs for the kernel's platform run these passes compiled. In other programs, a kernel that
    was not `named` is replaced by `xla`; a `named` one is interpreted on a CPU, which is slow.
    Gradients are those of the passes; tangents and second derivatives those of `reference`, the
    same function in XLA. Masks have no gradient.
    """
    forms = {kernel.driver.platform: passes(False)}
    forms |= {"cpu": passes(True)} if named else {"default": xla}
    primal, forward, backward = (
        by_platform(**dict(zip(forms, run, strict=True)))
        for run in zip(*forms.values(), strict=True)
    )

    @jax.custom_jvp
    def forward_again(*args):
        return forward(*args)

    @forward_again.defjvp
    def _(args, tangents):
        outputs, residuals = forward(*args)
        run = lambda *x: reference(*x, args[-1])  # noqa: E731
        _, moved = jax.jvp(run, args[:-1], tangents[:-1])
        return (outputs, residuals), (moved, jax.tree.map(jnp.zeros_like, residuals))

    @jax.custom_jvp
    def backward_again(args, residuals, cotangents):
        return backward(args, residuals, cotangents)

    @backward_again.defjvp
    def _(primals, tangents):
        args, _, dy = primals

        def gradient(x, dy):
            return jax.vjp(lambda *x: reference(*x, args[-1]), *x)[1](dy)

        _, moved = jax.jvp(gradient, (args[:-1], dy), (tangents[0][:-1], tangents[2]))
        return backward(*primals), (*moved, None)

    return with_gradient(primal, forward_again, backward_again, pushed=reference)
