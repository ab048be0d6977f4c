"""Random weights of version 7 under official names, the same in every process."""

import numpy


def random_rwkv7(shape: dict, seed: int = 0) -> dict[str, numpy.ndarray]:
    """Return float32 tensors as an official `.pth` holds them; activations stay near 1.

    Logits have deviation 4, which leaves about 3 nats to the next token, as a trained model does.
    """
    rng = numpy.random.default_rng(seed)
    width, vocab, heads = shape["width"], shape["vocab"], shape["width"] // shape["head_size"]
    tensors = {}

    def put(name: str, size: tuple[int, ...], scale: float, mean: float = 0.0) -> None:
        tensors[name] = rng.standard_normal(size, dtype=numpy.float32) * scale + mean

    def norm(name: str) -> None:
        put(f"{name}.weight", (width,), 0.1, 1.0)
        put(f"{name}.bias", (width,), 0.1)

    def matrix(name: str, out: int, into: int) -> None:
        put(f"{name}.weight", (out, into), into**-0.5)

    put("emb.weight", (vocab, width), 1.0)
    for layer in range(shape["layers"]):
        block = f"blocks.{layer}"
        for name in ("ln0", "ln1", "ln2", "att.ln_x") if layer == 0 else ("ln1", "ln2", "att.ln_x"):
            norm(f"{block}.{name}")
        for name in "rwkvag":
            put(f"{block}.att.x_{name}", (1, 1, width), 0.2, 0.5)
        for name in ("w", "a", "g") if layer == 0 else ("w", "a", "v", "g"):
            rank = shape[f"rank_{name}"]
            if name != "g":
                put(f"{block}.att.{name}0", (1, 1, width), 1.0, -1.0)
            put(f"{block}.att.{name}1", (width, rank), width**-0.5)
            put(f"{block}.att.{name}2", (rank, width), 0.1)
        put(f"{block}.att.k_k", (1, 1, width), 0.1, 0.7)
        put(f"{block}.att.k_a", (1, 1, width), 0.1, 1.0)
        put(f"{block}.att.r_k", (heads, shape["head_size"]), 0.1)
        for name in ("receptance", "key", "value", "output"):
            matrix(f"{block}.att.{name}", width, width)
        put(f"{block}.ffn.x_k", (1, 1, width), 0.2, 0.5)
        matrix(f"{block}.ffn.key", 4 * width, width)
        matrix(f"{block}.ffn.value", width, 4 * width)
    norm("ln_out")
    put("head.weight", (vocab, width), 4 * width**-0.5)
    return tensors
