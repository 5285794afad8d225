"""The db4 wavelet transform over the places of a sequence, as matrices.

Sequences are extended by zeros, so the coefficients are the products with all shifts of an orthonormal family that
reach the sequence, and the inverse is the transposed matrix.
"""

import torch
from torch import Tensor

DB4 = (
    0.23037781330885523,
    0.7148465705525415,
    0.6308807679295904,
    -0.02798376941698385,
    -0.18703481171888114,
    0.030841381835986965,
    0.032883011666982945,
    -0.010597401784997278,
)
"""Low pass of Daubechies' wavelet with four vanishing moments (Daubechies 1992, table 6.1)."""


def _one_level(length: int) -> tuple[Tensor, Tensor]:
    """Low and high pass, [n, length] each with n = (length + 7) // 2."""
    taps = len(DB4)
    low = torch.zeros((length + taps - 1) // 2, length, dtype=torch.float64)
    high = torch.zeros_like(low)
    for row in range(len(low)):
        for tap in range(taps):
            place = 2 * row + 1 - tap
            if 0 <= place < length:
                low[row, place] = DB4[taps - 1 - tap]
                high[row, place] = (-1) ** (tap + 1) * DB4[tap]
    return low, high


def transform(length: int, levels: int) -> list[Tensor]:
    """The matrices [n, length], float64, of the low pass of the last level and the high passes from last to first.

    The products of a sequence with all of them are its coefficients; the sum of the transposed matrices times the
    coefficients is the sequence again.
    """
    reached = torch.eye(length, dtype=torch.float64)
    highs: list[Tensor] = []
    for _ in range(levels):
        low, high = _one_level(len(reached))
        highs.insert(0, high @ reached)
        reached = low @ reached
    return [reached, *highs]
