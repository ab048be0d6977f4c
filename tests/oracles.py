"""What every number is compared with: float64 numpy, one token at a time, written from the
equations.

Nothing here imports the package, stabilises, chunks or vectorises over time, so a mistake cannot be
shared. The gradients are reverse recurrences written by hand; `tests/test_oracles.py` checks them
by central differences.
"""

import numpy as np


def _float64(*arrays):
    return tuple(np.asarray(x, np.float64) for x in arrays)


# Version 4: per channel, N_t = e^w N_{t-1} + e^{k_t} v_t, D_t = e^w D_{t-1} + e^{k_t},
# y_t = (N_{t-1} + e^{u+k_t} v_t) / (D_{t-1} + e^{u+k_t}).
# The plain sums fit float64 while |k| + |u| < 700; no test comes near.


def wkv4_sums(num, den, max_exp):
    """The true sums (N, D) that a state (num, den, max_exp) stands for."""
    num, den, max_exp = _float64(num, den, max_exp)
    return num * np.exp(max_exp), den * np.exp(max_exp)


def _wkv4_states(log_w, k, v, sums, reset):
    """The sums (N, D) as each token reads them (after its reset), and the final ones."""
    n, d = sums
    before = []
    for t in range(k.shape[1]):
        fresh = reset[:, t, None]
        n, d = np.where(fresh, 0.0, n), np.where(fresh, 0.0, d)
        before.append((n, d))
        n = np.exp(log_w) * n + np.exp(k[:, t]) * v[:, t]
        d = np.exp(log_w) * d + np.exp(k[:, t])
    return [*before, (n, d)]


def _wkv4_defaults(k, sums, reset):
    batch, time, width = k.shape
    sums = (np.zeros((batch, width)),) * 2 if sums is None else _float64(*sums)
    return sums, np.zeros((batch, time), bool) if reset is None else np.asarray(reset)


def wkv4(log_w, k, v, u, sums=None, reset=None):
    """Output `[b, t, c]` and the final sums (N, D), each `[b, c]`; `sums` are the initial ones."""
    log_w, k, v, u = _float64(log_w, k, v, u)
    sums, reset = _wkv4_defaults(k, sums, reset)
    states = _wkv4_states(log_w, k, v, sums, reset)
    y = np.zeros_like(k)
    for t, (n, d) in enumerate(states[:-1]):
        bonus = np.exp(u + k[:, t])
        y[:, t] = (n + bonus * v[:, t]) / (d + bonus)
    return y, states[-1]


def wkv4_grad(log_w, k, v, u, sums, reset, dy, dsums):
    """Gradients of <dy, y> + <dsums, final sums> by log_w, k, v, u and the initial sums N, D."""
    log_w, k, v, u, dy = _float64(log_w, k, v, u, dy)
    sums, reset = _wkv4_defaults(k, sums, reset)
    states = _wkv4_states(log_w, k, v, sums, reset)
    grads = {
        "log_w": np.zeros_like(log_w),
        "k": np.zeros_like(k),
        "v": np.zeros_like(v),
        "u": np.zeros_like(u),
    }
    dn, dd = _float64(*dsums)
    for t in reversed(range(k.shape[1])):
        n, d = states[t]
        weight, bonus = np.exp(k[:, t]), np.exp(u + k[:, t])
        y = (n + bonus * v[:, t]) / (d + bonus)
        q = dy[:, t] / (d + bonus)
        # v - y without the cancellation where the bonus is strong.
        by_bonus = bonus * q * (d * v[:, t] - n) / (d + bonus)
        grads["k"][:, t] = weight * (v[:, t] * dn + dd) + by_bonus
        grads["v"][:, t] = weight * dn + bonus * q
        grads["u"] += by_bonus.sum(0)
        grads["log_w"] += (np.exp(log_w) * (n * dn + d * dd)).sum(0)
        dn, dd = np.exp(log_w) * dn + q, np.exp(log_w) * dd - q * y
        fresh = reset[:, t, None]
        dn, dd = np.where(fresh, 0.0, dn), np.where(fresh, 0.0, dd)
    return grads | {"N": dn, "D": dd}


# Versions 5 and 6: per head, with S of shape [v, k],
# y_t = (S_{t-1} + v_t (u k_t)') r_t, S_t = S_{t-1} diag(w_t) + v_t k_t'.


