"""Random checkpoints in the official layout, of any version and size: names and shapes as the
official trainers write them, stated here independently of the package.

The weights are dense and of order one, where initial ones have many zeros: a group norm's wrong
epsilon, the smallest mistake known, then moves the logits by 4e-3 (version 6) to 3 (version 5.0).
"""

import numpy as np

VERSIONS = ("4", "5.0", "5.1", "5.2", "6", "7", "7a")


def checkpoint(
    version,
    *,
    layers=3,
    width=32,
    head=16,
    vocab=67,
    ffn=None,
    ranks=(6, 5, 4, 7),
    seed=0,
    tuned=False,
):
    """Official name -> float32 array; the values are float16 ones, so that files may be small.

    `ranks`: version 6 (mix, decay), version 7 (w, a, v, g), 7a (those, and the side of DeepEmbed's
    matrices). `tuned` adds `time_state` to versions 5 to 7. Layer 0 of version 7 has no v0, v1, v2.
    """
    rng = np.random.default_rng([seed, VERSIONS.index(version)])
    shapes = {"emb.weight": (vocab, width)} | _norm("blocks.0.ln0", width)
    for layer in range(layers):
        block = _norm("ln1", width) | _norm("ln2", width)
        block |= _time_mix(version, layer, width, head, ranks)
        heads = width // head
        block |= {"att.time_state": (heads, head, head)} if tuned and version != "4" else {}
        block |= _channel_mix(version, width, vocab, ffn, ranks)
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in block.items()}
    shapes |= _norm("ln_out", width) | {"head.weight": (vocab, width)}
    return {name: _draw(rng, name, shape) for name, shape in shapes.items()}


def _norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _named(part, rows, shape, suffix=""):
    return {f"{part}.{row}{suffix}": shape for row in rows}


def _time_mix(version, layer, c, n, ranks):
    h, row, square = c // n, (1, 1, c), (c, c)
    linear = ["receptance", "key", "value", "output"]
    if version[0] == "7":
        rank = dict(zip("wavg", ranks, strict=False))
        out = _named("att", ["x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "k_k", "k_a"], row)
        out["att.r_k"] = (h, n)
        for x in "wag" + ("v" if layer else ""):
            out |= {f"att.{x}1": (c, rank[x]), f"att.{x}2": (rank[x], c)}
            out |= {} if x == "g" else {f"att.{x}0": row}
        return out | _named("att", linear, square, ".weight") | _norm("att.ln_x", c)
    if version == "6":
        mix, decay = ranks[:2]
        out = _named("att", [f"time_maa_{x}" for x in "xwkvrg"] + ["time_decay"], row)
        out |= {"att.time_maa_w1": (c, 5 * mix), "att.time_maa_w2": (5, mix, c)}
        out |= {"att.time_decay_w1": (c, decay), "att.time_decay_w2": (decay, c)}
        out |= {"att.time_faaaa": (h, n)}
        return out | _named("att", [*linear, "gate"], square, ".weight") | _norm("att.ln_x", c)
    mixes = "kvr" if version in ("4", "5.0") else "kvrg"
    out = _named("att", [f"time_mix_{x}" for x in mixes], row)
    if version == "4":
        return (
            out
            | _named("att", ["time_decay", "time_first"], (c,))
            | _named("att", linear, square, ".weight")
        )
    per_head = (h, n) if version == "5.2" else (h,)
    bonus = "time_first" if version == "5.0" else "time_faaaa"
    out |= {"att.time_decay": per_head, f"att.{bonus}": per_head}
    linear += [] if version == "5.0" else ["gate"]
    return out | _named("att", linear, square, ".weight") | _norm("att.ln_x", c)


def _channel_mix(version, c, vocab, ffn, ranks):
    f = ffn or 4 * c
    out = {"ffn.key.weight": (f, c), "ffn.value.weight": (c, f)}
    if version[0] == "7":
        out["ffn.x_k"] = (1, 1, c)
        if version == "7a":
            e = ranks[4]
            out |= {"ffn.s_emb.weight": (vocab, e * e), "ffn.s_emb_x.weight": (e * e, c)}
            out |= {"ffn.s1": (c, e), "ffn.s2": (e, f), "ffn.s0": (1, 1, f)}
        return out
    name = "time_maa" if version == "6" else "time_mix"
    return out | {
        f"ffn.{name}_k": (1, 1, c),
        f"ffn.{name}_r": (1, 1, c),
        "ffn.receptance.weight": (c, c),
    }


def _draw(rng, name, shape):
    x, last = rng.normal(size=shape), name.rsplit(".", 1)[-1]
    if (
        last.startswith("x_")
        or last.startswith("time_mix")
        or last in [f"time_maa_{y}" for y in "xwkvrg"]
    ):
        x = rng.uniform(0.1, 0.9, size=shape)
    elif (".ln" in name and last == "weight") or name.startswith("ln_out.w") or last == "s0":
        x = 1 + 0.2 * x
    elif last == "weight" and "emb.weight" not in name:
        x = x / np.sqrt(shape[1])
    elif len(shape) > 1 and last[-1] in "12":  # low-rank factors are [in, out]
        x = x / np.sqrt(shape[-2])
    elif "emb.weight" not in name:
        x = 0.5 * x
    return x.astype(np.float16).astype(np.float32)
