"""The map between our state-dict names and those of the published checkpoints.

| ours | published |
|---|---|
| `text.adapter.*`, `image.adapter.*` | `text_adapter.0.*`, `vision_adapter.0.*` |
| `text.norm.*`, `image.norm.*` | `text_in_layer_norm.*`, `vision_in_layer_norm.*` |
| `text.item_bias`, `image.item_bias` | `text_item_embedding_bias`, `vision_item_embedding_bias` |
| `gaps.*` | `layer_norm_time.*` |
| `fusion_weight` | `fusion_factor` (published static fusion stores the number 1) |

and with `layers.i.` before ours, E = `encoder_ssd_layers.i.` or D = `decoder_ssd_layers.i.` before theirs:

| ours | published |
|---|---|
| `ssd.*` | E `ssd.*` and, the same tensors, D `ssd.*` |
| `text_norm.*`, `text_ffn.*` | E `layer_norm.*`, E `ffn.*` |
| `image_norm.*`, `image_ffn.*` | D `layer_norm.*`, D `ffn.*` |
| `cross_norm.*`, `cross_ssd.*` | D `co_layer_norm.*`, D `co_ssd.*` |
| `filter.image.*`, `filter.text.*` | D `text_complex_weight.0.*`, D `vision_complex_weight.0.*` (crossed) |
| `filter.joint.*` | D `co_complex_weight.0.*` |

Inside a block: `conv` = `conv1d_1`, `u_conv` = `u_conv1d`, `q_conv` = `q_conv1d`, `time.mlp_in` = `mlp4time_scale.1`,
`time.mlp_out` = `mlp4time_scale.3`, `time.conv_in` = `conv1d4time_1`, `time.conv_out` = `conv1d4time_2`,
`time_gate` = `time_gate_residual.1`, `time_norm` = `time_layer_norm`. Published convolutions are
[C, 1, K], ours [C, K]. A parameter for missing vectors (`text.missing`, `image.missing`) has no published name.
"""

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmm4rec_cli.errors import RunError

_RENAMES = [
    (r"^(text|image)\.adapter\.", r"\1_adapter.0."),
    (r"^(text|image)\.norm\.", r"\1_in_layer_norm."),
    (r"^(text|image)\.item_bias$", r"\1_item_embedding_bias"),
    (r"^image_", "vision_"),
    (r"^gaps\.", "layer_norm_time."),
    (r"^fusion_weight$", "fusion_factor"),
    (r"^layers\.(\d+)\.(ssd)\.", r"encoder_ssd_layers.\1.\2."),
    (r"^layers\.(\d+)\.text_norm\.", r"encoder_ssd_layers.\1.layer_norm."),
    (r"^layers\.(\d+)\.text_ffn\.", r"encoder_ssd_layers.\1.ffn."),
    (r"^layers\.(\d+)\.image_norm\.", r"decoder_ssd_layers.\1.layer_norm."),
    (r"^layers\.(\d+)\.image_ffn\.", r"decoder_ssd_layers.\1.ffn."),
    (r"^layers\.(\d+)\.cross_norm\.", r"decoder_ssd_layers.\1.co_layer_norm."),
    (r"^layers\.(\d+)\.cross_ssd\.", r"decoder_ssd_layers.\1.co_ssd."),
    (r"^layers\.(\d+)\.filter\.image\.", r"decoder_ssd_layers.\1.text_complex_weight.0."),
    (r"^layers\.(\d+)\.filter\.text\.", r"decoder_ssd_layers.\1.vision_complex_weight.0."),
    (r"^layers\.(\d+)\.filter\.joint\.", r"decoder_ssd_layers.\1.co_complex_weight.0."),
    (r"\.conv\.", ".conv1d_1."),
    (r"\.(u|q)_conv\.", r".\1_conv1d."),
    (r"\.time\.mlp_in\.", ".mlp4time_scale.1."),
    (r"\.time\.mlp_out\.", ".mlp4time_scale.3."),
    (r"\.time\.conv_in\.", ".conv1d4time_1."),
    (r"\.time\.conv_out\.", ".conv1d4time_2."),
    (r"\.time_gate\.", ".time_gate_residual.1."),
    (r"\.time_norm\.", ".time_layer_norm."),
    (r"\.ffn\.norm\.", ".ffn.layer_norm."),
]
_CONVOLUTION = re.compile(r"conv1d\w*\.weight$")
_ALIAS = re.compile(r"^decoder_ssd_layers\.(\d+)\.ssd\.")
_NOT_WEIGHTS = {"text_embedding": "text", "vision_embedding": "image"}


