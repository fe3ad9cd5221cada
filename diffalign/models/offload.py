"""CPU offload of frozen pipeline components between phases: text encoders and the VAE.

The weights stay in host memory. Loading copies them to the device, and unloading drops the copy: frozen weights never
have to be copied back. Results equal those of a component that stays on the device.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

TEXT_ENCODERS = "text_encoders"
VAE = "vae"
# Part -> prefix of its components' names.
PARTS = {TEXT_ENCODERS: "text_encoder", VAE: "vae"}
Method = TypeVar("Method", bound=Callable[..., Any])


def part_of(pipeline: DiffusionPipeline, part: str) -> dict[str, nn.Module]:
    """Return the modules of a part by component name; empty if the pipeline has none."""
    found = {name: c for name, c in pipeline.components.items() if name.startswith(PARTS[part])}
    return {name: network for name, network in found.items() if isinstance(network, nn.Module)}


def tensors_of(networks: Collection[nn.Module]) -> list[Tensor]:
    """Return all parameters and buffers, tied ones once (T5 ties its embeddings)."""
    return list({id(t): t for network in networks for t in [*network.parameters(), *network.buffers()]}.values())


class OffloadedModule:
    """A pipeline part that stays on ``device`` from its first use within ``pinned`` until the outermost one ends."""

    def __init__(self, networks: Collection[nn.Module], device: torch.device) -> None:
        self.networks, self.device, self.pins = networks, device, 0
        self._host_tensors: list[tuple[Tensor, Tensor]] = []

    @property
    def resident(self) -> bool:
        """Whether the weights are on the device."""
        return bool(self._host_tensors)

    def load(self) -> None:
        """Copy the weights to the device unless they are there; a failed copy is undone."""
        if self.resident:
            return
        self._host_tensors = [(tensor, tensor.data) for tensor in tensors_of(self.networks)]
        try:
            for tensor, home in self._host_tensors:
                tensor.data = home.to(self.device, non_blocking=True, copy=True)
        except BaseException:
            self.unload()
            raise

    def unload(self) -> None:
        """Drop the device copy; free, and allowed at any time."""
        for tensor, home in self._host_tensors:
            tensor.data = home
        self._host_tensors = []

    @contextmanager
    def pinned(self) -> Iterator[None]:
        """Keep the weights on the device once loaded, until this context ends; does not load them."""
        self.pins += 1
        try:
            yield
        finally:
            self.pins -= 1
            if not self.pins:
                self.unload()


def to_device(
    pipeline: DiffusionPipeline, device: torch.device, offload: Sequence[str] = (), without: str | None = None
) -> dict[str, OffloadedModule]:
    """Move a pipeline to a device, except for its offloaded parts.

    Quantised components stay where they were loaded, with a warning if they were to be offloaded.

    Args:
        pipeline: Moved in place.
        device: Target device. On a CPU nothing is offloaded.
        offload: Parts to offload, of ``PARTS``.
        without: Name of a component that is not moved.

    Returns:
        The offloaded parts by name.

    Raises:
        ValueError: Unknown part.
    """
    if unknown := [part for part in offload if part not in PARTS]:
        raise ValueError(f"offload: no part is named {', '.join(unknown)}; known: {', '.join(PARTS)}")
    to_offload = {part: part_of(pipeline, part) for part in offload if device.type != "cpu"}
    if not to_offload and without is None:
        pipeline.to(device)
        return {}
    for part, networks in to_offload.items():
        if fixed := [name for name, network in networks.items() if is_quantised(network)]:
            warnings.warn(f"offload: {part}: {', '.join(fixed)} is quantised, and stays on the device", stacklevel=2)
            to_offload[part] = {name: network for name, network in networks.items() if name not in fixed}
    offloaded_names = {name for networks in to_offload.values() for name in networks}
    for name, component in pipeline.components.items():
        if isinstance(component, nn.Module) and name != without and not is_quantised(component):
            component.to("cpu" if name in offloaded_names else device)
    return {part: OffloadedModule(networks.values(), device) for part, networks in to_offload.items()}


def is_quantised(network: nn.Module) -> bool:
    """Tell whether diffusers or transformers loaded a module quantised; its weights cannot be moved freely."""
    return getattr(network, "quantization_method", None) is not None


def needs(part: str) -> Callable[[Method], Method]:
    """Decorate a method of a ``DiffusionModel`` to load ``part`` for the duration of the call if it is offloaded.

    The method raises RuntimeError if it would record gradients and the part is not pinned for the backward pass.
    """

    def decorate(method: Method) -> Method:
        @functools.wraps(method)
        def wrapper(model: Any, *args: Any, **kwargs: Any) -> Any:
            offloaded: Mapping[str, OffloadedModule] = model.offloaded
            if (module := offloaded.get(part)) is None:
                return method(model, *args, **kwargs)
            if not module.pins and _records_gradients((*args, *kwargs.values())):
                raise RuntimeError(
                    f"{method.__name__} with gradients needs the {part} until the backward pass: make both within "
                    f'model.keeping("{part}")'
                )
            with module.pinned():
                module.load()
                return method(model, *args, **kwargs)

        return cast(Method, wrapper)

    return decorate


def _records_gradients(values: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in values)
