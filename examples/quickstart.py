"""The library in one page: the sample shop from raw tables to a metric. python examples/quickstart.py [FOLDER]."""

import sys
from pathlib import Path

from mmm4rec_cli.data.images import fetch_images
from mmm4rec_cli.data.preprocess import build_tables
from mmm4rec_cli.features.extract import extract_features
from mmm4rec_cli.sample_shop import SHOP_SETTINGS, write_shop
from mmm4rec_cli.settings import load
from mmm4rec_cli.training.finetune import finetune
from mmm4rec_cli.workspace import Workspace


def main(folder: Path, epochs: int = 3) -> dict:
    """Prepare one domain of the shop, train from scratch for a few epochs, print and return the result."""
    workspace = Workspace(folder)
    folder.mkdir(parents=True, exist_ok=True)
    workspace.config.write_text(SHOP_SETTINGS, encoding="utf-8")
    settings = load(overrides=[f"finetune.epochs={epochs}"], workspace=workspace)

    garden = write_shop(folder / "data" / "raw", seed=1).target
    manifest = build_tables(workspace, garden.name, settings.data, interactions=garden.interactions, items=garden.items)
    fetch_images(workspace, garden.name, settings.data, offline=True)
    extract_features(workspace, garden.name, settings.features)

    result = finetune(workspace, garden.name, settings, pretrained="none")
    print(f"{manifest['users']} users, {manifest['items']} items, {manifest['rows']} interactions")
    print(f"NDCG@10 on test: {result['metrics']['test']['NDCG@10']:.4f}", end=", ")
    print(f"popularity {result['yardsticks']['popularity']['test']['NDCG@10']:.4f}")
    return result


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "quickstart"))
