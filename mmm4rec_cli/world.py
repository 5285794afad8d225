"""The processes that share one training or evaluation, as `torchrun` starts them; usually there is only one.

The first process (rank 0) alone writes files and speaks; all of them walk through the same program.
"""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmm4rec_cli.errors import DeviceError

if TYPE_CHECKING:
    import torch


def first_process() -> bool:
    """Whether this process writes files and speaks."""
    return os.environ.get("RANK", "0") == "0"


@dataclass(frozen=True)
class World:
    """This process among those of the job."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def share(self, n: int) -> slice:
        """This process's contiguous part of n things; the parts differ by at most one."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def add_up(self, tensor: "torch.Tensor") -> None:
        """Replace a tensor by its sum over all processes."""
        if self.size > 1:
            import torch.distributed

            torch.distributed.all_reduce(tensor)

    def greatest(self, tensor: "torch.Tensor") -> "torch.Tensor":
        """Replace a tensor by its greatest values over all processes; gives it back."""
        if self.size > 1:
            import torch.distributed

            torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
        return tensor

    def first_says(self, value: Any) -> Any:
        """What the first process gives, on every process."""
        if self.size == 1:
            return value
        import torch.distributed

        said = [value]
        torch.distributed.broadcast_object_list(said, src=0)
        return said[0]

    def gathered(self, value: Any) -> list[Any]:
        """What every process gives, in the order of ranks."""
        if self.size == 1:
            return [value]
        import torch.distributed

        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return values


def join(device: "torch.device") -> World:
    """Meet the other processes that `torchrun` started; alone where it did not start this one.

    Raises:
        DeviceError: the processes cannot meet.
    """
    import torch.distributed

    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World()
    if not torch.distributed.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # Objects travel through gloo, on the CPU, so that they never wait for the GPU's queue.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        try:
            torch.distributed.init_process_group(backend)
        except (RuntimeError, ValueError) as error:
            raise DeviceError(
                f"the {size} processes could not meet: {str(error).splitlines()[0]}",
                hint="start them with torchrun --nproc-per-node N -m mmm4rec_cli …",
            ) from error
    return World(torch.distributed.get_rank(), size)


def leave() -> None:
    """Part from the other processes, if there are any."""
    import sys

    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
