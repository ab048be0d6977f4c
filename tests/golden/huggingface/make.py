"""Makes `rwkv4/` and `rwkv7/`: tiny Hugging Face folders and the logits that their own code gives.

Origin. The weights are random, dense and of order one, so that a tensor in another's place or a
transpose that was forgotten moves the logits by 0.02 or more. `rwkv4/` is of `RwkvForCausalLM` of
transformers 5.23.0: 8 layers, so that its `rescale_every` of 6 has something to divide, and saved
before the model runs, as the files of the hub are. `rwkv7/` is of `RWKV7ForCausalLM` of rwkv7-hf
0.9.0 (flash-linear-attention 0.6.0 loads it too, and agrees to 2e-5): one head of 64, the only size
at which official code computes the same, and ranks that all differ. The weights are kept in float16
to be small, and computed with in float32. `logits.npz` holds `tokens` `[t]` and `logits` `[t, V]`.

    pip install torch transformers==5.23.0 rwkv7-hf==0.9.0
    python tests/golden/huggingface/make.py
"""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from rwkv7_hf import RWKV7Config, RWKV7ForCausalLM
from transformers import PreTrainedModel, RwkvConfig, RwkvForCausalLM

MODELS = {
    "rwkv4": (
        RwkvForCausalLM,
        RwkvConfig(vocab_size=16, hidden_size=16, intermediate_size=12, num_hidden_layers=8),
    ),
    "rwkv7": (
        RWKV7ForCausalLM,
        RWKV7Config(
            vocab_size=24,
            hidden_size=64,
            intermediate_size=32,
            num_hidden_layers=2,
            decay_low_rank_dim=4,
            a_low_rank_dim=3,
            v_low_rank_dim=5,
            gate_low_rank_dim=6,
        ),
    ),
}
TOKENS = 24


def fill(model: PreTrainedModel) -> None:
    """Random values: matrices keep the size of what they multiply."""
    torch.manual_seed(7)
    for name, x in model.named_parameters():
        if x.ndim == 2 and "embeddings" not in name:
            value = torch.randn(x.shape) / x.shape[1] ** 0.5
        elif "time_mix" in name or ".x_" in name:
            value = torch.rand(x.shape)
        else:
            value = torch.randn(x.shape) * 0.5 + (name.endswith("weight") and x.ndim == 1)
        x.data = value.to(x.dtype)


def main() -> None:
    for name, (cls, config) in MODELS.items():
        folder = Path(__file__).parent / name
        folder.mkdir(exist_ok=True)
        model = cls(config)
        fill(model)
        with tempfile.TemporaryDirectory() as saved:
            model.half().save_pretrained(saved)
            # rwkv7-hf puts its code beside them.
            for file in ("config.json", "model.safetensors"):
                shutil.copyfile(Path(saved) / file, folder / file)
            model = cls.from_pretrained(saved, dtype=torch.float32).eval()
        tokens = np.random.default_rng(7).integers(0, config.vocab_size, TOKENS)
        with torch.no_grad():
            logits = model(torch.tensor(tokens)[None], use_cache=False).logits[0].numpy()
        np.savez_compressed(folder / "logits.npz", tokens=tokens, logits=logits)
        layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(f"{folder}: {layers} layers, {size} bytes, logits of {logits.std():.2f}")


if __name__ == "__main__":
    main()
