"""Worker: one package's WKV operators on the CPU, forward and with gradients, for `benchmarks.wkv`.

Every package computes the same from the same float32 arrays: output and final state, and with
gradients also those of every input, for given cotangents of both. Where a function takes other
inputs than ours (another layout, another sign or scale of the decay), the conversion is inside
the program that is timed, because the gradient passes through it.
"""

import os
import statistics
import time
from functools import partial

from benchmarks.worker import serve, versions

CALLS, SECONDS, LONGEST = 3, 0.1, 2.0
"""A turn has at least `CALLS` calls and takes at least `SECONDS`, unless that exceeds `LONGEST`
seconds; its time is the median of the calls."""
SAMPLES = 32
"""How many numbers of each result are reported, for comparison."""


def start(options: dict):
    package = options["package"]
    if package == "rwkv-ops":
        os.environ |= {"KERAS_BACKEND": "jax", "KERNEL_TYPE": "native"}
    make, names = PACKAGES[package]
    operators = make(options.get("implementation"))
    held = {}

    def handle(request: dict) -> dict:
        if "version" in request:
            held.clear()
            operator = operators.get(request["version"])
            if operator is None:
                return {"absent": "has none"}
            held["run"], answer = prepare(operator, request, options["largest"])
            return answer
        return {"seconds": turn(held["run"])}

    return handle, {"versions": versions("jax", "jaxlib", *names)}


def turn(run) -> float:
    run()  # caches and memory as in the middle of a run, not as the others left them
    began, times = time.perf_counter(), []
    while True:
        times.append(run())
        spent = time.perf_counter() - began
        if spent > LONGEST or (len(times) >= CALLS and spent > SECONDS):
            return statistics.median(times)


def prepare(operator, request: dict, largest: int):
    """A timed call of the compiled program, and its memory, compile time and part of its results;
    programs whose temporaries exceed `largest` bytes are not run."""
    import jax
    import numpy as np

    gradients = request["gradients"]
    with np.load(request["inputs"]) as file:
        x = dict(file)
    results = jax.eval_shape(operator, x)
    rng = np.random.default_rng(1)
    cotangents = jax.tree.map(lambda r: rng.standard_normal(r.shape, dtype=np.float32), results)

    def both(x, cotangents):
        values, pull_back = jax.vjp(operator, x)
        return values, pull_back(cotangents)[0]

    given = jax.device_put((x, cotangents) if gradients else (x,))
    began = time.perf_counter()
    try:
        lowered = jax.jit(both if gradients else operator).lower(*given)
    except ValueError as error:
        if not gradients or "Reverse-mode differentiation" not in str(error):
            raise
        return None, {"absent": "no gradient"}
    program = lowered.compile()
    seconds = time.perf_counter() - began
    analysis = program.memory_analysis()
    memory = analysis.temp_size_in_bytes if analysis else 0
    about = {"temporary_bytes": memory, "compile_seconds": seconds}
    if memory > largest:
        return None, about | {"absent": "too large to run"}

    def run() -> float:
        began = time.perf_counter()
        jax.block_until_ready(program(*given))
        return time.perf_counter() - began

    where = np.random.default_rng(2).random(SAMPLES)
    flat = [np.asarray(leaf).reshape(-1) for leaf in jax.tree.leaves(program(*given))]
    samples = [leaf[(where * leaf.size).astype(int)].tolist() for leaf in flat]
    return run, about | {"samples": samples}


def ours(implementation: str | None) -> dict:
    from rwkv_jax.wkv import wkv4, wkv6, wkv7

    def run4(x):
        y, state = wkv4(**x, implementation=implementation)
        # A version-4 state is three arrays that say two things; what a token reads of it is one.
        return y, state.num / state.den

    def run(operator, x):
        return operator(**x, implementation=implementation)

    return {"4": run4, "6": partial(run, wkv6), "7": partial(run, partial(wkv7, log_w_min=-0.7))}


