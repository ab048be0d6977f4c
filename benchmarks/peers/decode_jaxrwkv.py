"""Worker: reading and decoding one row with `jaxrwkv`, greedily, on random weights of its own."""

import time
from functools import partial

from benchmarks.worker import serve, versions


def start(options: dict):
    import jax
    import jax.numpy as jnp
    from jaxrwkv import get_rand_model

    shape = options["shape"]
    sizes = (shape["layers"], shape["width"], shape["vocab"])
    model, params, config = get_rand_model(
        0, "7", *sizes, dtype=jnp.float32, rwkv_type=options["kind"]
    )[:3]
    params = jax.device_put(params)
    forward = jax.jit(partial(model.forward, config=config))

    @jax.jit
    def step(params, token, state):
        logits, state = model.forward(params, token[None], state, config=config)
        return jnp.argmax(logits[-1]).astype(jnp.int32), state

    fresh = model.default_state(params, config)
    _, state = forward(params, jnp.asarray(options["prompt"], jnp.int32), fresh)
    token = jnp.int32(1)

    def handle(request: dict) -> dict:
        nonlocal token, state
        began = time.perf_counter()
        if "read" in request:
            ids = jnp.arange(request["read"], dtype=jnp.int32)
            jax.block_until_ready(forward(params, ids, fresh))
        else:
            for _ in range(request["tokens"]):
                token, state = step(params, token, state)
            jax.block_until_ready(token)
        return {"seconds": time.perf_counter() - began}

    handle({"tokens": 2})
    for length in options["reads"]:
        handle({"read": length})
    return handle, {"versions": versions("jax", "jaxrwkv")}


if __name__ == "__main__":
    serve(start)