@dataclass(frozen=True)
class LoadReport:
    """What did not find its counterpart, under published names."""

    missing: tuple[str, ...]
    """Weights of ours that the file does not hold; they keep their start values."""
    unexpected: tuple[str, ...]
    """Keys of the file that this model has no place for."""


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The model's tensors of a published checkpoint, on the CPU; nothing in the file is executed.

    Raises:
        RunError: truncated, or not such a checkpoint.
    """
    try:
        document = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError(f"{path} is not a published checkpoint: {reason}", hint="the file may be truncated") from None
    weights = document.get("model", document) if isinstance(document, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise RunError(f"{path} holds no model", hint="a published checkpoint is a dict with the key `model`")
    return weights


def sizes(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The model section that published weights were made with, read from their shapes.

    The number of groups cannot be read: as many as heads, as shipped. Temperature and dropouts leave no trace.

    Raises:
        RunError: a tensor that every published model has is not there.
    """
    block = "encoder_ssd_layers.0.ssd."
    needed = [
        "text_adapter.0.weight",
        *(block + name for name in ("A_log", "norm.weight", "in_proj.weight", "conv1d_1.weight")),
    ]
    if missing := [name for name in needed if name not in weights]:
        raise RunError(f"the checkpoint lacks {', '.join(missing)}", hint="is it a checkpoint of MMM4Rec?")
    hidden, heads, inner = (len(weights[name]) for name in needed[:3])
    states = (len(weights[block + "in_proj.weight"]) - 2 * inner - heads) // 2
    found: dict[str, Any] = {
        "hidden_size": hidden,
        "num_layers": len({name.split(".")[1] for name in weights if name.startswith("encoder_ssd_layers.")}),
        "d_state": states // heads,
        "n_groups": heads,
        "d_conv": weights[block + "conv1d_1.weight"].shape[-1],
        "expand": inner // hidden,
        "head_dim": inner // heads,
        "item_bias": "text_item_embedding_bias" in weights,
        "fusion": ("static", "shared", "instance")[weights["fusion_factor"].dim() if "fusion_factor" in weights else 0],
        "time": "published" if "layer_norm_time.weight" in weights else "none",
        "feed_forward": "encoder_ssd_layers.0.ffn.fc1.weight" in weights,
    }
    if found["feed_forward"]:
        found["inner_size"] = len(weights["encoder_ssd_layers.0.ffn.fc1.weight"])
    if found["time"] == "published":
        found["max_len"] = len(weights["layer_norm_time.weight"])
        found["point_time_gate"] = len(weights[block + "time_gate_residual.1.weight"]) > 1
    return found


def published_name(name: str) -> str | None:
    """The published name of one of our state-dict keys, or None if it has none."""
    if name in ("text.missing", "image.missing"):
        return None
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def load(model: nn.Module, state_dict: Mapping[str, Tensor]) -> LoadReport:
    """Copy published weights into the model; feature tables in the file fill the model's own.

    Raises:
        ValueError: shapes that do not fit, each named with both.
    """
    own = model.state_dict(keep_vars=True)
    targets = {name: tensor for key, tensor in own.items() if (name := published_name(key)) is not None}
    targets |= {name: model.get_submodule(part).features for name, part in _NOT_WEIGHTS.items() if name in state_dict}
    given = {name: tensor for name, tensor in state_dict.items() if not _ALIAS.match(name)}
    if "fusion_factor" not in targets and "fusion_factor" in given and given["fusion_factor"].dim() == 0:
        del given["fusion_factor"]  # static fusion: the constant 1
    wrong = []
    copies = []
    for name in targets.keys() & given.keys():
        value = given[name]
        if _CONVOLUTION.search(name) and value.dim() == 3:
            value = value.squeeze(1)
        if value.shape != targets[name].shape:
            wrong.append(f"{name}: the file holds {list(value.shape)}, the model takes {list(targets[name].shape)}")
        copies.append((targets[name], value))
    if wrong:
        raise ValueError("\n".join(sorted(wrong)))
    with torch.no_grad():
        for target, value in copies:
            target.copy_(value)
    return LoadReport(
        missing=tuple(sorted(targets.keys() - given.keys())), unexpected=tuple(sorted(given.keys() - targets.keys()))
    )


def export(model: nn.Module) -> dict[str, Tensor]:
    """The model's weights under published names and shapes, aliases of the shared block included."""
    state: dict[str, Tensor] = {}
    for key, tensor in model.state_dict().items():
        name = published_name(key)
        if name is None:
            continue
        if _CONVOLUTION.search(name):
            tensor = tensor.unsqueeze(1)
        state[name] = tensor
        if name.startswith("encoder_ssd_layers.") and ".ssd." in name:
            state["decoder" + name.removeprefix("encoder")] = tensor
    state.setdefault("fusion_factor", torch.tensor(1.0))
    return state
