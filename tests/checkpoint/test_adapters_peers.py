"""Adapters in the programs that train and use them: `peft` on `rwkv7-hf`, and PyPI `rwkv`.

Runs where `pip install '.[oracle]'` has been done; the fixtures of `test_adapters.py` hold what
peft says of adapters of its own.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from official_weights import checkpoint
from tolerances import CHANNEL, GOLDEN_LOGITS, PEFT_LOGITS, relative_rms

import rwkv_jax
from rwkv_jax import __main__ as program
from rwkv_jax import adapters, models
from rwkv_jax.checkpoint.keymaps import from_official

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
rwkv7_hf = pytest.importorskip("rwkv7_hf")
pytest.importorskip("rwkv")

pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = {"layers": 2, "width": 128, "head": 64, "vocab": 67, "ffn": 160, "seed": 4}
TOKENS = np.random.default_rng(1).integers(67, size=(2, 13))


def moved(tree, seed=0):
    """Every number that is not 0 changed, as training would; zeros of left out layers stay. B, all
    zero at first, is drawn where A is not."""
    rng = np.random.default_rng(seed)

    def draw(x):
        return (0.1 * rng.normal(size=x.shape)).astype(np.float32)

    def change(x):
        some = (np.asarray(x.down) != 0).any((1, 2))[:, None, None]
        return x.replace(down=x.down + draw(x.down) * some, up=jnp.asarray(draw(x.up) * some))

    low_rank = {path: change(x) for path, x in tree.low_rank.items()}
    return tree.replace(low_rank=low_rank, whole=jax.tree.map(lambda x: x + draw(x), tree.whole))


def in_peft(tmp_path, params, cfg, adapter, **options):
    """The adapter, saved by us, on the model, saved by us."""
    rwkv_jax.save(tmp_path / "base", params, cfg)
    adapters.save(tmp_path / "adapter", adapter, cfg)
    base = rwkv7_hf.RWKV7ForCausalLM.from_pretrained(tmp_path / "base").float()
    return peft.PeftModel.from_pretrained(base, tmp_path / "adapter", **options)


@pytest.mark.parametrize("layers", ["", "1:"])
def test_our_folder_gives_our_logits(layers, tmp_path):
    params, cfg = from_official(checkpoint("7", **SIZES))
    fresh = adapters.init(
        cfg,
        jax.random.key(0),
        3,
        7.0,
        layers=layers,
        rslora=True,
        also=["ln", "head"],
        params=params,
    )
    adapter = moved(fresh)
    model = in_peft(tmp_path, params, cfg, adapter).eval()
    with torch.no_grad():
        found = model(torch.from_numpy(TOKENS), use_cache=False).logits.numpy()
    tokens = jnp.asarray(TOKENS, jnp.int32)
    expected = np.asarray(models.forward(adapters.on(params, adapter), tokens, cfg=cfg)[0])
    bare = np.asarray(models.forward(params, tokens, cfg=cfg)[0])
    assert np.abs(found - expected).max() < PEFT_LOGITS * np.abs(expected).max()
    assert np.abs(bare - expected).max() > 0.1 * np.abs(expected).max()


def factors(model):
    """A and B of a peft model, by layer and official name, as ours: `down`, `up`."""
    longer = {"r_proj": "receptance", "k_proj": "key", "v_proj": "value", "o_proj": "output"}
    pattern = re.compile(r"layers\.(\d+)\.(attn|ffn)\.(\w+)\.lora_([AB])\.")
    for name, x in model.named_parameters():
        if match := pattern.search(name):
            layer, mix, part, side = match.groups()
            path = f"blocks.{'att' if mix == 'attn' else mix}.{longer.get(part, part)}"
            yield path, int(layer), "down" if side == "A" else "up", x


@pytest.mark.slow
def test_gradients_and_steps_of_adamw_are_those_of_torch(tmp_path):
    params, cfg = from_official(checkpoint("7", **SIZES))
    adapter = moved(adapters.init(cfg, jax.random.key(0), rank=3, alpha=5.0))
    model = in_peft(tmp_path, params, cfg, adapter, is_trainable=True)
    tokens, optimizer = torch.from_numpy(TOKENS), optax.adamw(1e-2, 0.9, 0.99, 1e-8, 0.0)
    theirs = torch.optim.AdamW(
        [x for *_, x in factors(model)], 1e-2, (0.9, 0.99), 1e-8, weight_decay=0.0
    )
    ids = jnp.asarray(TOKENS, jnp.int32)

    @jax.jit
    def gradient(adapter):
        def loss(adapter):
            logits, _ = models.forward(adapters.on(params, adapter), ids[:, :-1], cfg=cfg)
            return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

        return jax.value_and_grad(loss)(adapter)

    @jax.jit
    @jax.numpy_dtype_promotion("standard")  # optax relies on it
    def step(state, adapter, grads):
        updates, state = optimizer.update(grads, state, adapter)
        return state, optax.apply_updates(adapter, updates)

    def check(ours, pick):
        count = 0
        for path, layer, side, x in factors(model):
            mine, their = getattr(ours.low_rank[path], side)[layer], pick(x).detach().numpy().T
            assert relative_rms(mine, their) < CHANNEL, (path, layer, side)
            count += 1
        assert count == 2 * 2 * 6

    state = optimizer.init(adapter)
    for _ in range(5):
        loss, grads = gradient(adapter)
        theirs.zero_grad()
        their_loss = model(tokens, labels=tokens, use_cache=False).loss
        their_loss.backward()
        assert abs(float(loss) - float(their_loss)) < 1e-5 * float(loss)
        check(grads, lambda x: x.grad)
        state, adapter = step(state, adapter, grads)
        theirs.step()
        check(adapter, lambda x: x)


@pytest.mark.parametrize("version", ["4", "5.0", "5.1", "5.2", "6", "7"])
def test_a_merged_pth_in_pypi_rwkv(version, tmp_path):
    from models.test_pypi import official

    tensors = checkpoint(version, layers=2)
    params, cfg = from_official(tensors)
    rwkv_jax.save(tmp_path / "m.pth", params, cfg)
    fresh = adapters.init(cfg, jax.random.key(0), rank=3, alpha=5.0, also=["ln"], params=params)
    adapter = moved(fresh)
    adapters.save(tmp_path / "a", adapter, cfg)
    arguments = [tmp_path / "m.pth", tmp_path / "a", tmp_path / "out.pth"]
    assert program.main(["merge", *map(str, arguments)]) == 0
    tokens = TOKENS[0] % 67
    found, _ = official(version, tmp_path / "out.pth", tokens.tolist())
    expected, _ = models.forward(
        adapters.on(params, adapter), jnp.asarray(tokens, jnp.int32)[None], cfg=cfg
    )
    np.testing.assert_allclose(found, expected[0], rtol=0, atol=GOLDEN_LOGITS)
