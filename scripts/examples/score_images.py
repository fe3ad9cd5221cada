"""Score images with rewards alone: no trainer, no diffusion model.

python scripts/examples/score_images.py PROMPT IMAGE ...
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from diffalign import get_reward, score_images


def redness(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
    """Mean of red minus that of green and blue: (B, 3, H, W) in [0, 1] -> (B,)."""
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def main(prompt: str, paths: list[str]) -> None:
    scores = score_images(paths, prompt, [get_reward(redness), "jpeg_compressibility"])
    for row, path in enumerate(paths):
        print(path, *(f"{name} {values[row]:.3f}" for name, values in scores.items()))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
