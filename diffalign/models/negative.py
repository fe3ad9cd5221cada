"""A negative prompt that is trained: what guidance leads away from, as free tensors instead of an encoded text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from diffalign.structures import Conditioning

NEGATIVE_NAME = "negative_prompt.safetensors"
# What conditionings call their members -> what the pipelines call their arguments.
ARGUMENTS = {"embeds": "negative_prompt_embeds", "pooled": "negative_pooled_prompt_embeds"}


class NegativePrompt(nn.Module):
    """The embeddings of a negative prompt, trainable, float32: one row, of the same shape as an encoded text.

    initial: one row, what it begins at. ValueError where pipelines take no such embeddings.
    """

    def __init__(self, initial: Conditioning) -> None:
        super().__init__()
        named = {name: tensor for name, tensor in initial.tensors.items() if name in ARGUMENTS}
        if not named:
            raise ValueError(f"a negative prompt has {', '.join(ARGUMENTS)}, and this model's has none of them")
        self.trained = nn.ParameterDict({n: nn.Parameter(t.detach().float().clone()) for n, t in named.items()})
        self.rest = {name: tensor for name, tensor in initial.tensors.items() if name not in ARGUMENTS}
        self.shared = initial.shared

    def forward(self) -> dict[str, Tensor]:
        """The trained tensors by name. Called on accelerate's wrapper, so that processes share their gradients."""
        return dict(self.trained.items())

    def conditioning(self, trained: Mapping[str, Tensor]) -> Conditioning:
        """One row of what the denoiser sees, from what ``forward`` gave."""
        return Conditioning({**trained, **self.rest}, self.shared)

    def save(self, directory: Path) -> Path:
        """Writes the file that ``pipe(prompt, **load_file(file))`` takes: arguments of plain pipelines by name."""
        named: dict[str, Tensor] = {ARGUMENTS[n]: t.detach().cpu().contiguous() for n, t in self.trained.items()}
        save_file(named, directory / NEGATIVE_NAME)
        return directory / NEGATIVE_NAME