def _wkv6_defaults(log_w, k, state, reset, initial):
    return np.broadcast_to(log_w, k.shape), *_wkv7_defaults(k, state, reset, initial)


def _wkv6_states(log_w, k, v, state, reset, initial):
    """The state that each token finds (after its reset), and the final one."""
    before = []
    for t in range(k.shape[1]):
        state = _restart(state, reset[:, t], initial)
        before.append(state)
        state = state * np.exp(log_w[:, t])[..., None, :]
        state += _outer(v[:, t], k[:, t])
    return before, state


def wkv6(r, log_w, k, v, u, state=None, reset=None, initial=None):
    """Output `[b, t, h, n]` and the final state `[b, h, v, k]`; `log_w` may be `[h, n]`."""
    r, log_w, k, v, u = _float64(r, log_w, k, v, u)
    log_w, state, reset, initial = _wkv6_defaults(log_w, k, state, reset, initial)
    before, final = _wkv6_states(log_w, k, v, state, reset, initial)
    y = np.zeros_like(v)
    for t, s in enumerate(before):
        y[:, t] = _read(s + _outer(v[:, t], u * k[:, t]), r[:, t])
    return y, final


def wkv6_grad(r, log_w, k, v, u, state, reset, dy, dstate, initial=None):
    """Gradients of <dy, y> + <dstate, final state> by every input and the initial state."""
    r, log_w, k, v, u, dy, g = _float64(r, log_w, k, v, u, dy, dstate)
    shared = log_w.ndim == 2
    log_w, state, reset, initial = _wkv6_defaults(log_w, k, state, reset, initial)
    before, _ = _wkv6_states(log_w, k, v, state, reset, initial)
    grads = {name: np.zeros_like(k) for name in ("r", "log_w", "k")}
    grads |= {"v": np.zeros_like(v), "u": np.zeros_like(u), "initial": np.zeros_like(initial)}
    for t, s in reversed(list(enumerate(before))):
        w, uk = np.exp(log_w[:, t]), u * k[:, t]
        along = np.einsum("bhv,bhv->bh", dy[:, t], v[:, t])[..., None]
        grads["r"][:, t] = _spread(s, dy[:, t]) + uk * along
        grads["k"][:, t] = _spread(g, v[:, t]) + u * r[:, t] * along
        bonus = np.einsum("bhk,bhk->bh", uk, r[:, t])[..., None]
        grads["v"][:, t] = _read(g, k[:, t]) + bonus * dy[:, t]
        grads["u"] += (k[:, t] * r[:, t] * along).sum(0)
        grads["log_w"][:, t] = w * np.einsum("bhvk,bhvk->bhk", g, s)
        g = g * w[..., None, :]
        g += _outer(dy[:, t], r[:, t])
        grads["initial"] += g[reset[:, t]].sum(0)
        g = _restart(g, reset[:, t])
    if shared:
        grads["log_w"] = grads["log_w"].sum((0, 1))
    return grads | {"state": g}


# Version 7: per head, with S of shape [v, k],
# S_t = S_{t-1} diag(w_t) + (S_{t-1} a_t) b_t' + v_t k_t', y_t = S_t r_t.


def _wkv7_states(log_w, k, v, a, b, state, reset, initial):
    """For each token the state it finds (after its reset) and the one it leaves; the final one."""
    pairs = []
    for t in range(k.shape[1]):
        before = _restart(state, reset[:, t], initial)
        removed = _read(before, a[:, t])
        state = before * np.exp(log_w[:, t])[..., None, :]
        state += _outer(removed, b[:, t])
        state += _outer(v[:, t], k[:, t])
        pairs.append((before, state))
    return pairs, state


def _outer(x, y):
    return x[..., :, None] * y[..., None, :]


def _read(state, x):
    """`[b, h, v, k]` times `[b, h, k]`."""
    return (state @ x[..., None])[..., 0]


def _spread(state, x):
    """`[b, h, v, k]`, transposed, times `[b, h, v]`."""
    return (x[..., None, :] @ state)[..., 0, :]


def _restart(state, fresh, initial=0.0):
    """The state that a token finds: another one where a document starts."""
    return np.where(fresh[:, None, None, None], initial, state) if fresh.any() else state


def _wkv7_defaults(k, state, reset, initial):
    batch, time, heads, size = k.shape
    state = np.zeros((batch, heads, size, size)) if state is None else np.asarray(state, np.float64)
    reset = np.zeros((batch, time), bool) if reset is None else np.asarray(reset)
    initial = np.zeros(state.shape[1:]) if initial is None else np.asarray(initial, np.float64)
    return state, reset, initial


