"""Writing the sample shop: a user's own two tables and a folder of pictures, for every domain."""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmm4rec_cli.files import written_whole
from mmm4rec_cli.sample_shop.customers import Purchases, draw_rule, simulate
from mmm4rec_cli.sample_shop.goods import LINES, SOURCES, Goods, draw_goods
from mmm4rec_cli.sample_shop.pictures import draw_picture


@dataclass(frozen=True)
class ShopDomain:
    """Where one domain's tables lie."""

    name: str
    interactions: Path
    """CSV: user_id, item_id, timestamp (Unix seconds)."""
    items: Path
    """JSON lines: item_id, title, brand, description (or null), image (path relative to the file, or null)."""


@dataclass(frozen=True)
class Shop:
    """The written shop."""

    seed: int
    sources: tuple[ShopDomain, ...]
    """Domains to pre-train on."""
    target: ShopDomain
    """The smaller domain to fine-tune on."""

    @property
    def domains(self) -> tuple[ShopDomain, ...]:
        """Sources, then the target."""
        return (*self.sources, self.target)


def write_shop(folder: Path, seed: int) -> Shop:
    """Write the sample shop; the same seed gives the same bytes.

    Args:
        folder: gets one folder a domain, with `interactions.csv`, `items.jsonl` and `images/`.
        seed: at least 0; another seed draws other items, pictures, texts, users and another rule of taste.

    Raises:
        ValueError: a negative seed.
    """
    rng = np.random.default_rng(seed)
    rule = draw_rule(rng)
    domains = []
    for line in LINES:
        goods = draw_goods(line, rng)
        purchases = simulate(goods, rule, rng)
        place = _place(folder, line.domain)
        _write_pictures(goods, place.items.parent, rng)
        _write_items(goods, place.items, rng)
        _write_interactions(goods, purchases, place.interactions)
        domains.append(place)
    return Shop(seed=seed, sources=tuple(domains[: len(SOURCES)]), target=domains[-1])


def _place(folder: Path, domain: str) -> ShopDomain:
    home = folder / domain
    return ShopDomain(name=domain, interactions=home / "interactions.csv", items=home / "items.jsonl")


def _image(goods: Goods, item: int) -> str | None:
    return f"images/{goods.raw_ids[item]}.png" if goods.pictured[item] else None


def _write_pictures(goods: Goods, home: Path, rng: np.random.Generator) -> None:
    """Draw the pictures; an item without one keeps none from a shop of another seed, which has the same raw ids."""
    (home / "images").mkdir(parents=True, exist_ok=True)
    for item in range(len(goods.raw_ids)):
        relative = _image(goods, item)
        if relative is not None:
            with written_whole(home / relative) as part:
                draw_picture(part, int(goods.colours[item]), int(goods.patterns[item]), int(goods.kinds[item]), rng)
        else:
            (home / f"images/{goods.raw_ids[item]}.png").unlink(missing_ok=True)


def _write_items(goods: Goods, path: Path, rng: np.random.Generator) -> None:
    """Rows in no telling order, as a shop's export has them."""
    with written_whole(path) as part, part.open("w", encoding="utf-8") as stream:
        for item in rng.permutation(len(goods.raw_ids)):
            row = {
                "item_id": goods.raw_ids[item],
                "title": goods.titles[item],
                "brand": goods.brands[item],
                "description": goods.descriptions[item],
                "image": _image(goods, item),
            }
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def _rows(goods: Goods, purchases: Purchases) -> Iterator[tuple[str, str, int]]:
    code = goods.line.code.lower()
    for index in np.argsort(purchases.timestamps, kind="stable"):
        user = f"{code}-{purchases.users[index]:05d}"
        yield user, goods.raw_ids[purchases.items[index]], int(purchases.timestamps[index])


def _write_interactions(goods: Goods, purchases: Purchases, path: Path) -> None:
    """Rows in the order of time, as a shop's log has them."""
    with written_whole(path) as part, part.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(("user_id", "item_id", "timestamp"))
        writer.writerows(_rows(goods, purchases))