def ejkernel(_) -> dict:
    import jax.numpy as jnp
    from ejkernel.modules import operations

    options = {"platform": "xla", "return_state": True}

    def run4(x):
        y, state = operations.rwkv4(jnp.log(-x["log_w"]), x["u"], x["k"], x["v"], **options)
        return y, state[:, 0] / state[:, 1]

    def run6(x):
        order = (x[name] for name in ("r", "k", "v", "log_w", "u"))
        y, state = operations.rwkv6(*order, softmax_scale=1.0, **options)
        return y, state.swapaxes(-1, -2)

    def run7(x):
        # Its a writes what its b reads.
        order = (x[name] for name in ("r", "log_w", "k", "v", "b", "a"))
        y, state = operations.rwkv7(*order, softmax_scale=1.0, **options)
        return y, state.swapaxes(-1, -2)

    return {"4": run4, "6": run6, "7": run7}


def rwkv_ops(_) -> dict:
    import jax.numpy as jnp
    from rwkv_ops import get_generalized_delta_rule, get_rwkv6_kernel

    delta_rule = get_generalized_delta_rule(KERNEL_TYPE="native")[0]
    kernel6 = get_rwkv6_kernel(KERNEL_TYPE="native")

    def run6(x):
        b, t, h, n = x["r"].shape
        flat = {name: z.reshape(b, t, h * n) for name, z in x.items() if z.ndim == 4}
        decay = jnp.log(-flat["log_w"])
        order = (flat["r"], flat["k"], flat["v"], decay, x["u"])
        y, state = kernel6(*order, output_final_state=True)
        return y.reshape(b, t, h, n), state.swapaxes(-1, -2)

    def run7(x):
        decay = jnp.log(-x["log_w"])
        return delta_rule(x["r"], decay, x["k"], x["v"], x["a"], x["b"])

    return {"6": run6, "7": run7}


def jaxrwkv(kind: str) -> dict:
    import jax
    import jax.numpy as jnp
    from jaxrwkv import rwkv4, rwkv6, rwkv7

    loop4, loop6, loop7 = (getattr(m, kind).inner_loop for m in (rwkv4, rwkv6, rwkv7))

    def rest(k):
        return k.shape[0], jnp.zeros(k.shape[0], bool)

    def run4(x):
        zeros = jnp.zeros_like(x["u"])
        empty = jnp.stack([zeros, zeros, zeros - 1e38])

        def row(k, v):
            decay = jnp.log(-x["log_w"])
            state, y = loop4(jnp.ones_like(k), k, v, decay, x["u"], empty, *rest(k))
            return y, state[0] / state[1]

        return jax.vmap(row)(x["k"], x["v"])

    def run6(x):
        def row(r, k, v, log_w):
            zeros = jnp.zeros((k.shape[1], k.shape[2], v.shape[2]), v.dtype)
            order = (r, k, v, log_w[..., None], x["u"][..., None], zeros)
            state, y = loop6(*order, *rest(k))
            return y.reshape(v.shape), state.swapaxes(-1, -2)

        return jax.vmap(row)(x["r"], x["k"], x["v"], x["log_w"])

    def run7(x):
        def row(r, log_w, k, v, a, b):
            zeros = jnp.zeros((k.shape[1], v.shape[2], k.shape[2]), v.dtype)
            state, y = loop7(r, jnp.log(-log_w), k, v, a, b, zeros, *rest(k))
            return y.reshape(v.shape), state

        return jax.vmap(row)(*(x[name] for name in ("r", "log_w", "k", "v", "a", "b")))

    return {"4": run4, "6": run6, "7": run7}


PACKAGES = {
    "rwkv_jax": (ours, ("numpy",)),
    "ejkernel": (ejkernel, ("ejkernel",)),
    "rwkv-ops": (rwkv_ops, ("rwkv-ops", "keras")),
    "jaxrwkv": (jaxrwkv, ("jaxrwkv",)),
}

if __name__ == "__main__":
    serve(start)
