"""Low-rank updates by component and layer, whatever the format of their file: combine and resize."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """The update of one layer, ``up @ down``, with alpha and scale multiplied into ``up``.

    Attributes:
        down: (rank, in), or (rank, in, height, width) for a convolution; float32.
        up: (out, rank), or (out, rank, 1, 1).
        magnitude: (out,) or (1, out, 1, 1), row norms of DoRA (arXiv 2402.09353); None for a plain LoRA.
        bias: (out,), an added bias; None for most LoRAs.
    """

    down: Tensor
    up: Tensor
    magnitude: Tensor | None = None
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        """Rank of the update."""
        return len(self.down)

    def delta(self) -> Tensor:
        """Return the update in the shape of the layer's weight, without DoRA's rescaling."""
        return (self.up.flatten(1) @ self.down.flatten(1)).reshape(len(self.up), *self.down.shape[1:])


Updates = Mapping[str, Mapping[str, Factors]]  # component -> layer -> factors


def refuse_dora(updates: Updates, what: str) -> None:
    """Raise ValueError if there is a DoRA among ``updates``: its rescaled weights are no low-rank sum."""
    if any(f.magnitude is not None for layers in updates.values() for f in layers.values()):
        raise ValueError(f"a DoRA cannot be {what}: use --format merged, which writes the rescaled weights")


def combine(weighted: Sequence[tuple[Updates, float]]) -> Updates:
    """Add LoRAs by weights, exactly: the ranks of a layer add up.

    Raises:
        ValueError: A DoRA is scaled or combined with another LoRA.
    """
    if len(weighted) == 1 and weighted[0][1] == 1:
        return weighted[0][0]
    for updates, _ in weighted:
        refuse_dora(updates, "scaled or combined")
    total: dict[str, dict[str, Factors]] = {}
    for updates, weight in weighted:
        for component, layers in updates.items():
            kept = total.setdefault(component, {})
            for layer, own in layers.items():
                scaled = replace(own, up=own.up * weight, bias=None if own.bias is None else own.bias * weight)
                kept[layer] = _beside(kept[layer], scaled) if layer in kept else scaled
    return total


def _beside(one: Factors, other: Factors) -> Factors:
    biases = [bias for bias in (one.bias, other.bias) if bias is not None]
    return Factors(
        torch.cat([one.down, other.down]),
        torch.cat([one.up, other.up], dim=1),
        bias=reduce(torch.add, biases) if biases else None,
    )


def resize(updates: Updates, rank: int) -> tuple[Updates, float]:
    """Reduce each layer to at most ``rank`` by the SVD of its update, the best approximation of that rank.

    Args:
        updates: Plain LoRAs.
        rank: Layers of a lower rank keep theirs.

    Returns:
        The updates, and the share of their squared norm that is kept, 0 to 1.

    Raises:
        ValueError: No layer has a higher rank, or there is a DoRA.
    """
    refuse_dora(updates, "resized")
    most = max((f.rank for layers in updates.values() for f in layers.values()), default=0)
    if rank > most:
        raise ValueError(f"rank {rank} is more than the LoRA's {most}, and would add nothing: choose a smaller rank")
    kept = total = 0.0
    found: dict[str, dict[str, Factors]] = {}
    for component, layers in updates.items():
        for layer, own in layers.items():
            smaller, values = _truncated(own, rank)
            found.setdefault(component, {})[layer] = smaller
            kept, total = kept + float((values[:rank] ** 2).sum()), total + float((values**2).sum())
    return found, kept / total if total else 1.0


def _truncated(own: Factors, rank: int) -> tuple[Factors, Tensor]:
    """Return factors of at most ``rank``, and all singular values of the update."""
    # The SVD of the small core of two QR decompositions: the full update is never formed.
    q_up, r_up = torch.linalg.qr(own.up.flatten(1).double())
    q_down, r_down = torch.linalg.qr(own.down.flatten(1).double().T)
    left, values, right = torch.linalg.svd(r_up @ r_down.T)
    if own.rank <= rank:
        return own, values
    root = values[:rank].sqrt()
    up = (q_up @ left[:, : len(values)])[:, :rank] * root
    down = (right[: len(values)] @ q_down.T)[:rank] * root[:, None]
    width = len(root)
    return (
        replace(
            own,
            up=up.float().reshape(len(own.up), width, *own.up.shape[2:]),
            down=down.float().reshape(width, *own.down.shape[1:]),
        ),
        values,
    )


def merge(pipeline: Any, updates: Updates) -> None:
    """Add plain updates to the weights of a pipeline's components, in place: in float32, rounded once."""
    for component, layers in updates.items():
        module = getattr(pipeline, component)
        for name, own in layers.items():
            weight = module.get_submodule(name).weight
            weight.data = (weight.data.float() + own.delta().to(weight.device)).to(weight.dtype)


def adapter_config(layers: Mapping[str, Factors]) -> dict[str, Any]:
    """Return peft's settings of a component's factors: alpha is the rank, layer by layer.

    Raises:
        ValueError: A DoRA of some layers only, which peft would complete with wrong norms.
    """
    plain = [layer for layer, factors in layers.items() if factors.magnitude is None]
    if 0 < len(plain) < len(layers):
        raise ValueError(
            f"{len(plain)} of {len(layers)} layers, such as {plain[0]}, lack the norms of DoRA: only diffalign export "
            "--format merged takes such a LoRA"
        )
    common = Counter(f.rank for f in layers.values()).most_common(1)[0][0]
    other = {f"^{layer}": f.rank for layer, f in layers.items() if f.rank != common}
    return {
        "r": common,
        "lora_alpha": common,
        "rank_pattern": other,
        "alpha_pattern": dict(other),
        "target_modules": sorted(layers),
        "use_dora": any(f.magnitude is not None for f in layers.values()),
        "lora_bias": any(f.bias is not None for f in layers.values()),
    }


def adapter_state(layers: Mapping[str, Factors]) -> dict[str, Tensor]:
    """Return a component's factors under peft's names, relative to the component."""
    state = {}
    for layer, own in layers.items():
        state[f"{layer}.lora_A.weight"], state[f"{layer}.lora_B.weight"] = own.down, own.up
        if own.magnitude is not None:
            state[f"{layer}.lora_magnitude_vector"] = own.magnitude
        if own.bias is not None:
            state[f"{layer}.lora_B.bias"] = own.bias
    return state


def save_arguments(updates: Updates) -> dict[str, Any]:
    """Return the arguments of ``pipe.save_lora_weights``: tensors and settings of each component."""
    named: dict[str, Any] = {}
    for component, layers in updates.items():
        # Transformers before version 5 needs a prefix, which diffusers strips for later ones.
        text = component.startswith("text_encoder")
        own = {f"text_model.{n}" if text and not n.startswith("text_model.") else n: f for n, f in layers.items()}
        settings = PeftLoraConfig(**adapter_config(layers)).to_dict()
        named[f"{component}_lora_layers"] = adapter_state(own)
        named[f"{component}_lora_adapter_metadata"] = {**settings, "target_modules": sorted(layers)}
    return named
