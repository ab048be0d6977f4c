"""What the names of official files say, and the sampling of official models."""

from pathlib import Path

import pytest

from rwkv_jax.data.conversations import TEMPLATES
from rwkv_jax.errors import UserError
from rwkv_jax.sampling import Sampling
from rwkv_jax.sampling.chat import preset_for
from rwkv_jax.sampling.presets import PRESETS, preset, release_of


@pytest.mark.parametrize(
    "path, says, template",
    [
        ("rwkv7-g1h-1.5b-20260710-ctx10240.pth", "G1h 1.5B of 2026-07-10", "flower"),
        ("models/rwkv7-g1k-13.3b-20260930-ctx25600.pth", "G1k 13.3B of 2026-09-30", "flower"),
        ("RWKV7-G1k-2.9B-20260930/model.safetensors", "G1k 2.9B of 2026-09-30", "flower"),
        ("RWKV7-7.2B-20260805/model-00001-of-00003.safetensors", "7.2B of 2026-08-05", "flower"),
        ("models--RWKV7-1.5B-20260805/snapshots/a/m.st", "1.5B of 2026-08-05", "flower"),
        ("rwkv7-g1g-2.9b-20260526-ctx8192.pth", "G1g 2.9B of 2026-05-26", "g1"),
        ("rwkv7-g1-1.5b.pth", "G1 1.5B", "g1"),
        ("rwkv7-g0a3-7.2b-20251029-ctx8192.pth", "G0a3 7.2B of 2025-10-29", "g1"),
        ("rwkv7b-g1b-0.1b-20250822-ctx4096.pth", "G1b 0.1B of 2025-08-22", "g1"),
        ("rwkv8-g2-1b-20270101.pth", "G2 1B of 2027-01-01", "flower"),
        ("RWKV-x070-World-0.1B-v2.8-20241210-ctx4096.pth", "World 0.1B of 2024-12-10", "world"),
        ("rwkv-mine-20250101.pth", "of 2025-01-01", ""),
    ],
)  # fmt: skip
def test_names_of_official_files(path, says, template):
    release = release_of(Path("/home") / path)
    assert release and (str(release), release.template) == (says, template)


@pytest.mark.parametrize(
    "path", ["mine.pth", "g1h/mine.pth", "rwkv/mine.pth", "rwkv7-12345678.pth"]
)
def test_other_names_say_nothing(path):
    assert release_of(Path(path)) is None


def test_the_official_presets():
    assert PRESETS["text"] == Sampling()
    assert PRESETS["chat"] == Sampling(top_p=0.3, presence_penalty=0.5, frequency_penalty=0.5)
    assert PRESETS["think"].flags() == {
        "temperature": 0.96, "top_p": 0.76, "top_k": 32, "presence": 1.0, "frequency": 0.1,
        "decay": 0.988, "min_p": 0.0,
    }  # fmt: skip
    answer = Sampling(1.0, 0.28, 32, 0.0, 0.0)
    assert (preset("answer"), preset("tool").temperature) == (answer, 0.0)
    with pytest.raises(UserError, match="preset x: one of text, chat, think, answer, tool"):
        preset("x")


def test_presets_of_templates():
    ways = {way: preset_for(TEMPLATES["flower"], way) for way in ("off", "fast", "on", "a lot")}
    assert ways == {"off": "answer", "fast": "answer", "on": "think", "a lot": "think"}
    assert preset_for(TEMPLATES["g1"], "tool") == preset_for(TEMPLATES["flower"], "tool") == "tool"
    assert preset_for(TEMPLATES["g1"], "on") == preset_for(TEMPLATES["world"], "off") == "chat"
