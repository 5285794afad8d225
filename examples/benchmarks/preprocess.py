"""Tables of the pre-training mix at full size: this library beside plain Python sets and dictionaries.

    python examples/benchmarks/preprocess.py --share 0.1 --folder mix            # both sides, rows compared
    python examples/benchmarks/preprocess.py --share 1 --only ours --folder mix  # 46 million ratings

Raw files of the size and shape of the mix's five categories are written first (synthetic: ratings grouped by item,
power-law users, log-normal items, 2 % exact duplicates, day stamps, whole metadata lines of which some are Python
literals, some repeat an item and some hold debris). Then each side runs in a process of its own; seconds and peak
memory are its own, taken at its end. With both sides the interactions and the ids must be equal. `--ratings-only`
gives each side metadata lines of nothing but the asin, so that the filters on the ratings are timed alone.
"""

import argparse
import gzip
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from mmm4rec_cli.data.domains import CATEGORIES
from mmm4rec_cli.workspace import Workspace

MIX = "fhckm"
SIZES = {
    "food": (5_074_160, 287_209),
    "home": (21_928_568, 1_301_225),
    "cds": (4_543_369, 544_442),
    "kindle": (5_722_988, 493_859),
    "movies": (8_765_568, 203_970),
}
"""Ratings and metadata lines of the real categories."""

PROSE = (
    "stainless steel kitchen set with soft handles and a lid that fits most pans made from organic cotton in a "
    "small workshop the story of a family over three generations told by its youngest daughter remastered from "
    "the original tapes includes bonus tracks roasted slowly for a mild taste &amp; a fine crust <b>new "
    "edition</b> dishwasher safe please read the size chart before you order this item ships from and is sold by "
    "the maker"
)
WORDS = PROSE.split()


def names(codes, prefix, width):
    """Ids like Amazon's: the prefix and `width` letters or digits, another one for each code."""
    letters = np.frombuffer(b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ", np.uint8)
    # An odd factor permutes the codes, so that ids and codes are in different orders.
    scattered = codes.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) % np.uint64(36 ** min(width, 12))
    out = np.empty((len(codes), len(prefix) + width), np.uint8)
    out[:, : len(prefix)] = np.frombuffer(prefix.encode(), np.uint8)
    for place in range(len(prefix) + width - 1, len(prefix) - 1, -1):
        out[:, place] = letters[scattered % np.uint64(36)]
        scattered //= np.uint64(36)
    size = out.shape[1]
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(size), len(out), [None, pa.py_buffer(np.ascontiguousarray(out))]
    ).cast(pa.string())


def write_ratings(path, rows, n_items, random):
    """Write about `rows` ratings of a category; gives the raw ids of its items."""
    fresh = int(rows / 1.02)
    degrees = np.minimum((1 - random.random(fresh)) ** (-1 / 1.5), 3000).astype(np.int64)
    users = np.repeat(np.arange(len(degrees), dtype=np.uint32), degrees)[:fresh]
    popularity = np.cumsum(random.lognormal(0, 2.1, n_items))
    items = np.searchsorted(popularity, random.random(fresh) * popularity[-1]).astype(np.uint32)
    again = random.integers(fresh, size=rows - fresh)
    order = np.concatenate([np.arange(fresh), again])
    order = order[np.argsort(items[order], kind="stable")]
    days = random.integers(11_000, 17_800, fresh) * 86_400
    ratings = random.choice(5, fresh, p=[0.08, 0.05, 0.08, 0.18, 0.61])
    user_names = names(np.arange(users.max() + 1), "A", 13)
    item_names = names(np.arange(n_items), "B0", 8)
    assert pc.count_distinct(user_names).as_py() == len(user_names)
    assert pc.count_distinct(item_names).as_py() == len(item_names)
    options = pyarrow.csv.WriteOptions(include_header=False, quoting_style="none")
    schema = pa.schema([("i", pa.string()), ("u", pa.string()), ("r", pa.string()), ("t", pa.int64())])
    rating_names = pa.array(["1.0", "2.0", "3.0", "4.0", "5.0"])
    with pyarrow.csv.CSVWriter(path, schema, write_options=options) as writer:
        for start in range(0, len(order), 1 << 20):
            rows_here = order[start : start + (1 << 20)]
            writer.write(
                pa.table(
                    [
                        item_names.take(pa.array(items[rows_here])),
                        user_names.take(pa.array(users[rows_here])),
                        rating_names.take(pa.array(ratings[rows_here])),
                        pa.array(days[rows_here]),
                    ],
                    schema=schema,
                )
            )
    return item_names


