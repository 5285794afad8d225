"""Work beside the main line: on a GPU on a second stream, where small kernels run while large ones leave room.

Gradients take the same way back. Results are those of the main line: the same kernels, in an order that the waits keep.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mmm4rec_kernels import second

Tensors = tuple[Tensor | None, ...]


class Aside:
    """Tensors that are computed beside the main line.

    Args:
        device: where. On a GPU the work begins now, with what the main line has up to now; on a CPU when it is asked
            for, so that random numbers are drawn in the order of the main line.
        work: computes the tensors, also from those `given` by other work aside.
    """

    def __init__(self, device: torch.device, work: Callable[[], Tensors]) -> None:
        self._work = work
        self._given: Tensors | None = None
        self._done: torch.cuda.Event | None = None
        if device.type == "cuda":
            stream = second.second_stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._given = work()
                self._done = stream.record_event()

    @property
    def given(self) -> Tensors:
        """The tensors, for other work aside."""
        if self._given is None:
            self._given = self._work()
        return self._given

    def awaited(self) -> Tensors:
        """The tensors, for the main line."""
        if self._done is not None:
            main = torch.cuda.current_stream()
            main.wait_event(self._done)
            for tensor in self.given:
                if tensor is not None:
                    tensor.record_stream(main)
        return self.given
