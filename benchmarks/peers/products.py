"""Worker: a model's matrix products alone, one after the other, for a number of rows.

Each product depends on a sum over the one before, so they run in the order of a model. Of JAX's
compiler options and those of decoding, the faster counts.
"""

import time

from benchmarks.worker import serve


def start(options: dict):
    import jax
    import jax.numpy as jnp
    import numpy

    from rwkv_jax.sampling.compiler import NO_YNNPACK

    rng = numpy.random.default_rng(0)
    shapes = [tuple(shape) for shape in options["shapes"]]
    matrices = jax.device_put([rng.random(shape, dtype=numpy.float32) for shape in shapes])

    def products(matrices, x):
        for matrix in matrices:
            # Every column takes part: of those that nothing needs, XLA makes no product.
            x = x + 1e-9 * jnp.sum(x[:, : matrix.shape[0]] @ matrix, axis=1, keepdims=True)
        return x

    compiled = [jax.jit(products), jax.jit(products, compiler_options=NO_YNNPACK)]
    inputs = {rows: jnp.ones((rows, max(shape[0] for shape in shapes))) for rows in options["rows"]}

    def seconds(program, rows: int, repeats: int) -> float:
        began = time.perf_counter()
        for _ in range(repeats):
            jax.block_until_ready(program(matrices, inputs[rows]))
        return (time.perf_counter() - began) / repeats

    def handle(request: dict) -> dict:
        rows, repeats = request["rows"], request["repeats"]
        return {"seconds": min(seconds(program, rows, repeats) for program in compiled)}

    for rows in inputs:
        handle({"rows": rows, "repeats": 1})
    return handle, {}


if __name__ == "__main__":
    serve(start)
