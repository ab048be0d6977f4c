"""Worker: one training step (forward, backward, clip, AdamW) of a PyTorch model, timed on request.

`kind`: rwkv7-steps, rwkv7-chunks, rwkv4-steps (plain PyTorch), rwkv7-hf, transformers-rwkv4,
gpt2-sdpa, gpt2-eager.
"""

import time

from benchmarks.worker import serve, versions


def build(kind: str, shape: dict):
    """Return a module and the function of tokens [B,T] that gives its logits [B,T,V]."""
    vocab, width, layers = shape["vocab"], shape["width"], shape["layers"]
    ranks = {name: shape[f"rank_{name}"] for name in "wavg"}
    if kind in ("rwkv7-steps", "rwkv7-chunks"):
        from benchmarks.peers.torch_rwkv7 import RWKV7

        size = {"vocab": vocab, "width": width, "layers": layers}
        model = RWKV7(**size, head_size=shape["head_size"], ranks=ranks, form=kind.split("-")[1])
        return model, model
    if kind == "rwkv4-steps":
        from benchmarks.peers.torch_rwkv4 import RWKV4

        model = RWKV4(vocab=vocab, width=width, layers=layers)
        return model, model
    if kind == "rwkv7-hf":
        from rwkv7_hf import RWKV7Config, RWKV7ForCausalLM

        config = RWKV7Config(
            vocab_size=vocab,
            hidden_size=width,
            num_hidden_layers=layers,
            head_dim=shape["head_size"],
            decay_low_rank_dim=ranks["w"],
            a_low_rank_dim=ranks["a"],
            v_low_rank_dim=ranks["v"],
            gate_low_rank_dim=ranks["g"],
        )
        model = RWKV7ForCausalLM(config)
    elif kind == "transformers-rwkv4":
        from transformers import RwkvConfig, RwkvForCausalLM

        config = RwkvConfig(
            vocab_size=vocab,
            hidden_size=width,
            num_hidden_layers=layers,
            context_length=shape["context"],
            use_cache=False,
        )
        model = RwkvForCausalLM(config)
    else:
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=vocab,
            n_positions=shape["context"],
            n_embd=width,
            n_layer=layers,
            n_head=width // shape["head_size"],
            n_inner=shape["gpt2_inner"],
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
            attn_implementation=kind.split("-")[1],
        )
        model = GPT2LMHeadModel(config)
    model.train()
    return model, lambda tokens: model(tokens, use_cache=False).logits


def start(options: dict):
    import numpy
    import torch
    import torch.nn.functional as F

    shape = options["shape"]
    torch.set_num_threads(options["threads"])
    torch.manual_seed(0)
    model, logits = build(options["kind"], shape)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.001, fused=True
    )
    rng = numpy.random.default_rng(0)
    rows = rng.integers(0, shape["vocab"], (shape["batch"], shape["context"] + 1))
    tokens = torch.from_numpy(rows)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].reshape(-1)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(logits(inputs).view(-1, shape["vocab"]), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    loss = step()
    about = {
        "first_step_at": time.time(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss": loss,
        "versions": versions("torch", "transformers", "rwkv7-hf", "numpy"),
    }

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
