"""RWKV-7 in plain PyTorch, a peer for training speed: equations of the official "x070" model.

The recurrence comes in two forms. `steps` is the definition, one token at a time. `chunks` is its
WY form: with P_t the decay product inside a chunk, the rows u_t = S_{t-1} a_t solve (I - A_ab) U =
(a P_{t-1}) S_0^T + A_ak V, a unit triangular system; everything that does not need the state is
batched over all chunks first. Parameter names are those of official checkpoints.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK = 16


def steps(r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return y [B,T,H,N], token by token: S = S diag(w) + (S a) b^T + v k^T, y = S r."""
    batch, _, heads, size = r.shape
    state = r.new_zeros(batch, heads, size, size)
    ys = []
    # unbind, not indexing, whose backward makes a full-length zero tensor a token.
    tokens = (x.unbind(1) for x in (r, log_w.exp(), k, v, a, b))
    for r_t, w_t, k_t, v_t, a_t, b_t in zip(*tokens, strict=True):
        sa = state @ a_t.unsqueeze(-1)
        state = (
            state * w_t.unsqueeze(-2)
            + sa * b_t.unsqueeze(-2)
            + v_t.unsqueeze(-1) * k_t.unsqueeze(-2)
        )
        ys.append((state @ r_t.unsqueeze(-1)).squeeze(-1))
    return torch.stack(ys, 1)