def wkv7(r, log_w, k, v, a, b, state=None, reset=None, initial=None):
    """Output `[b, t, h, n]` and the final state `[b, h, v, k]`."""
    r, log_w, k, v, a, b = _float64(r, log_w, k, v, a, b)
    state, reset, initial = _wkv7_defaults(k, state, reset, initial)
    pairs, final = _wkv7_states(log_w, k, v, a, b, state, reset, initial)
    y = np.zeros_like(r)
    for t, (_, after) in enumerate(pairs):
        y[:, t] = _read(after, r[:, t])
    return y, final


def wkv7_grad(r, log_w, k, v, a, b, state, reset, dy, dstate, initial=None):
    """Gradients of <dy, y> + <dstate, final state> by every input and the initial state."""
    r, log_w, k, v, a, b, dy, g = _float64(r, log_w, k, v, a, b, dy, dstate)
    state, reset, initial = _wkv7_defaults(k, state, reset, initial)
    pairs, _ = _wkv7_states(log_w, k, v, a, b, state, reset, initial)
    grads = {name: np.zeros_like(r) for name in ("r", "log_w", "k", "v", "a", "b")}
    grads["initial"] = np.zeros_like(initial)
    for t, (before, after) in reversed(list(enumerate(pairs))):
        w = np.exp(log_w[:, t])
        g = g + _outer(dy[:, t], r[:, t])
        grads["r"][:, t] = _spread(after, dy[:, t])
        grads["log_w"][:, t] = w * np.einsum("bhvk,bhvk->bhk", g, before)
        grads["k"][:, t] = _spread(g, v[:, t])
        grads["v"][:, t] = _read(g, k[:, t])
        grads["b"][:, t] = _spread(g, _read(before, a[:, t]))
        dremoved = _read(g, b[:, t])
        grads["a"][:, t] = _spread(before, dremoved)
        g *= w[..., None, :]
        g += _outer(dremoved, a[:, t])
        grads["initial"] += g[reset[:, t]].sum(0)
        g = _restart(g, reset[:, t])
    return grads | {"state": g}


# Whole models, from a dict of officially named tensors.


def _sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def _layer_norm(x, weight, bias, eps=1e-5):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight + bias


def _norm(p, name, x):
    return _layer_norm(x, p[f"{name}.weight"], p[f"{name}.bias"])


def _plain(x):
    """`[1, 1, c]` as `[c]`, everything else as it is."""
    return x[0, 0] if x.ndim == 3 and x.shape[:2] == (1, 1) else x


def _layer(p, index):
    prefix = f"blocks.{index}."
    return {name.removeprefix(prefix): x for name, x in p.items() if name.startswith(prefix)}


def _model(tensors, tokens, time_mix, channel_mix):
    """Logits `[t, V]` of one sequence, read one token at a time from a fresh state."""
    p = {name: _plain(np.asarray(x, np.float64)) for name, x in tensors.items()}
    layers = 1 + max(int(name.split(".")[1]) for name in p if name.startswith("blocks."))
    width = p["emb.weight"].shape[1]
    states = [{"att": np.zeros(width), "ffn": np.zeros(width)} for _ in range(layers)]
    logits = []
    for token in tokens:
        x = _norm(p, "blocks.0.ln0", p["emb.weight"][token])
        shared = {"token": token, "embedded": x}
        for index, state in enumerate(states):
            block = _layer(p, index)
            h = _norm(block, "ln1", x)
            x = x + time_mix(block, h, state, shared)
            state["att"] = h
            h = _norm(block, "ln2", x)
            x = x + channel_mix(block, h, state["ffn"], shared)
            state["ffn"] = h
        logits.append(p["head.weight"] @ _norm(p, "ln_out", x))
    return np.stack(logits)


def _time_mix4(p, x, state, shared):
    del shared
    mix = {
        j: x * p[f"att.time_mix_{j}"] + state["att"] * (1 - p[f"att.time_mix_{j}"]) for j in "kvr"
    }
    r = _sigmoid(p["att.receptance.weight"] @ mix["r"])
    k = p["att.key.weight"] @ mix["k"]
    v = p["att.value.weight"] @ mix["v"]
    n, d = state.get("sums", (0.0, 0.0))
    bonus = np.exp(p["att.time_first"] + k)
    y = (n + bonus * v) / (d + bonus)
    w = np.exp(-np.exp(p["att.time_decay"]))
    state["sums"] = (w * n + np.exp(k) * v, w * d + np.exp(k))
    return p["att.output.weight"] @ (r * y)


