"""SRPO (arXiv 2509.06942): a reward relative to control words, so that what it likes in every image cancels out.

Departures from the published code, of this reward and of the recipe "srpo" around it: 1. the known noise is a fresh
draw, not that from which the image was sampled; 2. images of an iteration begin at a noise each, not all at one; 3. the
step down and the step up of an iteration are drawn apart, there they end at one level; 4. a step is one of the
sampling's, there a tenth of the window, anywhere in it, of levels that are linear in sigma: the same length for 25
steps; 5. FLUX.1-dev has one embedded guidance, there 1 while sampling and 3.5 with the gradient; 6. its hinge ends at
0.7 for HPSv2.1, beyond what a relative reward reaches, so that any threshold this high is the same. Its option eta is
read by nothing: images are sampled by the ODE, as here. Its later script, for Qwen-Image, has neither steps up nor k
nor a hinge.
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
