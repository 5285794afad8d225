"""The same encoding through Ray Data (extra `[ray]`), for clusters: CPU tasks decode, actors with the model encode.

One row is one job of the plan, so that the batches, and with them the vectors, are those of the local engine. Every
machine must see the pictures and the models under the same paths.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmm4rec_cli.errors import DeviceError, UsageError
from mmm4rec_cli.features.encoders import Encoder, load_encoder
from mmm4rec_cli.features.parts import Encoded, OpenPart, Plan
from mmm4rec_cli.features.prepare import Preparers
from mmm4rec_cli.features.store import Side
from mmm4rec_cli.reporter import Reporter, SilentReporter
from mmm4rec_cli.settings.schema import FeatureSettings

_Batch = dict[str, Any]


class _Prepare:
    """Decodes, resizes and tokenises; each call takes one row."""

    def __init__(self, preparers: Preparers) -> None:
        self._preparers = preparers

    def __call__(self, batch: _Batch) -> _Batch:
        side, inputs = batch["side"][0], batch["inputs"][0]
        given = list(inputs) if side == "text" else [None if path is None else Path(path) for path in inputs]
        ready = self._preparers[side](given)
        return {"job": batch["job"], "side": batch["side"], "ready": _boxed((ready.arrays, ready.failed))}


class _Encode:
    """An actor that holds the model."""

    def __init__(self, settings: FeatureSettings, device: str) -> None:
        self._encoder = load_encoder(settings, device, SilentReporter())

    def __call__(self, batch: _Batch) -> _Batch:
        side: Side = batch["side"][0]
        arrays, failed = batch["ready"][0]
        vectors = None if arrays is None else next(self._encoder.side(side).stream([arrays]))
        return {"job": batch["job"], "answer": _boxed((vectors, failed))}


def _boxed(value: Any) -> Any:
    """One object as a column of one row."""
    column = np.empty(1, dtype=object)
    column[0] = value
    return column


def encoded_by_ray(
    encoder: Encoder,
    plans: Mapping[Side, Plan],
    todo: Mapping[Side, Sequence[int]],
    settings: FeatureSettings,
    device: str,
    reporter: Reporter,
) -> Iterator[Encoded]:
    """Encode parts on the Ray cluster that `RAY_ADDRESS` names, else on one of this machine's own.

    Args:
        encoder: its preparers travel; each actor loads its model anew from the settings.
        plans: what is to be encoded.
        todo: which parts of it.
        settings: which encoder, and how.
        device: as for `load_encoder`, in the actors.
        reporter: hears of progress.

    Raises:
        UsageError: Ray is not installed.
        DeviceError: Ray could not do it.
    """
    try:
        import ray
        import ray.data
        from ray.data import ActorPoolStrategy, DataContext
    except ImportError as error:
        raise UsageError(
            f"--engine ray: Ray Data is not installed ({error})", hint="install it: pip install 'mmm4rec[ray]'"
        ) from None
    jobs = [
        (side, part, places)
        for side in plans
        for part in todo[side]
        for places in plans[side].jobs(part, encoder.batch_size(side, settings))
    ]
    for side in plans:
        for part in todo[side]:
            if not plans[side].span(part):
                yield OpenPart(plans[side], part, encoder.width(side)).encoded
    if not jobs:
        return
    started_here = not ray.is_initialized()
    if started_here:
        ray.init(logging_level=logging.ERROR, log_to_driver=False, include_dashboard=False)
    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    gpus = int(ray.cluster_resources().get("GPU", 0)) if encoder.on_gpu else 0
    rows = [
        {
            "job": number,
            "side": side,
            "inputs": [None if one is None else str(one) for one in (plans[side].inputs[place] for place in places)],
        }
        for number, (side, _, places) in enumerate(jobs)
    ]
    dataset = (
        ray.data.from_items(rows, override_num_blocks=len(rows))
        .map_batches(_Prepare(encoder.preparers).__call__, batch_size=1, batch_format="numpy")
        .map_batches(
            _Encode,
            fn_constructor_args=(settings, device),
            batch_size=1,
            batch_format="numpy",
            compute=ActorPoolStrategy(size=max(1, gpus)),
            num_gpus=1 if gpus else None,
        )
    )
    try:
        open_parts: dict[tuple[Side, int], OpenPart] = {}
        with reporter.stage("texts and images on Ray", len(jobs), "batches") as progress:
            for row in dataset.iter_rows():
                side, part, places = jobs[row["job"]]
                vectors, failed = row["answer"]
                if (side, part) not in open_parts:
                    width = encoder.width(side) if vectors is None else vectors.shape[1]
                    open_parts[side, part] = OpenPart(plans[side], part, width)
                one = open_parts[side, part]
                one.fill(places, vectors, failed)
                progress.advance()
                if not one.left:
                    yield open_parts.pop((side, part)).encoded
    except ray.exceptions.RayError as error:
        raise DeviceError(
            f"Ray: {' '.join(str(error).split())[-300:]}", hint="look at Ray's own log, or leave out --engine ray"
        ) from error
    finally:
        if started_here:
            ray.shutdown()
