"""Worker: one package's WKV operators on a GPU, bfloat16, for `benchmarks.gpu_suite`.

Every package computes the same from the same numbers; a turn is the median time of a call.
"""

import os
import statistics
import time
from functools import partial

# Contestants share the device's memory.
os.environ |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": ".25"}

from benchmarks.worker import serve, versions

CALLS = 10
LETTERS = {"4": "kv", "6": "rkv", "7": "rkvab"}


def start(options: dict):
    make, names = PACKAGES[options["package"]]
    prepare = make(options)
    held = {}

    def handle(request: dict) -> dict:
        held.clear()
        try:
            run, values = prepare(request)
            if run is None:
                return {"absent": values}
            for _ in range(2):
                run()
            held["times"] = []
            began = time.perf_counter()
            while len(held["times"]) < CALLS and time.perf_counter() - began < request["seconds"]:
                held["times"].append(run())
        except Exception as error:
            return {"absent": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        times = held["times"]
        return {
            "seconds": {"min": min(times), "median": statistics.median(times), "max": max(times)},
            "samples": values(),
        }

    return handle, {"versions": versions(*names)}


def numbers(request: dict) -> dict:
    """The inputs, as float32 arrays of numbers that bfloat16 holds; made as a model makes them."""
    import numpy as np

    from rwkv_jax.testing import Shape, wkv4_inputs, wkv6_inputs, wkv7_inputs

    make = {"4": wkv4_inputs, "6": wkv6_inputs, "7": wkv7_inputs}[request["version"]]
    # Long rows repeat a shorter one: drawing half a billion numbers takes longer than the kernels.
    b, t, h, n = request["shape"]
    x = make("typical", Shape(1, min(t, 256), h, n))
    return {
        name: np.tile(z, (b, t // z.shape[1], *[1] * (z.ndim - 2))) if z.ndim > 2 else z
        for name, z in x.items()
    }


def jax_package(operators, options):
    import jax
    import jax.numpy as jnp
    import numpy as np

    def prepare(request):
        operator = operators.get(request["version"])
        if operator is None:
            return None, "has none"
        x = {
            name: jnp.asarray(z, jnp.float32 if name in ("log_w", "u") else jnp.bfloat16)
            for name, z in numbers(request).items()
        }
        dy = jnp.ones_like(x["v"])

        def both(x, dy):
            y, pull_back = jax.vjp(operator, x)
            return y, pull_back(dy)[0]

        given = (x, dy) if request["gradients"] else (x,)
        program = jax.jit(both if request["gradients"] else operator).lower(*given).compile()
        out = []

        def run():
            began = time.perf_counter()
            out[:] = [jax.block_until_ready(program(*given))]
            return time.perf_counter() - began

        def values():
            leaves = jax.tree.leaves(out[0])
            return [
                np.asarray(z.reshape(-1)[:: max(1, z.size // 64)], float).tolist() for z in leaves
            ]

        return run, values

    return prepare


def ours(options):
    from rwkv_jax.testing import LOG_W_MIN
    from rwkv_jax.wkv import wkv4, wkv6, wkv7

    def run(operator, x):
        return operator(**x, implementation=options["implementation"])[0]

    bounded = partial(wkv7, log_w_min=LOG_W_MIN)  # as the model promises
    return jax_package(
        {"4": partial(run, wkv4), "6": partial(run, wkv6), "7": partial(run, bounded)}, options
    )


def from_operators(package):
    """The calls of benchmarks/peers/operators.py, y alone."""

    def make(options):
        from benchmarks.peers import operators

        os.environ |= {"KERAS_BACKEND": "jax", "KERNEL_TYPE": "native"}  # what rwkv-ops runs on
        found, _ = operators.PACKAGES[package]
        calls = found(None)
        return jax_package({v: (lambda x, f=f: f(x)[0]) for v, f in calls.items()}, options)

    return make


def fla(options):
    import torch
    from fla.ops.rwkv6 import chunk_rwkv6, fused_recurrent_rwkv6
    from fla.ops.rwkv7 import chunk_rwkv7, fused_recurrent_rwkv7

    chunked = options["implementation"].startswith("chunk")
    # What its own layer passes for version 7, whose decays are bounded.
    bounded = {}
    if options["implementation"] == "chunk, bounded decay":
        bounded = {"safe_gate": True, "lower_bound": -0.6065306597126334, "chunk_size": 64}
    call6 = chunk_rwkv6 if chunked else fused_recurrent_rwkv6
    call7 = chunk_rwkv7 if chunked else fused_recurrent_rwkv7

    def prepare(request):
        version = request["version"]
        torch.cuda.empty_cache()
        if version == "4":
            return None, "has none"
        if version == "7" and not chunked and request["gradients"]:
            return None, "no gradient"
        x = {
            name: torch.tensor(z, device="cuda").to(
                torch.float32 if name in ("log_w", "u") else torch.bfloat16
            )
            for name, z in numbers(request).items()
        }
        for z in x.values():
            z.requires_grad_(request["gradients"])
        dy = torch.ones_like(x["v"])
        out = []

        def forward():
            if version == "6":
                return call6(x["r"], x["k"], x["v"], x["log_w"], x["u"], scale=1.0)[0]
            order = (x[name] for name in ("r", "log_w", "k", "v", "a", "b"))
            return call7(*order, scale=1.0, **bounded)[0]

        def run():
            torch.cuda.synchronize()
            began = time.perf_counter()
            y = forward()
            if request["gradients"]:
                order = sorted(x)  # as JAX orders a dict
                out[:] = [y, *torch.autograd.grad(y, [x[name] for name in order], dy)]
            else:
                out[:] = [y]
            torch.cuda.synchronize()
            return time.perf_counter() - began

        def values():
            return [
                z.detach().reshape(-1)[:: z.numel() // 61 | 1].double().cpu().tolist() for z in out
            ]

        return run, values

    return prepare


PACKAGES = {
    "rwkv_jax": (ours, ("jax", "jaxlib")),
    "ejkernel": (from_operators("ejkernel"), ("jax", "ejkernel")),
    "rwkv-ops": (from_operators("rwkv-ops"), ("jax", "rwkv-ops", "keras")),
    "fla": (fla, ("torch", "triton", "flash-linear-attention", "fla-core")),
}

if __name__ == "__main__":
    serve(start)