def metadata_line(asin, place, random, others):
    """One line of about two kilobytes, as the metadata files of 2018 have them."""

    def words(most):
        start, count = random.integers(len(WORDS)), random.integers(3, most)
        return " ".join((WORDS * 3)[start : start + count])

    description = [words(90)] if random.random() < 0.75 else []
    title = words(14).title()
    if random.random() < 0.01:
        title = '<span class="a-size-medium" data-x=\'{"a":1}\'>' + title + " var aPageStart = (new Date()).getTime();"
    picture = f"https://images-na.ssl-images-amazon.com/images/I/{asin}"
    pictures = [f"{picture}{n}L._SS40_.jpg" for n in range(random.integers(0, 4))]
    line = {
        "category": ["Home & Kitchen", "Kitchen & Dining", words(6)],
        "tech1": "",
        "description": description,
        "fit": "",
        "title": title,
        "also_buy": [others[(place * 31 + n * 7919) % len(others)] for n in range(random.integers(0, 45))],
        "tech2": "",
        "brand": words(5).title(),
        "feature": [words(25) for _ in range(random.integers(0, 5))],
        "rank": [f">#{place:,} in Kitchen & Dining (See top 100)"],
        "also_view": [others[(place * 17 + n * 104_729) % len(others)] for n in range(random.integers(0, 45))],
        "details": {"Shipping Weight:": "2 pounds", "UPC:": str(place), "\n ASIN: ": asin},
        "main_cat": "Home & Kitchen",
        "similar_item": "",
        "date": "December 12, 2011",
        "price": "$19.99",
        "asin": asin,
        "imageURL": pictures,
        "imageURLHighRes": [one.replace("._SS40_", "") for one in pictures],
    }
    return (repr(line) if random.random() < 0.005 else json.dumps(line)) + "\n"


