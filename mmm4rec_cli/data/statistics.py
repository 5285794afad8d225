"""What a domain's tables hold, in numbers; computed from the Parquet files by Polars' lazy engine."""

from typing import Any

import polars as pl

from mmm4rec_cli.data.columns import IMAGE, IMAGE_URL, ITEM_ID, N_INTERACTIONS, TEXT, TIMESTAMP, USER_ID
from mmm4rec_cli.data.domains import CATEGORIES, MIXES, own_domains
from mmm4rec_cli.data.tables import INTERACTIONS, ITEMS, USERS, preprocess_command, read_manifest
from mmm4rec_cli.errors import DataError
from mmm4rec_cli.published import published_result
from mmm4rec_cli.workspace import Workspace

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
EDGES = (1, 2, 3, 5, 6, 8, 10, 15, 20, 50, 100)
"""Where the bins of history lengths begin; the last one has no end."""


def domains_with_tables(workspace: Workspace) -> list[str]:
    """The categories, mixes and own domains that have tables in this workspace."""
    known = (*CATEGORIES, *MIXES)
    there = [name for name in known if (workspace.processed(name) / INTERACTIONS).is_file()]
    return there + own_domains(workspace)


def describe(workspace: Workspace, domain: str) -> dict[str, Any]:
    """Count what a domain's tables hold.

    Args:
        workspace: where.
        domain: a domain that has tables.

    Returns:
        `users`, `items`, `interactions`; `per` user and item the mean, extremes and quantiles of interactions;
        `histogram` of history lengths; shares of interactions that are tied (their user has another one in the same
        second) and repeated (beyond the first of their user and item), of items with text, with an image, with an
        image's address; `first` and `last` day; `published` users and items, or None.

    Raises:
        DataError: there are no tables, or they are damaged.
    """
    read_manifest(workspace, domain)
    folder = workspace.processed(domain)
    rows, items, users = (pl.scan_parquet(folder / name) for name in (INTERACTIONS, ITEMS, USERS))
    # The rows are sorted by user and time, so that ties are neighbours.
    same_as_next = (pl.col(USER_ID) == pl.col(USER_ID).shift(-1)) & (pl.col(TIMESTAMP) == pl.col(TIMESTAMP).shift(-1))
    same_as_last = (pl.col(USER_ID) == pl.col(USER_ID).shift(1)) & (pl.col(TIMESTAMP) == pl.col(TIMESTAMP).shift(1))
    try:
        whole, pairs, goods, per_item, per_user, histogram = pl.collect_all(
            [
                rows.select(
                    interactions=pl.len(),
                    tied=(same_as_next.fill_null(value=False) | same_as_last.fill_null(value=False)).sum(),
                    first=pl.col(TIMESTAMP).min(),
                    last=pl.col(TIMESTAMP).max(),
                ),
                rows.select(pl.struct(USER_ID, ITEM_ID).n_unique()),
                items.select(pl.len(), pl.col(TEXT, IMAGE, IMAGE_URL).count()),
                items.select(_spread()),
                users.select(_spread()),
                users.group_by(_bin().alias("from")).len().sort("from"),
            ]
        )
    except (pl.exceptions.PolarsError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{folder}: the tables cannot be read ({reason})", hint=preprocess_command(workspace, domain)
        ) from error
    counted = whole.row(0, named=True)
    n, n_items = counted["interactions"], goods["len"][0]
    days = pl.from_epoch(pl.Series([counted["first"], counted["last"]])).dt.date().cast(pl.String)
    published = published_result(domain, item_bias=True)
    return {
        "domain": domain,
        "users": int(histogram["len"].sum()),
        "items": n_items,
        "interactions": n,
        "per": {"user": per_user.row(0, named=True), "item": per_item.row(0, named=True)},
        "histogram": [{"length": _named(start), "users": count} for start, count in histogram.rows()],
        "tied_share": counted["tied"] / n,
        "repeated_share": 1 - pairs.item() / n,
        "text_share": goods[TEXT][0] / n_items,
        "image_share": goods[IMAGE][0] / n_items,
        "image_url_share": goods[IMAGE_URL][0] / n_items,
        "first": days[0],
        "last": days[1],
        "published": None if published is None else {"users": published.n_users, "items": published.n_items},
    }


def _spread() -> list[pl.Expr]:
    count = pl.col(N_INTERACTIONS)
    quantiles = [count.quantile(q, "lower").cast(pl.Int64).alias(f"{q:.0%}") for q in QUANTILES]
    return [count.mean().alias("mean"), count.min().alias("min"), *quantiles, count.max().alias("max")]


def _bin() -> pl.Expr:
    """The edge at or below a user's number of interactions."""
    start = pl.lit(EDGES[0])
    for edge in EDGES[1:]:
        start = pl.when(pl.col(N_INTERACTIONS) >= edge).then(pl.lit(edge)).otherwise(start)
    return start


def _named(start: int) -> str:
    if start == EDGES[-1]:
        return f"{start}+"
    last = EDGES[EDGES.index(start) + 1] - 1
    return str(start) if start == last else f"{start}-{last}"
