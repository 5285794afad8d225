"""Scans, convolutions and norms of state-space models, and scores against a table, on whatever machine is at hand.

One public function an operation, each with the same numbers on every backend: `ssd`, `causal_conv1d`, `gated_rms_norm`
and `ssd_block`, which is all three and what lies between them; `ssd_block_tail` gives its last places alone.
What stands between them in a network is `residual_norm`, `hardswish_dropout`, `linear` and `unit_sum`; beside them,
over time stamps, `stream_stage` and `spectral_filter`; what stands behind it
`softmax_cross_entropy`, `lookup`, `sum_by_row` and `compare_counts`. `selective_scan` is
that of Mamba-1, for models that have it. `windows_before` and `packing_of` say where elements of sequences lie.
`backends()` says what can run here and why the rest cannot; `compile_once` shortens the first step.
"""

from mmm4rec_kernels.backend import Availability, BackendUnavailable, backends
from mmm4rec_kernels.block import CrossProjections, ssd_block, ssd_block_tail, tail_unfit
from mmm4rec_kernels.conv1d import causal_conv1d
from mmm4rec_kernels.norm import gated_rms_norm
from mmm4rec_kernels.rows import hardswish_dropout, linear, linear_and_rows, residual_norm, seeds_at_once, unit_sum
from mmm4rec_kernels.scoring import Order, compare_counts, lookup, order_of, softmax_cross_entropy, sum_by_row
from mmm4rec_kernels.selective import selective_scan
from mmm4rec_kernels.side_by_side import compile_once, compiled_side_by_side
from mmm4rec_kernels.ssd import ssd
from mmm4rec_kernels.streams import ComplexMap, StreamGate, StreamMaps, spectral_filter, stream_stage
from mmm4rec_kernels.windows import Packing, packing_of, windows_before

__all__ = [
    "Availability",
    "BackendUnavailable",
    "ComplexMap",
    "CrossProjections",
    "Order",
    "Packing",
    "StreamGate",
    "StreamMaps",
    "backends",
    "causal_conv1d",
    "compare_counts",
    "compile_once",
    "compiled_side_by_side",
    "gated_rms_norm",
    "hardswish_dropout",
    "linear",
    "linear_and_rows",
    "lookup",
    "order_of",
    "packing_of",
    "residual_norm",
    "seeds_at_once",
    "selective_scan",
    "softmax_cross_entropy",
    "spectral_filter",
    "ssd",
    "ssd_block",
    "ssd_block_tail",
    "stream_stage",
    "sum_by_row",
    "tail_unfit",
    "unit_sum",
    "windows_before",
]
