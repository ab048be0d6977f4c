"""Kernels as JAX functions: by rows and heads over devices and under vmap, with their gradient.

A kernel's program is of one row and head (or tile of heads). XLA cannot see that in a custom call,
so it is said here: a mesh that shards rows or heads, named or not by the caller, gives each device
its own (`custom_partitioning`), and `vmap` adds rows.
"""

import logging
import math
from functools import lru_cache, partial
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, Sharding

from rwkv_jax.typing import Array, Bool, Callable, Float
from rwkv_jax.wkv.device import accelerator, device_kind, too_old
from rwkv_jax.wkv.gradient import with_gradient
from rwkv_jax.wkv.triton import kept_type

log = logging.getLogger("rwkv_jax")


def per_row(
    call: Callable[..., tuple[Array, ...]],
    operands: list[str],
    results: list[str],
    heads_a_tile: Callable[[int], int] = lambda h: 1,
    *,
    platform: str,
) -> Callable[..., tuple[Array, ...]]:
    """`call`, whose work is of each row and head apart: over devices and under `vmap`.

    `operands` and `results` have a letter for each dimension: b rows, h heads or channels, m heads
    of k numbers each; others are of no device alone. The first operand has b and h. Of a device's h
    heads `call` gets whole tiles, zeros in the last. XLA for TPUs takes no part of this: there axes
    of a mesh are mapped before (`why_not`).
    """
    call = _in_tiles(call, operands, results, heads_a_tile)
    spread = call if platform == "tpu" else _spread(call, operands, results)

    @custom_vmap
    def run(*given: Array) -> tuple[Array, ...]:
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.manual_axes and not automatic(mesh):
            return call(*given)  # JAX takes it that some device is left to part over
        return tuple(spread(*given))

    @run.def_vmap
    def _(size: int, mapped: list[bool], *given: Array) -> tuple:
        folded = []
        for dims, is_mapped, x in zip(operands, mapped, given, strict=True):
            if not is_mapped:
                x = jnp.broadcast_to(x[None], (size, *x.shape))
            row = dims.index("b")
            x = jnp.moveaxis(x, 0, row)
            folded.append(x.reshape(*x.shape[:row], -1, *x.shape[row + 2 :]))
        out = []
        for dims, x in zip(results, run(*folded), strict=True):
            row = dims.index("b")
            x = x.reshape(*x.shape[:row], size, -1, *x.shape[row + 1 :])
            out.append(jnp.moveaxis(x, row, 0))
        return tuple(out), (True,) * len(out)

    return run


def _in_tiles(
    call: Callable[..., tuple[Array, ...]],
    operands: list[str],
    results: list[str],
    heads_a_tile: Callable[[int], int],
) -> Callable[..., tuple[Array, ...]]:
    def resized(x: Array, dims: str, old: int, new: int) -> Array:
        axis = max(dims.find("h"), dims.find("m"))
        if axis < 0:
            return x
        size = x.shape[axis] // old * new
        if new < old:
            return lax.slice_in_dim(x, 0, size, axis=axis)
        return jnp.pad(x, [(0, size - n if i == axis else 0) for i, n in enumerate(x.shape)])

    def run(*given: Array) -> tuple[Array, ...]:
        h = given[0].shape[operands[0].index("h")]
        whole = h + -h % heads_a_tile(h)
        if whole == h:
            return call(*given)
        filled = (resized(x, dims, h, whole) for x, dims in zip(given, operands, strict=True))
        out = zip(call(*filled), results, strict=True)
        return tuple(resized(x, dims, whole, h) for x, dims in out)

    return run


def _spread(
    call: Callable[..., tuple[Array, ...]], operands: list[str], results: list[str]
) -> Callable[..., tuple[Array, ...]]:
    """`call` of each device's rows and heads, as the first operand has them over devices."""

    def partition(mesh: Mesh, arguments: Any, outputs: Any) -> tuple:
        def shardings(each: list[str]) -> tuple[Sharding, ...]:
            return tuple(_as_first(arguments[0].sharding, operands[0], dims) for dims in each)

        return mesh, call, shardings(results), shardings(operands)

    rule = f"{', '.join(map(' '.join, operands))} -> {', '.join(map(' '.join, results))}"
    factors = dict.fromkeys(x for x in rule if x.isalpha())  # in the order that they appear in
    spread = custom_partitioning(call)
    spread.def_partition(
        partition=partition,
        sharding_rule=rule,
        need_replication_factors=tuple(x for x in factors if x not in "bh"),
        # By names of axes JAX has none inside a shard_map, and takes no parts of unequal size.
        decode_shardings=False,
    )
    return spread


