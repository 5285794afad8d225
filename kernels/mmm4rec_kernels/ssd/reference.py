"""The scan as it is defined: one place after the other. Slow, and the yardstick for everything else.

Letters: B sequences, L places, H heads, P head dim, G groups, N state.
"""

from __future__ import annotations

import torch

from mmm4rec_kernels.ssd.steps import spread_groups


def scan(
    x_BLHP: torch.Tensor,
    dt_BLH: torch.Tensor,
    A_H: torch.Tensor,
    B_BLGN: torch.Tensor,
    C_BLGN: torch.Tensor,
    D_HP: torch.Tensor | None,
    skip: str,
    initial_BHPN: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The recurrence, for step sizes dt that are final (bias, softplus and limits applied).

    S_t = exp(A dt_t) S_{t-1} + (dt_t x_t) B_t^T;  y_t = S_t C_t + D x_t, or + D dt_t x_t with skip = "dt_x".

    Returns:
        y [B, L, H, P] and the last state [B, H, P, N], in the dtype of x.
    """
    batch, length, heads, width = x_BLHP.shape
    B_BLHN, C_BLHN = spread_groups(B_BLGN, heads), spread_groups(C_BLGN, heads)
    state = x_BLHP.new_zeros(batch, heads, width, B_BLHN.shape[-1]) if initial_BHPN is None else initial_BHPN
    outputs = []
    for t in range(length):
        dt_BH1 = dt_BLH[:, t, :, None]
        step = dt_BH1 * x_BLHP[:, t]
        state = torch.exp(A_H[:, None] * dt_BH1)[..., None] * state + step[..., None] * B_BLHN[:, t, :, None]
        y = (state * C_BLHN[:, t, :, None]).sum(-1)
        if D_HP is not None:
            y = y + D_HP * (step if skip == "dt_x" else x_BLHP[:, t])
        outputs.append(y)
    return torch.stack(outputs, 1) if outputs else torch.zeros_like(x_BLHP), state
