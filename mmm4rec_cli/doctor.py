"""What this machine can run: looked up, and for the kernels tried."""

import os
import platform
import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmm4rec_cli import __version__
from mmm4rec_cli.reporter import Reporter, SilentReporter
from mmm4rec_cli.workspace import Workspace

if TYPE_CHECKING:
    import torch

PACKAGES = (
    *("torch", "triton", "transformers", "polars", "pyarrow", "numpy", "scikit-learn", "safetensors", "pydantic"),
    *("scipy", "matplotlib", "pillow", "huggingface_hub"),
)
"""What every installation has."""

OPTIONAL = {
    "faiss-cpu": ("mmm4rec export --format faiss", "pip install faiss-cpu"),
    "onnx": ("mmm4rec export --format onnx, with onnxscript", "pip install onnx onnxscript"),
    "onnxscript": ("mmm4rec export --format onnx, with onnx", "pip install onnx onnxscript"),
    "onnxruntime": ("comparing an ONNX export with the model", "pip install onnxruntime"),
    "ray": ("mmm4rec preprocess --engine ray", "pip install 'mmm4rec[ray]'"),
    "mamba-ssm": (
        "kernels of another project (compiled on the spot)",
        "pip install --no-build-isolation 'mmm4rec[cuda]'",
    ),
    "causal-conv1d": ("as mamba-ssm", "pip install --no-build-isolation 'mmm4rec[cuda]'"),
}
"""Packages that nothing needs but what stands beside them: what for, and the line that installs it."""

AGREES = 0.01
"""Largest difference from the reference, over the reference's largest value, up to which a backend counts as live."""


def examine(workspace: Workspace, reporter: Reporter | None = None) -> dict[str, Any]:
    """Everything that `mmm4rec doctor --json` prints.

    Returns:
        `mmm4rec`, `python`, `packages` (name -> version or null), `optional` (name -> {version or null, for,
        install}), `torch`, `cpu`, `gpus`, `backends` (operation -> backend -> {available, why}), `choices` (operation
        -> device -> what "auto" takes there), `encoders` (name -> {available, why}), `disk`. A backend is available if
        it ran just now and agreed with the reference.
    """
    reporter = reporter or SilentReporter()
    return {
        "mmm4rec": __version__,
        "python": {"version": platform.python_version(), "platform": platform.platform()},
        "packages": {name: _version(name) for name in PACKAGES},
        "optional": {
            name: {"version": _version(name), "for": purpose, "install": line}
            for name, (purpose, line) in OPTIONAL.items()
        },
        **_torch(),
        "cpu": {"count": os.cpu_count(), "memory_bytes": _memory()},
        "backends": _backends(reporter),
        "choices": _choices(),
        "encoders": _encoders(),
        "disk": _disk(workspace.root),
    }


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _torch() -> dict[str, Any]:
    import torch

    gpus = []
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        gpus.append(
            {
                "name": about.name,
                "capability": f"{about.major}.{about.minor}",
                "memory_bytes": total,
                "free_bytes": free,
            }
        )
    if gpus:
        why = f"{len(gpus)} GPU(s)"
    elif torch.version.cuda is None:
        why = f"torch {torch.__version__} is built without CUDA"
    else:
        why = f"torch {torch.__version__} is built for CUDA {torch.version.cuda}, but sees no GPU or driver"
    about_torch = {"version": torch.__version__, "cuda": torch.version.cuda, "threads": torch.get_num_threads()}
    return {"torch": {**about_torch, "why": why}, "gpus": gpus}


def _backends(reporter: Reporter) -> dict[str, dict[str, dict[str, Any]]]:
    import torch

    from mmm4rec_kernels import backends

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trials = _trials(device)
    found = backends()
    result: dict[str, dict[str, dict[str, Any]]] = {}
    with reporter.stage("try the kernels", sum(map(len, found.values())), "backends") as stage:
        for operation, states in found.items():
            result[operation] = {}
            for name, state in states.items():
                stage.advance(status=f"{operation} {name}")
                available, why = state.available, state.why
                if available and operation in trials:
                    available, said = _tried(trials[operation], name)
                    why = f"{why}; {said}"
                result[operation][name] = {"available": available, "why": why}
    return result


def _choices() -> dict[str, dict[str, str]]:
    from mmm4rec_kernels.backend import choices

    return choices()


