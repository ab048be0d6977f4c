"""Worker: float32 matrix-vector GB/s of one product, by "numpy", "jax" or "torch"."""

import time

from benchmarks.worker import serve

COLUMNS = 4096


def start(options: dict):
    import numpy

    rng = numpy.random.default_rng(0)
    rows = options["bytes"] // (4 * COLUMNS)
    matrix = rng.random((rows, COLUMNS), dtype=numpy.float32)
    vector = rng.random(COLUMNS, dtype=numpy.float32)
    if options["library"] == "torch":
        import torch

        torch.set_num_threads(options["threads"])
        matrix, vector = torch.from_numpy(matrix), torch.from_numpy(vector)

        def product():
            return matrix @ vector
    elif options["library"] == "jax":
        import jax

        matrix, vector = jax.device_put(matrix), jax.device_put(vector)
        compiled = jax.jit(lambda x, y: x @ y)

        def product():
            return jax.block_until_ready(compiled(matrix, vector))
    else:

        def product():
            return matrix @ vector

    return measured(product, 4 * rows * COLUMNS)


def measured(product, size: int):
    product()

    def handle(request: dict) -> dict:
        seconds = []
        for _ in range(request["repeats"]):
            began = time.perf_counter()
            product()
            seconds.append(time.perf_counter() - began)
        return {"gb_per_s": 1e-9 * size * len(seconds) / sum(seconds)}

    return handle, {}


if __name__ == "__main__":
    serve(start)
