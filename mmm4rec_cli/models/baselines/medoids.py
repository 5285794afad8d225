"""Clusters of items around medoids, on whitened vectors.

Letters: V rows, F width, K clusters.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def whitened(vectors_VF: Array, floor: float = 1e-5) -> Array:
    """Zero mean and unit covariance by the symmetric root (ZCA); eigenvalues are at least `floor`."""
    centred = vectors_VF - vectors_VF.mean(0)
    values, axes = np.linalg.eigh(centred.T @ centred / len(centred))
    root: Array = (axes / np.sqrt(np.maximum(values, floor))) @ axes.T
    return np.asarray(centred @ root)


def k_medoids(vectors_VF: Array, clusters: int, random: np.random.Generator, rounds: int = 100) -> NDArray[np.int64]:
    """The cluster [V] of each row: k-medoids++ start, then assignment and new medoids in turn until nothing changes.

    Fewer clusters than asked for where there are not as many different rows.
    """
    medoids = _start(vectors_VF, clusters, random)
    for _ in range(rounds):
        nearest = np.argmin(_distances(vectors_VF, vectors_VF[medoids]), 1)
        updated = medoids.copy()
        for cluster in range(len(medoids)):
            members = np.flatnonzero(nearest == cluster)
            if len(members):
                inside = vectors_VF[members]
                updated[cluster] = members[np.argmin(_distances(inside, inside).sum(1))]
        if np.array_equal(updated, medoids):
            break
        medoids = updated
    return np.asarray(np.argmin(_distances(vectors_VF, vectors_VF[medoids]), 1))


def _start(vectors_VF: Array, clusters: int, random: np.random.Generator) -> NDArray[np.int64]:
    """Each next medoid is drawn with the square of the distance to the nearest one so far."""
    medoids = [int(random.integers(len(vectors_VF)))]
    nearest = _distances(vectors_VF, vectors_VF[medoids])[:, 0]
    while len(medoids) < clusters and nearest.max() > 0:
        share = nearest**2
        medoids.append(int(random.choice(len(share), p=share / share.sum())))
        nearest = np.minimum(nearest, _distances(vectors_VF, vectors_VF[medoids[-1:]])[:, 0])
        nearest[medoids] = 0  # not a rounding error above it
    return np.array(medoids)


def _distances(a_VF: Array, b_KF: Array) -> Array:
    squared = (a_VF**2).sum(1)[:, None] + (b_KF**2).sum(1) - 2 * a_VF @ b_KF.T
    return np.asarray(np.sqrt(np.maximum(squared, 0)))
