"""The embedded text encoder: CLIP's text model, small, with token rows for the lab's vocabulary alone.

Attribute names are the state-dict keys of transformers' CLIPTextModel, which the host's CLIP reads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .vocabulary import END, LENGTH, START, TOKEN_IDS

WIDTH, LAYERS, HEADS = 64, 3, 2
ROWS = (START, END, *TOKEN_IDS.values())
"""The CLIP token id of each row of the embedding."""

CLIP_CONFIG = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 4 * WIDTH,
    "hidden_act": "quick_gelu",
    "max_position_embeddings": LENGTH,
    "vocab_size": 49408,
    "layer_norm_eps": 1e-5,
    "eos_token_id": END,
}
"""The text model in the words of transformers' CLIPTextConfig."""


class _SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            rearrange(part(x), "b n (h d) -> b h n d", h=HEADS) for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(rearrange(F.scaled_dot_product_attention(q, k, v, is_causal=True), "b h n d -> b n (h d)"))


class _MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(WIDTH, 4 * WIDTH)
        self.fc2 = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        return self.fc2(h * torch.sigmoid(1.702 * h))  # CLIP's quick GELU


class _Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(WIDTH)
        self.self_attn = _SelfAttention()
        self.layer_norm2 = nn.LayerNorm(WIDTH)
        self.mlp = _MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class _Embeddings(nn.Module):
    def __init__(self):
        super().__init__()
        self.token_embedding = nn.Embedding(len(ROWS), WIDTH)
        self.position_embedding = nn.Embedding(LENGTH, WIDTH)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding.weight, std=0.01)


class _TextModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embeddings = _Embeddings()
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(_Layer() for _ in range(LAYERS))
        self.final_layer_norm = nn.LayerNorm(WIDTH)


class TextEncoder(nn.Module):
    """CLIP token ids (B,77) of the lab's vocabulary -> context (B,77,64)."""

    rows: Tensor

    def __init__(self):
        super().__init__()
        self.text_model = _TextModel()
        rows = torch.zeros(CLIP_CONFIG["vocab_size"], dtype=torch.long)
        rows[list(ROWS)] = torch.arange(len(ROWS))
        self.register_buffer("rows", rows, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        embeddings = self.text_model.embeddings
        x = embeddings.token_embedding(self.rows[tokens]) + embeddings.position_embedding.weight
        for layer in self.text_model.encoder.layers:  # type: ignore[union-attr]
            x = layer(x)
        return self.text_model.final_layer_norm(x)
