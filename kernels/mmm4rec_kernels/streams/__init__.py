"""Stages of time streams: the factor that a stream puts on step sizes, the next stream, the filtered joint stream.

On a GPU one Triton kernel a direction, elsewhere the plain torch form. Letters: M streams, B users, H heads,
T places, K taps, F = T // 2 + 1 bins of the real Fourier transform.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from mmm4rec_kernels.backend import BackendUnavailable, availability, interpreting, runs, without_autocast
from mmm4rec_kernels.conv1d import causal_conv1d
from mmm4rec_kernels.rows import dropout, seed
from mmm4rec_kernels.streams import ops

__all__ = ["ComplexMap", "StreamGate", "StreamMaps", "spectral_filter", "stream_stage"]

MAX_PLACES = 32
"""Longest stream that the kernels take."""


class StreamMaps(NamedTuple):
    """Two linear maps over places, shared by the heads, and two causal convolutions over places, one of each head."""

    in_TT: torch.Tensor
    in_bias_T: torch.Tensor
    out_TT: torch.Tensor
    out_bias_T: torch.Tensor
    conv_in_HK: torch.Tensor
    conv_in_bias_H: torch.Tensor
    conv_out_HK: torch.Tensor
    conv_out_bias_H: torch.Tensor


class StreamGate(NamedTuple):
    """A linear map to one gate for all places, or to one a place, and the norm over places behind it."""

    weight_1T: torch.Tensor
    """[1, T] or [T, T]."""
    bias_1: torch.Tensor
    norm_weight_T: torch.Tensor
    norm_bias_T: torch.Tensor
    eps: float


class ComplexMap(NamedTuple):
    """(a + jb) -> (R a + rho - J b - iota) + j (J a + iota + R b + rho)."""

    real_FF: torch.Tensor
    imag_FF: torch.Tensor
    rho_F: torch.Tensor
    iota_F: torch.Tensor


def _by_kernel(backend: str, stream: torch.Tensor, parameter: torch.Tensor) -> bool:
    """Under "auto" wherever the kernels can run: a third of torch's time on an H100 at 1024 users of 20 places."""
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend: expected auto, torch or triton, got {backend!r}")
    if backend == "torch" or (backend == "auto" and not stream.is_cuda):
        return False
    places = stream.shape[-1]
    why = "" if runs("triton") else availability("triton").why
    if not (stream.is_cuda or interpreting()):
        why = why or f"it needs CUDA tensors, got {stream.device}"
    if not 2 <= places <= MAX_PLACES:
        why = why or f"it takes 2 to {MAX_PLACES} places, got {places}"
    if parameter.dtype != torch.float32:
        why = why or f"it takes float32 parameters, got {parameter.dtype}"
    if why and backend == "triton":
        raise BackendUnavailable(f"backend 'triton' cannot run: {why}")
    return not why


