"""Worker: best float32 GFLOP/s of matrix products, 2048^3 and a model's, by "torch" or "jax"."""

import time

from benchmarks.worker import serve


def start(options: dict):
    import numpy

    rng = numpy.random.default_rng(0)
    rows, width, ffn = options["rows"], options["width"], options["ffn"]
    shapes = {
        (2048, 2048, 2048),
        (rows, width, width),
        (rows, width, ffn),
        (rows, ffn, width),
        (ffn, rows, width),
    }
    if options["library"] == "torch":
        import torch

        torch.set_num_threads(options["threads"])
        array, product, wait = torch.from_numpy, torch.matmul, lambda x: x
    else:
        import jax

        array, product, wait = jax.device_put, jax.jit(lambda x, y: x @ y), jax.block_until_ready
    cases = {}
    for m, k, n in sorted(shapes):
        x, y = (array(rng.standard_normal(s, dtype=numpy.float32)) for s in ((m, k), (k, n)))
        wait(product(x, y))
        cases[f"{m}x{k} @ {k}x{n}"] = (x, y, 2e-9 * m * k * n)

    def handle(request: dict) -> dict:
        rates = {}
        for name, (x, y, gflop) in cases.items():
            best = float("inf")
            for _ in range(max(3, round(0.15 * 200 / gflop))):  # about 0.15 s each
                began = time.perf_counter()
                wait(product(x, y))
                best = min(best, time.perf_counter() - began)
            rates[name] = gflop / best
        return {"gflops": rates}

    return handle, {}


if __name__ == "__main__":
    serve(start)
