"""Makes `rwkv4.npz` and `rwkv7.npz`: random models and the logits that others' code gives.

Origin. The weights are random: dense and of order one (3 layers; width 64 for version 4, 128 in
heads of 64 for version 7; vocabulary 101), so that a wrong epsilon, a missing tanh or a key
normalised at the wrong place moves the logits by 0.02 or more. `pip_fp32` are the logits of the
PyPI package `rwkv` 0.8.32 on CPU in float32, `numpy_fp64` those of an implementation in float64
that shares code neither with that package, nor with this one, nor with `tests/oracles.py`.

The folder given holds, for V in 4 and 7.0, a checkpoint `V.pth` in the official layout and
`V_logits.npz` with `tokens`, `pip_fp32` and `numpy_fp64`. This script runs `rwkv` on each
checkpoint once more, refuses logits that it does not reproduce, and writes everything as plain
arrays, which need neither torch nor pickle to read:

    pip install torch rwkv==0.8.32
    python tests/golden/make.py FOLDER
"""

import os
import sys
from pathlib import Path

import numpy as np
import torch

VERSIONS = {"4": "rwkv4.npz", "7.0": "rwkv7.npz"}


def official_logits(weights: Path, tokens: list[int]) -> np.ndarray:
    """Logits `[t, V]` of the package `rwkv`, one token at a time."""
    # The package reads these when it is imported, and has another class for version 7.
    os.environ["RWKV_V7_ON"] = "1" if weights.stem.startswith("7") else "0"
    os.environ["RWKV_JIT_ON"] = "0"
    os.environ["RWKV_CUDA_ON"] = "0"
    for name in [name for name in sys.modules if name.split(".")[0] == "rwkv"]:
        del sys.modules[name]
    from rwkv.model import RWKV

    model = RWKV(model=str(weights.with_suffix("")), strategy="cpu fp32")
    state, logits = None, []
    for token in tokens:
        row, state = model.forward([token], state)
        logits.append(row.float().numpy().copy())
    return np.stack(logits)


def main(folder: Path) -> None:
    for version, name in VERSIONS.items():
        weights = folder / f"{version}.pth"
        tensors = torch.load(weights, map_location="cpu", weights_only=True)
        logits = dict(np.load(folder / f"{version}_logits.npz"))
        again = official_logits(weights, logits["tokens"].tolist())
        difference = float(np.abs(again - logits["numpy_fp64"]).max())
        if not difference < 5e-5:
            raise SystemExit(
                f"{weights}: `rwkv` gives other logits than the file, by {difference:.1e}"
            )
        arrays = {key: x.numpy() for key, x in tensors.items()}
        target = Path(__file__).parent / name
        np.savez_compressed(target, **arrays, **logits)
        print(
            f"{target}: {len(arrays)} tensors, {target.stat().st_size} bytes, "
            f"`rwkv` differs by {difference:.1e}"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
