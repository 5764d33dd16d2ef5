"""All claims, and the order in which they are tried: what needs no training comes first."""

from __future__ import annotations

from . import ablation, composition, convergence, cost, data_size, guidance, transfer
from .claim import Claim

CLAIMS = (
    Claim(
        "guidance",
        "without a prompt, control in both halves of guidance undoes it, in the conditional half alone it is too "
        "strong; weighting by resolution is between them",
        (),
        guidance.measure,
    ),
    Claim("composition", "controls compose by adding up, with no further weights", (), composition.measure),
    Claim("transfer", "a control works on a fine-tuned base as it is", (), transfer.measure),
    Claim("cost", "34 % more time and 23 % more memory than fine-tuning the base", (), cost.measure),
    Claim("convergence", "the hint is not learned gradually, but suddenly", ("zero",), convergence.measure),
    Claim(
        "ablation",
        "Gaussian convolutions fall to about ControlNet-lite's level; zero convolutions hold under every prompt",
        ablation.VARIANTS,
        ablation.measure,
    ),
    Claim(
        "data_size",
        "training does not collapse on few pictures, and gets better with more",
        data_size.SIZES,
        data_size.measure,
    ),
)
