"""mPLUG-Owl2 (arXiv 2311.04257), the network of DeQA-Score; its published code needs old versions of transformers.

A vision transformer's patches are condensed by query tokens, and a Llama reads them between text tokens. Norms, keys
and values of image tokens have weights of their own. Parameter names match the published files.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb


class OwlConfig(PretrainedConfig):  # type: ignore[misc]  # transformers is not followed, so its classes are Any
    """The published ``config.json``: Llama's settings, and ``visual_config`` of the two visual parts."""

    model_type = "mplug_owl2"

    def __init__(self, visual_config: dict[str, Any] | None = None, rope_theta: float = 10000.0, **kwargs: Any) -> None:
        self.visual_config = visual_config or {"visual_model": {}, "visual_abstractor": {}}
        self.theta = rope_theta
        super().__init__(**{"hidden_act": "silu", "mlp_bias": False, "rms_norm_eps": 1e-6, **kwargs})


def _heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def _attend(query: Tensor, key: Tensor, value: Tensor, causal: bool = False) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=causal).transpose(1, 2).flatten(2)


class VisionAttention(nn.Module):
    """Self-attention of image patches; the three projections are interleaved head by head."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value, self.dense = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, D) to the same shape."""
        parts = self.query_key_value(x).unflatten(-1, (self.heads, 3, -1)).permute(3, 0, 2, 1, 4)
        return self.dense(_attend(*parts))


class QuickMLP(nn.Module):
    """Two layers with x sigmoid(1.702 x) between them."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, D) to the same shape."""
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))


class VisionLayer(nn.Module):
    """A layer of the vision transformer."""

    def __init__(self, width: int, inner: int, heads: int, eps: float) -> None:
        super().__init__()
        self.self_attn, self.mlp = VisionAttention(width, heads), QuickMLP(width, inner)
        self.input_layernorm = nn.LayerNorm(width, eps)
        self.post_attention_layernorm = nn.LayerNorm(width, eps)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, D) to the same shape."""
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class VisionEmbeddings(nn.Module):
    """Embed patches, and put a class token in front of them."""

    def __init__(self, width: int, image: int, patch: int, eps: float) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.patch_embed = nn.Conv2d(3, width, patch, patch, bias=False)
        self.position_embedding = nn.Parameter(torch.zeros(1, (image // patch) ** 2 + 1, width))
        self.pre_layernorm = nn.LayerNorm(width, eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map (B, 3, S, S) to (B, 1 + patches, D)."""
        patches = self.patch_embed(pixels).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(pixels), -1, -1), patches], 1)
        return self.pre_layernorm(x + self.position_embedding)


class VisionModel(nn.Module):
    """The vision transformer."""

    def __init__(
        self,
        hidden_size: int = 1024,
        intermediate_size: int = 4096,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 16,
        image_size: int = 448,
        patch_size: int = 14,
        layer_norm_eps: float = 1e-6,
        **unused: Any,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.embeddings = VisionEmbeddings(hidden_size, image_size, patch_size, layer_norm_eps)
        sizes = (hidden_size, intermediate_size, num_attention_heads, layer_norm_eps)
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(VisionLayer(*sizes) for _ in range(num_hidden_layers))})
        self.post_layernorm = nn.LayerNorm(hidden_size, layer_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map (B, 3, S, S) to (B, 1 + patches, D)."""
        x = self.embeddings(pixels)
        layers: Any = self.encoder["layers"]
        for layer in layers:
            x = layer(x)
        return self.post_layernorm(x)


class AbstractorAttention(nn.Module):
    """Query tokens attend to themselves and to image tokens; positions are added to queries and keys."""

    q_pos_embed: Tensor
    k_pos_embed: Tensor

    def __init__(self, width: int, source: int, heads: int, queries: int, positions: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = nn.Linear(width, width), nn.Linear(source, width), nn.Linear(source, width)
        self.register_buffer("q_pos_embed", torch.zeros(queries, width))
        self.register_buffer("k_pos_embed", torch.zeros(positions, width))

    def forward(self, queries: Tensor, image: Tensor) -> Tensor:
        """Map queries (B, Q, D) for image tokens (B, N, D) to (B, Q, D)."""
        both = torch.cat([queries, image], 1)
        query = self.query(queries + self.q_pos_embed)
        key = self.key(both + torch.cat([self.q_pos_embed, self.k_pos_embed]))
        query, key, value = (_heads(x, self.heads) for x in (query, key, self.value(both)))
        return _attend(query, key, value)


class GatedMLP(nn.Module):
    """SwiGLU with a norm of the inner features."""

    def __init__(self, width: int, inner: int, eps: float) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(width, inner), nn.Linear(inner, width), nn.Linear(width, inner)
        self.ffn_ln = nn.LayerNorm(inner, eps)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, Q, D) to the same shape."""
        return self.w2(self.ffn_ln(F.silu(self.w1(x)) * self.w3(x)))


class AbstractorLayer(nn.Module):
    """A layer of the visual abstractor. Its residual branch starts from the normed queries."""

    def __init__(self, width: int, inner: int, attention: AbstractorAttention, eps: float) -> None:
        super().__init__()
        output = nn.ModuleDict(
            {"out_proj": nn.Linear(width, width), "norm2": nn.LayerNorm(width), "mlp": GatedMLP(width, inner, eps)}
        )
        norms = {"norm1": nn.LayerNorm(width), "normk": nn.LayerNorm(width)}
        self.crossattention = nn.ModuleDict({"attention": attention, "output": output, **norms})

    def forward(self, queries: Tensor, image: Tensor) -> Tensor:
        """Map queries (B, Q, D) for image tokens (B, N, D) to (B, Q, D)."""
        parts: Any = self.crossattention
        output, queries = parts["output"], parts["norm1"](queries)
        queries = queries + output["out_proj"](parts["attention"](queries, parts["normk"](image)))
        return queries + output["mlp"](output["norm2"](queries))


class Abstractor(nn.Module):
    """Condense image tokens to query tokens of the language model's width, and append an end token."""

    def __init__(
        self,
        language: int,
        num_learnable_queries: int = 64,
        hidden_size: int = 1024,
        num_hidden_layers: int = 6,
        num_attention_heads: int = 16,
        intermediate_size: int = 2816,
        layer_norm_eps: float = 1e-6,
        encoder_hidden_size: int = 1024,
        grid_size: int | None = None,
        **unused: Any,
    ) -> None:
        super().__init__()
        positions = (grid_size or 32) ** 2 + 1
        sizes = (hidden_size, encoder_hidden_size, num_attention_heads, num_learnable_queries, positions)
        layers = (
            AbstractorLayer(hidden_size, intermediate_size, AbstractorAttention(*sizes), layer_norm_eps)
            for _ in range(num_hidden_layers)
        )
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(layers)})
        self.visual_fc = nn.Linear(hidden_size, language)
        self.query_embeds = nn.Parameter(torch.zeros(1, num_learnable_queries, hidden_size))
        self.vit_eos = nn.Parameter(torch.zeros(1, 1, language))

    def forward(self, image: Tensor) -> Tensor:
        """Map (B, N, D) to (B, Q + 1, language)."""
        queries = self.query_embeds.expand(len(image), -1, -1)
        layers: Any = self.encoder["layers"]
        for layer in layers:
            queries = layer(queries, image)
        return torch.cat([self.visual_fc(queries), self.vit_eos.expand(len(image), -1, -1)], 1)


