"""Worker: reading prompts and decoding batches with rwkv_jax, sampling included."""

import time

from benchmarks.worker import serve

MATRIX = 1 << 14
"""Numbers in a parameter from which it counts as a matrix of the model."""


def start(options: dict):
    import jax
    import numpy

    from benchmarks.peers.official_weights import random_rwkv7
    from rwkv_jax.checkpoint.keymaps import from_official
    from rwkv_jax.sampling import Sampling
    from rwkv_jax.sampling.decode import BLOCK, decode, decoding_layout, prefill
    from rwkv_jax.sampling.transforms import Vocabulary

    params, cfg = from_official(random_rwkv7(options["shape"]))
    params = decoding_layout(params, cfg)
    vocabulary = jax.device_put(
        Vocabulary(
            allowed=numpy.ones(cfg.vocab_size, bool),
            increment=numpy.ones(cfg.vocab_size, numpy.float32),
        )
    )
    end = -1  # no token ends the text, so that every call writes all that it is asked for

    def read(tokens: list[int], rows: int = 1):
        return prefill(params, [tokens] * rows, list(range(rows)), cfg=cfg, end=end)

    batches = {rows: read(options["prompt"], rows) for rows in options["rows"]}

    def write(rows: int, count: int, greedy: bool) -> None:
        sampling = Sampling(temperature=0.0) if greedy else Sampling()
        while count:
            steps = min(count, BLOCK)
            written, batches[rows] = decode(
                params, batches[rows], sampling.batched(rows), vocabulary, steps, cfg=cfg, end=end
            )
            jax.block_until_ready(written)
            count -= steps

    def handle(request: dict) -> dict:
        began = time.perf_counter()
        if "read" in request:
            ids = numpy.random.default_rng(0).integers(cfg.vocab_size, size=request["read"])
            jax.block_until_ready(read(ids.tolist()))
        else:
            write(request["rows"], request["tokens"], request["greedy"])
        return {"seconds": time.perf_counter() - began}

    logits = numpy.asarray(batches[1].logits)[0, ::4096].tolist()
    for rows in batches:
        write(rows, 2, False)
    for length in options["reads"]:
        handle({"read": length})
    table = params.emb.nbytes
    large = [x for x in jax.tree.leaves((params.blocks, params.head)) if x.size >= MATRIX]
    return handle, {
        "logits": logits,
        "weight_bytes": sum(x.nbytes for x in jax.tree.leaves(params)) - table,
        "products": [x.shape for x in large if x.ndim == 2],
    }


if __name__ == "__main__":
    serve(start)