def write_metadata(path, item_names, lines, random, ratings_only):
    """Write the metadata of a category: a line an item in random order, some items twice, one in twenty unknown."""
    asins = item_names.to_pylist()
    repeated = random.choice(len(asins), lines // 50)
    places = random.permutation(np.concatenate([random.permutation(len(asins))[: lines - lines // 20], repeated]))
    with gzip.open(path, "wb", compresslevel=1) as stream:
        for place in places.tolist():
            asin = asins[place]
            line = f'{{"asin": "{asin}"}}\n' if ratings_only else metadata_line(asin, place, random, asins)
            stream.write(line.encode())


def write_mix(workspace, share, ratings_only):
    for number, (domain, (rows, lines)) in enumerate(SIZES.items()):
        random = np.random.default_rng(number)
        folder = workspace.raw(domain)
        folder.mkdir(parents=True, exist_ok=True)
        rows, lines = int(rows * share), int(lines * share)
        items = write_ratings(folder / f"{CATEGORIES[domain]}.csv", rows, lines, random)
        write_metadata(folder / f"meta_{CATEGORIES[domain]}.json.gz", items, lines, FastRandom(number), ratings_only)


class FastRandom:
    """The draws of a NumPy generator that the metadata need, one at a time without NumPy's cost a call."""

    def __init__(self, seed):
        import random

        self.one, self.many = random.Random(seed), np.random.default_rng(seed)
        self.random = self.one.random
        self.choice, self.permutation = self.many.choice, self.many.permutation

    def integers(self, low, high=None):
        start, stop = (0, low) if high is None else (low, high)
        return start + int(self.one.random() * (stop - start))


def ours(workspace, report):
    """Run the library; tells its seconds."""
    from mmm4rec_cli.data.preprocess import build_tables
    from mmm4rec_cli.settings.schema import DataSettings

    started = time.perf_counter()
    manifest = build_tables(workspace, MIX, DataSettings())
    report["seconds"] = time.perf_counter() - started
    report["counts"] = manifest["counts"]


def plain(workspace, report):
    """The same filters, order and ids on plain sets and dictionaries, one interpreter, no text cleaning."""
    started = time.perf_counter()
    rows = {}
    known = {}
    for domain in SIZES:
        folder = workspace.raw(domain)
        with (folder / f"{CATEGORIES[domain]}.csv").open(encoding="utf-8") as stream:
            for line in stream:
                item, user, rating, stamp = line.rstrip("\n").split(",")
                rows[f"{domain}-{user}", f"{domain}-{item}", rating, int(stamp)] = None
        read = time.perf_counter()
        with gzip.open(folder / f"meta_{CATEGORIES[domain]}.json.gz", "rt", encoding="utf-8") as stream:
            for line in stream:
                record = parsed(line)
                fields = (record.get("title"), record.get("brand"), record.get("description"))
                known.setdefault(f"{domain}-{record['asin']}", fields)
        report.setdefault("metadata_seconds", 0.0)
        report["metadata_seconds"] += time.perf_counter() - read
    kept = [row for row in rows if row[1] in known]
    del rows
    while True:
        users, items = {}, {}
        for user, item, _, _ in kept:
            users[user] = users.get(user, 0) + 1
            items[item] = items.get(item, 0) + 1
        left = [row for row in kept if users[row[0]] >= 5 and items[row[1]] >= 5]
        if len(left) == len(kept):
            break
        kept = left
    histories = {user: [] for user in sorted(users)}
    for user, item, _, stamp in kept:
        histories[user].append((item, stamp))
    item_ids = {item: number for number, item in enumerate(sorted(items), 1)}
    columns = [], [], []
    for number, history in enumerate(histories.values()):
        history.sort(key=lambda one: one[1])
        for item, stamp in history:
            columns[0].append(number)
            columns[1].append(item_ids[item])
            columns[2].append(stamp)
    folder = workspace.root / "plain"
    folder.mkdir(exist_ok=True)
    types = (pa.int32(), pa.int32(), pa.int64())
    arrays = [pa.array(values, kind) for values, kind in zip(columns, types, strict=True)]
    pq.write_table(pa.table(arrays, ["user_id", "item_id", "timestamp"]), folder / "interactions.parquet")
    pq.write_table(pa.table({"raw_user_id": list(histories)}), folder / "users.parquet")
    said = [json.dumps(known[item]) for item in item_ids]
    pq.write_table(pa.table({"raw_item_id": list(item_ids), "text": said}), folder / "items.parquet")
    report["seconds"] = time.perf_counter() - started
    report["rows"] = len(columns[0])


def parsed(line):
    import ast

    try:
        return json.loads(line)
    except ValueError:
        return ast.literal_eval(line)


def assert_equal(workspace):
    for name, columns in {
        "interactions": ["user_id", "item_id", "timestamp"],
        "users": ["raw_user_id"],
        "items": ["raw_item_id"],
    }.items():
        one = pq.read_table(workspace.processed(MIX) / f"{name}.parquet", columns=columns)
        other = pq.read_table(workspace.root / "plain" / f"{name}.parquet", columns=columns)
        assert one.cast(other.schema).equals(other), f"{name} differ"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--share", type=float, default=0.1, help="share of the mix's 46 million ratings")
    parser.add_argument("--folder", type=Path, required=True, help="workspace for the raw files (kept if there)")
    parser.add_argument("--only", choices=("ours", "plain"), help="run one side")
    parser.add_argument("--ratings-only", action="store_true", help="metadata lines of nothing but the asin")
    parser.add_argument("--side", choices=("ours", "plain"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    workspace = Workspace(given.folder)
    if given.side is not None:
        report = {"side": given.side}
        {"ours": ours, "plain": plain}[given.side](workspace, report)
        report["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps(report))
        return
    if not workspace.raw("movies").is_dir():
        started = time.perf_counter()
        write_mix(workspace, given.share, given.ratings_only)
        print(f"raw files written in {time.perf_counter() - started:.0f} s", flush=True)
    shutil.rmtree(workspace.processed(MIX), ignore_errors=True)
    reports = {}
    for side in [given.only] if given.only else ["ours", "plain"]:
        command = [sys.executable, __file__, "--folder", str(given.folder), "--side", side]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        print(done.stdout.strip(), flush=True)
        reports[side] = json.loads(done.stdout)
    if len(reports) == 2:
        assert_equal(workspace)
        faster = reports["plain"]["seconds"] / reports["ours"]["seconds"]
        leaner = reports["plain"]["peak_gib"] / reports["ours"]["peak_gib"]
        print(f"rows equal; {faster:.1f} x faster, 1/{leaner:.1f} of the memory")


if __name__ == "__main__":
    main()
