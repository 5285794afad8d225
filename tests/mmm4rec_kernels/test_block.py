"""The whole block. Letters: B L E H P G N C K as in the package."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mmm4rec_kernels import CrossProjections, causal_conv1d, gated_rms_norm, ssd, ssd_block

E, H, G, N = 24, 4, 2, 6
GN = G * N
PARAMETERS = ("conv_weight_CK", "conv_bias_C", "A_log_H", "D_H", "dt_bias_H", "norm_weight_E")


def make(kind: str, batch: int = 3, length: int = 7) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    widths = [2 * E + 2 * GN + H] if kind == "self" else [E + GN + H, E, GN]
    parameters = {
        "conv_weight_CK": normal(E + 2 * GN, 4) / 2,
        "conv_bias_C": normal(E + 2 * GN) / 2,
        "A_log_H": normal(H),
        "D_H": normal(H),
        "dt_bias_H": normal(H) - 2,
        "norm_weight_E": normal(E),
        "time_factor_BLH": normal(batch, H, length).transpose(1, 2),
    }
    return [normal(batch, length, width) for width in widths], parameters


def call(projections: list[torch.Tensor], parameters: dict[str, torch.Tensor], **options: object) -> torch.Tensor:
    projected = projections[0] if len(projections) == 1 else CrossProjections(*projections)
    return ssd_block(projected, **parameters, **{"n_groups": G, "eps": 1e-12} | options)


@pytest.mark.parametrize("kind", ["self", "cross"])
def test_is_the_chain_of_its_operations(kind):
    projections, p = make(kind)
    if kind == "self":
        z, x, B, C, dt = projections[0].split([E, E, GN, GN, H], -1)
    else:
        (x, B, dt), z, C = projections[0].split([E, GN, H], -1), projections[1], projections[2]
    xBC = causal_conv1d(torch.cat([x, B, C], -1), p["conv_weight_CK"], p["conv_bias_C"], activation="silu")
    x, B, C = xBC.split([E, GN, GN], -1)
    y = ssd(
        x.reshape(3, 7, H, -1),
        dt * p["time_factor_BLH"],
        -p["A_log_H"].exp(),
        B.reshape(3, 7, G, N),
        C.reshape(3, 7, G, N),
        D=p["D_H"],
        dt_bias=p["dt_bias_H"],
        skip="dt_x",
    )
    expected = gated_rms_norm(y.reshape(3, 7, E), z, p["norm_weight_E"], eps=1e-12)
    for backend in ("reference", "torch"):
        torch.testing.assert_close(call(projections, p, backend=backend), expected)


@pytest.mark.parametrize("kind", ["self", "cross"])
def test_gradients_of_torch_are_those_of_the_reference(kind):
    results = []
    for backend in ("reference", "torch"):
        projections, p = make(kind)
        leaves = [*projections, *p.values()]
        for leaf in leaves:
            leaf.requires_grad_()
        results.append(torch.autograd.grad(call(projections, p, backend=backend).pow(3).sum(), leaves))
    torch.testing.assert_close(results[0], results[1])


def test_time_factor_and_skip_matter():
    projections, p = make("self")
    usual = call(projections, p)
    assert not torch.allclose(call(projections, {**p, "time_factor_BLH": None}), usual)
    assert not torch.allclose(call(projections, p, skip="x"), usual)
    ones = {**p, "time_factor_BLH": torch.ones(3, 7, H, dtype=torch.float64)}
    torch.testing.assert_close(call(projections, ones), call(projections, {**p, "time_factor_BLH": None}))


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_padding_and_packing_change_nothing(backend):
    lengths = torch.tensor([4, 7, 1])
    (projected,), p = make("self")
    full = call([projected], p, backend=backend)
    inside = torch.arange(7) < lengths[:, None]
    projected[~inside] = torch.nan
    padded = call([projected], p, lengths=lengths, backend=backend)
    torch.testing.assert_close(padded[inside], full[inside])
    assert (padded[~inside] == 0).all()
    packed = {**p, "time_factor_BLH": p["time_factor_BLH"][inside][None]}
    joined = call([projected[inside][None]], packed, cu_seqlens=F.pad(lengths.cumsum(0), (1, 0)), backend=backend)
    torch.testing.assert_close(joined[0], full[inside])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_groups": 3}, "n_groups: expected a divisor of H = 4"),
        ({"conv_weight_CK": torch.zeros(E, 4)}, "conv_weight_CK: expected shape"),
        ({"conv_bias_C": torch.zeros(E)}, "conv_bias_C: expected shape"),
        ({"norm_weight_E": torch.zeros(E + 1)}, "norm_weight_E: expected shape"),
        ({"D_H": torch.zeros(5)}, "D_H: expected shape"),
        ({"time_factor_BLH": torch.zeros(3, H, 7)}, r"time_factor_BLH: expected shape \[B, L, H\] = \[3, 7, 4\]"),
        ({"skip": "z"}, "skip: expected one of"),
        ({"lengths": torch.tensor([8, 1, 1])}, "lengths: expected values"),
    ],
)
def test_bad_input_is_named(change, message):
    projections, p = make("self")
    options = {k: v for k, v in change.items() if k not in p}
    with pytest.raises(ValueError, match=message):
        call(projections, p | {k: v for k, v in change.items() if k in p}, **options)


def test_bad_projections_are_named():
    (projected,), p = make("self")
    with pytest.raises(ValueError, match=r"projected: expected shape \[B, L, 2E \+ 2GN \+ H\]"):
        call([projected[..., 1:]], p)
    (xBdt, z, C), p = make("cross")
    with pytest.raises(ValueError, match=r"projected\.z: expected shape"):
        call([xBdt, z[:, 1:], C], p)
