"""Item vectors that need no weights: for the demo and for tests, not for research.

Nothing is fitted to a catalogue, so a text or a picture gets the same vector in every domain, and what a model learns
on one domain carries over to another. Sizes: B texts, 128 wide for texts, 96 wide for pictures.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

Floats = npt.NDArray[np.float32]


def normalised(vectors: npt.NDArray[Any]) -> Floats:
    """Rows of [B, F] divided by their Euclidean length; zero rows stay zero."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    units: Floats = (vectors / np.where(lengths > 0, lengths, 1)).astype(np.float32)
    return units


class SketchText:
    """Hashed words and pairs of words, brought to 128 numbers by one fixed Gaussian random projection."""

    width = 128
    hashes = 2**14
    seed = 2020

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the vectors."""
        return {"model": "sketch text 1", "hashes": self.hashes, "width": self.width, "seed": self.seed}

    @cached_property
    def _vectorizer(self) -> Any:
        from sklearn.feature_extraction.text import HashingVectorizer

        # the pattern takes words of one letter too, as in item ids
        words = {"token_pattern": r"(?u)\b\w+\b", "ngram_range": (1, 2), "stop_words": "english"}
        return HashingVectorizer(n_features=self.hashes, norm="l2", **words)

    @cached_property
    def _projection(self) -> Any:
        from sklearn.random_projection import GaussianRandomProjection

        # fit() looks at nothing but the number of columns
        projection = GaussianRandomProjection(n_components=self.width, random_state=self.seed)
        return projection.fit(np.zeros((1, self.hashes)))

    @property
    def preparer(self) -> Callable[[Sequence[str]], Mapping[str, Any]]:
        """The whole work; `stream` passes it on."""
        return self._prepared

    def _prepared(self, batch: Sequence[str]) -> dict[str, Any]:
        return {"vector": self.texts(batch)}

    def stream(self, batches: Iterable[Mapping[str, Any]]) -> Iterator[Floats]:
        """Unit vectors float32 [B, 128] of each batch."""
        return (np.asarray(batch["vector"]) for batch in batches)

    def texts(self, batch: Sequence[str]) -> Floats:
        """Unit vectors float32 [B, 128]; a text without a word to go by gets zeros."""
        return normalised(self._projection.transform(self._vectorizer.transform(batch)))


class SketchImage:
    """64 numbers of colour (a joint RGB histogram) and 32 of edges (8 directions in each quarter)."""

    width = 96
    side = 64

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the vectors."""
        return {"model": "sketch image 1", "side": self.side, "width": self.width}

    def prepare(self, image: Image.Image) -> dict[str, npt.NDArray[Any]]:
        """The vector of one RGB picture, not yet of unit length; safe to call from several threads."""
        small = image.resize((self.side, self.side), Image.Resampling.BOX)
        levels = np.asarray(small, dtype=np.int64) // 64
        bins = (levels[..., 0] * 4 + levels[..., 1]) * 4 + levels[..., 2]
        colour = np.sqrt(np.bincount(bins.ravel(), minlength=64) / self.side**2)

        grey = np.asarray(small.convert("L"), dtype=np.float64) / 255
        down, right = np.gradient(grey)
        strength = np.hypot(down, right)
        # an edge has no front: directions are taken modulo half a turn
        direction = np.floor((np.arctan2(down, right) % np.pi) / np.pi * 8).astype(np.int64) % 8
        half = np.arange(self.side) * 2 // self.side
        quarter = half[:, None] * 2 + half[None, :]
        edges = np.bincount((quarter * 8 + direction).ravel(), weights=strength.ravel(), minlength=32)
        total = edges.sum()
        edges = np.sqrt(edges / total) if total > 0 else edges
        return {"vector": np.concatenate([colour, edges])}

    @property
    def preparer(self) -> Callable[[Image.Image], dict[str, npt.NDArray[Any]]]:
        """`prepare`."""
        return self.prepare

    def stream(self, batches: Iterable[Mapping[str, Any]]) -> Iterator[Floats]:
        """Unit vectors float32 [B, 96] of each batch."""
        return (normalised(np.asarray(batch["vector"])) for batch in batches)

    def images(self, batch: Sequence[Mapping[str, npt.NDArray[Any]]]) -> Floats:
        """Unit vectors float32 [B, 96] of prepared pictures."""
        return normalised(np.stack([prepared["vector"] for prepared in batch]))
