"""Items that no training has seen, as vectors of a run's own encoder."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mmm4rec_cli.data.columns import IMAGE, RAW_ITEM_ID, TEXT, TITLE
from mmm4rec_cli.errors import DataError
from mmm4rec_cli.features.encoders import load_encoder
from mmm4rec_cli.features.extract import encode_items, own_vectors
from mmm4rec_cli.features.store import fingerprint
from mmm4rec_cli.reporter import Reporter, SilentReporter
from mmm4rec_cli.settings.schema import Columns, FeatureSettings
from mmm4rec_cli.workspace import Workspace


@dataclass(frozen=True)
class NewItems:
    """New items and their vectors.

    Attributes:
        raw_ids: [n] raw item ids.
        titles: [n] titles or None.
        text: vectors and presence, float32 [n, F] and bool [n].
        image: as `text`.
        fingerprint: identity of the encoder.
    """

    raw_ids: list[str]
    titles: list[str | None]
    text: tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]
    image: tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]
    fingerprint: str


def read_new_items(
    workspace: Workspace,
    file: Path,
    metadata: Mapping[str, Any],
    settings: FeatureSettings,
    columns: Columns,
    device: str = "auto",
    reporter: Reporter | None = None,
) -> NewItems:
    """Read and encode items as `preprocess --items` and its encoder do.

    Where the known vectors were imported, nothing here can encode: the file then holds `item_id`, `text` and `image`
    vectors as for `preprocess --features`.

    Args:
        workspace: where relative paths of pictures are kept.
        file: the items.
        metadata: of the known items' features: who encoded them.
        settings: the run's own features section.
        columns: names of the columns.
        device: auto, cpu, cuda or cuda:N.
        reporter: progress and notes.

    Raises:
        DataError: the file is missing, malformed, holds an id twice, or the encoder is not the run's any more.
    """
    reporter = reporter or SilentReporter()
    if metadata["identity"].get("kind") == "imported":
        ids, text, image = own_vectors(file, reporter)
        return NewItems(ids, [None] * len(ids), text, image, str(metadata["fingerprint"]))
    # The same cleaning as in training matters more than which library reads the table.
    from mmm4rec_cli.data.items import read_own_items, with_texts

    frame = with_texts(read_own_items(file, columns, workspace).frame)
    encoder = load_encoder(settings, device, reporter)
    if fingerprint(encoder.identity) != metadata["fingerprint"]:
        raise DataError(
            f"encoder {encoder.name} ({fingerprint(encoder.identity)[:8]}) is not the one that the run's vectors come "
            f"from ({metadata['fingerprint'][:8]})",
            hint="put the run's encoder back where it was, or preprocess and train again",
        )
    paths = [None if path is None else workspace.root / path for path in frame[IMAGE].to_list()]
    raw_ids = frame[RAW_ITEM_ID].to_list()
    text, image = encode_items(encoder, raw_ids, frame[TEXT].to_list(), paths, settings, reporter)
    return NewItems(raw_ids, frame[TITLE].to_list(), text, image, str(metadata["fingerprint"]))
