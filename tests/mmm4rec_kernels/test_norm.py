"""The gated RMS norm. Letter: E width."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mmm4rec_kernels import gated_rms_norm


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_published_numbers(golden, backend):
    y = gated_rms_norm(golden["rms/in/x"], golden["rms/in/z"], golden["rms/in/weight"], eps=1e-12, backend=backend)
    torch.testing.assert_close(y, golden["rms/out/y"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("before", [False, True])
def test_torch_agrees_with_the_definition(before):
    torch.manual_seed(0)
    results = []
    for backend in ("reference", "torch"):
        torch.manual_seed(1)
        leaves = [torch.randn(3, 5, 12, dtype=torch.float64).requires_grad_() for _ in range(2)]
        leaves.append(torch.randn(12, dtype=torch.float64).requires_grad_())
        y = gated_rms_norm(*leaves, eps=1e-5, norm_before_gate=before, backend=backend)
        results.append([y, *torch.autograd.grad(y.pow(3).sum(), leaves)])
    torch.testing.assert_close(results[0], results[1])


def test_order_of_norm_and_gate():
    y, z, weight = torch.randn(2, 4, 8), torch.randn(2, 4, 8), torch.randn(8)
    after = gated_rms_norm(y, z, weight, eps=1e-5)
    torch.testing.assert_close(after, F.rms_norm(y * F.silu(z), (8,), weight, 1e-5))
    before = gated_rms_norm(y, z, weight, eps=1e-5, norm_before_gate=True)
    torch.testing.assert_close(before, F.rms_norm(y, (8,), weight, 1e-5) * F.silu(z))


def test_rows_of_zeros_stay_zero():
    zero = torch.zeros(2, 8)
    assert (gated_rms_norm(zero, zero, torch.ones(8), eps=1e-12) == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": torch.zeros(2, 7)}, "z: expected shape"),
        ({"weight": torch.zeros(7)}, r"weight: expected shape \[E\] = \[8\]"),
        ({"eps": -1.0}, "eps: expected a number that is not negative"),
        ({"z": torch.zeros(2, 8, dtype=torch.float64)}, "z: expected dtype"),
    ],
)
def test_bad_input_is_named(change, message):
    good = {"y": torch.zeros(2, 8), "z": torch.zeros(2, 8), "weight": torch.ones(8), "eps": 1e-12}
    with pytest.raises(ValueError, match=message):
        gated_rms_norm(**good | change)
