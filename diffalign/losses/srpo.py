"""SRPO (arXiv 2509.06942): a reward relative to control words, so that what it likes in every image cancels out."""

from __future__ import annotations

from torch import Tensor

from diffalign.diffusion.parameterization import widen


def relative_reward(wanted: Tensor, unwanted: Tensor, k: float = 0.0) -> Tensor:
    """(1 + k) r(x, wanted words + c) - r(x, unwanted words + c): (B,), float32 or wider.

    For a reward that is linear in the embedding of its text, as a cosine is, this is the paper's
    f_img . ((1 + k) f_txt(wanted) - f_txt(unwanted)). On a step up to more noise the caller swaps the two: there the
    gradient by the denoiser's output has the other sign, so that what is unwanted is penalised.
    """
    return (1 + k) * widen(wanted) - widen(unwanted)
