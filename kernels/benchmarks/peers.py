"""The forms that the kernels are timed against, each as its own project would have it called.

Nothing here is imported from another project before its form is built; a missing one says what is missing. Letters as
in `run`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import math
import operator
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from mmm4rec_kernels import causal_conv1d, gated_rms_norm, sequences, ssd, ssd_block

H, P, N, K = 8, 64, 64, 4
E, GN = H * P, H * N
EPS = 1e-12
SHORT = 64
"""Up to here 64 places are the smallest chunk of mamba-ssm that holds a sequence."""

Call = Callable[..., torch.Tensor]


class Missing(RuntimeError):
    """A peer cannot run here; the message says why."""


@dataclass(frozen=True)
class Form:
    """One way to compute an operation."""

    operation: str
    name: str
    peer: str
    """The process that it is timed in."""
    build: Callable[[], Call]
    """Imports what it needs; gives the function of the inputs by name, if packed of cu_seqlens and max_length too."""
    packed: bool = True
    lengths: Callable[[int], bool] = lambda length: True
    without: tuple[str, ...] = ()
    """Inputs that it does not know."""


def naive_scan(x, dt, A, B, C, D, dt_bias):
    """The quadratic form as it is usually written: decay matrix by segment sums, three einsums."""
    dt = F.softplus(dt.float() + dt_bias)
    step = dt[..., None] * x.float()
    length = x.shape[1]
    a = (dt * A).transpose(1, 2)[..., None].expand(-1, -1, -1, length)
    lower = torch.ones(length, length, dtype=torch.bool, device=x.device).tril(-1)
    decay = a.masked_fill(~lower, 0).cumsum(-2)
    decay = decay.masked_fill(torch.ones_like(lower).triu(1), -torch.inf).exp()
    scores = torch.einsum("blhn,bshn->bhls", C.float(), B.float())
    y = torch.einsum("bhls,bshp->blhp", scores * decay, step)
    return (y + D[:, None] * x).to(x.dtype)


def quadratic_scan(x, dt, A, B, C, D, dt_bias):
    """The quadratic form with nothing that a compiler must undo: differences of sums, products in the dtype of x."""
    dt = F.softplus(dt.float() + dt_bias)
    total = (dt * A).transpose(1, 2).contiguous().cumsum(-1)
    ahead = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(ahead, -torch.inf).exp()
    scores = C.transpose(1, 2) @ B.permute(0, 2, 3, 1)
    y = (scores * decay).to(x.dtype) @ (dt[..., None] * x).to(x.dtype).transpose(1, 2)
    return (y.transpose(1, 2) + D[:, None] * x).to(x.dtype)


def naive_convolution(x_BLC, weight_CK, bias):
    """As nn.Conv1d is used: channels first, padded on both sides, the rest cut off."""
    columns, length = x_BLC.transpose(1, 2), x_BLC.shape[1]
    weight, bias = weight_CK[:, None].to(columns.dtype), bias.to(columns.dtype)
    y = F.conv1d(columns, weight, bias, padding=K - 1, groups=columns.shape[1])[..., :length]
    return F.silu(y).transpose(1, 2)


def chain(scan: Call) -> Call:
    """The block in plain torch around a scan."""

    def block(
        projected, conv_weight_CK, conv_bias_C, A_log_H, D_H, dt_bias_H, norm_weight_E, time_factor_BLH
    ) -> torch.Tensor:
        z, xBC, dt = projected.split([E, E + 2 * GN, H], -1)
        x, B, C = naive_convolution(xBC, conv_weight_CK, conv_bias_C).split([E, GN, GN], -1)
        heads = [t.unflatten(-1, (H, -1)) for t in (x, B, C)]
        y = scan(heads[0], dt * time_factor_BLH, -A_log_H.exp(), heads[1], heads[2], D_H, dt_bias_H)
        gated = y.flatten(2).float() * F.silu(z.float())
        normed = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + EPS) * norm_weight_E
        return normed.to(projected.dtype)

    return block


def compiled(function: Call) -> Call:
    """Under torch.compile, each shape for itself."""
    from torch._inductor.ir import ReductionHint, Scan

    torch._dynamo.config.recompile_limit = 64
    # Where torch 2.11 cuts running sums into parts, which it does at 256 x 200, it fails with a TypeError.
    Scan.num_splits = classmethod(lambda cls, *arguments, **named: (ReductionHint.DEFAULT, 1))
    return torch.compile(function, dynamic=False)


def ours(function: Call, backend: str, **options: Any) -> Callable[[], Call]:
    return lambda: functools.partial(function, backend=backend, **options)


def imported(module: str) -> Any:
    """A module of a peer; Missing says why it is not there."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # a peer's import may fail in any way
        raise Missing(f"{module}: {(str(error) or type(error).__name__).splitlines()[0]}") from error


def stand_in(*packages: str) -> None:
    """Puts empty packages with the paths of the real ones in their place, so that modules below import alone."""
    top = packages[0]
    if top in sys.modules:
        return
    spec = importlib.util.find_spec(top)
    if spec is None or not spec.submodule_search_locations:
        raise Missing(f"{top} is not installed")
    root = Path(spec.submodule_search_locations[0])
    for package in packages:
        empty = importlib.util.module_from_spec(importlib.machinery.ModuleSpec(package, None, is_package=True))
        empty.__path__ = [str(root.joinpath(*package.split(".")[1:]))]
        sys.modules[package] = empty


def mamba_module(name: str) -> Any:
    """A module of mamba-ssm, of which the Triton kernels alone suffice.

    Its package imports the compiled part of Mamba-1 first, which need not be built for them.
    """
    if importlib.util.find_spec("selective_scan_cuda") is None:
        stand_in("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton", "mamba_ssm.utils")
    return imported(name)