def _channel_mix4(p, x, previous, shared):
    del shared
    mix = {j: x * p[f"ffn.time_mix_{j}"] + previous * (1 - p[f"ffn.time_mix_{j}"]) for j in "kr"}
    k = np.maximum(p["ffn.key.weight"] @ mix["k"], 0.0) ** 2
    return _sigmoid(p["ffn.receptance.weight"] @ mix["r"]) * (p["ffn.value.weight"] @ k)


def model4(tensors, tokens):
    """Version 4: logits `[t, V]`."""
    return _model(tensors, tokens, _time_mix4, _channel_mix4)


def _silu(x):
    return x * _sigmoid(x)


def _fresh(p, heads, size):
    """The state [h, v, k] that documents start from: learnt, or zero."""
    return p["att.time_state"] if "att.time_state" in p else np.zeros((heads, size, size))


def _attend5(p, r, w, k, v, u, state):
    """Heads of versions 5 and 6: `[h, n]` in, the normalised output `[h * n]`."""
    heads, size = r.shape
    # Files keep a learnt state [h, v, k]; this oracle has states [h, k, v].
    s = state.get("wkv", _fresh(p, heads, size).transpose(0, 2, 1))
    y = np.stack([r[h] @ (s[h] + np.outer(u[h] * k[h], v[h])) for h in range(heads)])
    state["wkv"] = np.stack([w[h][:, None] * s[h] + np.outer(k[h], v[h]) for h in range(heads)])
    y = _layer_norm(y, 1.0, 0.0, eps=64e-5).reshape(-1)
    return y * p["att.ln_x.weight"] + p["att.ln_x.bias"]


def _time_mix5(p, x, state, shared):
    del shared
    gated = "att.gate.weight" in p
    mix = {}
    for j in "krvg" if gated else "krv":
        mu = p[f"att.time_mix_{j}"]
        mix[j] = x * mu + state["att"] * (1 - mu)
    decay = np.atleast_1d(p["att.time_decay"])
    heads = decay.shape[0]
    size = len(x) // heads
    w = np.broadcast_to(np.exp(-np.exp(decay.reshape(heads, -1))), (heads, size))
    u = p["att.time_faaaa"] if gated else np.exp(p["att.time_first"])
    u = np.broadcast_to(np.reshape(u, (heads, -1)), (heads, size))
    r = (p["att.receptance.weight"] @ mix["r"]).reshape(heads, size)
    k = (p["att.key.weight"] @ mix["k"]).reshape(heads, size)
    v = (p["att.value.weight"] @ mix["v"]).reshape(heads, size)
    y = _attend5(p, r, w, k, v, u, state)
    if gated:
        y = y * _silu(p["att.gate.weight"] @ mix["g"])
    return p["att.output.weight"] @ y


def model5(tensors, tokens):
    """Versions 5.0, 5.1 and 5.2, told apart by their tensors; state-tuned or not: logits
    `[t, V]`."""
    return _model(tensors, tokens, _time_mix5, _channel_mix4)


def _time_mix6(p, x, state, shared):
    del shared
    heads, size = p["att.time_faaaa"].reshape(-1, p["att.time_faaaa"].shape[-1]).shape
    delta = state["att"] - x
    low = np.tanh((x + delta * p["att.time_maa_x"]) @ p["att.time_maa_w1"]).reshape(5, -1)
    up = p["att.time_maa_w2"].reshape(5, -1, len(x))
    mix = {j: x + delta * (p[f"att.time_maa_{j}"] + low[i] @ up[i]) for i, j in enumerate("wkvrg")}
    w = p["att.time_decay"] + np.tanh(mix["w"] @ p["att.time_decay_w1"]) @ p["att.time_decay_w2"]
    w = np.exp(-np.exp(w)).reshape(heads, size)
    r = (p["att.receptance.weight"] @ mix["r"]).reshape(heads, size)
    k = (p["att.key.weight"] @ mix["k"]).reshape(heads, size)
    v = (p["att.value.weight"] @ mix["v"]).reshape(heads, size)
    y = _attend5(p, r, w, k, v, p["att.time_faaaa"].reshape(heads, size), state)
    return p["att.output.weight"] @ (y * _silu(p["att.gate.weight"] @ mix["g"]))