def chunks(r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return y [B,T,H,N] by chunks of 16 tokens; T must be a multiple of 16."""
    batch, length, heads, size = r.shape

    def cut(x: Tensor) -> Tensor:  # [B, T, H, N] -> [B, H, chunk, token, N]
        return x.view(batch, -1, CHUNK, heads, size).permute(0, 3, 1, 2, 4)

    r, log_w, k, v, a, b = map(cut, (r, log_w, k, v, a, b))
    p = log_w.cumsum(-2)
    centre = p[..., CHUNK // 2 - 1 : CHUNK // 2, :]
    total = p[..., -1:, :]
    inclusive, exclusive, inverse = (
        (p - centre).exp(),
        (p - log_w - centre).exp(),
        (centre - p).exp(),
    )
    queries = torch.cat((a * exclusive, r * inclusive), -2)
    keys = torch.cat((b * inverse, k * inverse), -2)
    scores = queries @ keys.mT
    strict = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=r.device).tril(-1)
    causal = strict.logical_not().mT
    ab = scores[..., :CHUNK, :CHUNK].masked_fill(~strict, 0)
    ak = scores[..., :CHUNK, CHUNK:].masked_fill(~strict, 0)
    rb_rk = scores[..., CHUNK:, :].masked_fill(~causal.repeat(1, 2), 0)
    from_start = queries * centre.exp()
    right = torch.cat((from_start[..., :CHUNK, :], ak @ v), -1)
    solved = torch.linalg.solve_triangular(-ab, right, upper=False, unitriangular=True)
    w, u0 = solved.split(size, -1)
    to_end = keys * (total - centre).exp()
    decay = total.exp()

    state = r.new_zeros(batch, heads, size, size)
    starts, us = [], []
    sequence = (x.unbind(2) for x in (w, u0, v, to_end, decay))
    for w_c, u0_c, v_c, to_end_c, decay_c in zip(*sequence, strict=True):
        starts.append(state)
        uv = torch.cat((u0_c + w_c @ state.mT, v_c), -2)
        us.append(uv)
        state = state * decay_c + uv.mT @ to_end_c
    y = from_start[..., CHUNK:, :] @ torch.stack(starts, 2).mT + rb_rk @ torch.stack(us, 2)
    return y.permute(0, 2, 3, 1, 4).reshape(batch, length, heads, size)


FORMS = {"steps": steps, "chunks": chunks}


def token_shift(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 1, -1))


class TimeMix(nn.Module):
    def __init__(self, width: int, head_size: int, ranks: dict[str, int], layer: int):
        super().__init__()
        self.heads, self.head_size, self.layer = width // head_size, head_size, layer
        for name in "rwkvag":
            setattr(self, f"x_{name}", nn.Parameter(torch.rand(1, 1, width)))
        for name, rank in ranks.items():
            if name == "v" and layer == 0:
                continue
            if name != "g":
                setattr(self, f"{name}0", nn.Parameter(torch.randn(1, 1, width) - 1.0))
            setattr(self, f"{name}1", nn.Parameter(torch.randn(width, rank) * width**-0.5))
            setattr(self, f"{name}2", nn.Parameter(torch.randn(rank, width) * 0.1))
        self.k_k = nn.Parameter(0.7 + 0.1 * torch.randn(1, 1, width))
        self.k_a = nn.Parameter(1.0 + 0.1 * torch.randn(1, 1, width))
        self.r_k = nn.Parameter(0.1 * torch.randn(self.heads, head_size))
        for name in ("receptance", "key", "value", "output"):
            setattr(self, name, nn.Linear(width, width, bias=False))
        self.ln_x = nn.GroupNorm(self.heads, width, eps=64e-5)

    def forward(self, x: Tensor, v_first: Tensor | None, form: str) -> tuple[Tensor, Tensor]:
        batch, length, width = x.shape
        by_head = (batch, length, self.heads, self.head_size)
        delta = token_shift(x) - x
        r = self.receptance(torch.addcmul(x, delta, self.x_r))
        w = self.w0 + torch.tanh(torch.addcmul(x, delta, self.x_w) @ self.w1) @ self.w2
        log_w = -math.exp(-0.5) * torch.sigmoid(w)
        k = self.key(torch.addcmul(x, delta, self.x_k))
        x_v = torch.addcmul(x, delta, self.x_v)
        v = self.value(x_v)
        a = torch.sigmoid(self.a0 + torch.addcmul(x, delta, self.x_a) @ self.a1 @ self.a2)
        g = torch.sigmoid(torch.addcmul(x, delta, self.x_g) @ self.g1) @ self.g2
        if v_first is None:
            v_first = v
        else:
            v = torch.lerp(v, v_first, torch.sigmoid(self.v0 + x_v @ self.v1 @ self.v2))
        kk = F.normalize((k * self.k_k).view(by_head), dim=-1)
        k = k * (1 + (a - 1) * self.k_a)
        r, log_w, k, v_heads, a = (z.view(by_head) for z in (r, log_w, k, v, a))
        y = FORMS[form](r, log_w, k, v_heads, -kk, kk * a)
        y = self.ln_x(y.reshape(batch * length, width)).view(by_head)
        y = y + (r * k * self.r_k).sum(-1, keepdim=True) * v_heads
        return self.output(y.view(batch, length, width) * g), v_first


class ChannelMix(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.x_k = nn.Parameter(torch.rand(1, 1, width))
        self.key = nn.Linear(width, 4 * width, bias=False)
        self.value = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.value(
            torch.relu(self.key(torch.addcmul(x, token_shift(x) - x, self.x_k))).square()
        )


class Block(nn.Module):
    def __init__(self, width: int, head_size: int, ranks: dict[str, int], layer: int):
        super().__init__()
        if layer == 0:
            self.ln0 = nn.LayerNorm(width)
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.att = TimeMix(width, head_size, ranks, layer)
        self.ffn = ChannelMix(width)


class RWKV7(nn.Module):
    """tokens [B,T] -> logits [B,T,V]; `ranks` are those of w, a, v and g."""

    def __init__(
        self,
        *,
        vocab: int,
        width: int,
        layers: int,
        head_size: int,
        ranks: dict[str, int],
        form: str,
    ):
        super().__init__()
        self.form = form
        self.emb = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList(
            Block(width, head_size, ranks, layer) for layer in range(layers)
        )
        self.ln_out = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.blocks[0].ln0(self.emb(tokens))
        v_first = None
        for block in self.blocks:
            y, v_first = block.att(block.ln1(x), v_first, self.form)
            x = x + y
            x = x + block.ffn(block.ln2(x))
        return self.head(self.ln_out(x))
