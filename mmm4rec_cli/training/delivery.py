"""Windows of sequences in the host's memory, on their way to the device before they are needed."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch

from mmm4rec_cli.data.sequences import Sequences, Windows
from mmm4rec_cli.training.step import MicroBatch, windows_of
from mmm4rec_cli.world import World

AHEAD = 2
"""Groups of micro-batches that are delivered ahead of the one in work."""


class Delivery:
    """Brings windows from the host's memory to the device while it computes.

    A thread gathers them into pinned memory; a stream of its own copies them.

    Args:
        sequences: in the host's memory.
        device: where windows go.
        max_len: places of a window.
        world: the processes that share a micro-batch.
        with_target_time: see `Sequences.windows`.
    """

    def __init__(
        self, sequences: Sequences, device: torch.device, max_len: int, world: World, *, with_target_time: bool
    ) -> None:
        self.sequences, self.device, self.max_len, self.world = sequences, device, max_len, world
        self.with_target_time = with_target_time
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def ahead(self, groups: Iterator[list[MicroBatch]]) -> Iterator[list[MicroBatch]]:
        """The same groups in the same order, each micro-batch with its windows."""
        with ThreadPoolExecutor(1) as thread:
            waiting: deque[Future[tuple[list[MicroBatch], Any]]] = deque()
            for group in groups:
                waiting.append(thread.submit(self._sent, group))
                if len(waiting) > AHEAD:
                    yield self._received(*waiting.popleft().result())
            while waiting:
                yield self._received(*waiting.popleft().result())

    def _sent(self, group: list[MicroBatch]) -> tuple[list[MicroBatch], Any]:
        """In the thread: the group with its windows, and what to wait for before they are read."""
        gathered = [
            windows_of(self.sequences, batch, self.max_len, self.world, with_target_time=self.with_target_time)
            for batch in group
        ]
        if self.stream is None:
            return [replace(b, windows=w) for b, w in zip(group, gathered, strict=True)], None
        with torch.cuda.stream(self.stream):
            moved = [_pinned(windows).to(self.device) for windows in gathered]
            event = self.stream.record_event()
        return [replace(b, windows=w) for b, w in zip(group, moved, strict=True)], event

    def _received(self, group: list[MicroBatch], event: Any) -> list[MicroBatch]:
        if event is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(event)
            for batch in group:
                for tensor in batch.inputs():
                    tensor.record_stream(stream)
        return group


def _pinned(windows: Windows) -> Windows:
    pinned: dict[str, Any] = {name: tensor.pin_memory() for name, tensor in windows.tensors().items()}
    return replace(windows, **pinned)
