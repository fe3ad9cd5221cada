"""SRPO (arXiv 2509.06942): a reward relative to control words, which cancels its bias common to all images.

Departures from the published code, of this reward and of the recipe "srpo" around it: 1. the known noise is a fresh
sample, not the noise that the image was sampled from; 2. each image of an iteration has its own start noise, there all
share one; 3. the steps down and up of an iteration are drawn independently, there they end at one level; 4. a step is a
sampling step, there a tenth of the window, anywhere in it, on levels that are linear in sigma: the same length for 25
steps; 5. FLUX.1-dev has one embedded guidance, there 1 while sampling and 3.5 with the gradient; 6. its hinge ends at
0.7 for HPSv2.1, beyond what a relative reward reaches, so that any threshold this high is the same. Its option eta is
unused: images are sampled by the ODE, as here. Its later script, for Qwen-Image, has no steps up, no k and no hinge.
"""

from __future__ import annotations

from torch import Tensor

from diffalign.diffusion.parameterization import widen


def relative_reward(wanted: Tensor, unwanted: Tensor, k: float = 0.0) -> Tensor:
    """(1 + k) r(x, wanted words + c) - r(x, unwanted words + c): (B,), float32 or wider.

    For a reward that is linear in the embedding of its text, as a cosine is, this is the paper's
    f_img . ((1 + k) f_txt(wanted) - f_txt(unwanted)). On a step up in noise the caller swaps the two: there the
    gradient with respect to the denoiser's output has the other sign, which penalises the unwanted words.
    """
    return (1 + k) * widen(wanted) - widen(unwanted)
