"""The transformer of SASRec and those built on it: causal, post-norm.

Letters: B users, L places, D width, H heads, P = D / H.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmm4rec_cli.settings.schema import ModelSettings


class SelfAttention(nn.Module):
    """Causal attention with its output map, dropout, residual and norm.

    A real place never sees padding, because all of it lies behind; so the causal mask is the only one.
    """

    def __init__(self, config: ModelSettings) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads, self.attention_dropout = config.baseline.heads, config.baseline.attention_dropout
        if width % self.heads:
            raise ValueError(f"model.baseline.heads={self.heads} must divide model.hidden_size={width}")
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.dropout = nn.Dropout(config.dropout)
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """[B, L, D] in and out."""
        q, k, v = (
            linear(x_BLD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        dropout = self.attention_dropout if self.training else 0.0
        read_BHLP = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        out: Tensor = self.norm(self.dropout(self.out(read_BHLP.transpose(1, 2).flatten(2))) + x_BLD)
        return out


class PlaceFeedForward(nn.Module):
    """Linear, GELU, linear, dropout, residual, norm.

    Args:
        config: sizes and dropout.
        inner_dropout: dropout between the two linears too.
    """

    def __init__(self, config: ModelSettings, *, inner_dropout: bool = False) -> None:
        super().__init__()
        self.inner = nn.Linear(config.hidden_size, config.inner_size)
        self.outer = nn.Linear(config.inner_size, config.hidden_size)
        self.inner_dropout = nn.Dropout(config.dropout) if inner_dropout else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """[B, L, D] in and out."""
        out: Tensor = self.norm(self.dropout(self.outer(self.inner_dropout(F.gelu(self.inner(x_BLD))))) + x_BLD)
        return out


class Transformer(nn.Sequential):
    """`num_layers` of attention and feed-forward."""

    def __init__(self, config: ModelSettings) -> None:
        layers = (nn.Sequential(SelfAttention(config), PlaceFeedForward(config)) for _ in range(config.num_layers))
        super().__init__(*layers)


class PlaceInput(nn.Module):
    """Item vectors plus a learned vector a place, norm, dropout."""

    def __init__(self, config: ModelSettings) -> None:
        super().__init__()
        self.places = nn.Embedding(config.max_len, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.embedding_dropout)

    def forward(self, vectors_BLD: Tensor) -> Tensor:
        """[B, L, D] in and out."""
        place_L = torch.arange(vectors_BLD.shape[1], device=vectors_BLD.device)
        out: Tensor = self.dropout(self.norm(vectors_BLD + self.places(place_L)))
        return out
