"""One token after a prompt with PyPI `rwkv`: `first_token_rwkv.py MODEL.pth PROMPT THREADS`."""

import os
import sys


def main(path: str, prompt: str, threads: str) -> None:
    os.environ |= {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "1", "RWKV_CUDA_ON": "0"}
    import torch

    torch.set_num_threads(int(threads))
    from rwkv.model import RWKV
    from rwkv.utils import PIPELINE

    model = RWKV(model=path.removesuffix(".pth"), strategy="cpu fp32")
    pipeline = PIPELINE(model, "rwkv_vocab_v20230424")
    logits, _ = model.forward(pipeline.encode(prompt), None)
    token = pipeline.sample_logits(logits.float(), temperature=1.0, top_p=0.85)
    print(pipeline.decode([token]))


if __name__ == "__main__":
    main(*sys.argv[1:])
