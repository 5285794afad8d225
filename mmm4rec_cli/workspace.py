"""Where things lie in a workspace (the contract with the user: docs in README, section Files)."""

import shlex
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Workspace:
    """The folders of one workspace; nothing is created by asking for a path."""

    root: Path

    def command(self, *words: str) -> str:
        """The command line that does `words` in this workspace, ready to be typed."""
        where = () if self.root == Path() else ("--workspace", str(self.root))
        return shlex.join(("mmm4rec", *words, *where))

    @property
    def config(self) -> Path:
        """The workspace's settings file."""
        return self.root / "mmm4rec.toml"

    def raw(self, domain: str) -> Path:
        """Files as downloaded: `<Category>.csv`, `meta_<Category>.json.gz`, `images/<raw item id>.<ext>`."""
        return self.root / "data" / "raw" / domain

    def processed(self, domain: str) -> Path:
        """`interactions.parquet`, `items.parquet`, `users.parquet`, `manifest.json`."""
        return self.root / "data" / "processed" / domain

    def features(self, domain: str, encoder: str) -> Path:
        """One row an item: the vectors of one encoder."""
        return self.root / "data" / "features" / domain / f"{encoder}.parquet"

    @property
    def weights(self) -> Path:
        """Downloaded pre-trained weights."""
        return self.root / "data" / "weights"

    @property
    def published(self) -> Path:
        """Downloaded archives of published processed data, and what they were unpacked into."""
        return self.root / "data" / "published"

    @property
    def runs(self) -> Path:
        """`<command>/<domain>/<run id>/` below it."""
        return self.root / "runs"
