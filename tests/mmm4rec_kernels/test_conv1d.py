"""The causal convolution. Letters: B L C K as in the package."""

from __future__ import annotations

import pytest
import torch

from mmm4rec_kernels import causal_conv1d


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_published_numbers(golden, backend):
    x_BLC = golden["conv/in/x"].transpose(1, 2)
    y = causal_conv1d(x_BLC, golden["conv/in/weight"][:, 0], golden["conv/in/bias"], activation="silu", backend=backend)
    torch.testing.assert_close(y.transpose(1, 2), golden["conv/out/silu"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("taps", [2, 3, 4])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 20])
def test_torch_agrees_with_the_definition(taps, length):
    torch.manual_seed(taps)
    wide = torch.randn(3, length, 11, dtype=torch.float64)
    results = []
    for backend in ("reference", "torch"):
        leaves = [wide.clone().requires_grad_(), *(t.requires_grad_() for t in _weights(7, taps))]
        y = causal_conv1d(leaves[0][..., 2:9], leaves[1], leaves[2], activation="silu", backend=backend)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    torch.testing.assert_close(results[0], results[1])


def _weights(channels: int, taps: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(channels)
    weight = torch.randn(channels, taps, dtype=torch.float64, generator=generator)
    return [weight, torch.randn(channels, dtype=torch.float64, generator=generator)]


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_padding_and_packing_change_nothing(backend):
    lengths = torch.tensor([3, 0, 7, 1])
    x = torch.randn(4, 7, 5, dtype=torch.float64)
    weight, bias = _weights(5, 4)
    inside = torch.arange(7) < lengths[:, None]
    x[~inside] = torch.nan
    padded = causal_conv1d(x, weight, bias, lengths=lengths, backend=backend)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    packed = causal_conv1d(x[inside][None], weight, bias, cu_seqlens=offsets, backend=backend)
    torch.testing.assert_close(padded[inside], packed[0])
    assert (padded[~inside] == 0).all()


def test_dtype_is_kept():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(1, 4, 3).to(dtype)
        assert causal_conv1d(x, torch.randn(3, 4).to(dtype)).dtype == dtype


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_BLC": torch.zeros(2, 5)}, r"x_BLC: expected shape \[B, L, C\]"),
        ({"weight_CK": torch.zeros(3, 5)}, r"weight_CK: expected shape \[C, K\] = \[3, 2 to 4\]"),
        ({"weight_CK": torch.zeros(4, 4)}, "weight_CK: expected shape"),
        ({"bias": torch.zeros(4)}, r"bias: expected shape \[C\] = \[3\]"),
        ({"activation": "relu"}, "activation: expected one of None, 'silu'"),
        ({"lengths": torch.tensor([1, 9])}, "lengths: expected values"),
        ({"backend": "mamba_ssm"}, "backend: causal_conv1d has"),
    ],
)
def test_bad_input_is_named(change, message):
    good = {"x_BLC": torch.zeros(2, 5, 3), "weight_CK": torch.zeros(3, 4)}
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**good | change)
