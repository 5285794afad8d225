"""MMM4Rec written down as its description reads, to be timed against: the same mathematics and nothing saved.

Every place is computed, padding included; the adapters run at every place; the convolutions are `nn.Conv1d` behind
transposes; the scan is one product with a decay matrix of segment sums; item biases are looked up row by row; the two
modalities' scores are two products with whole logits. Tensors carry the published names, so published weights load.

Letters: B users, T places, D width, E inner width, H heads, P head dim, G groups, N state, V catalogue rows.
"""

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TimeScale(nn.Module):
    def __init__(self, c: SimpleNamespace, heads: int) -> None:
        super().__init__()
        self.conv1d4time_1 = nn.Conv1d(heads, heads, c.d_conv, groups=heads, padding=c.d_conv - 1)
        self.conv1d4time_2 = nn.Conv1d(heads, heads, c.d_conv, groups=heads, padding=c.d_conv - 1)
        self.mlp4time_scale = nn.Sequential(
            nn.Dropout(c.time_dropout), nn.Linear(c.max_len, c.max_len), nn.SiLU(), nn.Linear(c.max_len, c.max_len)
        )

    def scale(self, r_BHT: Tensor) -> Tensor:
        length = r_BHT.shape[-1]
        w = F.tanhshrink(self.mlp4time_scale(r_BHT)) * r_BHT
        w = F.silu(self.conv1d4time_1(w)[..., :length])
        return F.silu(self.conv1d4time_2(w)[..., :length])


def segment_sums(a: Tensor) -> Tensor:
    """[..., T] to [..., T, T]: the sum over (s, t] below the diagonal, -inf above."""
    length = a.shape[-1]
    spread = a[..., None].expand(*a.shape, length)
    below = torch.ones(length, length, dtype=torch.bool, device=a.device).tril(-1)
    sums = spread.masked_fill(~below, 0).cumsum(-2)
    return sums.masked_fill(~torch.ones_like(below).tril(), -math.inf)


