"""Makes the folders beside it: adapters of one tiny random model of version 7, saved by `peft` 0.21
on `rwkv7-hf` 0.9, and `logits.npz`: `tokens`, the base model's logits as `base`, and those of each
adapter by its folder's name, before merging, in float32 on CPU.

The model is `official_weights.checkpoint("7", **SIZES)`, so its weights are not stored.

    pip install '.[oracle]'
    python tests/golden/peft/make.py
"""

import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, MissConfig, get_peft_model
from rwkv7_hf import RWKV7ForCausalLM

import rwkv_jax
from rwkv_jax.checkpoint.keymaps import from_official

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from official_weights import checkpoint  # noqa: E402

SIZES = {"layers": 2, "width": 128, "head": 64, "vocab": 67, "ffn": 160, "seed": 11}
TIME_MIX = ["r_proj", "k_proj", "v_proj", "o_proj"]
BOTH = [*TIME_MIX, "ffn.key", "ffn.value"]

CONFIGS = {
    "lora": LoraConfig(
        r=2,
        lora_alpha=6,
        target_modules=BOTH,
        rank_pattern={"ffn.key": 3, r"model\.layers\.1\.attn\.k_proj": 4},
        alpha_pattern={r"layers\.0\..*v_proj": 5, "o_proj": 1},
        modules_to_save=["attn_norm"],
    ),
    "rslora": LoraConfig(
        r=3, lora_alpha=4, use_rslora=True, target_modules=BOTH, layers_to_transform=[1]
    ),
    "dora": LoraConfig(r=2, lora_alpha=4, use_dora=True, target_modules=["k_proj", "ffn.value"]),
    "miss": MissConfig(r=3, target_modules=["r_proj", "ffn.key"]),
    "mini": MissConfig(r=4, mini_r=8, init_weights="mini", target_modules=["o_proj", "ffn.value"]),
    "pissa": LoraConfig(
        r=2, lora_alpha=2, init_lora_weights="pissa", target_modules=["v_proj", "ffn.key"]
    ),
}


def moved(model: torch.nn.Module, seed: int) -> None:
    """Changes what is trained, as training would."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for x in (x for x in model.parameters() if x.requires_grad):
            x += 0.1 * torch.randn(x.shape, generator=draw)


def logits(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.from_numpy(tokens)[None], use_cache=False).logits[0].numpy()


def main() -> None:
    tokens = np.random.default_rng(3).integers(SIZES["vocab"], size=12)
    found = {"tokens": tokens}
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary) / "base"
        rwkv_jax.save(base, *from_official(checkpoint("7", **SIZES)))

        def fresh() -> torch.nn.Module:
            return RWKV7ForCausalLM.from_pretrained(base).float()

        found["base"] = logits(fresh(), tokens)
        for seed, (name, config) in enumerate(CONFIGS.items()):
            model = get_peft_model(fresh(), config)
            start, given = Path(temporary) / "start", {}
            if name == "pissa":
                model.peft_config["default"].init_lora_weights = True
                model.save_pretrained(start)
                model.peft_config["default"].init_lora_weights = "pissa"
                given = {"path_initial_model_for_weight_conversion": str(start)}
            moved(model, seed)
            found[name] = logits(model, tokens)
            shutil.rmtree(HERE / name, ignore_errors=True)
            model.peft_config["default"].base_model_name_or_path = "tiny"
            model.save_pretrained(HERE / name, **given)
            (HERE / name / "README.md").unlink()
    np.savez_compressed(HERE / "logits.npz", **found)


if __name__ == "__main__":
    main()
