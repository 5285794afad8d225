"""Shared by all tests: a small domain whose next item follows from the last one."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mmm4rec_cli.data.tables import read_tables, write_tables
from mmm4rec_cli.features.store import write_features
from mmm4rec_cli.settings import Settings
from mmm4rec_cli.workspace import Workspace

MakeDomain = Callable[..., None]


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path)


@pytest.fixture
def make_domain(workspace: Workspace) -> MakeDomain:
    """Write tables and features of a domain: items in a ring, users walk along it with noise."""

    def make(
        name: str = "ring",
        users: int = 60,
        items: int = 25,
        seed: int = 0,
        widths: tuple[int, int] = (6, 5),
        encoder: str = "test",
        raw_prefix: str = "i",
    ) -> None:
        random = np.random.default_rng(seed)
        user_id, item_id, timestamp = [], [], []
        for user in range(users):
            place, time = int(random.integers(items)), 1_500_000_000
            for _ in range(int(random.integers(4, 12))):
                user_id.append(user)
                item_id.append(place + 1)
                timestamp.append(time)
                place = (place + 1 + int(random.random() < 0.1)) % items
                time += int(random.integers(0, 3)) * 86_400
        counts_items = np.bincount(item_id, minlength=items + 1)[1:]
        raw = [f"{raw_prefix}{i:03d}" for i in range(items)]
        write_tables(
            workspace,
            name,
            interactions=pa.table(
                {
                    "user_id": pa.array(user_id, pa.int32()),
                    "item_id": pa.array(item_id, pa.int32()),
                    "timestamp": pa.array(timestamp, pa.int64()),
                }
            ),
            items=pa.table(
                {
                    "item_id": pa.array(range(1, items + 1), pa.int32()),
                    "raw_item_id": raw,
                    "title": pa.array([None] * items, pa.string()),
                    "text": raw,
                    "image": pa.array([None] * items, pa.string()),
                    "image_url": pa.array([None] * items, pa.string()),
                    "n_interactions": pa.array(counts_items, pa.int32()),
                }
            ),
            users=pa.table(
                {
                    "user_id": pa.array(range(users), pa.int32()),
                    "raw_user_id": [f"u{i:03d}" for i in range(users)],
                    "n_interactions": pa.array(np.bincount(user_id, minlength=users), pa.int32()),
                }
            ),
            manifest={"domain": name},
        )
        angle = 2 * np.pi * np.arange(items) / items
        waves = [np.cos(k * angle) for k in range(1, 10)]
        has_image = np.arange(items) % 7 != 3
        write_features(
            workspace.features(name, encoder),
            text=np.stack(waves[: widths[0]], 1).astype(np.float32),
            has_text=np.ones(items, np.bool_),
            image=np.stack([np.sin(k * angle) for k in range(1, widths[1] + 1)], 1).astype(np.float32),
            has_image=has_image,
            encoder=encoder,
            identity={"name": encoder, "widths": list(widths)},
            catalogue=read_tables(workspace, name).catalogue,
            source={"by": "tests"},
        )

    return make


@pytest.fixture
def small_settings() -> Callable[..., Settings]:
    """Settings of a small model; keyword arguments are nested sections."""

    def make(**sections: object) -> Settings:
        base: dict[str, dict[str, object]] = {
            "features": {"encoder": "test"},
            "model": {
                **{"hidden_size": 16, "inner_size": 16, "d_state": 4, "head_dim": 4, "n_groups": 8, "max_len": 6},
                **{"dropout": 0.1, "embedding_dropout": 0.1, "time_dropout": 0.1, "time": "observed"},
            },
            "pretrain": {"epochs": 3, "batch_size": 32, "accumulation": 2, "lr": 5e-3},
            "finetune": {"epochs": 3, "batch_size": 32, "accumulation": 2, "lr": 5e-3, "metric": "Hit@5"},
            "evaluate": {"k": (5, 10)},
            "runtime": {"device": "cpu", "seed": 7},
        }
        for name, values in sections.items():
            base[name] = {**base.get(name, {}), **values} if isinstance(values, dict) else values  # type: ignore[assignment]
        return Settings.model_validate(base)

    return make
