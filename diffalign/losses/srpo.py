"""SRPO (arXiv 2509.06942): a reward relative to control words, so that what it likes in every image cancels out.

Departures from the published code, of this reward and of the recipe "srpo" around it: 1. one pair of control words, not
several in turn (wanted: Natural-lighting, Detail, Detailed, Real; unwanted: Concept art, Painting, Anime, Flat, Oil);
2. the noise that is known is drawn anew, not that from which the image was sampled; 3. images are sampled by the ODE,
not with noise of eta 0.3; 4. an iteration takes a step down or a step up, in turn, not one of each; 5. a step is one of
the sampling's, there a tenth of the window: the same for 25 steps; 6. its hinge ends at 0.7 for HPSv2.1, beyond what a
relative reward reaches, so that any threshold this high is the same.
"""

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
