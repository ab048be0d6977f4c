"""Worker: decoding at batch 1 with rwkv_jax: the jitted loop, sampling included."""

import time

from benchmarks.worker import serve


def start(options: dict):
    import jax
    import numpy

    from benchmarks.peers.official_weights import random_rwkv7
    from rwkv_jax.checkpoint.keymaps import from_official
    from rwkv_jax.nn import Transposed
    from rwkv_jax.sampling import Sampling
    from rwkv_jax.sampling.decode import BLOCK, decode, decoding_layout, prefill
    from rwkv_jax.sampling.transforms import Vocabulary

    def is_large(leaf) -> bool:
        return isinstance(leaf, Transposed)

    params, cfg = from_official(random_rwkv7(options["shape"]))
    params = decoding_layout(params, cfg)
    vocabulary = Vocabulary(
        allowed=numpy.ones(cfg.vocab_size, bool),
        increment=numpy.ones(cfg.vocab_size, numpy.float32),
    )
    vocabulary = jax.device_put(vocabulary)
    end = -1  # no token ends the text, so that every call writes all that it is asked for
    rows = prefill(params, [options["prompt"]], [0], cfg=cfg, end=end)
    logits = numpy.asarray(rows.logits)[0, ::4096].tolist()

    def write(rows, count: int, sampling: Sampling):
        written, rows = decode(
            params, rows, sampling.batched(1), vocabulary, count, cfg=cfg, end=end
        )
        return jax.block_until_ready(written), rows

    def handle(request: dict) -> dict:
        nonlocal rows
        sampling = Sampling(temperature=0.0) if request["greedy"] else Sampling()
        left = request["tokens"]
        began = time.perf_counter()
        while left:
            count = min(left, BLOCK)
            _, rows = write(rows, count, sampling)
            left -= count
        return {"seconds": time.perf_counter() - began}

    handle({"tokens": 2, "greedy": False})
    matrices = sum(x.nbytes for x in jax.tree.leaves(params)) - params.emb.nbytes
    large = jax.tree.leaves((params.blocks, params.head), is_leaf=is_large)
    return handle, {
        "logits": logits,
        "weight_bytes": matrices + params.emb.nbytes // cfg.vocab_size,
        "products": [x.rows.shape for x in large if is_large(x)],
    }


if __name__ == "__main__":
    serve(start)