def stream_stage(
    stream_MBHT: torch.Tensor,
    maps: StreamMaps,
    gate: StreamGate | None = None,
    *,
    p: float = 0.0,
    training: bool = False,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The factor on step sizes and, with a gate, the next stream.

    With r the stream, f = tanhshrink(out(silu(in(dropout(r))))) and w = silu(conv_out(silu(conv_in(f r)))); with
    g = sigmoid(gate(dropout(r))) the next stream is the norm over places of g r + (1 - g) w.

    Args:
        stream_MBHT: any strides.
        maps: see `StreamMaps`.
        gate: see `StreamGate`, or None.
        p: probability of dropout, drawn anew for each of its two places.
        training: dropout is drawn.
        backend: "torch", the plain form; "triton", one kernel a direction in float32; or "auto", the kernels where they
            can run.

    Returns:
        w [M, B, H, T] and the next stream [M, B, H, T] or None.

    Raises:
        ValueError: there is no such backend.
        BackendUnavailable: it cannot run here or cannot take the call.
    """
    if not _by_kernel(backend, stream_MBHT, maps.in_TT):
        return _stage(stream_MBHT, maps, gate, p, training)
    streams, users, heads, places = stream_MBHT.shape
    rows = stream_MBHT.reshape(-1, heads, places)
    rows = rows if rows.stride(2) == 1 else rows.contiguous()
    gates = [] if gate is None else [t.contiguous() for t in gate[:4]]
    eps = 0.0 if gate is None else gate.eps
    w_NTH, following, _ = ops.stage(rows, [t.contiguous() for t in maps], gates, seed(rows, p, training), p, eps)
    w_MBHT = w_NTH.view(streams, users, places, heads).transpose(-1, -2)
    return w_MBHT, None if gate is None else following.view(streams, users, heads, places)


def _stage(
    stream_MBHT: torch.Tensor, maps: StreamMaps, gate: StreamGate | None, p: float, training: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    hidden = F.silu(F.linear(dropout(stream_MBHT, p, training), maps.in_TT, maps.in_bias_T))
    scale = F.tanhshrink(F.linear(hidden, maps.out_TT, maps.out_bias_T))
    scaled_MBTH = (scale * stream_MBHT).transpose(-1, -2)
    once_NTH = causal_conv1d(scaled_MBTH.flatten(0, 1), maps.conv_in_HK, maps.conv_in_bias_H, activation="silu")
    w_NTH = causal_conv1d(once_NTH, maps.conv_out_HK, maps.conv_out_bias_H, activation="silu")
    w_MBHT = w_NTH.view_as(scaled_MBTH).transpose(-1, -2)
    if gate is None:
        return w_MBHT, None
    share = torch.sigmoid(F.linear(dropout(stream_MBHT, p, training), gate.weight_1T, gate.bias_1)).to(w_MBHT.dtype)
    mixed = torch.lerp(w_MBHT, stream_MBHT.to(w_MBHT.dtype), share)
    return w_MBHT, F.layer_norm(mixed, mixed.shape[-1:], gate.norm_weight_T, gate.norm_bias_T, gate.eps)


def spectral_filter(
    streams_MBHT: torch.Tensor, image: ComplexMap, text: ComplexMap, joint: ComplexMap, *, backend: str = "auto"
) -> torch.Tensor:
    """The joint stream [B, H, T]: inverse transform of joint(image(v) v + text(t) t) for the spectra v and t.

    Args:
        streams_MBHT: image (first) and text (last), or one stream that is both.
        image: map of the image stream's spectrum.
        text: map of the text stream's spectrum.
        joint: map of their sum.
        backend: as of `stream_stage`.

    Returns:
        [B, H, T]. The transforms are orthonormal; the inverse one ignores the imaginary part of bin 0 and, for even
        T, of bin T / 2.

    Raises:
        ValueError: there is no such backend.
        BackendUnavailable: it cannot run here or cannot take the call.
    """
    if not _by_kernel(backend, streams_MBHT, image.real_FF):
        if not torch.is_autocast_enabled(streams_MBHT.device.type):
            return _filter(streams_MBHT, image, text, joint)
        with without_autocast(streams_MBHT):  # transforms take no bfloat16
            return _filter(streams_MBHT.to(image.real_FF.dtype), image, text, joint)
    maps = torch.cat([t.flatten() for part in (image, text, joint) for t in part])
    first = streams_MBHT[0].contiguous()
    last = streams_MBHT[1].contiguous() if len(streams_MBHT) > 1 else None
    filtered: torch.Tensor
    filtered, _ = ops.spectral(first, last, maps)
    return filtered


def _filter(streams_MBHT: torch.Tensor, image: ComplexMap, text: ComplexMap, joint: ComplexMap) -> torch.Tensor:
    if streams_MBHT.shape[0] == 1:  # ONNX can transform a real tensor, but not take a part of a complex one
        first = last = torch.fft.rfft(streams_MBHT[0], norm="ortho")
    else:
        first, last = torch.fft.rfft(streams_MBHT, norm="ortho").unbind()
    joined = _mapped(joint, _mapped(image, first) * first + _mapped(text, last) * last)
    filtered: torch.Tensor = torch.fft.irfft(joined, n=streams_MBHT.shape[-1], norm="ortho")
    return filtered


def _mapped(given: ComplexMap, x: torch.Tensor) -> torch.Tensor:
    """As one real product over interleaved real and imaginary parts."""
    R, J, rho, iota = given
    weight = torch.stack([torch.stack([R, -J], -1), torch.stack([J, R], -1)], 1).flatten(2).flatten(0, 1)
    bias = torch.stack([rho - iota, rho + iota], -1).flatten()
    mapped = F.linear(torch.view_as_real(x).flatten(-2), weight, bias)
    return torch.view_as_complex(mapped.view(*x.shape, 2))
