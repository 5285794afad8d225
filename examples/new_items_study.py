"""How do items fare that training never saw? Hides a tenth of a domain's items, trains, ranks them with the others.

    python examples/new_items_study.py WORKSPACE DOMAIN [--seeds 1,2] [--set finetune.lr=2e-3 …]

Every user's last event is the target; it may be a hidden item. With and without item bias, as scored and calibrated
(`evaluate.new_items = "fair_share"`), the table holds
the share of hidden items in the recommended top ten (seen items left out), to be held against their share of the
targets: a smaller share means that new items are starved. Training never reads hidden items, their events or vectors.
"""

import argparse
import tempfile
from itertools import pairwise
from pathlib import Path
from statistics import mean

import numpy as np
import pyarrow as pa

from mmm4rec_cli.console import show, table
from mmm4rec_cli.data.dataset import Dataset, encoder_at_hand, load_dataset
from mmm4rec_cli.data.tables import read_tables, write_tables
from mmm4rec_cli.evaluation.recommend import Asked, load_recommender
from mmm4rec_cli.features.new_items import NewItems
from mmm4rec_cli.features.store import write_features
from mmm4rec_cli.runs import find_run
from mmm4rec_cli.settings import Settings, load
from mmm4rec_cli.training.finetune import finetune
from mmm4rec_cli.workspace import Workspace

K = 10
Row = dict[str, float | str]


def hide(full: Dataset, workspace: Workspace, share: float, seed: int) -> np.ndarray:
    """Write the domain without a random share of its items into another workspace; bool [V + 1], True: hidden."""
    hidden = np.zeros(full.n_items + 1, dtype=bool)
    random = np.random.default_rng(seed)
    hidden[1 + random.choice(full.n_items, round(share * full.n_items), replace=False)] = True
    shown = np.flatnonzero(~hidden)[1:]
    new_id = np.zeros(full.n_items + 1, dtype=np.int32)
    new_id[shown] = np.arange(1, len(shown) + 1)
    item = full.sequences.items_N.numpy()
    user = np.repeat(np.arange(full.n_users, dtype=np.int32), full.sequences.counts_U.numpy())
    kept = ~hidden[item]
    raw = [full.raw_item_ids[i - 1] for i in shown]
    nothing = pa.nulls(len(raw), pa.string())
    write_tables(
        workspace,
        full.name,
        interactions=pa.table(
            {"user_id": user[kept], "item_id": new_id[item[kept]], "timestamp": full.sequences.times_N.numpy()[kept]}
        ),
        items=pa.table(
            {
                **{"item_id": pa.array(range(1, len(raw) + 1), pa.int32()), "raw_item_id": raw, "title": nothing},
                **{"text": raw, "image": nothing, "image_url": nothing},
                "n_interactions": pa.array(np.bincount(new_id[item[kept]], minlength=len(raw) + 1)[1:], pa.int32()),
            }
        ),
        users=pa.table(
            {
                "user_id": pa.array(range(full.n_users), pa.int32()),
                "raw_user_id": full.raw_user_ids,
                "n_interactions": pa.array(np.bincount(user[kept], minlength=full.n_users), pa.int32()),
            }
        ),
        manifest={"domain": full.name},
    )
    have = full.features
    write_features(
        workspace.features(full.name, full.encoder),
        **{"text": have.text[shown], "has_text": have.has_text[shown]},
        **{"image": have.image[shown], "has_image": have.has_image[shown]},
        encoder=full.encoder,
        identity=have.metadata["identity"],
        catalogue=read_tables(workspace, full.name).catalogue,
        source={"by": "new_items_study"},
    )
    return hidden


def measure(workspace: Workspace, run: str, full: Dataset, hidden: np.ndarray, settings: Settings) -> Row:
    """What the run recommends to every user before their last event, hidden items among the candidates."""
    ids, have = np.flatnonzero(hidden), full.features
    new = NewItems(
        [full.raw_item_ids[i - 1] for i in ids],
        [None] * len(ids),
        (have.text[ids], have.has_text[ids]),
        (have.image[ids], have.has_image[ids]),
        have.fingerprint,
    )
    recommender = load_recommender(workspace, find_run(workspace, run), settings, new_items=new)
    offsets, items, times = (
        x.tolist() for x in (full.sequences.offsets_U1, full.sequences.items_N, full.sequences.times_N)
    )
    spans = [(begin, end - 1) for begin, end in pairwise(offsets) if end - begin > 1]
    targets = np.array([items[end] for _, end in spans])
    asked = (Asked(None, [full.raw_item_ids[i - 1] for i in items[b:e]], times[b:e]) for b, e in spans)
    blocks = recommender.recommend(asked, K)
    place = {raw: i + 1 for i, raw in enumerate(full.raw_item_ids)}
    to_full = np.array([0, *(place[raw] for raw in recommender.dataset.raw_item_ids)])
    top = np.concatenate([to_full[block.item] for block in blocks])
    hit = (top == targets[:, None]).any(1)
    of_new = hidden[targets]
    return {
        "hidden items": len(ids) / full.n_items,
        "hidden targets": float(of_new.mean()),
        "hidden in top 10": float(hidden[top].mean()),
        "Hit@10, hidden": float(hit[of_new].mean()) if of_new.any() else float("nan"),
        "Hit@10, others": float(hit[~of_new].mean()),
        "Hit@10": float(hit.mean()),
    }


def main(words: list[str] | None = None) -> list[Row]:
    """Train and measure every variant, print the means over seeds, give them back."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workspace", type=Path)
    parser.add_argument("domain")
    parser.add_argument("--share", type=float, default=0.1, help="share of the items that are hidden")
    parser.add_argument("--seeds", default="1,2", help="each hides other items")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    given = parser.parse_args(words)
    source = Workspace(given.workspace)
    settings = load(overrides=given.set, workspace=source)
    settings = settings.model_copy(update={"features": encoder_at_hand(source, [given.domain], settings.features)})
    full = load_dataset(source, [given.domain], settings.features.encoder)
    found: dict[str, list[Row]] = {}
    for seed in map(int, given.seeds.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            workspace = Workspace(Path(folder))
            hidden = hide(full, workspace, given.share, seed)
            for name, bias in (("without item bias", False), ("with item bias", True)):
                model = settings.model.model_copy(update={"item_bias": bias})
                runtime = settings.runtime.model_copy(update={"seed": seed})
                trained = settings.model_copy(update={"model": model, "runtime": runtime})
                run = finetune(workspace, full.name, trained, pretrained="none")["run"]
                for new in ("as_scored", "fair_share"):
                    evaluate = trained.evaluate.model_copy(update={"new_items": new})
                    asked = trained.model_copy(update={"evaluate": evaluate})
                    row = measure(workspace, run, full, hidden, asked)
                    found.setdefault(f"{name}, {new.replace('_', ' ')}", []).append(row)
    means = [
        {"model": label, **{name: mean(float(row[name]) for row in rows) for name in rows[0]}}
        for label, rows in found.items()
    ]
    show(table(f"{given.domain}, seeds {given.seeds}", list(means[0]), [list(row.values()) for row in means]))
    return means


if __name__ == "__main__":
    main()
