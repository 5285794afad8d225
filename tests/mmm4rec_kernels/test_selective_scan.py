"""The scan of Mamba-1: against its closed form, and the Triton kernels against it (see test_interpreted).

Letters: B sequences, L places, E channels, N state.
"""

from __future__ import annotations

import os

import pytest
import torch

from mmm4rec_kernels import selective_scan
from mmm4rec_kernels.agreement import disagreement

ON_GPU = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
DEVICE = "cuda" if ON_GPU else "cpu"
needs_triton = pytest.mark.skipif(
    not (ON_GPU or os.environ.get("TRITON_INTERPRET") == "1"), reason="needs a GPU or TRITON_INTERPRET=1"
)


def inputs(batch=2, length=5, channels=7, states=3, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    return {
        "x_BLE": normal(batch, length, channels),
        "dt_BLE": normal(batch, length, channels).exp() * 0.3,
        "A_EN": -normal(channels, states).exp(),
        "B_BLN": normal(batch, length, states),
        "C_BLN": normal(batch, length, states),
        "D_E": normal(channels),
    }


def outcome(given, dtype, backend):
    leaves = {k: t.to(DEVICE, dtype).requires_grad_() for k, t in given.items()}
    y = selective_scan(**leaves, backend=backend)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    (y * weights).sum().backward()
    return {"y": y.detach(), **{f"d_{k}": t.grad for k, t in leaves.items()}}


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_every_output_is_a_sum_over_what_came_before(backend):
    x, dt, A, B, C, D = (t.double() for t in inputs().values())
    total = dt.cumsum(1)
    want = torch.empty_like(x)
    for t in range(x.shape[1]):
        decay_BsEN = torch.exp((total[:, t, None] - total[:, : t + 1])[..., None] * A)
        weight_BsE = torch.einsum("bsen,bsn,bn->bse", decay_BsEN, B[:, : t + 1], C[:, t])
        want[:, t] = (weight_BsE * (dt * x)[:, : t + 1]).sum(1) + D * x[:, t]
    torch.testing.assert_close(selective_scan(x, dt, A, B, C, D, backend=backend), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sizes", [(2, 5, 7, 3), (1, 1, 1, 1), (3, 20, 33, 32)])
def test_torch_agrees_with_the_recurrence(sizes):
    given = inputs(*sizes)
    torch.testing.assert_close(
        outcome(given, torch.float64, "torch"), outcome(given, torch.float64, "reference"), rtol=1e-10, atol=1e-10
    )


@needs_triton
@pytest.mark.parametrize("sizes", [(2, 5, 7, 3), (1, 1, 1, 1), (3, 20, 33, 32)])
def test_the_selective_kernels_agree_with_the_recurrence_and_repeat(sizes):
    given = inputs(*sizes)
    truth, yardstick = outcome(given, torch.float64, "reference"), outcome(given, torch.float32, "reference")
    got, again = (outcome(given, torch.float32, "triton") for _ in range(2))
    assert not disagreement(got, truth, yardstick)
    assert all(torch.equal(got[k], again[k]) for k in got)


@needs_triton
def test_operators_are_well_formed():
    from mmm4rec_kernels.selective import ops

    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    tensors = [t.to(DEVICE) for t in inputs().values()]
    torch.library.opcheck(ops.scan_forward.overload, [t.requires_grad_() for t in tensors], test_utils=checks)
    tensors = [t.detach() for t in tensors]
    torch.library.opcheck(ops.scan_backward.overload, [torch.ones_like(tensors[0]), *tensors], test_utils=checks)


@pytest.mark.gpu
@needs_triton
def test_the_kernels_at_the_sizes_of_the_models():
    for channels, length in ((128, 20), (512, 50)):
        given = inputs(64, length, channels, 32)
        truth, yardstick = outcome(given, torch.float64, "reference"), outcome(given, torch.float32, "reference")
        assert not disagreement(outcome(given, torch.float32, "triton"), truth, yardstick)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dt_BLE": torch.zeros(2, 5, 6)}, "dt_BLE: expected shape"),
        ({"A_EN": torch.zeros(6, 3)}, r"A_EN: expected shape \[E, N\]"),
        ({"C_BLN": torch.zeros(2, 5, 4)}, "C_BLN: expected shape"),
        ({"D_E": torch.zeros(7, dtype=torch.int64)}, "D_E: expected a floating-point"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        selective_scan(**inputs() | change)
