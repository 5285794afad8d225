"""Where the device time of a training step goes, part by part, beside the least that each part could take.

A step is run without a CUDA graph under the profiler; every kernel is put to the part of the model whose forward
launched it, or whose backward belongs to that forward. The floor of a part is the larger of two times: operations at
the rate of a large TF32 product, bytes at the rate of a large copy, both measured in the same run; bytes count each
float32 input once and each output once for the forward and for the backward pass, as if the part were one kernel each.
"""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from mmm4rec_cli.models import blocks, mmm4rec
from mmm4rec_cli.models.mmm4rec import MMM4Rec
from mmm4rec_cli.training.loop import Trainer
from mmm4rec_cli.training.step import MicroBatch, rounded_rows

PREFIX = "part: "


def ceilings() -> tuple[float, float]:
    """Operations a second of a large product with TF32 allowed, and bytes a second of a large copy."""
    a, b = (torch.randn(8192, 8192, device="cuda") for _ in range(2))
    big, other = (torch.empty(1 << 30, device="cuda") for _ in range(2))
    rates = []
    for run, amount in ((lambda: a @ b, 2 * 8192**3), (lambda: other.copy_(big), 2 * 4 * (1 << 30))):
        run()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(5):
            run()
        end.record()
        end.synchronize()
        rates.append(5 * amount / start.elapsed_time(end) * 1000)
    return rates[0], rates[1]


def _named(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any, **options: Any) -> Any:
        with torch.profiler.record_function(PREFIX + part):
            return function(*arguments, **options)

    return run


@contextlib.contextmanager
def _parts_named(model: MMM4Rec, trainer: Trainer) -> Iterator[None]:
    with contextlib.ExitStack() as stack:

        def name(owner: Any, attribute: str, part: str) -> None:
            stack.enter_context(mock.patch.object(owner, attribute, _named(part, getattr(owner, attribute))))

        name(blocks, "ssd_block", "block: convolution, scan, norm")
        name(blocks, "ssd_block_tail", "block: convolution, scan, norm")
        name(blocks, "residual_norm", "residual norms")
        name(blocks, "hardswish_dropout", "feed-forward activation")
        name(mmm4rec, "lookup", "item vectors of the places")
        name(mmm4rec, "order_of", "item vectors of the places")
        name(model, "catalogue_loss", "catalogue loss")
        name(model, "_fused", "catalogue loss")
        name(trainer.optimizer, "step", "optimiser")
        name(model, "_streams", "time streams")
        for path, module in model.named_modules():
            if path.endswith("adapter"):
                name(module, "forward", "catalogue through the adapters")
            elif path.endswith((".time", ".filter")):
                name(module, "forward", "time streams")
            elif path.endswith("_proj"):
                part = "products of the cross block" if "cross" in path else "products of the self block"
                name(module, "forward", part)
                name(module, "bare", part)
            elif path.endswith((".fc1", ".fc2")):
                name(module, "bare", "products of the feed-forwards")
            elif path.endswith(".ssd"):
                name(module, "tail", "products of the self block")
            elif path.endswith(".cross_ssd"):
                name(module, "tail", "products of the cross block")
        yield


def device_times(model: MMM4Rec, trainer: Trainer, batch: MicroBatch, device: torch.device) -> dict[str, list[float]]:
    """Microseconds (on a CPU: of the processor) and kernels of each part in one step."""
    weight = torch.tensor(batch.weight, dtype=torch.float64, device=device)
    on_gpu = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if on_gpu else [])]
    with _parts_named(model, trainer):
        for _ in range(2):
            with torch.profiler.profile(activities=activities) as seen:
                trainer.gradients._compute(batch, weight)
                trainer.optimizer.step()
                if on_gpu:
                    torch.cuda.synchronize()
    return _by_part(seen.events(), on_gpu)


def _by_part(events: Any, on_gpu: bool) -> dict[str, list[float]]:
    def part_of(event: Any) -> str | None:
        while event is not None:
            if event.name.startswith(PREFIX):
                return str(event.name.removeprefix(PREFIX))
            event = event.cpu_parent
        return None

    def backward_of(event: Any) -> int | None:
        while event is not None:
            if event.name.startswith("autograd::engine::evaluate_function"):
                return int(event.sequence_nr)
            event = event.cpu_parent
        return None

    on_cpu = [e for e in events if e.device_type == torch.autograd.DeviceType.CPU]
    forward: dict[int, str] = {}
    for event in on_cpu:
        part = part_of(event)
        if part is not None and event.sequence_nr >= 0 and backward_of(event) is None:
            forward[event.sequence_nr] = part
    found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for event in on_cpu:
        cost = sum(k.duration for k in event.kernels) if on_gpu else event.self_cpu_time_total
        count = len(event.kernels) if on_gpu else 1
        if count and not (on_gpu and event.name.startswith((PREFIX, "autograd::engine"))):
            number = backward_of(event)
            part = part_of(event) or forward.get(-1 if number is None else number) or "rest"
            found[part][0] += cost
            found[part][1] += count
    return dict(found)


