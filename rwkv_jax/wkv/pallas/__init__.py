"""The recurrences as Pallas kernels, for NVIDIA GPUs from Ampere on and for TPUs from v4 on, and
which of them runs.

Pallas is imported when a kernel may run, so that programs for CPUs do without it, and a JAX that
lacks a backend of it runs XLA's forms. docs/kernels.md says what the kernels are made of.
"""

import logging
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp

from rwkv_jax.wkv.device import accelerator, device_kind, is_here, too_old
from rwkv_jax.wkv.form import Form
from rwkv_jax.wkv.pallas.partition import auto_axes

log = logging.getLogger("rwkv_jax")

_BACKENDS = {"cuda": "triton", "tpu": "tpu", "mosaic_gpu": "mosaic_gpu"}
"""Pallas' modules, by XLA's name of a platform, or the name of a kernel that is not its default."""


def _missing(name: str) -> str | None:
    """Why this JAX has no such kernels."""
    backend = f"jax.experimental.pallas.{_BACKENDS[name]}"
    try:
        import_module(backend)
    except ImportError as error:
        return f"JAX {jax.__version__}, which does not import {backend} ({error})"
    return None


@lru_cache
def form(operator: str, name: str, *, named: bool) -> Form:
    """(x, state, reset) -> (y, state) by the kernel of "wkv4", "wkv6" or "wkv7" for "cuda" or
    "tpu", or by "mosaic_gpu" of "wkv7", for inputs of any float dtype that it takes; y is in v's.

    In programs for a CPU the kernel is interpreted if it was asked for by name; if it was not,
    XLA's form runs. Raises `ValueError` with the reason if the inputs are not supported, or if a
    named kernel is for another device than the program's.
    """

    def checked(x: Any, state: Any, reset: Any) -> Any:
        device, platform = accelerator(), _platform(name)
        if named and device not in (None, platform):
            reason = f"{device}: this one is for {platform}"
        else:
            reason = unsupported_reason(operator, name, x, state)
        if reason is not None:
            raise ValueError(
                f"{operator}: no kernel for {reason}; implementation='chunked' takes any"
            )
        return _form(operator, name, named)(x, state, reset)

    return checked


@lru_cache
def _form(operator: str, name: str, named: bool) -> Form:
    from rwkv_jax.wkv.pallas.table import FORMS, KERNELS

    return FORMS[operator](KERNELS[operator, name], named)


def _platform(name: str) -> str:
    return "cuda" if name == "mosaic_gpu" else name


def select(operator: str, x: Any, state: Any) -> Form | None:
    """The `form` of the kernel for the program's device, or None.

    If there is a kernel but it does not take these inputs, or the compiler of this process' devices
    does not take it, the log says why in one line.
    """
    platform = accelerator()
    if platform not in ("cuda", "tpu"):
        return None
    reason = (
        unsupported_reason(operator, platform, x, state)
        or _no_mesh(platform)
        or _refused(operator, platform, x, state)
    )
    if reason is None:
        return form(operator, platform, named=False)
    warn_once(f"{operator}: no kernel for {reason}; XLA's form runs instead")
    return None


def needs_shard_map(implementation: str | None) -> bool:
    """Whether this implementation needs a `shard_map` around it even if no axis shards anything:
    XLA for TPUs does not partition kernels."""
    return implementation == "pallas_tpu" or (implementation is None and accelerator() == "tpu")


def unsupported_reason(operator: str, name: str, x: Any, state: Any) -> str | None:
    """Why the kernel cannot run here, or not on these inputs."""
    platform, mesh = _platform(name), jax.sharding.get_abstract_mesh()
    if platform == "tpu" and (axes := auto_axes(mesh)):
        return (
            f"automatic mesh axes ({', '.join(axes)}) on TPUs, where XLA cannot partition it; make"
            " them explicit, or map them by jax.shard_map"
        )
    if platform == "tpu" and device_kind() in ("TPU v2", "TPU v3"):
        return device_kind()
    if platform == "cuda" and (reason := too_old()):
        return reason
    if any(z.dtype == jnp.float64 for z in jax.tree.leaves(state)):  # as any input makes it
        return "float64"
    # One token runs by the kernel of its platform.
    if reason := _missing(name) or (_missing(platform) if x.k.shape[1] == 1 else None):
        return reason
    from rwkv_jax.wkv.pallas.table import KERNELS

    return KERNELS[operator, name].driver.unsupported(x)


def _no_mesh(platform: str | None) -> str | None:
    """On several TPUs with no mesh set, XLA may have to partition the program."""
    if platform != "tpu" or not jax.sharding.get_abstract_mesh().empty or jax.device_count() == 1:
        return None
    return "several TPUs without a mesh; set one of explicit axes (jax.set_mesh)"


def _refused(operator: str, platform: str, x: Any, state: Any) -> str | None:
    """Why the compiler of this process' devices refuses the kernel.

    It is asked for a single program of the kernel's grid, whose code is the whole kernel's, with
    its gradient, and with documents; once for each of them. That takes seconds.
    """
    if not is_here(platform):
        return None
    from rwkv_jax.wkv.pallas.table import KERNELS

    kernel, (t, n) = KERNELS[operator, platform], (x.k.shape[1], x.k.shape[-1])
    single = t == 1 and operator != "wkv4"
    b, t, h = (1, 1, x.k.shape[2]) if single else kernel.driver.program(x, kernel.size)
    tokens = {4: (b, t, h, n), 3: (b, t, h), 2: (h, n), 1: (h,)}
    states = {4: (b, h, n, n), 2: (b, h)}

    def small(shapes: dict[int, tuple[int, ...]], z: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shapes[z.ndim], z.dtype)

    # These do not change the kernel.
    x = x._replace(**{name: None for name in ("initial", "mask") if name in x._fields})
    x, state = jax.tree.map(partial(small, tokens), x), jax.tree.map(partial(small, states), state)
    reason = _trial(operator, platform, x, state, single)
    if reason is not None and jax.process_count() > 1:
        # Another process may have got another answer: their programs would not match, and hang.
        raise RuntimeError(f"{operator}: {reason}; give implementation='chunked' (train.wkv)")
    return reason


@lru_cache
def _trial(operator: str, platform: str, x: Any, state: Any, single: bool) -> str | None:
    run = _form(operator, platform, False)
    reset = jax.ShapeDtypeStruct(x.v.shape[:2], jnp.bool_)

    def both(x: Any, state: Any, reset: Any) -> Any:
        if single:  # its gradient is XLA's
            return run(x, state, reset)
        out, pull_back = jax.vjp(lambda x, state: run(x, state, reset), x, state)
        return pull_back(out)

    # In a thread of its own, which traces nothing and has no mesh in context.
    with ThreadPoolExecutor(1) as thread:
        traced = thread.submit(jax.jit(both).trace, x, state, reset).result()
        try:
            thread.submit(compile_here, traced).result()
        except Exception as error:  # compilers raise any
            message = (str(error).splitlines() or [""])[0]
            return f"{device_kind()}, whose compiler refuses it ({type(error).__name__}: {message})"
    return None


def compile_here(traced: Any) -> None:
    """Compiles a program for this process' default device."""
    traced.lower().compile()


@lru_cache
def warn_once(message: str) -> None:
    """A line in the log, once in a process."""
    log.warning(message)