def quick_tuning() -> None:
    """Lets Triton's autotuners look at each configuration for 10 ms: enough at these sizes, and hundreds are tried."""
    from triton.runtime import driver
    from triton.testing import do_bench

    driver.active.get_benchmarker = lambda: functools.partial(do_bench, warmup=2, rep=10)


def mamba_scan(chunk: int) -> Call:
    quick_tuning()
    function = mamba_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined

    def scan(x, dt, A, B, C, D, dt_bias, cu_seqlens=None, max_length=None) -> torch.Tensor:
        numbers = None if cu_seqlens is None else sequences.numbers(cu_seqlens, x.shape[1])
        return function(x, dt, A, B, C, chunk, D=D, dt_bias=dt_bias, dt_softplus=True, seq_idx=numbers)

    return scan


def mamba_block(chunk: int) -> Call:
    quick_tuning()
    imported("causal_conv1d")
    function = mamba_module("mamba_ssm.ops.triton.ssd_combined").mamba_split_conv1d_scan_combined
    norm = mamba_module("mamba_ssm.ops.triton.layernorm_gated").rmsnorm_fn

    def block(
        projected,
        conv_weight_CK,
        conv_bias_C,
        A_log_H,
        D_H,
        dt_bias_H,
        norm_weight_E,
        cu_seqlens=None,
        max_length=None,
    ) -> torch.Tensor:
        # Given the norm's weight it would take one norm a group; without, it gates only, and one norm follows.
        gated = function(
            projected,
            conv_weight_CK,
            conv_bias_C,
            dt_bias_H,
            -A_log_H.exp(),
            D_H,
            chunk,
            seq_idx=None if cu_seqlens is None else sequences.numbers(cu_seqlens, projected.shape[1]),
            headdim=P,
            ngroups=H,
        )
        return norm(gated, norm_weight_E, None, eps=EPS)

    return block


def version(distribution: str) -> str:
    """The installed version, as part of a form's name; empty if there is none."""
    try:
        return f" {importlib.metadata.version(distribution)}"
    except importlib.metadata.PackageNotFoundError:
        return ""


def gla_scan(name: str) -> Call:
    """The scan as gated linear attention: its queries are C, its keys B, its values the scaled x.

    The package imports every layer and model that it has; only the kernels are asked for.
    """
    quick_tuning()
    stand_in("fla", "fla.ops")
    vars(sys.modules["fla"]).setdefault("__version__", version("flash-linear-attention").strip())
    function = getattr(imported("fla.ops.simple_gla"), name)

    def scan(x, dt, A, B, C, D, dt_bias) -> torch.Tensor:
        step = F.softplus(dt.float() + dt_bias)
        y, _ = function(C, B, (step[..., None] * x).to(x.dtype), step * A, scale=1.0)
        return (y + D[:, None] * x).to(x.dtype)

    return scan


def dao_convolution() -> Call:
    function = imported("causal_conv1d").causal_conv1d_fn

    def convolve(x_BLC, weight_CK, bias, cu_seqlens=None, max_length=None) -> torch.Tensor:
        numbers = None if cu_seqlens is None else sequences.numbers(cu_seqlens, x_BLC.shape[1])
        return function(x_BLC.transpose(1, 2), weight_CK, bias, numbers, activation="silu").transpose(1, 2)

    return convolve


def forms() -> Iterable[Form]:
    """Every form, ours first."""
    publics: dict[str, tuple[Call, dict[str, Any]]] = {
        "ssd": (ssd, {}),
        "causal_conv1d": (causal_conv1d, {"activation": "silu"}),
        "gated_rms_norm": (gated_rms_norm, {"eps": EPS}),
        "ssd_block": (ssd_block, {"n_groups": H, "eps": EPS, "skip": "x"}),
    }
    for operation, (function, options) in publics.items():
        for backend in ("triton", "torch"):
            peer = "triton" if backend == "triton" else "torch"
            yield Form(operation, backend, peer, ours(function, backend, **options))
    yield Form("causal_conv1d", "causal-conv1d", "causal-conv1d", dao_convolution)
    for chunk in (64, 128, 256):
        fits = functools.partial(_holds, chunk)
        yield Form(
            "ssd", f"mamba-ssm, chunks of {chunk}", "mamba-ssm", functools.partial(mamba_scan, chunk), lengths=fits
        )
        yield Form(
            "ssd_block",
            f"mamba-ssm, chunks of {chunk}",
            "mamba-ssm",
            functools.partial(mamba_block, chunk),
            lengths=fits,
            without=("time_factor_BLH",),
        )
    gla = version("flash-linear-attention")
    for kind, longest in (("chunk", math.inf), ("fused_recurrent", SHORT)):
        build, fits = functools.partial(gla_scan, f"{kind}_simple_gla"), functools.partial(operator.ge, longest)
        # It takes packed sequences too, but tunes itself anew for them, for minutes.
        yield Form("ssd", f"simple_gla{gla}, {kind}", "flash-linear-attention", build, packed=False, lengths=fits)
    for operation, naive, quadratic in (
        ("ssd", naive_scan, quadratic_scan),
        ("causal_conv1d", naive_convolution, naive_convolution),
        ("ssd_block", chain(naive_scan), chain(quadratic_scan)),
    ):
        yield Form(operation, "naive", "naive", functools.partial(as_is, naive), packed=False)
        yield Form(operation, "compiled", "torch.compile", functools.partial(compiled, quadratic), packed=False)


def as_is(function: Call) -> Call:
    return function


def _holds(chunk: int, length: int) -> bool:
    return chunk == SHORT or length > SHORT
