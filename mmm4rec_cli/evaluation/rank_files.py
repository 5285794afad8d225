"""`ranks.parquet`: one row a ranked target."""

from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmm4rec_cli.data import columns
from mmm4rec_cli.evaluation.evaluate import RankedSplit
from mmm4rec_cli.files import written_whole

SCHEMA = pa.schema(
    [(columns.USER_ID, pa.int32()), (columns.ITEM_ID, pa.int32()), ("rank0", pa.float64()), ("split", pa.string())]
)


def write_ranks(path: Path, ranked: Iterable[RankedSplit]) -> None:
    """Write the splits' ranks; splits already in the file and not given here are kept."""
    given = list(ranked)
    tables = [
        pa.table(
            [r.user_U.numpy(), r.target_U.numpy(), r.rank0_U.numpy(), [r.split] * len(r.user_U)], SCHEMA.names
        ).cast(SCHEMA)
        for r in given
    ]
    if path.is_file():
        old = pq.read_table(path, schema=SCHEMA)
        tables.insert(0, old.filter(~pc.field("split").isin([r.split for r in given])))
    with written_whole(path) as part:
        pq.write_table(pa.concat_tables(tables), part)
