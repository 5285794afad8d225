"""Residual norm, activation and bias sums: the torch form, and the kernels in the interpreter or on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mmm4rec_kernels import hardswish_dropout, linear, linear_and_rows, residual_norm, rows, seeds_at_once, unit_sum
from mmm4rec_kernels.rows import ops

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BY_KERNEL = INTERPRETED or torch.cuda.is_available()
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
by_kernel = pytest.mark.skipif(not BY_KERNEL, reason="runs in test_the_kernels_interpreted, and on a GPU")


def inputs(groups: int | None, rows: int = 21, width: int = 24, count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    shape = (rows, width) if groups is None else (groups, rows, width)
    weights = (width,) if groups is None else (groups, width)
    tensors = [torch.randn(shape, generator=generator) for _ in range(count)]
    return [t.to(DEVICE) for t in [*tensors, *(torch.randn(weights, generator=generator) for _ in range(2))]]


def plain(x, residual, other, weight, bias):
    total = x if residual is None else x + residual
    total = total if other is None else total + other
    normed = F.layer_norm(total, total.shape[-1:], eps=1e-5)
    if weight.dim() == 2:
        weight, bias = weight[:, None], bias[:, None]
    return normed * weight + bias


@pytest.mark.parametrize("added", [0, 1, 2])
@pytest.mark.parametrize("groups", [None, 2])
def test_residual_norm_and_its_gradients(groups, added):
    given = [t.requires_grad_() for t in inputs(groups)]
    x, residual, other, weight, bias = given
    residual, other = residual if added else None, other if added == 2 else None
    got = residual_norm(x, weight, bias, residual=residual, other=other, eps=1e-5)
    double = [None if t is None else t.detach().double().requires_grad_() for t in (x, residual, other, weight, bias)]
    want = plain(*double)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    up = torch.randn_like(want)
    got.backward(up.float())
    want.backward(up)
    for leaf, other_leaf in zip((x, residual, other, weight, bias), double, strict=True):
        if leaf is not None:
            torch.testing.assert_close(leaf.grad.double(), other_leaf.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("groups", [None, 2])
def test_a_shift_of_the_first_argument_and_its_gradient(groups):
    x, residual, shift, weight, bias = inputs(groups)
    shift = shift[..., 0, :].reshape(-1, 24)[0]
    results = []
    for function in (
        lambda x, s: residual_norm(x, weight, bias, residual=residual, shift=s) * hardswish_dropout(3 * x, shift=s),
        lambda x, s: residual_norm(x + s, weight, bias, residual=residual) * hardswish_dropout(3 * x + s),
    ):
        leaves = [t.clone().requires_grad_() for t in (x, shift)]
        y = function(*leaves)
        (y * y).sum().backward()
        results.append([y, *(t.grad for t in leaves)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-4)


def test_dropout_acts_on_the_first_argument_alone():
    x, residual, *_ = inputs(None, rows=400)
    ones = torch.ones(x.shape[-1], device=DEVICE)
    torch.manual_seed(3)
    kept = hardswish_dropout(torch.full_like(x, 5.0), p=0.25, training=True)
    assert kept.unique().tolist() == pytest.approx([0.0, 5 / 0.75])
    assert float((kept == 0).float().mean()) == pytest.approx(0.25, abs=0.02)
    assert torch.equal(hardswish_dropout(x, p=0.25), F.hardswish(x)) or BY_KERNEL
    calm = residual_norm(x, ones, 0 * ones, residual=residual, p=0.25)
    torch.testing.assert_close(calm, residual_norm(x, ones, 0 * ones, residual=residual))
    shaken = residual_norm(x, ones, 0 * ones, residual=residual, p=0.25, training=True)
    again = residual_norm(x, ones, 0 * ones, residual=residual, p=0.25, training=True)
    assert not torch.equal(shaken, again)


@by_kernel
@pytest.mark.parametrize("width", [24, 22])
def test_the_gradient_sees_the_same_dropout_as_the_result(width):
    x, residual, _, weight, bias = inputs(None, rows=50, width=width)
    seed = torch.tensor([77], device=DEVICE)
    x.requires_grad_()
    out, total = ops.norm_forward(x[None], residual[None], None, weight[None], bias[None], seed, 0.4, 1e-5)
    dropped = (total[0] - residual).abs() < 1e-6
    assert 0.3 < float(dropped.float().mean()) < 0.5
    torch.testing.assert_close((total[0] - residual)[~dropped], (x / 0.6)[~dropped], rtol=1e-4, atol=1e-5)
    out.backward(torch.randn_like(out))
    assert torch.equal(x.grad == 0, dropped)
    y = torch.randn(7, 13 * width, device=DEVICE, requires_grad=True)
    out = ops.hardswish_forward(y, seed, 0.4)
    out.sum().backward()
    slope = torch.where(y <= -3, 0.0, torch.where(y < 3, y / 3 + 0.5, 1.0)) / 0.6
    lost = (out == 0) & (y > -3)
    torch.testing.assert_close(y.grad[~lost], slope[~lost])
    assert not y.grad[lost].any()


@by_kernel
def test_seeds_drawn_at_once_differ_and_follow_the_generator():
    x = torch.ones(4000, device=DEVICE)

    def dropped() -> list[torch.Tensor]:
        torch.manual_seed(3)
        with seeds_at_once(torch.device(DEVICE), count=2):
            return [hardswish_dropout(x, p=0.5, training=True) for _ in range(3)]

    first, again = dropped(), dropped()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[1], first[2])
    assert not rows._drawn


@by_kernel
@pytest.mark.parametrize(("rows", "columns"), [(1, 5), (33, 70), (300, 131)])
def test_sums_over_rows_repeat_and_are_right(rows, columns):
    x = torch.randn(rows, columns, device=DEVICE)
    got = ops.sum_rows(x)
    torch.testing.assert_close(got.double(), x.double().sum(0), rtol=1e-5, atol=1e-5)
    assert torch.equal(got, ops.sum_rows(x))


def test_the_sum_of_rows_of_one_length_and_its_gradients():
    a, b = (t.requires_grad_() for t in inputs(None)[:2])
    with torch.no_grad():
        a[3] = 0
        a[4] *= 1e-14 / a[4].norm()
    got = unit_sum(a, b, scale=1.25)
    double = [t.detach().double().requires_grad_() for t in (a, b)]
    want = sum(F.normalize(t, dim=-1, eps=1e-12) for t in double) * 1.25
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    up = torch.randn_like(want)
    got.backward(up.float())
    want.backward(up)
    for leaf, other in zip((a, b), double, strict=True):
        torch.testing.assert_close(leaf.grad.double(), other.grad, rtol=1e-4, atol=1e-5)


def test_linear_has_the_gradients_of_torchs_own():
    x, weight, bias = torch.randn(2, 9, 6), torch.randn(11, 6), torch.randn(11)
    results = []
    for function in (linear, F.linear):
        leaves = [t.clone().to(DEVICE).requires_grad_() for t in (x, weight, bias)]
        y = function(*leaves)
        (y * y).sum().backward()
        results.append([y, *(t.grad for t in leaves)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_turned_weight_is_the_weight():
    wide, narrow = torch.randn(1032, 6, device=DEVICE), torch.randn(8, 6, device=DEVICE)
    assert rows._turned(wide) is wide, "products of full precision take it as it lies"
    torch.set_float32_matmul_precision("high")
    try:
        turned = rows._turned(wide)
        assert rows._turned(narrow) is narrow
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(turned, wide)
    assert turned.stride() == (1, 1032)


def test_rows_beside_a_linear_layer_and_their_gradients():
    x, weight, bias = torch.randn(9, 6), torch.randn(11, 6), torch.randn(11)
    index = torch.tensor([8, 2, 5], device=DEVICE)
    results = []
    for function in (linear_and_rows, lambda x, w, b, i: (F.linear(x, w, b), x[i])):
        for bare in (False, True):
            leaves = [t.clone().to(DEVICE).requires_grad_() for t in (x, weight, bias)]
            y, rows = function(*leaves[:2], None if bare else leaves[2], index)
            ((y * y).sum() + (rows**3).sum()).backward()
            results.append([y, rows, *(t.grad for t in leaves[: 2 if bare else 3])])
    for got, want in zip(results[:2], results[2:], strict=True):
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_places_beside_a_linear_layer_and_their_gradients():
    x, weight, bias = torch.randn(3, 4, 6), torch.randn(11, 6), torch.randn(11)
    results = []
    for function in (linear_and_rows, lambda x, w, b, i: (F.linear(x, w, b), x[:, i])):
        leaves = [t.clone().to(DEVICE).requires_grad_() for t in (x, weight, bias)]
        y, rows = function(*leaves, slice(1, 3))
        ((y * y).sum() + (rows**3).sum()).backward()
        results.append([y, rows, *(t.grad for t in leaves)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@by_kernel
def test_the_fused_nadam_step_is_torchs():
    from mmm4rec_kernels.rows import fused

    torch.manual_seed(0)
    start = torch.randn(3000, device=DEVICE)
    theirs = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.NAdam([theirs], lr=1e-2, weight_decay=0.005)
    value, first, second = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    product = 1.0
    for k in range(1, 4):
        gradient = torch.randn_like(start)
        theirs.grad = gradient.clone()
        optimizer.step()
        now, following = (0.9 * (1 - 0.5 * 0.96 ** (j * 0.004)) for j in (k, k + 1))
        product *= now
        factors = 1e-2 * (1 - now) / (1 - product), 1e-2 * following / (1 - product * following)
        fused.nadam(value, gradient, first, second, *factors, 0.9, 0.999, 1 - 0.999**k, 1e-8, 0.005)
        torch.testing.assert_close(value, theirs.detach(), rtol=1e-5, atol=1e-6)


@by_kernel
def test_operators_are_well_formed():
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    seed = torch.tensor(7, device=DEVICE)
    x, residual, grad, weight, bias = inputs(2)
    shift = bias[0]

    def check(operator, *arguments):
        torch.library.opcheck(operator.overload, arguments, test_utils=checks)

    check(ops.norm_forward, x.requires_grad_(), residual, None, weight, bias, seed, 0.25, 1e-5, None)
    check(ops.norm_forward, x[:1], None, None, weight[:1], bias[:1], None, 0.0, 1e-5, shift)
    check(ops.norm_backward, grad, residual, weight, seed, 0.25, 1e-5, True, True, False)
    check(ops.sum_rows, grad[0])
    check(ops.hardswish_forward, x, seed, 0.25, None)
    check(ops.hardswish_backward, grad, x.detach(), seed, 0.25, None)
    check(ops.unit_sum, x, residual, 0.5, 1e-12)
    check(ops.unit_sum_backward, grad, x.detach(), residual, 0.5, 1e-12)


@pytest.mark.skipif(BY_KERNEL, reason="the kernels run here without it")
@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_the_kernels_interpreted():
    pytest.importorskip("triton")
    here = Path(__file__)
    paths = [str(here.parents[2] / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(here)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert "skipped" in result.stdout.splitlines()[-1]
    assert " 1 skipped" in result.stdout.splitlines()[-1]
