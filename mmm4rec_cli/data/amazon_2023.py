"""Amazon Reviews 2023, a second source under the domain names of 2018 where the category still exists.

What differs from 2018: an item is a `parent_asin`, under which colours and sizes are one; times are milliseconds, so
that few of a user's events are tied; the reviews reach to September 2023; the text is title, store, features and
description; `luxury` and `pantry` have no category any more. Numbers published for 2018 do not hold for it.
"""

import gzip
import shutil
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import polars as pl

from mmm4rec_cli.data import raw
from mmm4rec_cli.data.columns import IMAGE, IMAGE_URL, ITEM_ID, TITLE
from mmm4rec_cli.data.domains import CATEGORIES
from mmm4rec_cli.data.interactions import Log, read_own_interactions
from mmm4rec_cli.data.items import BRAND, DESCRIPTION, Metadata, with_texts
from mmm4rec_cli.errors import DataError, UsageError
from mmm4rec_cli.settings.schema import Columns

MIRROR = "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_2023"
LANDING_PAGE = "https://amazon-reviews-2023.github.io/"
KINDS = {
    "ratings": "benchmark/0core/rating_only/{}.csv.gz",
    "metadata": "raw/meta_categories/meta_{}.jsonl.gz",
}
"""Where the files lie below a mirror's address."""

_RENAMED = {"fashion": "Amazon_Fashion"}
_GONE = {"luxury", "pantry"}
CATEGORIES_2023: Mapping[str, str] = MappingProxyType(
    {name: _RENAMED.get(name, category) for name, category in CATEGORIES.items() if name not in _GONE}
)
"""Short name -> category, as in the file names of Amazon Reviews 2023."""

NOTE = (
    "Amazon Reviews 2023: items are parent_asin (colours and sizes are one item), times are milliseconds and reach to "
    "September 2023; numbers published for the 2018 data do not hold for it"
)


def category(domain: str) -> str:
    """The 2023 category of a short name; UsageError if there is none."""
    if domain not in CATEGORIES_2023:
        raise UsageError(
            f"domain {domain!r} has no category in Amazon Reviews 2023",
            hint=f"take --source amazon-2018 for it; in 2023 there are {', '.join(CATEGORIES_2023)}",
        )
    return CATEGORIES_2023[domain]


def files(folder: Path, domain: str) -> tuple[Path, Path] | None:
    """Ratings and metadata of a domain, if its folder holds the 2023 ones; None where it holds no such ratings."""
    name = CATEGORIES_2023.get(domain)
    ratings = folder / f"{name}.csv.gz"
    return (ratings, folder / f"meta_{name}.jsonl.gz") if name is not None and ratings.is_file() else None


def read_ratings(path: Path, hint: str) -> Log:
    """Read a ratings file: gzip of CSV with the header user_id,parent_asin,rating,timestamp; milliseconds.

    Raises:
        DataError: missing, cut, damaged, or a row is broken; the first one is named.
    """
    raw.require_file(path, hint)
    # The reader of tables takes plain files. The name is kept, so that complaints name the file that there is.
    with tempfile.TemporaryDirectory(prefix=".ratings-", dir=path.parent) as folder:
        plain = Path(folder) / path.name.removesuffix(".gz")
        try:
            with gzip.open(path) as packed, plain.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, 2**22)
        except (EOFError, OSError, zlib.error) as error:
            raise DataError(f"{path}: its gzip stream is cut off or damaged ({error})", hint=hint) from error
        log, _ = read_own_interactions(plain, Columns(item_id="parent_asin"), "ms")
    return log


def read_metadata(path: Path, rated: pl.Series, wanted: pl.Series, hint: str) -> Metadata:
    """Read the metadata of a category: gzip of JSON lines with `parent_asin`, texts and images.

    Args:
        path: the file.
        rated: raw ids of all rated items.
        wanted: the ones whose text and image are needed.
        hint: what to do if the file is missing or damaged.

    Raises:
        DataError: missing, cut, damaged, or a line without a `parent_asin` or that is no JSON object.
    """
    wanted_ids, rated_ids = set(wanted), set(rated)
    seen: set[str] = set()
    lines = 0
    rows: list[dict[str, str | None]] = []
    for number, value in raw.objects(path, hint, literals=False):
        lines += 1
        item = value.get("parent_asin")
        if not isinstance(item, str) or not item.strip():
            raise DataError(f"{path}, line {number}: no parent_asin", hint=hint)
        if item not in seen and item in wanted_ids:
            rows.append(_row(item, value))
        seen.add(item)
    if not lines:
        raise DataError(f"{path} has no lines", hint=hint)
    schema = dict.fromkeys((ITEM_ID, TITLE, BRAND, DESCRIPTION, IMAGE, IMAGE_URL), pl.String)
    return Metadata(
        known=pl.Series(ITEM_ID, sorted(seen & rated_ids), pl.String),
        frame=with_texts(pl.DataFrame(rows, schema=schema)),
        lines=lines,
        repeated=lines - len(seen),
    )


def _row(item: str, value: dict[str, Any]) -> dict[str, str | None]:
    """What the tables need of one line; fields of another kind count as missing."""
    parts = [part for name in ("features", DESCRIPTION) for part in _texts(value.get(name))]
    return {
        ITEM_ID: item,
        TITLE: " ".join(_texts(value.get("title"))) or None,
        BRAND: " ".join(_texts(value.get("store"))) or None,
        DESCRIPTION: " ".join(parts) or None,
        IMAGE: None,
        IMAGE_URL: _address(value.get("images")),
    }


def _texts(value: Any) -> list[str]:
    """Strings in a field that is one or a list of them; half a surrogate pair is no text."""
    values = value if isinstance(value, list) else [value]
    return [part.encode("utf-8", "replace").decode() for part in values if isinstance(part, str)]


def _address(images: Any) -> str | None:
    """The first picture in high resolution, else the first large one, else the first thumbnail."""
    shown = [image for image in images if isinstance(image, dict)] if isinstance(images, list) else []
    for size in ("hi_res", "large", "thumb"):
        for image in shown:
            address = image.get(size)
            if isinstance(address, str) and address.strip():
                return address.strip()
    return None
