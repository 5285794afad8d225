"""User vectors for evaluation and serving: on a GPU as recorded CUDA graphs, where the host would be too slow."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmm4rec_cli.data.sequences import Windows
from mmm4rec_cli.device import precision
from mmm4rec_cli.models.interface import SequenceModel
from mmm4rec_cli.models.places import rounded_rows
from mmm4rec_kernels import compile_once

RECORD_AT = 4
"""Times that a shape is met before it is recorded: recording costs as much as several calls."""


@dataclass(frozen=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    windows: Windows
    user_BD: Tensor


class RecordedUsers:
    """`SequenceModel.users` without gradients.

    Args:
        model: in evaluation mode; its parameters may change in place.
        number_format: `runtime.precision`.
        device: where the model is.
    """

    def __init__(self, model: SequenceModel, number_format: str, device: torch.device) -> None:
        self.model, self.number_format, self.device = model, number_format, device
        self.graphs = device.type == "cuda"
        self._met: dict[tuple[int, int | None], int] = {}
        self._recorded: dict[tuple[int, int | None], _Recorded] = {}

    def __call__(self, windows: Windows) -> Tensor:
        """User vectors [B, D] in the dtype that the model computes in.

        Args:
            windows: on any device; with `rows` that many places are computed, and no padding.
        """
        windows = windows.to(self.device)
        if not self.graphs:
            return self._compute(windows)
        users, length = windows.items_BT.shape
        if windows.rows is not None:
            windows = replace(windows, rows=rounded_rows(windows.rows, users, length))
        shape = (users, windows.rows)
        if shape not in self._met:
            kind = (type(self), type(self.model), self.number_format)
            compile_once(kind, self.device, lambda: self._compute(windows))
        self._met[shape] = self._met.get(shape, 0) + 1
        if shape not in self._recorded:
            if self._met[shape] < RECORD_AT:
                return self._compute(windows)
            self._recorded[shape] = self._record(windows)
        recorded = self._recorded[shape]
        for name in ("items_BT", "lengths_B", "timestamps_BT"):
            getattr(recorded.windows, name).copy_(getattr(windows, name))
        recorded.graph.replay()
        return recorded.user_BD.clone()

    def _compute(self, windows: Windows) -> Tensor:
        with torch.inference_mode(), precision(self.number_format, self.device):
            return self.model.users(windows)

    def _record(self, windows: Windows) -> _Recorded:
        names = ("items_BT", "lengths_B", "timestamps_BT")
        held = replace(windows, **{name: getattr(windows, name).clone() for name in names})
        graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.graph(graph):
            user_BD = self._compute(held)
        return _Recorded(graph, held, user_BD)
