"""Makes the `.pth` files of this folder, and `expected.json`, the tensors that torch saw in them.

`CASE-VERSION.pth` is a case below as that version of torch saves it; `expected.json` holds
`{file: {name: [dtype, shape, numbers in C order]}}`. Made with torch 1.6.0 (the first to write
zips) and 1.12.1 (storages have types), case `plain` alone, and with 2.13.0, all cases:

    pip install torch==VERSION numpy
    python tests/golden/pth/make.py [CASE ...]
"""

import json
import sys
from collections import OrderedDict
from pathlib import Path

import torch

HERE = Path(__file__).parent
VERSION = torch.__version__.split("+")[0]
TYPES = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool uint16 uint32 uint64"


def ramp(*shape, dtype=torch.float32):
    """0, 1, 2, ... as that type has them."""
    return torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)


def plain():
    """Each type, and each way to lie in a storage."""
    dtypes = {name: getattr(torch, name) for name in TYPES.split() if hasattr(torch, name)}
    found = OrderedDict((name, ramp(2, 3, dtype=dtype)) for name, dtype in dtypes.items())
    found["scalar"] = torch.tensor(3.5)
    found["empty"] = torch.zeros(0, 4)
    shared = ramp(4, 6, dtype=torch.bfloat16)
    found["whole"] = shared
    found["transposed"] = shared.t()
    found["column"] = shared[:, 2]
    found["strided"] = shared[1::2, ::3]
    found["repeated"] = ramp(3, 1).expand(3, 4)
    found["parameter"] = torch.nn.Parameter(ramp(3))
    found["tagged"] = torch.nn.Parameter(ramp(2))
    found["tagged"].decays = False
    return found


def module():
    """What `state_dict` gives, with its `_metadata`."""
    made = torch.nn.Sequential(torch.nn.Linear(2, 3, bias=False), torch.nn.BatchNorm1d(3))
    state = made.state_dict()
    for value in state.values():
        value.copy_(ramp(*value.shape))
    return state


def under_module():
    """A checkpoint with the state dict under `module`, and what a trainer keeps beside it."""
    weights = OrderedDict({"emb.weight": ramp(3, 2, dtype=torch.bfloat16)})
    shapes = [OrderedDict({"emb.weight": torch.Size([3, 2])})]
    names = {"sparse_tensor_module_names": set(), "version": "0.14.0", "optimizer": None}
    rest = {"param_shapes": shapes, "global_steps": 3, "dtype": torch.bfloat16, **names}
    return {"module": weights, **rest}


def under_state_dict():
    """The same under `state_dict`, with tensors elsewhere that are no weights."""
    moments = {0: {"step": torch.tensor(5.0), "exp_avg": ramp(3, 2)}}
    groups = [{"lr": 1e-3, "betas": (0.9, 0.99), "params": [0]}]
    return {
        "epoch": 1,
        "loss": torch.tensor(2.5),
        "optimizer_states": [{"state": moments, "param_groups": groups}],
        "state_dict": {"model.emb.weight": ramp(3, 2)},
    }


CASES = {
    "plain": (plain, 2),
    "module": (module, 2),
    "under_module": (under_module, 2),
    "under_state_dict": (under_state_dict, 2),
    "protocol1": (plain, 1),
    "protocol4": (plain, 4),
    "protocol5": (plain, 5),
}


def main(*names):
    path = HERE / "expected.json"
    expected = json.loads(path.read_text()) if path.exists() else {}
    for name in names or CASES:
        make, protocol = CASES[name]
        made = make()
        file = f"{name}-{VERSION}.pth"
        torch.save(made, HERE / file, pickle_protocol=protocol)
        state = made.get("module") or made.get("state_dict") or made
        expected[file] = {
            key: [str(x.dtype)[6:], list(x.shape), x.flatten().tolist()] for key, x in state.items()
        }
    text = json.dumps(expected, sort_keys=True).replace('"}, "', '"},\n"')
    path.write_text(text.replace("]}, ", "]},\n") + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
