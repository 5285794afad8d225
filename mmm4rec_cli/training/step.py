"""One micro-batch: windows, loss and gradients, on a GPU as recorded CUDA graphs.

Letters: B targets of the micro-batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mmm4rec_cli.data.sequences import Sequences, Windows
from mmm4rec_cli.device import precision
from mmm4rec_cli.models.interface import SequenceModel
from mmm4rec_cli.models.places import rounded_rows
from mmm4rec_cli.world import World
from mmm4rec_kernels import compile_once, seeds_at_once


@dataclass(frozen=True)
class MicroBatch:
    """What one process computes of a micro-batch."""

    positions_B: Tensor
    """Flat positions of its own targets."""
    candidates_C: Tensor | None
    """Flat positions of the whole micro-batch's targets, where they are the candidates; else None."""
    places: int
    """Sum of the lengths of its own windows."""
    weight: float
    """Factor on the mean loss of its own targets."""
    negative_N: Tensor | None = None
    """Items drawn for the sampled loss."""
    windows: Windows | None = None
    """Its windows where they come from the host's memory, already on their way; None: they are gathered here."""

    def inputs(self) -> list[Tensor]:
        """Everything that is read of it on the device."""
        tensors = [self.positions_B, self.candidates_C, self.negative_N]
        if self.windows is not None:
            tensors = [self.negative_N, *self.windows.tensors().values()]
        return [tensor for tensor in tensors if tensor is not None]

    def cloned(self) -> "MicroBatch":
        """The same in memory of its own, for `fill`."""
        if self.windows is not None:
            own: dict[str, Any] = {name: tensor.clone() for name, tensor in self.windows.tensors().items()}
            return replace(self, negative_N=_clone(self.negative_N), windows=replace(self.windows, **own))
        candidates_C, negative_N = _clone(self.candidates_C), _clone(self.negative_N)
        return replace(self, positions_B=self.positions_B.clone(), candidates_C=candidates_C, negative_N=negative_N)

    def fill(self, other: "MicroBatch") -> None:
        """Take over the content of another one of the same shapes."""
        for own, given in zip(self.inputs(), other.inputs(), strict=True):
            own.copy_(given, non_blocking=True)


