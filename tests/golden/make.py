"""Makes `rwkv*.npz`: random models of every version and what official code computes with them.

A file holds the weights under their official names (`tests/official_weights.py`, stored as
float16, which they are exactly), `tokens`, the logits `pip_fp32` of the PyPI package `rwkv` 0.8.32
on CPU in float32, its recurrent state after the last token as `state/0`, `state/1`, ... in the
order of its own list, and the logits `numpy_fp64` of `tests/oracles.py`. The script refuses to
write logits on which the two disagree. Nothing of torch or pickle is needed to read the files.

    pip install torch rwkv==0.8.32
    python tests/golden/make.py
"""

import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import oracles
from official_weights import VERSIONS, checkpoint

TOKENS = 40
SIZES = {
    "4": {"width": 64, "ffn": 160},
    "5.0": {"head": 8},
    "5.1": {"ffn": 96},
    "5.2": {"head": 8, "ffn": 96},
    "6": {"ffn": 96},
    "7": {"width": 128, "head": 64, "ranks": (32, 24, 16, 40), "ffn": 256},
    "7a": {"ranks": (8, 6, 5, 9, 32)},  # the package knows DeepEmbed's matrices as 32 x 32 only
}


def official(version: str, tensors: dict[str, np.ndarray], tokens: list[int]):
    """Logits `[t, V]` of the package `rwkv`, one token at a time, and its state after the last."""
    # The package reads these when it is imported, and has another class for version 7.
    os.environ["RWKV_V7_ON"] = "1" if version.startswith("7") else "0"
    os.environ["RWKV_DE_VERSION"] = "1" if version == "7a" else "0"
    os.environ["RWKV_JIT_ON"] = "0"
    os.environ["RWKV_CUDA_ON"] = "0"
    for name in [name for name in sys.modules if name.split(".")[0] == "rwkv"]:
        del sys.modules[name]
    from rwkv.model import RWKV

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        torch.save({k: torch.from_numpy(x) for k, x in tensors.items()}, path.with_suffix(".pth"))
        model = RWKV(model=str(path), strategy="cpu fp32")
    state, logits = None, []
    for token in tokens:
        row, state = model.forward([token], state)
        logits.append(row.float().numpy().copy())
    return np.stack(logits), [x.float().numpy() for x in state]


def main() -> None:
    for version in VERSIONS:
        tensors = checkpoint(version, seed=1, **SIZES[version])
        rng = np.random.default_rng(2)
        tokens = rng.integers(len(tensors["emb.weight"]), size=TOKENS)
        logits, state = official(version, tensors, tokens.tolist())
        exact = oracles.MODELS[version](tensors, tokens)
        difference = float(np.abs(logits - exact).max())
        if not difference < 5e-5:
            raise SystemExit(f"version {version}: `rwkv` differs by {difference:.1e}")
        target = Path(__file__).parent / f"rwkv{version}.npz"
        np.savez_compressed(
            target,
            **{name: x.astype(np.float16) for name, x in tensors.items()},
            **{f"state/{i}": x for i, x in enumerate(state)},
            tokens=tokens,
            pip_fp32=logits,
            numpy_fp64=exact,
        )
        print(
            f"{target.name}: {len(tensors)} tensors, {target.stat().st_size:,} bytes, logits of"
            f" deviation {exact.std():.2f}, `rwkv` differs by {difference:.1e}"
        )


if __name__ == "__main__":
    main()