def _as_first(first: Any, of: str, dims: str) -> Sharding:
    """`dims` over devices as the first operand, of dimensions `of`, has its rows and heads: XLA's
    form is an array of devices with an axis for each dimension and one for copies."""
    form = first._to_xla_hlo_sharding(len(of))
    if form.is_replicated():
        return first
    tiles = form.tile_assignment_dimensions()
    devices = np.reshape(form.tile_assignment_devices(), tiles)
    kept = [of.index(x) for x in dims if x in "bh"]
    devices = devices.transpose(*kept, *(i for i in range(devices.ndim) if i not in kept))
    counts = [tiles[of.index(x)] if x in "bh" else 1 for x in dims]
    shape = ",".join(map(str, [*counts, devices.size // math.prod(counts)]))
    order = ",".join(map(str, devices.ravel()))
    form = type(form).from_string(f"{{devices=[{shape}]{order} last_tile_dim_replicate}}")
    # Devices in any order: XLA goes by their numbers.
    return type(first)(tuple(first.device_set), form)


def automatic(mesh: Any) -> list[str]:
    """The axes of a mesh over which XLA parts programs by itself."""
    return [axis for axis in mesh.auto_axes if mesh.shape[axis] > 1]


def on_platform(platform: str, interpreted: bool, run: Callable, form: Callable) -> Callable:
    """`run(interpret, *given)` compiled for the platform; in programs for a CPU it is interpreted,
    or else `form(*given)` runs in programs for all others."""
    compiled = {platform: partial(run, False)}
    if interpreted:
        return lambda *given: lax.platform_dependent(*given, cpu=partial(run, True), **compiled)
    return lambda *given: lax.platform_dependent(*given, default=form, **compiled)


def differentiable(
    operator: str, primal: Callable, forward: Callable, backward: Callable, reference: Callable
) -> Callable[..., Any]:
    """`with_gradient` of passes that are kernels, twice: what differentiates a gradient meets both
    passes, and those are then `reference`'s, which XLA runs. The last of what is given is not
    differentiated, nor is what is kept, which is made of the rest."""

    @jax.custom_vjp
    def forward_again(*given):
        return forward(*given)

    def of_forward(given, cotangents):
        outputs, _ = cotangents
        x, fixed = given
        return *jax.vjp(lambda *x: reference(*x, *fixed), *x)[1](outputs), *(None for _ in fixed)

    def split(given):
        floating = [_is_float(x) for x in given]
        count = floating.index(False) if False in floating else len(given)
        return given[:count], given[count:]

    forward_again.defvjp(lambda *given: (forward(*given), split(given)), of_forward)

    @jax.custom_vjp
    def backward_again(given, kept, cotangents):
        return backward(given, kept, cotangents)

    def of_backward(residuals, gradients):
        given, kept, cotangents = residuals
        x, fixed = split(given)

        def gradient(x, cotangents):
            return jax.vjp(lambda *x: reference(*x, *fixed), *x)[1](cotangents)

        x, cotangents = jax.vjp(gradient, x, cotangents)[1](gradients[: len(x)])
        return (*x, *(None for _ in fixed)), jax.tree.map(jnp.zeros_like, kept), cotangents

    backward_again.defvjp(lambda *all: (backward(*all), all), of_backward)
    return with_gradient(operator, primal, forward_again, backward_again)


def _is_float(x: Any) -> bool:
    """Whether it is a tree of numbers, if it is one of any array at all."""
    leaves = jax.tree.leaves(x)
    return x is not None and all(jnp.issubdtype(z.dtype, jnp.floating) for z in leaves)


@lru_cache
def say_once(message: str) -> None:
    """A line in the log, once in a process."""
    log.warning(message)


class Form(NamedTuple):
    """XLA's form, for where a kernel does not run. All take what the kernel takes; `forward` keeps
    as many states as the kernel."""

    primal: Callable[..., Any]  # (kernel, x, shared, state, reset)
    forward: Callable[..., Any]
    backward: Callable[..., Any]  # (kernel, given, kept, cotangents)
    reference: Callable[..., Any]
    """(x, shared, state, reset) -> (y, the state after), which JAX can differentiate twice."""


class Kernel(NamedTuple):
    """A version's recurrence on one platform."""

    operator: str
    platform: str  # XLA's name
    driver: ModuleType  # triton or mosaic
    tile: ModuleType  # the version's algebra
    size: int  # tokens a chunk
    form: Form


def refusal(kernel: Kernel, x: Any, state: Array) -> str | None:
    """Why there is no kernel for such inputs."""
    n, v = x.r.shape[-1], x.v.shape[-1]
    if state.dtype == jnp.float64:  # as any input makes it
        return "float64"
    if v % n:
        return f"values of {v} channels a head for keys of {n}"
    return kernel.driver.refusal(n, x.v.dtype)


def check(kernel: Any, operator: str, named: bool, reason: str | None) -> None:
    """Raises a `ValueError` if there is a reason against a kernel, or it was named for another
    device than the program's."""
    platform = accelerator()
    if named and platform not in (None, kernel.platform):
        reason = f"{platform}: this one is for {kernel.platform}"
    reason = reason or why_not(kernel.platform)
    if reason is not None:
        raise ValueError(f"{operator}: no kernel for {reason}; implementation='chunked' takes any")


def run(
    kernel: Kernel, named: bool, x: Any, shared: tuple, state: Array, reset: Any
) -> tuple[Array, Array]:
    """The recurrence by this kernel, for any length, and size of values that is a multiple of the
    keys'. In a program for a CPU it is interpreted if it was `named`, else XLA's
    form runs. Whether there is one for such inputs is for the caller to `check`.
    """
    t, n = x.r.shape[1], x.r.shape[3]
    more = -t % kernel.size
    if more:
        # Zeros: no decay, nothing written, nothing removed.
        x = type(x)(*(jnp.pad(z, ((0, 0), (0, more), (0, 0), (0, 0))) for z in x))
        reset = None if reset is None else jnp.pad(reset, ((0, 0), (0, more)))
    parts = []
    for start in range(0, x.v.shape[-1], n):
        part = x._replace(v=lax.slice_in_dim(x.v, start, start + n, axis=3))
        entering = lax.slice_in_dim(state, start, start + n, axis=2)
        parts.append(recurrence(kernel, named)(part, shared, entering, reset))
    y, after = parts[0]
    if len(parts) > 1:
        ys, states = zip(*parts, strict=True)
        y, after = jnp.concatenate(ys, 3), jnp.concatenate(states, 2)
    return y[:, :t], after


def wide(x: Any) -> Any:
    """Inputs in the type that XLA's forms compute in."""
    return type(x)(*(z.astype(jnp.float32) for z in x))


def narrow(dx: Any, x: Any) -> Any:
    """Gradients in their inputs' types."""
    return type(x)(*(d.astype(z.dtype) for d, z in zip(dx, x, strict=True)))


def kept(kernel: Kernel, x: Any, entering: Float[Array, "chunks b h v k"]) -> Array:
    """States of XLA's form, in the shape and type of what the kernel keeps."""
    return kernel.driver.kept(entering.astype(kept_type(x)))


def entering(kernel: Kernel, x: Any, kept: Array) -> Float[Array, "chunks b h v k"]:
    """The inverse of `kept`."""
    return kernel.driver.entering(kept.astype(jnp.float32), x.r.shape[2])


@lru_cache
def recurrence(kernel: Kernel, interpreted: bool) -> Callable[..., Any]:
    """f(x, shared, state, reset) -> (y, the state after), with its gradient.

    `x` is a version's inputs [b, t, h, n], of whole chunks, in any type; `shared` what all tokens
    share [h, n]; `state` [b, h, n, n]. In a program for a CPU the kernel is interpreted, which is
    slow, or XLA's form runs.
    """

    def pick(name: str, run: Callable) -> Callable:
        form = partial(getattr(kernel.form, name), kernel)
        return on_platform(kernel.platform, interpreted, run, form)

    primal = pick("primal", partial(_forward, kernel, False))
    forward = pick("forward", partial(_forward, kernel, True))
    backward = pick("backward", partial(_backward, kernel))
    return differentiable(kernel.operator, primal, forward, backward, kernel.form.reference)


def _forward(
    kernel: Kernel, keep: bool, interpret: bool, x: Any, shared: tuple, state: Array, reset: Any
) -> Any:
    """(y, the state after), and, to `keep`, the states that enter the chunks."""
    fixed, dims, kinds = _fixed(kernel, x, shared, reset)

    def call(*given: Array) -> tuple[Array, ...]:
        *fixed, state = given
        return kernel.driver.forward(
            kernel.tile, kernel.size, keep, interpret, *_kinds(kinds, x, fixed), state
        )

    results = ["bthn", "bhvk"] + [kernel.driver.KEPT] * keep
    tiled = partial(kernel.driver.heads_a_tile, n=x[0].shape[3])
    y, after, *kept = per_row(call, [*dims, "bhvk"], results, tiled, platform=kernel.platform)(
        *fixed, state
    )
    return ((y, after), kept[0]) if keep else (y, after)


def _backward(kernel: Kernel, interpret: bool, given: Any, kept: Array, cotangents: Any) -> Any:
    """Gradients of what `_forward` was given."""
    x, shared, _, reset = given
    fixed, dims, kinds = _fixed(kernel, x, shared, reset)

    def call(*given: Array) -> tuple[Array, ...]:
        *fixed, kept, dy, dstate = given
        return kernel.driver.backward(
            kernel.tile, kernel.size, interpret, *_kinds(kinds, x, fixed), kept, dy, dstate
        )

    results = ["bthn"] * len(x) + ["bhn"] * len(shared) + ["bhvk"]
    dims = [*dims, kernel.driver.KEPT, "bthn", "bhvk"]
    tiled = partial(kernel.driver.heads_a_tile, n=x[0].shape[3])
    *out, dstate = per_row(call, dims, results, tiled, platform=kernel.platform)(
        *fixed, kept, *cotangents
    )
    dshared = (jnp.sum(z, 0).astype(u.dtype) for z, u in zip(out[len(x) :], shared, strict=True))
    return type(x)(*out[: len(x)]), tuple(dshared), dstate, None


def _fixed(kernel: Kernel, x: Any, shared: tuple, reset: Any) -> tuple[list, list[str], tuple]:
    """What both passes read: the arrays, their dimensions, how many there are of each kind."""
    rows = [jnp.broadcast_to(u, (x[0].shape[0], *u.shape)) for u in shared]
    ids = [] if reset is None else [started(reset, kernel.size)]
    dims = ["bthn"] * len(x) + ["bhn"] * len(rows) + ["bcs"] * len(ids)
    return [*x, *rows, *ids], dims, (len(x), len(rows), len(ids))


def _kinds(counts: tuple, x: Any, flat: list[Array]) -> tuple[Any, tuple, Array | None]:
    """The inverse of `_fixed`."""
    tokens, rows, ids = counts
    return (
        type(x)(*flat[:tokens]),
        tuple(flat[tokens : tokens + rows]),
        flat[-1] if ids else None,
    )


def why_not(platform: str | None) -> str | None:
    """Why there is no kernel here, whatever the inputs."""
    mesh = jax.sharding.get_abstract_mesh()
    if platform == "tpu" and (axes := automatic(mesh)):
        return (
            f"automatic mesh axes ({', '.join(axes)}) on TPUs, where XLA cannot part it; make them"
            " explicit, or map them by jax.shard_map"
        )
    if platform == "tpu" and device_kind() in ("TPU v2", "TPU v3"):
        return device_kind()
    return too_old() if platform == "cuda" else None


def mapped(implementation: str | None) -> bool:
    """Whether axes of a mesh have to be mapped for it, even those that part nothing."""
    return implementation == "pallas_tpu" or (implementation is None and accelerator() == "tpu")


def chosen(operator: str, kernels: tuple[Any, ...], refusal: Callable, *x: Any) -> Any:
    """The kernel for the accelerator and these inputs, if there is one; a line in the log if there
    is one for other inputs."""
    platform = accelerator()
    kernel = next((kernel for kernel in kernels if kernel.platform == platform), None)
    if kernel is None:
        return None
    reason = why_not(platform) or _no_mesh(platform) or refusal(kernel, *x)
    if reason is None:
        return kernel
    say_once(f"{operator}: no kernel for {reason}; XLA's form runs instead")
    return None


def _no_mesh(platform: str | None) -> str | None:
    """Where there are several TPUs and no mesh is set, XLA may have to part a program over them."""
    if platform != "tpu" or not jax.sharding.get_abstract_mesh().empty or jax.device_count() == 1:
        return None
    return "several TPUs without a mesh; set one of explicit axes (jax.set_mesh)"


def started(reset: Bool[Array, "b t"], size: int) -> Float[Array, "b chunks C"]:
    """How many documents started in the chunk up to each token."""
    return jnp.cumsum(reset.reshape(reset.shape[0], -1, size).astype(jnp.float32), 2)
