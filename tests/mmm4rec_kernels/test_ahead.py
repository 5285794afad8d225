"""Compiling for GPUs that are not here. Letters as in the package."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]

SHARED_LIMIT = 99 * 1024
"""Bytes that a program may use on the smallest of these GPUs."""


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_the_block_at_published_sizes_compiles(capability):
    from mmm4rec_kernels import ahead
    from mmm4rec_kernels.block import fused

    H, E, GN, batch, length = 8, 512, 512, 4, 20
    tensors = (torch.empty(batch, length, H), torch.empty(E + 2 * GN, 4), torch.empty(E + 2 * GN))
    heads = [torch.empty(H) for _ in range(3)]
    arguments = (torch.empty(batch, length, 2 * E + 2 * GN + H), None, None, *tensors, *heads, torch.empty(E), None)

    def both():
        out, saved = fused.forward(*arguments, False, length, 8, 1e-12, True)
        fused.backward(out, saved, *arguments, False, length, 8, True)

    torch.set_float32_matmul_precision("high")
    try:
        needs = ahead.needs(both, capability)
    finally:
        torch.set_float32_matmul_precision("highest")
    names = ["conv_forward", "scan_forward", "norm_forward", "norm_backward", "scan_backward", "conv_backward"]
    assert [need.kernel for need in needs if need.kernel != "ordered_sums"] == names
    for need in needs:
        assert need.registers <= 255
        assert need.shared <= SHARED_LIMIT
        # One warp holds a whole tile: what little spills costs less than a second warp's exchange, measured on an H200.
        assert need.spilled <= {"scan_forward": 64, "scan_backward": 160}.get(need.kernel, 0), need.kernel


@pytest.mark.parametrize("batch", [2, 64])
@pytest.mark.parametrize("capability", [86, 90, 100])
def test_the_scan_of_long_sequences_compiles(capability, batch):
    from mmm4rec_kernels import ahead
    from mmm4rec_kernels.ssd import fused

    tensors = [torch.empty(batch, 200, 8, 64) for _ in range(3)]
    steps, per_head = torch.empty(batch, 200, 8), torch.empty(8)
    x, B, C = tensors
    arguments = (x, steps, per_head, B, C, per_head, per_head, None, None, False, 200, True, None, True)

    def both():
        y, states, _ = fused.forward(*arguments, False)
        fused.backward(y, None, states, *arguments)

    torch.set_float32_matmul_precision("high")
    try:
        needs = ahead.needs(both, capability)
    finally:
        torch.set_float32_matmul_precision("highest")
    cut = ["segment_writes", "walk"] if batch == 2 else []
    names = [*cut, "segment_forward", *cut, "segment_backward"]
    assert [need.kernel for need in needs if need.kernel != "ordered_sums"] == names
    for need in needs:
        assert need.registers <= 255
        assert need.shared <= SHARED_LIMIT
        assert need.spilled <= {"segment_writes": 16, "segment_backward": 32}.get(need.kernel, 0), need.kernel


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_the_block_of_packed_sequences_compiles(capability):
    from mmm4rec_kernels import ahead
    from mmm4rec_kernels.block import short

    H, E, GN, places = 8, 512, 512, 200
    tensors = (torch.empty(1, places, H), torch.empty(E + 2 * GN, 4), torch.empty(E + 2 * GN))
    heads = [torch.empty(H) for _ in range(3)]
    offsets = torch.tensor([0, 20, places], dtype=torch.int32)
    arguments = (torch.empty(1, places, 2 * E + 2 * GN + H), None, None, *tensors, *heads, torch.empty(E), offsets)

    def both():
        out, *saved = short.forward(*arguments, True, 20, 8, 1e-12, True)
        short.backward(out, out, *saved, *arguments, True, 20, 8, True)

    torch.set_float32_matmul_precision("high")
    try:
        needs = ahead.needs(both, capability)
    finally:
        torch.set_float32_matmul_precision("highest")
    names = {need.kernel for need in needs}
    assert names >= {"block_steps", "block_forward", "block_backward", "block_steps_backward", "columns_backward"}
    for need in needs:
        assert need.registers <= 255
        assert need.shared <= SHARED_LIMIT
        assert capability != 90 or need.spilled <= {"block_forward": 24}.get(need.kernel, 0), need.kernel


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("length", [12, 20])
def test_the_joined_backward_of_the_block_compiles(length, capability):
    from mmm4rec_kernels import ahead
    from mmm4rec_kernels.block import short

    H, E, GN = 8, 512, 512
    tensors = (torch.empty(4, length, H), torch.empty(E + 2 * GN, 4), torch.empty(E + 2 * GN))
    heads = [torch.empty(H) for _ in range(3)]
    arguments = (torch.empty(4, length, 2 * E + 2 * GN + H), None, None, *tensors, *heads, torch.empty(E), None)

    def both():
        out, *saved = short.forward(*arguments, False, length, 8, 1e-12, True)
        short.backward(out, out, *saved, *arguments, False, length, 8, True)

    torch.set_float32_matmul_precision("high")
    try:
        needs = ahead.needs(both, capability)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert [n.kernel for n in needs] == [
        "block_steps",
        "block_forward",
        "row_products",
        "joined_backward",
        "ordered_sums",
    ]
    for need in needs:
        assert need.registers <= 255
        assert need.shared <= SHARED_LIMIT
        # The walk reads what other threads stored: not through a cache that stores do not reach.
        assert ".nc" not in need.assembly
        assert capability != 90 or need.spilled <= {"joined_backward": 104}.get(need.kernel, 0), need.kernel


@pytest.mark.parametrize("capability", [80, 90, 120])
@pytest.mark.parametrize("read", [1, 4])
def test_the_tail_of_the_block_compiles(read, capability):
    from mmm4rec_kernels import ahead
    from mmm4rec_kernels.block import tail_fused

    H, E, GN, users, length = 8, 512, 512, 4, 20
    written = torch.empty(users, length, E + GN + H)
    tensors = (torch.empty(E + GN + H), torch.empty(users, read + 3, GN), torch.empty(users, length, H))
    parameters = (torch.empty(E + 2 * GN, 4), torch.empty(E + 2 * GN), *(torch.empty(H) for _ in range(3)))
    arguments = (written, *tensors, *parameters, None, torch.empty(users, dtype=torch.int64), length, True)

    def both():
        tail_fused.backward(tail_fused.forward(*arguments), *arguments)

    needs = ahead.needs(both, capability)
    assert [need.kernel for need in needs] == ["tail_forward", "tail_backward", "ordered_sums"]
    for need in needs:
        assert need.registers <= 255
        assert need.shared <= SHARED_LIMIT
        assert need.spilled <= {"tail_backward": 40}.get(need.kernel, 0), need.kernel