def _tried(run: "Callable[[str], torch.Tensor]", backend: str) -> tuple[bool, str]:
    """Whether a backend runs and agrees with the reference, and what happened."""
    try:
        expected, given = run("reference").double(), run(backend).double()
    except Exception as error:  # a backend of another project may fail in any way; its reason is the answer
        return False, f"failed: {(str(error) or type(error).__name__).splitlines()[0]}"
    difference = float((given - expected).abs().max() / expected.abs().max())
    words = f"ran on {given.device.type}, {difference:.0e} from the reference"
    return difference <= AGREES, words if difference <= AGREES else f"wrong: {words}"


def _trials(device: "torch.device") -> "dict[str, Callable[[str], torch.Tensor]]":
    """A small call of each operation at the published sizes: backend -> result."""
    import torch

    from mmm4rec_kernels import (
        causal_conv1d,
        compare_counts,
        gated_rms_norm,
        lookup,
        selective_scan,
        softmax_cross_entropy,
        ssd,
        ssd_block,
    )

    n_sequences, length, heads, head_dim, groups, state, taps, eps = 2, 20, 8, 64, 8, 64, 4, 1e-12
    width = heads * head_dim
    channels = width + 2 * groups * state
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random).to(device)

    x, dt = normal(n_sequences, length, heads, head_dim), normal(n_sequences, length, heads)
    b, c = normal(n_sequences, length, groups, state), normal(n_sequences, length, groups, state)
    decay, skip, dt_bias = -normal(heads).exp(), normal(heads), normal(heads)
    columns, weight, bias = normal(n_sequences, length, channels), normal(channels, taps), normal(channels)
    y, z, norm_weight = normal(n_sequences, length, width), normal(n_sequences, length, width), normal(width)
    projected = normal(n_sequences, length, width + channels + heads)
    query, table, target = normal(length, width), normal(channels, width), torch.arange(length, device=device)
    steps, own_decay = normal(n_sequences, length, width).exp(), -normal(width, state).exp()
    return {
        "ssd": lambda backend: ssd(x, dt, decay, b, c, D=skip, dt_bias=dt_bias, backend=backend),
        "causal_conv1d": lambda backend: causal_conv1d(columns, weight, bias, activation="silu", backend=backend),
        "gated_rms_norm": lambda backend: gated_rms_norm(y, z, norm_weight, eps=eps, backend=backend),
        "ssd_block": lambda backend: ssd_block(
            projected,
            weight,
            bias,
            (-decay).log(),
            skip,
            dt_bias,
            norm_weight,
            n_groups=groups,
            eps=eps,
            backend=backend,
        ),
        "selective_scan": lambda backend: selective_scan(
            y, steps, own_decay, b[:, :, 0], c[:, :, 0], norm_weight, backend=backend
        ),
        "softmax_cross_entropy": lambda backend: softmax_cross_entropy(query, table, target, backend=backend),
        "lookup": lambda backend: lookup(table, target, backend=backend),
        "compare_counts": lambda backend: torch.stack(compare_counts(table, table[:, 0], backend=backend)),
    }


def _encoders() -> dict[str, dict[str, Any]]:
    from huggingface_hub import try_to_load_from_cache

    from mmm4rec_cli.features.store import PAIRS, PRESETS

    def folder(model: str) -> Path | None:
        files = ("model.safetensors", "model.safetensors.index.json")
        here = [path for file in files if isinstance(path := try_to_load_from_cache(model, file), str)]
        return Path(here[0]).parent if here else None

    found = {}
    for name, models in {**{name: (model,) for name, model in PRESETS.items()}, **PAIRS}.items():
        places = {model: folder(model) for model in models if model is not None}
        if not places:
            found[name] = {"available": True, "why": "needs no weights; for demos and tests"}
            continue
        why = "; ".join(
            f"{model} in {place}" if place else f"{model} is not on the disk: fetched at first use"
            for model, place in places.items()
        )
        found[name] = {"available": all(places.values()), "why": why}
    return found


def _disk(root: Path) -> dict[str, Any]:
    there = next(path for path in (root.resolve(), *root.resolve().parents) if path.exists())
    usage = shutil.disk_usage(there)
    return {"path": str(root.resolve()), "free_bytes": usage.free, "total_bytes": usage.total}
