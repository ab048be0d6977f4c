"""Worker: the project's own training step, on the shape and batch of the peers."""

import time

from benchmarks.worker import serve


def start(options: dict):
    import jax
    import numpy

    from rwkv_jax import models
    from rwkv_jax.config import Config, ModelConfig, OptimizerConfig, TrainConfig, TuneConfig
    from rwkv_jax.data.loader import Batch
    from rwkv_jax.training.state import init_train_state
    from rwkv_jax.training.step import make_train_step

    jax.config.update("jax_compilation_cache_dir", options["cache"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)

    shape, version = options["shape"], options["version"]
    of_version_7 = {f"rank_{name}": shape[f"rank_{name}"] for name in "wavg"} | {
        "head_size": shape["head_size"]
    }
    model = ModelConfig(
        version=version,
        layers=shape["layers"],
        width=shape["width"],
        vocab_size=shape["vocab"],
        **(of_version_7 if version == "7" else {}),
    )
    # As the peers do it: one learning rate, clipping at 1, no L2Wrap.
    cfg = Config(
        model=model,
        optimizer=OptimizerConfig(peak_lr=1e-4, final_lr=1e-4, eps=1e-8),
        train=TrainConfig(
            batch=shape["batch"],
            context=shape["context"],
            l2wrap=0.0,
            wkv=options["implementation"] or "auto",
            remat=options["remat"],
        ),
        tune=TuneConfig(**options.get("tune", {})),
    )
    rng = numpy.random.default_rng(0)
    tokens = rng.integers(0, shape["vocab"], (shape["batch"], shape["context"] + 1)).astype(
        numpy.int32
    )
    reset = numpy.zeros((shape["batch"], shape["context"]), bool)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], reset)

    given = None
    if cfg.tune.method != "full":
        given = jax.tree.map(
            lambda x: x.astype(cfg.tune.base), models.init_params(model, jax.random.key(0))
        )
    state = init_train_state(cfg, given)
    train_step = make_train_step(cfg).lower(state, batch).compile()
    memory = train_step.memory_analysis()
    state, metrics = train_step(state, batch)
    about = {
        "bytes": memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes,
        "loss": float(metrics.loss),
        "first_step_at": time.time(),
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
    }

    def step() -> float:
        nonlocal state
        state, metrics = train_step(state, batch)
        return float(metrics.loss)  # waits for the whole step: its outputs come from one program

    def handle(request: dict) -> dict:
        step()  # caches and memory as in the middle of a run, not as the others left them
        seconds = []
        for _ in range(request["steps"]):
            began = time.perf_counter()
            loss = step()
            seconds.append(time.perf_counter() - began)
        return {"seconds": seconds, "loss": loss}

    return handle, about


if __name__ == "__main__":
    serve(start)
