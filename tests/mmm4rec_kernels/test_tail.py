"""The block's last places alone against the whole block. Letters as in `ssd_block_tail`."""

from __future__ import annotations

import os

import pytest
import torch

from mmm4rec_kernels import BackendUnavailable, CrossProjections, ssd_block, ssd_block_tail

E, H, G, N, K = 12, 4, 2, 3, 4
Q = G * N
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"


def block_inputs(lengths: list[int], length: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    shapes = [
        (len(lengths), length, E + Q + H),
        (len(lengths), length, E),
        (len(lengths), length, Q),
        (len(lengths), length, H),
        (E + 2 * Q, K),
        (E + 2 * Q,),
        (H,),
        (H,),
        (H,),
        (E,),
    ]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def last(rows: torch.Tensor, lengths: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows at the last places [B, count, C], and which of them are real."""
    place = lengths[:, None] - count + torch.arange(count)
    inside = (place >= 0)[..., None]
    return rows[torch.arange(len(rows))[:, None], place.clamp(min=0)], inside


@pytest.mark.parametrize("skip", ["x", "dt_x"])
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("length", [2, 9])
def test_the_last_places_and_all_gradients_equal_those_of_the_whole_block(length, count, skip):
    lengths = torch.tensor([1, length, max(1, length - 2), 2])
    xBdt, z, C, factor, *parameters = given = block_inputs(lengths.tolist(), length)
    options = {"n_groups": G, "eps": 1e-6, "time_factor_BLH": factor, "skip": skip}
    whole = ssd_block(CrossProjections(xBdt, z, C), *parameters, **options, lengths=lengths)
    want, inside = last(whole, lengths, count)
    z_tail, _ = last(z, lengths, count)
    C_tail, reached = last(C, lengths, count + K - 1)
    projected = CrossProjections(xBdt, z_tail, C_tail * reached)
    got = ssd_block_tail(projected, lengths, *parameters, **options)
    torch.testing.assert_close(got * inside, want * inside, rtol=1e-10, atol=1e-10)
    up = torch.randn(got.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * inside
    for one, other in zip(torch.autograd.grad(got, given, up), torch.autograd.grad(want, given, up), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_digits_survive_behind_a_very_negative_decay():
    lengths = torch.tensor([12])
    given = [t.detach().float() for t in block_inputs([12], 12)]
    xBdt, z, C, _, *parameters = given
    xBdt[0, 3, -H:] = 300.0
    options = {"n_groups": G, "eps": 1e-6}
    want = ssd_block(
        CrossProjections(*(t.double() for t in (xBdt, z, C))), *(p.double() for p in parameters), **options
    )
    got = ssd_block_tail(CrossProjections(xBdt, z[:, -1:], C[:, -K:]), lengths, *parameters, **options)
    torch.testing.assert_close(got.double(), want[:, -1:], rtol=1e-4, atol=1e-5)


def test_projections_of_other_places_are_refused():
    xBdt, z, C, _, *parameters = (t.detach() for t in block_inputs([3, 3], 3))
    with pytest.raises(ValueError, match=r"projected\.C: .*J \+ K - 1"):
        ssd_block_tail(
            CrossProjections(xBdt, z[:, -1:], C[:, -1:]), torch.tensor([3, 3]), *parameters, n_groups=G, eps=1e-6
        )


def test_packed_sequences_give_what_padded_ones_give():
    lengths = torch.tensor([1, 9, 5, 2])
    xBdt, z, C, factor, *parameters = given = block_inputs(lengths.tolist(), 9)
    options = {"n_groups": G, "eps": 1e-6, "time_factor_BLH": factor, "backend": "torch"}
    inside = torch.arange(9) < lengths[:, None]
    rows = torch.cat([xBdt[inside], torch.ones(3, xBdt.shape[-1], dtype=xBdt.dtype)])[None]
    offsets = torch.tensor([0, 1, 10, 15, 17, 20], dtype=torch.int32)
    _, reached = last(C, lengths, 3 + K)
    up = torch.randn_like(z[:, -4:]) * (lengths[:, None] - 4 + torch.arange(4) >= 0)[..., None]
    seen = []
    for written, packed in ((xBdt, {}), (rows, {"cu_seqlens": offsets, "max_length": 9})):
        projected = CrossProjections(written, z[:, -4:], C[:, -3 - K :] * reached)
        got = ssd_block_tail(projected, lengths, *parameters, **options, **packed)
        seen.append((got.detach() * (up != 0), *torch.autograd.grad(got, given, up)))
    for got, want in zip(*seen, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.skipif(not INTERPRETED and DEVICE == "cpu", reason="runs interpreted, and on a GPU")
@pytest.mark.parametrize(
    ("count", "skip", "taps", "packed"), [(1, "dt_x", 4, True), (4, "dt_x", 4, False), (3, "x", 3, True)]
)
def test_tail_kernel_equals_the_torch_form(count, skip, taps, packed):
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")
    lengths = torch.tensor([1, 9, 5, 2, 3], device=DEVICE)
    users, width, states = len(lengths), H * 12, H * 5
    shape = (1, 28) if packed else (users, 9)
    shapes = [
        *((*shape, width + states + H), (users, count, width), (users, count + taps - 1, states), (users, 9, H)),
        *((width + 2 * states, taps), (width + 2 * states,), (H,), (H,), (H,), (width,)),
    ]
    given = [torch.randn(shape, device=DEVICE).requires_grad_() for shape in shapes]
    shift = torch.randn(shapes[0][-1], device=DEVICE).requires_grad_()
    xBdt, z, C, factor, *parameters = given
    given.append(shift)
    offsets = torch.tensor([0, 1, 10, 15, 17, 20, 28, 28], device=DEVICE, dtype=torch.int32)
    options = {"n_groups": H, "eps": 1e-6, "time_factor_BLH": factor, "skip": skip}
    options |= {"cu_seqlens": offsets, "max_length": 9} if packed else {}
    options["bias_of_xBdt"] = shift
    place = lengths[:, None] - count - taps + 1 + torch.arange(count + taps - 1, device=DEVICE)
    reached = (place >= 0)[..., None]
    up = torch.randn(users, count, width, device=DEVICE) * reached[:, taps - 1 :]
    seen = []
    for backend in ("torch", "triton"):
        projected = CrossProjections(xBdt, z, C)
        got = ssd_block_tail(projected, lengths, *parameters, **options, backend=backend)
        seen.append((got.detach() * reached[:, taps - 1 :], *torch.autograd.grad(got, given, up)))
    for want, got in zip(*seen, strict=True):
        assert float((got - want).norm() / want.norm()) < 3e-5


@pytest.mark.skipif(not INTERPRETED and DEVICE == "cpu", reason="runs interpreted, and on a GPU")
def test_operators_are_well_formed():
    from mmm4rec_kernels.block import tail_ops

    lengths = torch.tensor([1, 9, 5], device=DEVICE)
    width, states = H * 12, H * 5
    shapes = [(3, 9, width + states + H), (width + states + H,), (3, 5, states), (3, 9, H), (width + 2 * states, 4)]
    shapes += [(width + 2 * states,), (H,), (H,), (H,)]
    given = [torch.randn(shape, device=DEVICE) for shape in shapes]
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    arguments = [*given, None, lengths, 9, True]
    forward = [t.requires_grad_() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in arguments]
    torch.library.opcheck(tail_ops.tail_forward.overload, forward, test_utils=checks)
    grad = torch.randn(3, 2, width, device=DEVICE)
    backward = [grad, *(t.detach() if isinstance(t, torch.Tensor) else t for t in arguments)]
    torch.library.opcheck(tail_ops.tail_backward.overload, backward, test_utils=checks)


def test_sizes_that_the_kernel_was_not_built_for_are_refused():
    xBdt, z, C, _, *parameters = (t.detach() for t in block_inputs([3, 3], 3))
    projected = CrossProjections(xBdt, z[:, -1:], torch.zeros(2, K, Q, dtype=C.dtype))
    with pytest.raises(BackendUnavailable, match="CUDA" if not INTERPRETED else "float64"):
        ssd_block_tail(projected, torch.tensor([3, 3]), *parameters, n_groups=G, eps=1e-6, backend="triton")


def test_a_backend_that_nobody_knows_is_refused():
    xBdt, z, C, _, *parameters = (t.detach() for t in block_inputs([3, 3], 3))
    projected = CrossProjections(xBdt, z[:, -1:], torch.zeros(2, K, Q, dtype=C.dtype))
    with pytest.raises(ValueError, match="backend: expected auto, torch or triton"):
        ssd_block_tail(projected, torch.tensor([3, 3]), *parameters, n_groups=G, eps=1e-6, backend="cuda")
