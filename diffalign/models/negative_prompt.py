"""A trainable negative prompt: free embeddings for guidance instead of an encoded text."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from diffalign.structures import Conditioning

NEGATIVE_NAME = "negative_prompt.safetensors"
# Conditioning tensors that are trained; others, such as masks, stay fixed.
TRAINED = ("embeds", "pooled")


class NegativePrompt(nn.Module):
    """Trainable float32 embeddings of a negative prompt: one row, shaped like an encoded text.

    Masked positions get no gradient.

    Args:
        initial: One row, the initial value.

    Raises:
        ValueError: ``initial`` has no embeddings.
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
        """Return the trained tensors by name; call accelerate's wrapper, so that processes share gradients."""
        return dict(self.trained.items())

    def conditioning(self, trained: Mapping[str, Tensor]) -> Conditioning:
        """Build a one-row conditioning from the output of ``forward``."""
        return Conditioning({**trained, **self.rest}, self.shared)