def floors(model: MMM4Rec, users: int, rows: int, rates: tuple[float, float]) -> dict[str, tuple[float, float, float]]:
    """Of each part: operations, bytes and the least microseconds, forward and backward together."""
    config = model.config
    width, inner = config.hidden_size, config.expand * config.hidden_size
    states, heads = config.n_groups * config.d_state, config.n_heads
    items, features = model.text.features.shape
    table: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def add(part: str, operations: float, numbers: float) -> None:
        table[part][0] += operations
        table[part][1] += 4 * numbers

    def product(part: str, n: int, k: int, m: int, passes: int = 3) -> None:
        add(part, passes * 2 * n * k * m, passes * (n * k + n * m + k * m))

    product("catalogue through the adapters", 2 * items, features, width, passes=2)
    for i in range(config.num_layers):
        # Places of image that are read, and of the reading stream of the cross block; of the last layer only the ends.
        last = i == config.num_layers - 1
        read = users if last else rows
        near, far = (min(rows, n * users) if last else rows for n in (config.d_conv, 2 * config.d_conv - 1))
        for all_of, gated, reading in ((rows, rows, rows), (rows, near, far)):
            product("products of the self block", all_of, width, inner + states + heads)
            product("products of the self block", gated, width, inner)
            product("products of the self block", reading, width, states)
            product("products of the self block", gated, inner, width)
        product("products of the cross block", rows, width, inner + states + heads)
        product("products of the cross block", near, width, states)
        product("products of the cross block", read, width, inner)
        product("products of the cross block", read, inner, width)
        for n in (rows, read):
            product("products of the feed-forwards", n, width, config.inner_size)
            product("products of the feed-forwards", n, config.inner_size, width)
            add("feed-forward activation", 0, 5 * n * config.inner_size)
            add("residual norms", 0, 7 * n * width)
        # Inputs twice, their gradients once, the output and its gradient; the scan's products are quadratic in 20.
        for gated, reading in ((rows, rows), (near, far), (read, near)):
            numbers = rows * (inner + states + heads) + gated * inner + reading * states
            scan = 2 * 20 * (2 * states + 2 * inner) * 3
            add("block: convolution, scan, norm", 3 * gated * scan / 2, 3 * numbers + 2 * gated * inner)
        add("residual norms", 0, (7 * (rows + near) + 9 * read) * width)
        streams = users * heads * config.max_len
        add("time streams", 0, 24 * streams)
    add("residual norms", 0, 5 * 2 * rows * width)
    add("item vectors of the places", 0, 2 * (4 * rows + 2 * items) * width)
    product("catalogue loss", users, width, items)
    add("catalogue loss", 0, 2 * 5 * items * width)
    add("optimiser", 0, 7 * sum(p.numel() for p in model.parameters()))
    return {
        part: (operations, size, 1e6 * max(operations / rates[0], size / rates[1]))
        for part, (operations, size) in table.items()
    }


def lines(model: MMM4Rec, trainer: Trainer, batch: MicroBatch, device: torch.device) -> list[dict[str, Any]]:
    """Rows of the table, the largest first, with a sum."""
    times = device_times(model, trainer, batch, device)
    rates = ceilings() if device.type == "cuda" else (1e11, 1e10)
    users = len(batch.positions_B)
    least = floors(model, users, rounded_rows(batch.places, users, trainer.max_len), rates)
    table = []
    for part in sorted(times.keys() | least.keys(), key=lambda p: -times.get(p, [0.0])[0]):
        us, kernels = times.get(part, [0.0, 0])
        operations, size, floor = least.get(part, (0.0, 0.0, 0.0))
        table.append({"part": part, "us": us, "kernels": kernels, "gflop": operations / 1e9, "mb": size / 1e6})
        table[-1] |= {"floor_us": floor, "share": floor / us if us else None}
    total = {key: sum(row[key] for row in table) for key in ("us", "kernels", "gflop", "mb", "floor_us")}
    total |= {"part": f"sum (at {rates[0] / 1e12:.0f} TFLOP/s, {rates[1] / 1e12:.2f} TB/s)"}
    return [*table, total | {"share": total["floor_us"] / total["us"]}]
