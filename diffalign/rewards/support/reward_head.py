"""The score head of DiNa-LRM: query tokens attend to features of several layers of a diffusion transformer.

Parameter names match the published ``rm_head.pt``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LayerAdapter(nn.Module):
    """Modulate one layer's tokens by the time embedding, and project them to a quarter of the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer_embed = nn.Parameter(torch.zeros(1, 1, width))
        self.cond_mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, 2 * width))
        self.proj = nn.Linear(width, width // 4)

    def forward(self, tokens: Tensor, time: Tensor) -> Tensor:
        """Map tokens (B, N, D) and embeddings of their time (B, D) to (B, N, D / 4)."""
        scale, shift = self.cond_mlp(time)[:, None].chunk(2, dim=-1)
        return self.proj(tokens * (1 + scale) + shift + self.layer_embed)


class Attention(nn.Module):
    """Attend to visual tokens, and separately to text tokens; the sum of both is added to the queries.

    Args:
        width: of all tokens.
        heads: of the attention.
        text: whether there are text tokens.
        gated: whether values are weighted, token by token.
    """

    def __init__(self, width: int, heads: int, text: bool, gated: bool) -> None:
        super().__init__()
        self.heads = heads
        self.norm_q, self.to_q = nn.RMSNorm(width), nn.Linear(width, width)
        self.norm_v, self.to_k_vis, self.to_v_vis = nn.RMSNorm(width), *_linears(width, 2)
        self.gate_vis = _gate(width) if gated else None
        if text:
            self.norm_t, self.to_k_text, self.to_v_text = nn.RMSNorm(width), *_linears(width, 2)
            self.gate_text = _gate(width) if gated else None
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, queries: Tensor, visual: Tensor, text: Tensor | None = None) -> Tensor:
        """Update queries (B, Q, D) by visual (B, N, D) and text tokens (B, L, D)."""
        query, visual = self.to_q(self.norm_q(queries)), self.norm_v(visual)
        found = self._attend(query, self.to_k_vis(visual), _weighted(self.to_v_vis(visual), self.gate_vis, visual))
        if text is not None:
            text = self.norm_t(text)
            values = _weighted(self.to_v_text(text), self.gate_text, text)
            found = found + self._attend(query, self.to_k_text(text), values)
        return queries + self.to_out(found)

    def _attend(self, *parts: Tensor) -> Tensor:
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


class RewardHead(nn.Module):
    """Score the features of a transformer's layers.

    Args:
        width: of the features.
        visual: number of layers whose image tokens are read.
        text: number of layers whose text tokens are read.
        queries: number of query tokens, whose scores are averaged.
        heads: of the attention.
    """

    def __init__(self, width: int, visual: int, text: int, queries: int, heads: int) -> None:
        super().__init__()
        self.layer_adapters_visual = nn.ModuleList(LayerAdapter(width) for _ in range(visual))
        self.layer_adapters_text = nn.ModuleList(LayerAdapter(width) for _ in range(text))
        self.agg_visual = nn.Linear(visual * (width // 4), width)
        self.agg_text = nn.Linear(text * (width // 4), width) if text else None
        self.query_tokens = nn.Parameter(torch.zeros(1, queries, width))
        self.attn1 = Attention(width, heads, text=bool(text), gated=True)
        self.attn2 = Attention(width, heads, text=False, gated=False)
        self.norm_ff = nn.RMSNorm(width)
        self.ff = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.head = nn.Linear(width, 1)

    def forward(self, visual: Sequence[Tensor], text: Sequence[Tensor], time: Tensor) -> Tensor:
        """Score image tokens (B, N, D) and text tokens (B, L, D) of each layer, and time embeddings (B, D): (B,)."""
        seen = self.agg_visual(_adapted(self.layer_adapters_visual, visual, time))
        read = None if self.agg_text is None else self.agg_text(_adapted(self.layer_adapters_text, text, time))
        queries = self.attn1(self.query_tokens.expand(len(seen), -1, -1), seen, read)
        queries = self.attn2(queries, seen)
        queries = queries + self.ff(self.norm_ff(queries))
        return self.head(queries).mean((1, 2))


def _adapted(adapters: nn.ModuleList, layers: Sequence[Tensor], time: Tensor) -> Tensor:
    return torch.cat([adapter(tokens, time) for adapter, tokens in zip(adapters, layers, strict=True)], -1)


def _linears(width: int, count: int) -> list[nn.Linear]:
    return [nn.Linear(width, width) for _ in range(count)]


def _gate(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))


def _weighted(values: Tensor, gate: nn.Module | None, tokens: Tensor) -> Tensor:
    return values if gate is None else values * torch.sigmoid(gate(tokens))
