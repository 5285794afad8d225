"""How fast a model answers: latency of one history, users a second, memory. Needs torch and pyarrow, no data set.

    python examples/benchmarks/serve.py                                   # 26,000 and 1,000,000 items, paper sizes
    python examples/benchmarks/serve.py --items 2000 --seconds 0.2 --hidden 64

The model is untrained and its vectors are random: speed does not depend on what it learnt. `evaluate` ranks held-out
targets among all items, `recommend` answers whole blocks of users with the seen items hidden; both are the library's
own paths, Python around them included. The yardstick beside them is what most tools do: all scores of a block of
users, then argsort. Peak memory is what a measurement took above what was there before it (model and item table).
"""

import argparse
import ctypes
import json
import platform
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

from mmm4rec_cli.data.dataset import Dataset
from mmm4rec_cli.data.sequences import Sequences
from mmm4rec_cli.device import precision, resolve_device
from mmm4rec_cli.evaluation.evaluate import Ranking, rank_split
from mmm4rec_cli.evaluation.recommend import Asked, Recommender
from mmm4rec_cli.features.store import ItemFeatures
from mmm4rec_cli.models.mmm4rec import MMM4Rec
from mmm4rec_cli.settings.schema import Settings

K = 10


def made_up(n_items: int, n_users: int, width: int) -> Dataset:
    """Users with 5 to 40 purchases of items drawn at random."""
    random = np.random.default_rng(0)
    counts = random.integers(5, 41, n_users)
    n = int(counts.sum())
    sequences = Sequences.of(
        np.repeat(np.arange(n_users, dtype=np.int32), counts),
        random.integers(1, n_items + 1, n).astype(np.int32),
        1_500_000_000 + np.sort(random.integers(0, 10**8, n)),
        n_users,
    )
    vectors = random.standard_normal((n_items + 1, width), dtype=np.float32)
    has = np.arange(n_items + 1) > 0
    vectors[0] = 0
    return Dataset(
        name="made up",
        domains=("made up",),
        sequences=sequences,
        raw_item_ids=[f"B{i:09d}" for i in range(n_items)],
        raw_user_ids=[f"U{i:09d}" for i in range(n_users)],
        features=ItemFeatures(vectors, has, vectors, has, {}, ""),
        encoder="none",
        fingerprint="",
    )


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call, the device's work included."""
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_mib(call: Callable[[], object], device: torch.device) -> float:
    """MiB that a call takes above what was held before it: of the GPU, or of the process (Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back first, or the call would find it there
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to what is held now
    before = _status("VmRSS")
    call()
    return (_status("VmHWM") - before) / 2**10


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])


def rate(call: Callable[[int], object], seconds: float, device: torch.device, most: int, first: int = 64) -> float:
    """Units a second of `call(n)`, n grown until one call takes about `seconds`."""
    n = min(first, most)
    while True:
        call(n)  # compiles, allocates
        took = seconds_of(partial(call, n), device)
        if n == most or took >= 0.5 * seconds:
            return n / took
        n = min(most, max(2 * n, int(0.8 * n * seconds / max(took, 1e-6))))


def rows(
    n_items: int, n_users: int, settings: Settings, width: int, device: torch.device, seconds: float
) -> Iterator[dict[str, object]]:
    """The measurements of one catalogue, one document each."""
    torch.manual_seed(0)
    dataset = made_up(n_items, n_users, width)
    features = torch.from_numpy(dataset.features.text).to(device)
    model = MMM4Rec(settings.model, features, features).to(device).eval()
    sequences, tests = dataset.sequences.to(device), dataset.sequences.split("leave_one_out").test.to(device)
    max_len = settings.model.max_len
    ranking = Ranking(batch_size=settings.evaluate.batch_size, precision=settings.runtime.precision)
    with torch.inference_mode(), precision(settings.runtime.precision, device):
        model.item_table()
        yield {"what": "item table, once", "seconds": seconds_of(model.item_table, device)}
    recommender = Recommender(model, dataset, [None] * n_items, settings, device)

    def recommend(n: int) -> None:
        for block in recommender.recommend((Asked(raw) for raw in dataset.raw_user_ids[:n]), K):
            recommender.table(block)

    def one(user: int) -> None:
        begin, end = dataset.sequences.offsets_U1[user : user + 2].tolist()
        history = [recommender.raw(item) for item in dataset.sequences.items_N[begin:end].tolist()]
        times = dataset.sequences.times_N[begin:end].tolist()
        (found,) = recommender.recommend([Asked(None, history, times)], K)
        recommender.documents(found)

    for user in range(5):
        one(user)
    took, begin = [], time.perf_counter()
    while len(took) < 20 or (time.perf_counter() - begin < seconds and len(took) < 1000):
        took.append(1000 * seconds_of(partial(one, len(took) % n_users), device))
    p50, p99 = np.quantile(took, [0.5, 0.99]).tolist()
    yield {"what": "one history", "calls": len(took), "p50_ms": p50, "p99_ms": p99}

    def evaluate(n: int) -> None:
        rank_split(model, sequences, tests[:n], "test", max_len, ranking)

    scores = 1 << (28 if device.type == "cuda" else 25)  # what argsort may hold at once
    block = min(settings.evaluate.batch_size, max(1, scores // n_items))

    def argsort(n: int) -> None:
        with torch.inference_mode(), precision(settings.runtime.precision, device):
            for positions in torch.split(tests[:n], block):
                windows = sequences.windows(positions, max_len, with_target_time=model.reads_target_time)
                user_BD = model(windows.items_BT, windows.lengths_B, windows.timestamps_BT)
                order_BV = torch.argsort(user_BD @ recommender.item_VD.T, dim=1, descending=True)
                (order_BV == windows.target_B[:, None]).int().argmax(1)

    few = min(n_users, settings.evaluate.batch_size)
    for name, call in (("evaluate", evaluate), ("recommend", recommend), ("argsort of all scores", argsort)):
        found: dict[str, object] = {"what": name, "users_per_second": rate(call, seconds, device, n_users)}
        if name == "argsort of all scores":
            found["peak_mib"] = peak_mib(partial(call, block), device)
        else:
            found["peak_mib"] = peak_mib(partial(call, few), device)
            more = min(n_users, (4 if n_items < 100_000 or device.type == "cuda" else 2) * few)
            found["peak_mib_more_users"] = peak_mib(partial(call, more), device)
            found["users"], found["more_users"] = few, more
        yield found


def main(words: list[str] | None = None) -> list[dict[str, object]]:
    """Measure, print one line a figure, write them as JSON lines; gives them back."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", default="26000,1000000", help="sizes of the catalogue")
    parser.add_argument("--users", type=int, default=200_000, help="users that are made up")
    parser.add_argument("--hidden", type=int, default=256, help="model.hidden_size")
    parser.add_argument("--width", type=int, default=64, help="width of the given vectors; the item table is made once")
    parser.add_argument("--batch", type=int, default=1024, help="evaluate.batch_size: users a block")
    parser.add_argument("--seconds", type=float, default=3.0, help="time of one measurement, about")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="tf32", choices=("tf32", "fp32", "bf16"))
    parser.add_argument("--out", type=Path, default=None, help="JSON lines")
    given = parser.parse_args(words)
    device = resolve_device(given.device)
    settings = Settings()
    sizes = {"hidden_size": given.hidden, "inner_size": given.hidden, "head_dim": min(64, given.hidden // 4)}
    model = replace_in(settings.model, **sizes, item_bias=False)
    settings = settings.model_copy(
        update={
            "model": model,
            "evaluate": replace_in(settings.evaluate, batch_size=given.batch),
            "runtime": replace_in(settings.runtime, precision=given.precision),
        }
    )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    about = {
        **{"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__},
        **{"precision": given.precision, "hidden": given.hidden, "batch": given.batch},
    }
    found = []
    for n_items in map(int, given.items.split(",")):
        for row in rows(n_items, given.users, settings, given.width, device, given.seconds):
            figures = "  ".join(f"{k} {v:,.4g}" for k, v in row.items() if isinstance(v, (int, float)))
            print(f"{n_items:>9,} items  {row['what']:<22} {figures}", flush=True)
            found.append({**about, "items": n_items, **row})
    if given.out is not None:
        given.out.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return found


def replace_in(section, **values):
    """A frozen settings section with other values, checked."""
    return type(section).model_validate({**section.model_dump(), **values})


if __name__ == "__main__":
    main()
