"""Texts and pictures made ready for a model, in processes or threads that run ahead of it.

A job is what one call of a model takes: some texts, or the paths of some pictures. Jobs come out in the order in which
they went in. Sizes: B texts or pictures of one job.
"""

import multiprocessing
import os
import shutil
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from mmm4rec_cli.data.images import UnreadableImage, decoding, open_image
from mmm4rec_cli.errors import DeviceError
from mmm4rec_cli.features.store import Side
from mmm4rec_cli.reporter import Reporter
from mmm4rec_cli.settings.schema import FeatureSettings

Arrays = Mapping[str, Any]
"""What a model takes, by name: numpy arrays or torch tensors [B, …]."""

WHITE = Image.new("RGB", (200, 200), "white")
"""The published stand-in for a picture."""

_MANY = 2048
"""Inputs from which processes are worth their start."""
_MOST_PROCESSES = 32
_AHEAD = 2


class Job(NamedTuple):
    """What one call of a model takes: texts, or paths of pictures (None for the white one)."""

    side: Side
    inputs: list[Any]


class Ready(NamedTuple):
    """A job made ready.

    Attributes:
        arrays: of the inputs that could be made ready, in their order; None if there is none.
        failed: place in the job -> why not.
    """

    arrays: Arrays | None
    failed: dict[int, str]


@dataclass(frozen=True)
class Pictures:
    """Opens and prepares the pictures of a job; goes through pickle if `one` does."""

    one: Callable[[Image.Image], Mapping[str, npt.NDArray[Any]]]

    def __call__(self, paths: Sequence[Any]) -> Ready:
        """Arrays [B, …] of those that can be read, and why the others cannot."""
        good, failed = [], {}
        for place, path in enumerate(paths):
            try:
                good.append(self.one(WHITE if path is None else open_image(path)))
            except MemoryError:
                failed[place] = f"{path}\ttoo large for this machine's memory"
            except (UnreadableImage, ValueError) as error:
                failed[place] = f"{path}\t{error}"
        arrays = {key: np.stack([one[key] for one in good]) for key in good[0]} if good else None
        return Ready(arrays, failed)


@dataclass(frozen=True)
class Texts:
    """Makes the texts of a job ready; goes through pickle if `batch` does."""

    batch: Callable[[Sequence[str]], Arrays]

    def __call__(self, texts: Sequence[Any]) -> Ready:
        """Arrays [B, …] of all texts."""
        return Ready(self.batch(texts), {})


Preparers = Mapping[Side, Pictures | Texts]


@dataclass(frozen=True)
class _Jobs:
    """A torch dataset whose index is the job itself, so that no worker holds more than the jobs under way."""

    preparers: Preparers

    def __getitem__(self, job: Job) -> tuple[dict[str, Any] | None, dict[int, str]]:
        import torch

        with decoding():
            arrays, failed = self.preparers[job.side](job.inputs)
        if arrays is None:
            return None, failed
        return {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in arrays.items()}, failed


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def n_processes(settings: FeatureSettings, count: int, on_gpu: bool) -> int:
    """How many processes make `count` inputs ready; 0 for none, threads do it.

    On the CPU the model itself takes the cores, and threads keep up with it.
    """
    if settings.workers != "auto":
        return settings.workers
    return min(cores(), _MOST_PROCESSES) if on_gpu and count >= _MANY else 0


@contextmanager
def prepared(
    jobs: Iterable[Job], preparers: Preparers, processes: int, reporter: Reporter, pin: bool = False
) -> Iterator[Iterator[Ready]]:
    """Give the jobs made ready, in their order; whoever leaves the block early leaves no process behind.

    Processes are started as `multiprocessing.set_start_method` says, else by spawn, the way that is sound beside the
    threads of torch, polars and Arrow.

    Args:
        jobs: taken no faster than they are needed.
        preparers: what makes a job of each side ready.
        processes: 0 for threads.
        reporter: hears if there is too little shared memory for processes.
        pin: put the arrays into pinned memory, for copies to a GPU that nobody waits for.

    Raises:
        DeviceError: a process died.
    """
    if processes and not _shared_memory():
        reporter.note("less than 1 GiB of shared memory in /dev/shm: decoding in threads instead of processes")
        processes = 0
    results = _from_processes(jobs, preparers, processes, pin) if processes else _from_threads(jobs, preparers)
    try:
        with nullcontext() if processes else decoding():
            yield results
    finally:
        results.close()


def _shared_memory() -> bool:
    """Whether arrays can go from process to process; containers often have next to none."""
    folder = Path("/dev/shm")  # noqa: S108 (looked at, not written to)
    return not folder.is_dir() or shutil.disk_usage(folder).free >= 2**30


def _from_threads(jobs: Iterable[Job], preparers: Preparers) -> Generator[Ready, None, None]:
    """Threads work a little ahead of whoever takes the results."""
    threads = min(16, cores())
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Ready]] = deque()
        try:
            for job in jobs:
                waiting.append(pool.submit(preparers[job.side], job.inputs))
                if len(waiting) > threads + _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _from_processes(
    jobs: Iterable[Job], preparers: Preparers, processes: int, pin: bool
) -> Generator[Ready, None, None]:
    from torch.utils.data import DataLoader

    dataset: Any = _Jobs(preparers)
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=jobs,
        num_workers=processes,
        prefetch_factor=_AHEAD,
        collate_fn=_as_it_is,
        pin_memory=pin,
        multiprocessing_context=multiprocessing.get_start_method(allow_none=True) or "spawn",
    )
    results = iter(loader)
    try:
        for arrays, failed in results:
            yield Ready(arrays, failed)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DeviceError(
            f"a process that decodes pictures ended on its own ({' '.join(str(error).split())[:160]})",
            hint="decode in threads with --set features.workers=0, or in fewer processes; a script of your own needs "
            "its `if __name__ == '__main__':`",
        ) from error
    finally:
        # the last reference ends the processes
        del results, loader


def _as_it_is(value: Any) -> Any:
    return value
