"""Worker: reading and decoding one row with PyPI `rwkv` (strategy "cpu fp32" or "cpu bf16")."""

import os
import tempfile
import time
from pathlib import Path

from benchmarks.worker import serve, versions


def start(options: dict):
    os.environ |= {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "1", "RWKV_CUDA_ON": "0"}
    import torch

    torch.set_num_threads(options["threads"])
    from rwkv.model import RWKV
    from rwkv.utils import PIPELINE

    from benchmarks.peers.official_weights import random_rwkv7

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pth"
        torch.save(
            {name: torch.from_numpy(x) for name, x in random_rwkv7(options["shape"]).items()}, path
        )
        model = RWKV(model=str(path.with_suffix("")), strategy=options["strategy"])
    sampler = PIPELINE(model, "rwkv_vocab_v20230424")
    logits, state = model.forward(options["prompt"], None)
    first = logits.float()[::4096].tolist()
    ids = torch.randint(options["shape"]["vocab"], (max(options["reads"]),)).tolist()

    def handle(request: dict) -> dict:
        nonlocal logits, state
        began = time.perf_counter()
        if "read" in request:
            model.forward(ids[: request["read"]], None)
            return {"seconds": time.perf_counter() - began}
        for _ in range(request["tokens"]):
            if request["greedy"]:
                token = int(logits.argmax())
            else:
                token = int(sampler.sample_logits(logits.float(), temperature=1.0, top_p=0.85))
            logits, state = model.forward([token], state)
        return {"seconds": time.perf_counter() - began}

    handle({"tokens": 4, "greedy": False})  # TorchScript specialises in the first calls
    return handle, {"logits": first, "versions": versions("torch", "rwkv", "numpy")}


if __name__ == "__main__":
    serve(start)
