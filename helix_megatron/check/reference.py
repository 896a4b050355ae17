"""Attention in float64 in one process, straight from the formula and Megatron's standard weight layout.

Independent of the rest of the package: no layout, no exchange, no Megatron. Tests compare with it too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass
class Case:
    """One attention layer and its input."""

    heads: int
    groups: int
    dim: int
    hidden: int = 24
    seq: int = 16
    batch: int = 2
    rotary_percent: float = 1.0  # 0: no RoPE
    interleaved: bool = False
    bias: bool = True
    qk_norm: str | None = None  # "RMSNorm", "LayerNorm" or "L2Norm"
    window: tuple[int, int] | None = None
    gate: bool = False  # a sigmoid gate on the output, from rows of its own behind the query heads
    sinks: bool = False  # a learned logit per head, of which nothing is read
    mask: str = "causal"  # "causal" (made by the core), "none"; tensors: "padding", "arbitrary", "documents"
    seed: int = 0
    documents: tuple[int, ...] = ()  # lengths of packed sequences, which see themselves alone; sum seq
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def rotary_dim(self) -> int:
        return int(self.dim * self.rotary_percent)

    def draw(self) -> dict[str, Tensor]:
        """float64 weights in the standard layout, input, and the weights of the loss."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator) * scale).double()

        rows = ((2 if self.gate else 1) * self.heads + 2 * self.groups) * self.dim
        self.tensors = {
            "hidden": normal(self.seq, self.batch, self.hidden),
            "qkv_weight": normal(rows, self.hidden, scale=1.5 / math.sqrt(self.hidden)),
            "qkv_bias": normal(rows, scale=0.3) if self.bias else torch.zeros(rows).double(),
            "proj_weight": normal(self.hidden, self.heads * self.dim, scale=1 / math.sqrt(self.hidden)),
            "q_norm": 1 + normal(self.dim, scale=0.2),
            "k_norm": 1 + normal(self.dim, scale=0.2),
            "loss": normal(self.seq, self.batch, self.hidden),
            "sinks": normal(self.heads),
        }
        return self.tensors

    def rounded(self, dtype: torch.dtype) -> Case:
        """The same with its tensors rounded to `dtype`: what a layer of that dtype is given."""
        return replace(self, tensors={name: x.to(dtype).double() for name, x in self.tensors.items()})

    def to(self, device: torch.device | str) -> Case:
        """The same with its tensors on `device`, where `reference` then computes."""
        return replace(self, tensors={name: x.to(device) for name, x in self.tensors.items()})

    def attention_mask(self) -> Tensor | None:
        """True where a query must not look: [b, 1, s, s], or None when the core makes the mask itself."""
        if self.mask in ("causal", "none"):
            return None
        causal = torch.ones(self.seq, self.seq, dtype=torch.bool).triu(1)
        mask = causal.expand(self.batch, 1, -1, -1).clone()
        if self.mask == "documents":  # a second one begins early in each sample
            for sample in range(self.batch):
                mask[sample, :, self.seq // 4 + sample :, : self.seq // 4 + sample] = True
            return mask
        if self.mask == "padding":  # the last keys of the second sample are padding
            mask[-1, :, :, self.seq - self.seq // 4 :] = True
            mask[:, :, :, 0] = False
            return mask
        generator = torch.Generator().manual_seed(self.seed + 1)
        mask = torch.rand(self.batch, 1, self.seq, self.seq, generator=generator) < 0.4
        return mask & ~torch.eye(self.seq, dtype=torch.bool)

    def rope_table(self) -> Tensor | None:
        """[s, 1, 1, rotary_dim] float32 angles, as Megatron's RotaryEmbedding makes them."""
        if not self.rotary_dim:
            return None
        inverse = 1.0 / (10000 ** (torch.arange(0, self.rotary_dim, 2).float() / self.rotary_dim))
        angles = torch.outer(torch.arange(self.seq).float(), inverse)
        table = (
            torch.stack((angles, angles), dim=-1).flatten(1)
            if self.interleaved
            else torch.cat((angles, angles), dim=-1)
        )
        return table[:, None, None, :]


def rotate(x: Tensor, table: Tensor | None, interleaved: bool) -> Tensor:
    """RoPE on the leading table.shape[-1] dimensions of [s, b, heads, d]."""
    if table is None:
        return x
    table = table.to(x)
    size = table.shape[-1]
    head, rest = x[..., :size], x[..., size:]
    if interleaved:
        partner = torch.stack((-head[..., 1::2], head[..., 0::2]), dim=-1).flatten(-2)
    else:
        partner = torch.cat((-head[..., size // 2 :], head[..., : size // 2]), dim=-1)
    return torch.cat((head * table.cos() + partner * table.sin(), rest), dim=-1)


def normalise(x: Tensor, weight: Tensor, kind: str | None, eps: float = 1e-5) -> Tensor:
    if kind is None:
        return x
    if kind == "LayerNorm":
        x = x - x.mean(-1, keepdim=True)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x if kind == "L2Norm" else x * weight


def attention(case: Case, t: dict[str, Tensor], slices: int = 1) -> Tensor:
    """[s, b, h] -> [s, b, h], of t["hidden"] with the weights t; `slices` as in `reference`."""
    if case.documents:
        parts = t["hidden"].split(case.documents)
        alone = [replace(case, seq=len(part), documents=()) for part in parts]
        return torch.cat(
            [attention(c, {**t, "hidden": x}, slices) for c, x in zip(alone, parts, strict=True)]
        )
    s, b, ratio = case.seq, case.batch, case.heads // case.groups
    qkv = t["hidden"] @ t["qkv_weight"].T + t["qkv_bias"]
    qkv = qkv.view(s, b, case.groups, -1, case.dim)
    gate = qkv[:, :, :, ratio : 2 * ratio].reshape(s, b, -1)
    query = qkv[:, :, :, :ratio].reshape(s, b, case.heads, case.dim)
    key, value = qkv[:, :, :, -2], qkv[:, :, :, -1]
    query = normalise(query, t["q_norm"], case.qk_norm)
    key = normalise(key, t["k_norm"], case.qk_norm)
    key, value = key.repeat_interleave(ratio, 2), value.repeat_interleave(ratio, 2)
    d = case.dim // slices
    query, key, value = (x.reshape(s, b, case.heads * slices, d) for x in (query, key, value))
    table = case.rope_table()
    if table is not None and slices > 1:
        smaller = Case(case.heads, case.groups, d, seq=s, rotary_percent=case.rotary_percent)
        smaller.interleaved = case.interleaved
        table = smaller.rope_table()
    query, key = rotate(query, table, case.interleaved), rotate(key, table, case.interleaved)
    scores = torch.einsum("sbhd,tbhd->bhst", query, key) / math.sqrt(d)
    device, mask = scores.device, case.attention_mask()
    mask = None if mask is None else mask.to(device)
    if case.window is not None:
        row, column = torch.arange(s, device=device)[:, None], torch.arange(s, device=device)[None, :]
        hidden = (column > row + case.window[1]) | (column < row - case.window[0])
        mask = hidden | mask if case.mask == "documents" else hidden
    elif mask is None and case.mask == "causal":
        mask = torch.ones(s, s, dtype=torch.bool, device=device).triu(1)
    if mask is not None:
        scores = scores.masked_fill(mask, float("-inf"))
    probs = scores.softmax(-1)
    if case.sinks:
        column = t["sinks"][:, None, None].expand(b, -1, s, 1)
        probs = torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]
    out = torch.einsum("bhst,tbhd->sbhd", probs, value).reshape(s, b, -1)
    if case.gate:
        out = out * gate.sigmoid()
    return out @ t["proj_weight"].T


def reference(case: Case, slices: int = 1, input_norm: bool = False) -> dict[str, Tensor]:
    """Output, and gradients of (output * loss).sum(), for the whole layer.

    input_norm: an RMSNorm of weight 1 before it, as in Transformer Engine's linear_qkv.
    slices > 1: the paper's formula instead, softmax(Q_j K_j^T / sqrt(d/slices)) V_j for each contiguous
    slice j of a head, each slice rotated as a head of its own dimension.
    """
    names = ("hidden", "qkv_weight", "qkv_bias", "proj_weight", "q_norm", "k_norm", "sinks")
    t = {name: case.tensors[name].clone().requires_grad_() for name in names}
    ones = torch.ones(case.hidden, dtype=torch.float64, device=t["hidden"].device)
    inputs = {**t, "hidden": normalise(t["hidden"], ones, "RMSNorm")} if input_norm else t
    out = attention(case, inputs, slices)
    (out * case.tensors["loss"]).sum().backward()
    grads = {name: x.grad for name, x in t.items() if x.grad is not None}
    return {"output": out.detach(), **grads}
