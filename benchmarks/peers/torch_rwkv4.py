"""RWKV-4 in plain PyTorch, a peer for training speed: token by token, exponents below a running
maximum.

Parameter names are those of official checkpoints; `time_mix_*` weighs the current token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def steps(log_w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return y [B,T,C]; log_w and u are [C]."""
    num = torch.zeros_like(k[:, 0])
    den = torch.zeros_like(num)
    top = torch.full_like(num, -1e38)
    ys = []
    # unbind, not indexing, whose backward makes a full-length zero tensor a token.
    for k_t, bonus, v_t in zip(k.unbind(1), (k + u).unbind(1), v.unbind(1), strict=True):
        q = torch.maximum(top, bonus)
        old, new = torch.exp(top - q), torch.exp(bonus - q)
        ys.append((old * num + new * v_t) / (old * den + new))
        decayed = top + log_w
        top = torch.maximum(decayed, k_t)
        old, new = torch.exp(decayed - top), torch.exp(k_t - top)
        num, den = old * num + new * v_t, old * den + new
    return torch.stack(ys, 1)


def mixed(x: Tensor, mix: Tensor) -> Tensor:
    return torch.lerp(F.pad(x, (0, 0, 1, -1)), x, mix)


class TimeMix(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.time_decay = nn.Parameter(torch.linspace(-5, 1, width))
        self.time_first = nn.Parameter(torch.randn(width) * 0.5 - 1)
        for name in "kvr":
            setattr(self, f"time_mix_{name}", nn.Parameter(torch.rand(1, 1, width)))
        for name in ("key", "value", "receptance", "output"):
            setattr(self, name, nn.Linear(width, width, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.key(mixed(x, self.time_mix_k)), self.value(mixed(x, self.time_mix_v))
        r = torch.sigmoid(self.receptance(mixed(x, self.time_mix_r)))
        return self.output(r * steps(-self.time_decay.exp(), self.time_first, k, v))


class ChannelMix(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        for name in "kr":
            setattr(self, f"time_mix_{name}", nn.Parameter(torch.rand(1, 1, width)))
        self.key = nn.Linear(width, 4 * width, bias=False)
        self.receptance = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        k = torch.relu(self.key(mixed(x, self.time_mix_k))).square()
        return torch.sigmoid(self.receptance(mixed(x, self.time_mix_r))) * self.value(k)


class Block(nn.Module):
    def __init__(self, width: int, layer: int):
        super().__init__()
        if layer == 0:
            self.ln0 = nn.LayerNorm(width)
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.att, self.ffn = TimeMix(width), ChannelMix(width)


class RWKV4(nn.Module):
    """tokens [B,T] -> logits [B,T,V]."""

    def __init__(self, *, vocab: int, width: int, layers: int):
        super().__init__()
        self.emb = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList(Block(width, layer) for layer in range(layers))
        self.ln_out = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.blocks[0].ln0(self.emb(tokens))
        for block in self.blocks:
            x = x + block.att(block.ln1(x))
            x = x + block.ffn(block.ln2(x))
        return self.head(self.ln_out(x))
