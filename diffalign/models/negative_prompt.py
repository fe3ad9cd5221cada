"""A negative prompt that is trained: what guidance leads away from, as free tensors instead of an encoded text."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from diffalign.structures import Conditioning

NEGATIVE_NAME = "negative_prompt.safetensors"
# The members of a conditioning that stand for a text; the others, such as masks, stay as they are.
TRAINED = ("embeds", "pooled")


class NegativePrompt(nn.Module):
    """The embeddings of a negative prompt, trainable, float32: one row, of the same shape as an encoded text.

    Where there is a mask, what it hides gets no gradient. initial: one row, what it begins at. ValueError where it has
    no embeddings.
    """

    def __init__(self, initial: Conditioning) -> None:
        super().__init__()
        named = {name: tensor for name, tensor in initial.tensors.items() if name in TRAINED}
        if not named:
            raise ValueError(
                f"a negative prompt has {', '.join(TRAINED)}, and this model's has none of them; train a LoRA"
            )
        self.trained = nn.ParameterDict({n: nn.Parameter(t.detach().float().clone()) for n, t in named.items()})
        self.rest = {name: tensor for name, tensor in initial.tensors.items() if name not in TRAINED}
        self.shared = initial.shared

    def forward(self) -> dict[str, Tensor]:
        """The trained tensors by name. Called on accelerate's wrapper, so that processes share their gradients."""
        return dict(self.trained.items())

    def conditioning(self, trained: Mapping[str, Tensor]) -> Conditioning:
        """One row of what the denoiser sees, from what ``forward`` gave."""
        return Conditioning({**trained, **self.rest}, self.shared)
