"""Worker: how far the plain PyTorch peers are from the packages `rwkv7-hf` and `transformers`."""

from benchmarks.worker import serve

SHAPE = {
    "vocab": 50,
    "width": 128,
    "layers": 3,
    "head_size": 64,
    "batch": 2,
    "context": 48,
    "gpt2_inner": 512,
}
SHAPE |= {"rank_w": 16, "rank_a": 24, "rank_v": 8, "rank_g": 32}

RWKV7_MODULES = {
    "receptance": "r_proj",
    "key": "k_proj",
    "value": "v_proj",
    "output": "o_proj",
    "ln_x": "g_norm",
}
RWKV4_MIXES = {
    "time_mix_k": "time_mix_key",
    "time_mix_v": "time_mix_value",
    "time_mix_r": "time_mix_receptance",
}


def rwkv7_hf_name(name: str) -> tuple[str, bool]:
    """Return the package's name of an official parameter, and whether it is stored transposed."""
    name = (
        name.replace("emb.", "model.embeddings.")
        .replace("ln_out.", "model.norm.")
        .replace("head.", "lm_head.")
    )
    if not name.startswith("blocks."):
        return name, False
    _, layer, rest = name.split(".", 2)
    rest = (
        rest.replace("ln0.", "pre_norm.").replace("ln1.", "attn_norm.").replace("ln2.", "ffn_norm.")
    )
    transposed = False
    if rest.startswith("att."):
        first, *tail = rest[4:].split(".")
        if len(first) == 2 and first[0] in "wavg" and first[1] in "012":
            transposed = first[1] != "0"
            first = (
                f"{first[0]}_lora.lora."
                + {"0": "2.bias", "1": "0.weight", "2": "2.weight"}[first[1]]
            )
        rest = ".".join(["attn", RWKV7_MODULES.get(first, first), *tail])
    return f"model.layers.{layer}.{rest}", transposed


def transformers_rwkv4_name(name: str) -> tuple[str, bool]:
    name = name.replace("emb.", "rwkv.embeddings.").replace("ln_out.", "rwkv.ln_out.")
    if name.startswith("blocks."):
        name = "rwkv." + name.replace(".ln0.", ".pre_ln.").replace(".att.", ".attention.")
        name = name.replace(".ffn.", ".feed_forward.")
        for ours, theirs in RWKV4_MIXES.items():
            name = name.replace(ours, theirs)
    return name, False


def start(options: dict):
    import torch
    import torch.nn.functional as F

    from benchmarks.peers.train_torch import build

    torch.set_num_threads(options["threads"])
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    # Token 0 is left out: rwkv7-hf declares it padding and gives its embedding no gradient.
    tokens = torch.randint(1, SHAPE["vocab"], (SHAPE["batch"], SHAPE["context"] + 1))

    def relative(x, y) -> float:
        return ((x - y).norm() / y.norm().clamp_min(1e-30)).item()

    def run(model, logits):
        model.zero_grad()
        out = logits(tokens[:, :-1])
        F.cross_entropy(out.reshape(-1, SHAPE["vocab"]), tokens[:, 1:].reshape(-1)).backward()
        return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}

    report = {}
    pairs = (("rwkv7-hf", ("rwkv7-steps", "rwkv7-chunks"), rwkv7_hf_name),)
    pairs += (("transformers-rwkv4", ("rwkv4-steps",), transformers_rwkv4_name),)
    for package, peers, rename in pairs:
        theirs, theirs_logits = build(package, SHAPE)
        theirs.double()
        for peer in peers:
            torch.manual_seed(1)
            model, logits = build(peer, SHAPE)
            with torch.no_grad():
                for p in model.parameters():
                    p += 0.02 * torch.randn_like(p)  # so that no zero or one hides a wrong name
                target = theirs.state_dict()
                for name, p in model.named_parameters():
                    other, transposed = rename(name)
                    target.pop(other)
                    theirs.get_parameter(other).copy_(
                        (p.mT if transposed else p).reshape(theirs.get_parameter(other).shape)
                    )
                assert not target, f"{package}: parameters without a counterpart: {sorted(target)}"
            expected, expected_gradients = run(theirs, theirs_logits)
            out, gradients = run(model, logits)
            worst = 0.0
            for name, gradient in gradients.items():
                other, transposed = rename(name)
                gradient = (gradient.mT if transposed else gradient).reshape(
                    expected_gradients[other].shape
                )
                worst = max(worst, relative(gradient, expected_gradients[other]))
            report[f"{peer} against {package}"] = {
                "logits": relative(out, expected),
                "gradients": worst,
            }
    return lambda request: {}, {"errors": report}


if __name__ == "__main__":
    serve(start)
