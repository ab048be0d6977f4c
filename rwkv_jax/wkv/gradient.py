"""Functions of arrays whose gradient is written by hand, and which differentiate in every mode.

JAX's `custom_vjp` knows reverse mode only. Here the derivative is a JAX primitive: evaluating it
applies JAX's JVP of `forward`, transposing it calls the gradient by hand.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from rwkv_jax.remat import save_for_backward
from rwkv_jax.typing import Array, Callable, PyTree


def with_gradient(
    primal: Callable,
    forward: Callable,
    backward: Callable,
    *,
    keeps_outputs: bool = False,
    pushed: Callable | None = None,
) -> Callable[..., Any]:
    """`primal(*args)`, whose gradient is written by hand.

    Under differentiation `forward(*args)` runs instead and returns (outputs, residuals);
    `backward(args, residuals, cotangents)` returns the gradients of `args`, None for masks. With
    `keeps_outputs` the residuals that `backward` gets are (outputs, residuals). All of them are
    tagged as too expensive to recompute (`rwkv_jax.remat`). `pushed(*args)`, the same outputs
    again, is what JAX differentiates in forward mode; None is `forward`.
    """
    pushed = pushed or outputs_of(forward)

    @jax.custom_jvp
    def run(*args):
        outputs, tree = jax.tree.flatten(primal(*args))
        tied = _tied.bind(*outputs, *jax.tree.leaves(args), size=len(outputs))
        return jax.tree.unflatten(tree, tied)

    def differentiated(args, tangents):
        outputs, residuals = save_for_backward(forward(*args), of_wkv=True)
        residuals = (outputs, residuals) if keeps_outputs else residuals
        known, tree = jax.tree.flatten((args, residuals))
        tangents = jax.tree.leaves(tangents)
        moving = tuple(not isinstance(x, SymbolicZero) for x in tangents)
        flat, out_tree = jax.tree.flatten(outputs)
        derivative = Derivative(pushed, backward, tree, out_tree, moving)
        types = tuple(map(jax.typeof, flat))
        out = _derivative.bind(*known, *_select(moving, tangents), map=derivative, types=types)
        return outputs, jax.tree.unflatten(out_tree, out)

    run.defjvp(differentiated, symbolic_zeros=True)
    return run


def outputs_of(forward: Callable) -> Callable:
    """`forward` without its residuals: a `primal`."""
    return lambda *args: forward(*args)[0]


class Derivative(NamedTuple):
    """The linear map of tangents, of those arguments that are `moving`, to tangents of outputs.

    All that it depends on is `known`, the leaves of (args, residuals).
    """

    pushed: Callable
    backward: Callable
    tree: Any  # of (args, residuals)
    out_tree: Any
    moving: tuple[bool, ...]

    @property
    def size(self) -> int:
        return self.tree.num_leaves

    def push(self, known: list[Array], tangents: list[Array]) -> list[Array]:
        args, _ = jax.tree.unflatten(self.tree, known)
        flat, tree = jax.tree.flatten(args)
        run = lambda *flat: self.pushed(*jax.tree.unflatten(tree, flat))  # noqa: E731
        return jax.tree.leaves(_along(run, flat, self.moving, tangents)[1])

    def pull(self, known: list[Array], cotangents: list[Array]) -> list[Array]:
        args, residuals = jax.tree.unflatten(self.tree, known)
        cotangents = jax.tree.unflatten(self.out_tree, cotangents)
        gradients = self.backward(args, residuals, cotangents)
        none = lambda x: x is None  # noqa: E731
        filled = jax.tree.map(lambda x: 0 if x is None else x, gradients, is_leaf=none)
        return _select(self.moving, jax.tree.leaves(jax.tree.broadcast(filled, args)))


class Batched(NamedTuple):
    """A derivative mapped over the leading axis of tangents, and of what is `mapped` of `known`."""

    map: Any
    mapped: tuple[bool, ...]

    @property
    def size(self) -> int:
        return self.map.size

    def push(self, known: list[Array], tangents: list[Array]) -> list[Array]:
        return jax.vmap(self.map.push, (self._axes, 0))(known, tangents)

    def pull(self, known: list[Array], cotangents: list[Array]) -> list[Array]:
        return jax.vmap(self.map.pull, (self._axes, 0))(known, cotangents)

    @property
    def _axes(self) -> list[int | None]:
        return [0 if mapped else None for mapped in self.mapped]


def _select(which: Sequence[bool], values: Sequence[Any]) -> list[Any]:
    return [x for x, chosen in zip(values, which, strict=True) if chosen]


def _along(
    run: Callable, values: Sequence[Array], moving: Sequence[bool], tangents: list[Array]
) -> tuple[PyTree, PyTree]:
    """`jax.jvp` of `run(*values)` along the `tangents` of those `values` that are `moving`."""

    def of_moving(*new: Array) -> PyTree:
        left = iter(new)
        pairs = zip(values, moving, strict=True)
        return run(*(next(left) if moves else x for x, moves in pairs))

    return jax.jvp(of_moving, _select(moving, values), tangents)


_derivative = Primitive("derivative")
_derivative.multiple_results = True


@_derivative.def_abstract_eval
def _types(*_, map, types):
    return list(types)


def _push(*operands, map, types):
    return map.push([*operands[: map.size]], [*operands[map.size :]])


def _transpose(cotangents, *operands, map, types):
    cotangents = [ad.instantiate_zeros(x) for x in cotangents]
    return [None] * map.size + map.pull([*operands[: map.size]], cotangents)


def _differentiate(operands, tangents, **how):
    moving = tuple(not isinstance(x, ad.Zero) for x in tangents)
    return _along(partial(_push, **how), operands, moving, _select(moving, tangents))


def _batch(operands, axes, *, map, types):
    size = next(x.shape[axis] for x, axis in zip(operands, axes, strict=True) if axis is not None)
    front = [
        x if axis is None and place < map.size else batching.bdim_at_front(x, axis, size)
        for place, (x, axis) in enumerate(zip(operands, axes, strict=True))
    ]
    batched = Batched(map, tuple(axis is not None for axis in axes[: map.size]))
    types = jax.make_jaxpr(batched.push)(front[: map.size], front[map.size :]).out_avals
    out = _derivative.bind(*front, map=batched, types=tuple(types))
    return out, [0] * len(out)


_derivative.def_impl(jax.jit(_push, static_argnames=("map", "types")))
mlir.register_lowering(_derivative, mlir.lower_fun(_push, multiple_results=True))
ad.primitive_transposes[_derivative] = _transpose
ad.primitive_jvps[_derivative] = _differentiate
batching.primitive_batchers[_derivative] = _batch


_tied = Primitive("tied")
"""Returns its first `size` operands. Where `vmap` maps any operand, all results are mapped: `cond`
refuses branches whose results are mapped differently, as those of `run` and its derivative are."""
_tied.multiple_results = True


@_tied.def_abstract_eval
def _types_tied(*operands, size):
    return list(operands[:size])


def _tie(*operands, size):
    return list(operands[:size])


def _batch_tied(operands, axes, *, size):
    count = next(x.shape[axis] for x, axis in zip(operands, axes, strict=True) if axis is not None)
    pairs = zip(operands[:size], axes[:size], strict=True)
    front = [batching.bdim_at_front(x, axis, count) for x, axis in pairs]
    return _tied.bind(*front, size=size), [0] * size


_tied.def_impl(_tie)
mlir.register_lowering(_tied, mlir.lower_fun(_tie, multiple_results=True))
batching.primitive_batchers[_tied] = _batch_tied
