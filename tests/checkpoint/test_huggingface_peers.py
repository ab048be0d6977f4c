"""Exported folders in the libraries that read them: logits against the official ones.

Runs where `pip install '.[oracle]'` has been done; the fixtures of `test_huggingface.py` hold what
those libraries say of folders of their own.
"""

import re
from pathlib import Path

import numpy as np
import pytest
from tolerances import GOLDEN_LOGITS

import rwkv_jax
from rwkv_jax import __main__ as program
from rwkv_jax.checkpoint.keymaps import from_official

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("version", ["4", "7"])
def test_an_exported_folder_gives_the_official_logits(version, tmp_path):
    if version == "7":
        architecture = pytest.importorskip("rwkv7_hf").RWKV7ForCausalLM
    else:
        architecture = transformers.RwkvForCausalLM
    golden = dict(np.load(GOLDEN / f"rwkv{version}.npz"))
    tensors = {name: x.astype(np.float32) for name, x in golden.items() if "." in name}
    rwkv_jax.save(tmp_path / "folder", *from_official(tensors))
    model, report = architecture.from_pretrained(tmp_path / "folder", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        tokens = torch.tensor(golden["tokens"].astype(np.int64))[None]
        logits = model.eval()(tokens, use_cache=False).logits[0].numpy()
    np.testing.assert_allclose(logits, golden["pip_fp32"], rtol=0, atol=GOLDEN_LOGITS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("version", ["4", "7"])
def test_the_line_that_convert_prints_opens_the_folder(version, tmp_path, capsys):
    if version == "7":
        pytest.importorskip("rwkv7_hf")
    golden = dict(np.load(GOLDEN / f"rwkv{version}.npz"))
    tensors = {name: x.astype(np.float32) for name, x in golden.items() if "." in name}
    rwkv_jax.save(tmp_path / "m.pth", *from_official(tensors))
    arguments = ["convert", str(tmp_path / "m.pth"), str(tmp_path / "folder")]
    assert program.main(arguments) == 0
    line = re.search(r"^open it: (.*)$", capsys.readouterr().out, re.M)[1]
    exec(line, {})