class Multiway(nn.Module):
    """Apply one module to text tokens, another to image tokens."""

    def __init__(self, text: nn.Module, image: nn.Module) -> None:
        super().__init__()
        self.multiway = nn.ModuleList([text, image])

    def forward(self, x: Tensor, where: slice) -> Tensor:
        """Map (B, L, D), whose image tokens are at ``where``."""
        text, image = self.multiway
        return torch.cat([text(x[:, : where.start]), image(x[:, where]), text(x[:, where.stop :])], 1)


class LanguageLayer(nn.Module):
    """A layer of Llama with two sets of norms, keys and values."""

    def __init__(self, config: OwlConfig) -> None:
        super().__init__()
        width, self.heads = config.hidden_size, config.num_attention_heads
        self.groups = getattr(config, "num_key_value_heads", None) or self.heads
        small = width // self.heads * self.groups
        outs = {"q_proj": width, "k_proj": small, "v_proj": small, "o_proj": width}
        linears = {name: [nn.Linear(width, out, bias=False) for _ in range(2)] for name, out in outs.items()}
        ways = {name: Multiway(*linears[name]) for name in ("k_proj", "v_proj")}
        self.self_attn = nn.ModuleDict({"q_proj": linears["q_proj"][0], **ways, "o_proj": linears["o_proj"][0]})
        self.mlp = LlamaMLP(config)
        norms = [LlamaRMSNorm(width, config.rms_norm_eps) for _ in range(4)]
        self.input_layernorm, self.post_attention_layernorm = Multiway(*norms[:2]), Multiway(*norms[2:])

    def forward(self, x: Tensor, where: slice, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Map (B, L, D), whose image tokens are at ``where``."""
        parts: Any = self.self_attn
        normed = self.input_layernorm(x, where)
        query = _heads(parts["q_proj"](normed), self.heads)
        key, value = (_heads(parts[name](normed, where), self.groups) for name in ("k_proj", "v_proj"))
        query, key = apply_rotary_pos_emb(query, key, *rotary)
        key, value = (part.repeat_interleave(self.heads // self.groups, 1) for part in (key, value))
        x = x + parts["o_proj"](_attend(query, key, value, causal=True))
        return x + self.mlp(self.post_attention_layernorm(x, where))


class MplugOwl2(PreTrainedModel):  # type: ignore[misc]  # as OwlConfig
    """The network with its language-model head."""

    config_class = OwlConfig
    _keys_to_ignore_on_load_unexpected = (r"rotary_emb\.inv_freq$",)  # saved by old versions of transformers

    def __init__(self, config: OwlConfig) -> None:
        super().__init__(config)
        width, visual = config.hidden_size, config.visual_config
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, width),
                "layers": nn.ModuleList(LanguageLayer(config) for _ in range(config.num_hidden_layers)),
                "norm": LlamaRMSNorm(width, config.rms_norm_eps),
                "vision_model": VisionModel(**visual["visual_model"]),
                "visual_abstractor": Abstractor(width, **visual["visual_abstractor"]),
            }
        )
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, pixels: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """Compute the logits of the next token, (B, vocabulary), for token ids before and after the image."""
        model: Any = self.model
        image = model["visual_abstractor"](model["vision_model"](pixels))
        front, back = (model["embed_tokens"](ids).expand(len(image), -1, -1) for ids in (before, after))
        x = torch.cat([front, image, back], 1)
        where = slice(len(before), len(before) + image.shape[1])
        rotary = self._rotary(x)
        for layer in model["layers"]:
            x = layer(x, where, rotary)
        return self.lm_head(model["norm"](x[:, -1]))

    def _rotary(self, x: Tensor) -> tuple[Tensor, Tensor]:
        size = self.config.hidden_size // self.config.num_attention_heads
        steps = torch.arange(0, size, 2, device=x.device, dtype=torch.float32) / size
        angles = torch.arange(x.shape[1], device=x.device, dtype=torch.float32)[:, None] / self.config.theta**steps
        both = torch.cat([angles, angles], -1)[None]
        return both.cos().to(x.dtype), both.sin().to(x.dtype)