def _clone(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()


class Gradients:
    """Adds the gradient of a micro-batch's loss to the parameters' and returns the loss.

    On a GPU the whole of it, from gathering windows to the last gradient, is recorded once for each number of targets
    and rows and then replayed: the same kernels in the same order, without the host's work. What cannot be recorded
    runs as it is.

    Args:
        model: in training mode, on the device of the targets; its parameters have gradients to add to.
        sequences: where windows are gathered, on the same device; or on the CPU, and each micro-batch brings its own.
        in_batch: candidates are the targets of the whole micro-batch.
        max_len: T.
        number_format: `runtime.precision`.
        device: where the model is.
        world: the processes that share a micro-batch.
        graphs: record CUDA graphs.
        say: takes a line when recording fails.
    """

    def __init__(
        self,
        model: SequenceModel,
        sequences: Sequences,
        *,
        in_batch: bool,
        max_len: int,
        number_format: str,
        device: torch.device,
        world: World | None = None,
        graphs: bool = True,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.model, self.sequences = model, sequences
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.totals = [p.grad for p in self.parameters if p.grad is not None]
        self.in_batch, self.max_len, self.number_format = in_batch, max_len, number_format
        self.device, self.world = device, world or World()
        self.graphs = graphs and device.type == "cuda"
        self.say = say
        self._recorded: dict[tuple[int, int, int], _Recorded] = {}
        self._pool: Any = None
        self._dry = False
        """Numbers are arbitrary and are not kept."""

    def rows_of(self, batch: MicroBatch) -> int:
        """Rows that a micro-batch is computed with."""
        return rounded_rows(batch.places, len(batch.positions_B), self.max_len) if self.graphs else batch.places

    def __call__(self, batch: MicroBatch) -> Tensor:
        """The mean loss of the micro-batch's own targets, float64; on a GPU it may not be computed yet."""
        shape = self.shape_of(batch)
        if not self.graphs:
            weight = torch.tensor(batch.weight, dtype=torch.float64, device=self.device)
            return self._compute(batch, weight)
        recorded = self._recorded.get(shape)
        if recorded is None:
            recorded = self._record(batch)
            if recorded is None:
                return self(batch)
            self._recorded[shape] = recorded
        return recorded.replay(batch)

    def shape_of(self, batch: MicroBatch) -> tuple[int, int, int]:
        """What a recorded graph is bound to: numbers of targets, of candidates and of rows."""
        candidates = 0 if batch.candidates_C is None else len(batch.candidates_C)
        return len(batch.positions_B), candidates, self.rows_of(batch)

    def _compute(self, batch: MicroBatch, weight: Tensor) -> Tensor:
        windows = self._windows(batch)
        with precision(self.number_format, self.device), seeds_at_once(self.device):
            loss = self._loss(windows)
        gradients = torch.autograd.grad(loss * weight.to(loss.dtype), self.parameters, allow_unused=True)
        self._add(gradients)
        return loss.detach().double()

    def _add(self, gradients: Sequence[Any]) -> None:
        """Add to the parameters' gradients."""
        if self._dry:
            return
        # One operation for all parameters; accumulating each on its own costs a kernel a parameter, and so would one
        # gradient whose strides are others than its parameter's.
        found = [i for i, gradient in enumerate(gradients) if gradient is not None]
        torch._foreach_add_([self.totals[i] for i in found], [gradients[i].contiguous() for i in found])

    def _loss(self, windows: Windows) -> Tensor:
        return self.model.training_loss(windows, in_batch=self.in_batch)

    def _windows(self, batch: MicroBatch) -> Windows:
        windows = batch.windows
        if windows is None:
            reads_target_time = self.model.reads_target_time
            windows = windows_of(self.sequences, batch, self.max_len, self.world, with_target_time=reads_target_time)
        return replace(windows, rows=self.rows_of(batch)).to(self.device)

    def _record(self, batch: MicroBatch) -> "_Recorded | None":
        """Record a graph; the parameters' gradients and the random state are left as they were."""
        held = batch.cloned()
        weight = torch.zeros((), dtype=torch.float64, device=self.device)
        random = torch.cuda.get_rng_state(self.device)
        try:
            kind = (type(self), type(self.model), self.number_format, self.in_batch)
            compile_once(kind, self.device, lambda: self._rehearse(held, weight))
            if self._pool is None:
                # Once as it is, so that nothing is set up while recording; with weight 0 it adds 0 to the gradients.
                side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    self._compute(held, weight)
                torch.cuda.current_stream().wait_stream(side)
                self._pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            # What the thread of the delivery asks of the GPU meanwhile is none of the graph's business.
            mode = "global" if batch.windows is None else "thread_local"
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode=mode):
                loss = self._compute(held, weight)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.graphs = False
            self.say(f"training without CUDA graphs, which is slower: {str(error).splitlines()[0]}")
            return None
        finally:
            torch.cuda.set_rng_state(random, self.device)
        return _Recorded(graph, held, weight, loss)

    def _rehearse(self, held: MicroBatch, weight: Tensor) -> None:
        """All that a micro-batch does, but that its gradients are not kept."""
        self._dry = True
        try:
            self._compute(held, weight)
        finally:
            self._dry = False


@dataclass(frozen=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    held: MicroBatch
    weight: Tensor
    loss: Tensor

    def replay(self, batch: MicroBatch) -> Tensor:
        self.held.fill(batch)
        self.weight.fill_(batch.weight)
        self.graph.replay()
        return self.loss.clone()


def windows_of(
    sequences: Sequences, batch: MicroBatch, max_len: int, world: World, *, with_target_time: bool
) -> Windows:
    """The windows of a micro-batch, among its candidates where it names them."""
    windows = sequences.windows(batch.positions_B, max_len, with_target_time=with_target_time)
    if batch.candidates_C is None:
        return windows
    share = world.share(len(batch.candidates_C))
    return windows.among(sequences.items_N[batch.candidates_C].long(), share.start)


class ShardedGradients(Gradients):
    """As `Gradients` for the full loss, with the item table in slices over the processes.

    Micro-batches without `candidates_C` (smaller than the number of processes) are computed on the whole table.
    Nothing is recorded: processes that wait for one another inside a graph cannot be interrupted.
    """

    def _loss(self, windows: Windows) -> Tensor:
        if windows.candidate_C is None:
            return super()._loss(windows)
        return self.model.sharded_loss(windows, self.world)