def scan(x: Tensor, a: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
    dt = F.softplus(a + dt_bias)
    x = x * dt[..., None]
    decay = segment_sums((dt * A).transpose(1, 2)).exp()
    scores = torch.einsum("blhn,bshn->bhls", C, B) * decay
    return torch.einsum("bhls,bshp->blhp", scores, x) + D[:, None] * x


class Norm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        g = y * F.silu(z)
        return g * torch.rsqrt(g.square().mean(-1, keepdim=True) + self.eps) * self.weight


class Block(TimeScale):
    def __init__(self, c: SimpleNamespace) -> None:
        inner = c.expand * c.hidden_size
        heads, states = inner // c.head_dim, c.n_groups * c.d_state
        super().__init__(c, heads)
        self.inner, self.heads, self.groups, self.states = inner, heads, c.n_groups, states
        step = torch.exp(torch.rand(heads) * (math.log(0.1) - math.log(0.001)) + math.log(0.001)).clamp(min=1e-4)
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = Norm(inner, c.norm_eps)
        self.out_proj = nn.Linear(inner, c.hidden_size)

    def run(self, x: Tensor, a: Tensor, b: Tensor, c: Tensor, z: Tensor) -> Tensor:
        batch, length = x.shape[:2]
        x = x.view(batch, length, self.heads, -1)
        b, c = (t.view(batch, length, self.groups, -1).expand(-1, -1, self.heads, -1) for t in (b, c))
        y = scan(x, a, -self.A_log.exp(), b, c, self.D, self.dt_bias).flatten(2)
        return self.out_proj(self.norm(y, z))


class SSD(Block):
    def __init__(self, c: SimpleNamespace) -> None:
        super().__init__(c)
        channels = self.inner + 2 * self.states
        self.in_proj = nn.Linear(c.hidden_size, self.inner + channels + self.heads)
        self.conv1d_1 = nn.Conv1d(channels, channels, c.d_conv, groups=channels, padding=c.d_conv - 1)
        self.time_gate_residual = nn.Sequential(nn.Dropout(c.time_dropout), nn.Linear(c.max_len, 1))
        self.time_layer_norm = nn.LayerNorm(c.max_len, eps=c.norm_eps)

    def forward(self, u: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        z, xbc, a = self.in_proj(u).split([self.inner, self.inner + 2 * self.states, self.heads], -1)
        xbc = F.silu(self.conv1d_1(xbc.transpose(1, 2))[..., : u.shape[1]]).transpose(1, 2)
        x, b, c = xbc.split([self.inner, self.states, self.states], -1)
        w = self.scale(r)
        gate = torch.sigmoid(self.time_gate_residual(r))
        return self.run(x, a * w.transpose(1, 2), b, c, z), self.time_layer_norm(gate * r + (1 - gate) * w)


class CoSSD(Block):
    def __init__(self, c: SimpleNamespace) -> None:
        super().__init__(c)
        self.u_in_proj = nn.Linear(c.hidden_size, self.inner + self.states + self.heads)
        self.z_in_proj = nn.Linear(c.hidden_size, self.inner)
        self.q_in_proj = nn.Linear(c.hidden_size, self.states)
        width = self.inner + self.states
        self.u_conv1d = nn.Conv1d(width, width, c.d_conv, groups=width, padding=c.d_conv - 1)
        self.q_conv1d = nn.Conv1d(self.states, self.states, c.d_conv, groups=self.states, padding=c.d_conv - 1)

    def forward(self, q: Tensor, u: Tensor, r: Tensor) -> Tensor:
        length = u.shape[1]
        xb, a = self.u_in_proj(u).split([self.inner + self.states, self.heads], -1)
        xb = F.silu(self.u_conv1d(xb.transpose(1, 2))[..., :length]).transpose(1, 2)
        x, b = xb.split([self.inner, self.states], -1)
        c = F.silu(self.q_conv1d(self.q_in_proj(q).transpose(1, 2))[..., :length]).transpose(1, 2)
        return self.run(x, a * self.scale(r).transpose(1, 2), b, c, self.z_in_proj(q + u))


class FeedForward(nn.Module):
    def __init__(self, c: SimpleNamespace) -> None:
        super().__init__()
        self.fc1 = nn.Linear(c.hidden_size, c.inner_size)
        self.fc2 = nn.Linear(c.inner_size, c.hidden_size)
        self.layer_norm = nn.LayerNorm(c.hidden_size, eps=1e-12)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer_norm(self.dropout(self.fc2(self.dropout(F.hardswish(self.fc1(x))))) + x)


class Encoder(nn.Module):
    def __init__(self, c: SimpleNamespace) -> None:
        super().__init__()
        self.ssd, self.ffn = SSD(c), FeedForward(c)
        self.layer_norm = nn.LayerNorm(c.hidden_size, eps=c.norm_eps)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        o, r = self.ssd(x, r)
        return self.ffn(self.layer_norm(self.dropout(o) + x)), r


class ComplexLinear(nn.Module):
    def __init__(self, bins: int) -> None:
        super().__init__()
        self.real, self.imag = nn.Linear(bins, bins), nn.Linear(bins, bins)

    def forward(self, x: Tensor) -> Tensor:
        return torch.complex(self.real(x.real) - self.imag(x.imag), self.imag(x.real) + self.real(x.imag))


class Decoder(nn.Module):
    def __init__(self, c: SimpleNamespace, ssd: SSD) -> None:
        super().__init__()
        self.ssd, self.co_ssd, self.ffn = ssd, CoSSD(c), FeedForward(c)
        self.layer_norm = nn.LayerNorm(c.hidden_size, eps=c.norm_eps)
        self.co_layer_norm = nn.LayerNorm(c.hidden_size, eps=c.norm_eps)
        bins = c.max_len // 2 + 1
        self.vision_complex_weight = nn.ModuleList([ComplexLinear(bins)])
        self.text_complex_weight = nn.ModuleList([ComplexLinear(bins)])
        self.co_complex_weight = nn.ModuleList([ComplexLinear(bins)])
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, r_v: Tensor, text: Tensor, r_t: Tensor) -> tuple[Tensor, Tensor]:
        o, r_v = self.ssd(x, r_v)
        q = self.layer_norm(self.dropout(o) + x)
        vision, words = (torch.fft.rfft(r, norm="ortho") for r in (r_v, r_t))
        vision = self.text_complex_weight[0](vision) * vision
        words = self.vision_complex_weight[0](words) * words
        joint = torch.fft.irfft(self.co_complex_weight[0](vision + words), n=r_v.shape[-1], norm="ortho")
        o = self.co_ssd(q, text, joint)
        return self.ffn(self.co_layer_norm(self.dropout(o) + q + text)), r_v


class NaiveMMM4Rec(nn.Module):
    """The network; `config` has the settings' model section's names; features [V, F], row 0 padding."""

    def __init__(self, config: SimpleNamespace, text_features: Tensor, image_features: Tensor) -> None:
        super().__init__()
        c = config
        self.register_buffer("text_embedding", text_features)
        self.register_buffer("vision_embedding", image_features)
        rows = len(text_features)
        self.text_item_embedding_bias = nn.Parameter(torch.zeros(rows, c.hidden_size))
        self.vision_item_embedding_bias = nn.Parameter(torch.zeros(rows, c.hidden_size))
        self.text_adapter = nn.Sequential(nn.Linear(text_features.shape[1], c.hidden_size))
        self.vision_adapter = nn.Sequential(nn.Linear(image_features.shape[1], c.hidden_size))
        self.text_in_layer_norm = nn.LayerNorm(c.hidden_size, eps=c.norm_eps)
        self.vision_in_layer_norm = nn.LayerNorm(c.hidden_size, eps=c.norm_eps)
        self.layer_norm_time = nn.LayerNorm(c.max_len, eps=c.norm_eps)
        self.encoder_ssd_layers = nn.ModuleList(Encoder(c) for _ in range(c.num_layers))
        self.decoder_ssd_layers = nn.ModuleList(Decoder(c, layer.ssd) for layer in self.encoder_ssd_layers)
        self.embedding_dropout, self.time_dropout = nn.Dropout(c.embedding_dropout), nn.Dropout(c.time_dropout)
        self.heads, self.temperature = c.expand * c.hidden_size // c.head_dim, c.temperature
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, items_BT: Tensor, lengths_B: Tensor, timestamps_BT: Tensor) -> Tensor:
        vision = self.vision_adapter(F.embedding(items_BT, self.vision_embedding))
        vision = vision + F.embedding(items_BT, self.vision_item_embedding_bias)
        text = self.text_adapter(F.embedding(items_BT, self.text_embedding))
        text = text + F.embedding(items_BT, self.text_item_embedding_bias)
        vision = self.vision_in_layer_norm(self.embedding_dropout(vision))
        text = self.text_in_layer_norm(self.embedding_dropout(text))
        gaps = torch.diff(timestamps_BT, dim=1, prepend=timestamps_BT[:, :1]).to(text.dtype)
        r_v, r_t = (self.layer_norm_time(self.time_dropout(gaps))[:, None].repeat(1, self.heads, 1) for _ in range(2))
        for encoder, decoder in zip(self.encoder_ssd_layers, self.decoder_ssd_layers, strict=True):
            text, r_t = encoder(text, r_t)
            vision, r_v = decoder(vision, r_v, text, r_t)
        return vision[torch.arange(len(vision), device=vision.device), lengths_B - 1]

    def scores(self, user_BD: Tensor) -> Tensor:
        text = F.normalize(self.text_adapter(self.text_embedding) + self.text_item_embedding_bias, dim=-1)
        vision = F.normalize(self.vision_adapter(self.vision_embedding) + self.vision_item_embedding_bias, dim=-1)
        return (user_BD @ text.T + user_BD @ vision.T) / self.temperature

    def loss(self, user_BD: Tensor, target_B: Tensor) -> Tensor:
        return F.cross_entropy(self.scores(user_BD), target_B)