def _channel_mix6(p, x, previous, shared):
    del shared
    delta = previous - x
    k = np.maximum(p["ffn.key.weight"] @ (x + delta * p["ffn.time_maa_k"]), 0.0) ** 2
    r = _sigmoid(p["ffn.receptance.weight"] @ (x + delta * p["ffn.time_maa_r"]))
    return r * (p["ffn.value.weight"] @ k)


def model6(tensors, tokens):
    """Version 6, state-tuned or not: logits `[t, V]`."""
    return _model(tensors, tokens, _time_mix6, _channel_mix6)


def _time_mix7(p, x, state, shared):
    heads, size = p["att.r_k"].shape
    mix = {j: x + (state["att"] - x) * p[f"att.x_{j}"] for j in "rwkvag"}
    r = p["att.receptance.weight"] @ mix["r"]
    k = p["att.key.weight"] @ mix["k"]
    v = p["att.value.weight"] @ mix["v"]
    w = np.exp(
        -np.exp(-0.5) * _sigmoid(p["att.w0"] + np.tanh(mix["w"] @ p["att.w1"]) @ p["att.w2"])
    )
    alpha = _sigmoid(p["att.a0"] + mix["a"] @ p["att.a1"] @ p["att.a2"])
    gate = _sigmoid(mix["g"] @ p["att.g1"]) @ p["att.g2"]
    if "v_first" in shared:
        v = v + (shared["v_first"] - v) * _sigmoid(
            p["att.v0"] + mix["v"] @ p["att.v1"] @ p["att.v2"]
        )
    else:
        shared["v_first"] = v
    kk = (k * p["att.k_k"]).reshape(heads, size)
    kk = kk / np.maximum(np.linalg.norm(kk, axis=1, keepdims=True), 1e-12)
    k = k * (1 + (alpha - 1) * p["att.k_a"])
    r, w, k, v, alpha = (z.reshape(heads, size) for z in (r, w, k, v, alpha))

    s = state.get("wkv", _fresh(p, heads, size))
    out = np.zeros((heads, size))
    new = np.zeros_like(s)
    for h in range(heads):
        new[h] = s[h] * w[h] - np.outer(s[h] @ kk[h], kk[h] * alpha[h]) + np.outer(v[h], k[h])
        y = _layer_norm(new[h] @ r[h], 1.0, 0.0, eps=64e-5)
        part = slice(h * size, (h + 1) * size)
        out[h] = y * p["att.ln_x.weight"][part] + p["att.ln_x.bias"][part]
        out[h] += (r[h] * k[h] * p["att.r_k"][h]).sum() * v[h]
    state["wkv"] = new
    return p["att.output.weight"] @ (out.reshape(-1) * gate)


def _channel_mix7(p, x, previous, shared):
    del shared
    k = p["ffn.key.weight"] @ (x + (previous - x) * p["ffn.x_k"])
    return p["ffn.value.weight"] @ np.maximum(k, 0.0) ** 2


def model7(tensors, tokens):
    """Version 7, state-tuned or not: logits `[t, V]`. Layer 0's `att.v0 v1 v2`, where a file has
    them, take no part."""
    return _model(tensors, tokens, _time_mix7, _channel_mix7)


def _channel_mix7a(p, x, previous, shared):
    matrix = p["ffn.s_emb.weight"][shared["token"]]
    matrix = matrix + p["ffn.s_emb_x.weight"] @ shared["embedded"]
    rank = p["ffn.s1"].shape[1]
    gain = x @ p["ffn.s1"] @ matrix.reshape(rank, rank) @ p["ffn.s2"] + p["ffn.s0"]
    k = p["ffn.key.weight"] @ (x + (previous - x) * p["ffn.x_k"])
    return p["ffn.value.weight"] @ (np.maximum(k, 0.0) ** 2 * gain)


def model7a(tensors, tokens):
    """Version 7a: logits `[t, V]`."""
    return _model(tensors, tokens, _time_mix7, _channel_mix7a)


MODELS = {
    "4": model4,
    "5.0": model5,
    "5.1": model5,
    "5.2": model5,
    "6": model6,
    "7": model7,
    "7a": model7a,
}
