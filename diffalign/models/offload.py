"""Parts of a pipeline that leave the device between phases: text encoders and the VAE.

Their weights live in main memory. For a visit they are copied to the device, and dropped there when it ends: they are
frozen, so nothing has to be copied back. Numbers are those of a part that is always there.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

TEXT_ENCODERS = "text_encoders"
VAE = "vae"
# Part -> how the names of its components begin.
PARTS = {TEXT_ENCODERS: "text_encoder", VAE: "vae"}
Method = TypeVar("Method", bound=Callable[..., Any])


def part_of(pipeline: DiffusionPipeline, part: str) -> dict[str, nn.Module]:
    """The networks of a part by name; a pipeline may have none."""
    found = {name: c for name, c in pipeline.components.items() if name.startswith(PARTS[part])}
    return {name: network for name, network in found.items() if isinstance(network, nn.Module)}


def tensors_of(networks: Collection[nn.Module]) -> list[Tensor]:
    """Parameters and buffers, each once (T5 ties its embeddings)."""
    return list({id(t): t for network in networks for t in [*network.parameters(), *network.buffers()]}.values())


class OffloadedModule:
    """A part that is on ``device`` from its first use within ``kept`` to the end of the outermost one."""

    def __init__(self, networks: Collection[nn.Module], device: torch.device) -> None:
        self.networks, self.device, self.keepers = networks, device, 0
        self._home: list[tuple[Tensor, Tensor]] = []

    @property
    def here(self) -> bool:
        """Whether it is on the device."""
        return bool(self._home)

    def come(self) -> None:
        """Copies it to the device, unless it is there."""
        if self.here:
            return
        self._home = [(tensor, tensor.data) for tensor in tensors_of(self.networks)]
        try:
            for tensor, home in self._home:
                tensor.data = home.to(self.device, non_blocking=True, copy=True)
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        """Drops what is on the device; it costs nothing, and may be asked at any time."""
        for tensor, home in self._home:
            tensor.data = home
        self._home = []

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Within this context it does not leave; it need not come."""
        self.keepers += 1
        try:
            yield
        finally:
            self.keepers -= 1
            if not self.keepers:
                self.leave()


def place(
    pipeline: DiffusionPipeline, device: torch.device, offload: Sequence[str] = (), without: str | None = None
) -> dict[str, OffloadedModule]:
    """Moves a pipeline to ``device``, but for the parts ``offload``, which it returns as visitors by name.

    without: a component that stays where it is. What is quantised stays as well, with a warning where it was to leave.
    On a CPU there is nowhere to leave to: nothing is a visitor. ValueError: an unknown part.
    """
    if unknown := [part for part in offload if part not in PARTS]:
        raise ValueError(f"offload: no part is named {', '.join(unknown)}; known: {', '.join(PARTS)}")
    leaving = {part: part_of(pipeline, part) for part in offload if device.type != "cpu"}
    if not leaving and without is None:
        pipeline.to(device)
        return {}
    for part, networks in leaving.items():
        if fixed := [name for name, network in networks.items() if is_quantised(network)]:
            warnings.warn(f"offload: {part}: {', '.join(fixed)} is quantised, and stays on the device", stacklevel=2)
            leaving[part] = {name: network for name, network in networks.items() if name not in fixed}
    gone = {name for networks in leaving.values() for name in networks}
    for name, component in pipeline.components.items():
        if isinstance(component, nn.Module) and name != without and not is_quantised(component):
            component.to("cpu" if name in gone else device)
    return {part: OffloadedModule(networks.values(), device) for part, networks in leaving.items()}


def is_quantised(network: nn.Module) -> bool:
    """Whether diffusers or transformers loaded it so, onto its device; its weights cannot be moved freely."""
    return getattr(network, "quantization_method", None) is not None


def needs(part: str) -> Callable[[Method], Method]:
    """For a method of a model that has ``visitors``: it runs while ``part`` is on the device.

    RuntimeError: it would record gradients, and nobody keeps the part there for the backward pass.
    """

    def decorated(method: Method) -> Method:
        @functools.wraps(method)
        def called(model: Any, *args: Any, **kwargs: Any) -> Any:
            visitors: Mapping[str, OffloadedModule] = model.visitors
            if (visitor := visitors.get(part)) is None:
                return method(model, *args, **kwargs)
            if not visitor.keepers and _records((*args, *kwargs.values())):
                raise RuntimeError(
                    f"{method.__name__} with gradients needs the {part} until the backward pass: make both within "
                    f'model.keeping("{part}")'
                )
            with visitor.kept():
                visitor.come()
                return method(model, *args, **kwargs)

        return called

    return decorated


def _records(values: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in values)
