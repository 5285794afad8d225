"""Work beside the main line: on a GPU on a second stream, where small kernels run while large ones leave room.

Gradients take the same way back. Results are those of the main line: the same kernels, in an order that the waits keep.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mmm4rec_kernels import second


class Aside:
    """Tensors that are computed beside the main line.

    Args:
        device: where; on a CPU they are computed at once.
        work: computes them from what the main line has up to now, or from `given` of earlier work.
    """

    def __init__(self, device: torch.device, work: Callable[[], tuple[Tensor | None, ...]]) -> None:
        self.given: tuple[Tensor | None, ...]
        """The tensors, for other work aside."""
        self._done: torch.cuda.Event | None = None
        if device.type != "cuda":
            self.given = work()
            return
        stream = second.second_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.given = work()
            self._done = stream.record_event()

    def awaited(self) -> tuple[Tensor | None, ...]:
        """The tensors, for the main line."""
        if self._done is not None:
            main = torch.cuda.current_stream()
            main.wait_event(self._done)
            for tensor in self.given:
                if tensor is not None:
                    tensor.record_stream(main)
        return self.given
