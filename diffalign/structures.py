"""Data structures of the package: small frozen dataclasses that all subpackages share.

Shapes are written with B samples, C latent channels, H x W latent positions, N buffer nodes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, overload

from diffalign.files import check_inside, read_bytes

if TYPE_CHECKING:  # preference data is read without torch
    from torch import Tensor


def without_nulls(value: Any) -> Any:
    """Drop the members of mappings that are None, at any depth: tables write null where a member is absent."""
    if isinstance(value, Mapping):
        return {key: without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [without_nulls(entry) for entry in value] if isinstance(value, (list, tuple)) else value


Resolution = int | tuple[int, int] | None  # of a configuration: a side, (height, width), or the model's own


@overload
def image_size(resolution: int | tuple[int, int]) -> tuple[int, int]: ...
@overload
def image_size(resolution: Resolution) -> tuple[int, int] | None: ...
def image_size(resolution: Resolution) -> tuple[int, int] | None:
    """Return (height, width) in pixels of a configured resolution; one side means a square."""
    return (resolution, resolution) if isinstance(resolution, int) else resolution


class EditInput(NamedTuple):
    """An editing instruction with the path of its source image, which is fitted to ``size``, (height, width).

    None: the model's size.
    """

    text: str
    image: str
    size: tuple[int, int] | None = None


Input = str | EditInput  # of a model: a text, with a source image for models that edit


def text_of(given: Input) -> str:
    """Return the text of a model's input."""
    return given if isinstance(given, str) else given.text


@dataclass(frozen=True)
class Prompt:
    """A text with metadata for rewards.

    ``metadata`` passes unchanged through the rollout buffer to the reward: a GenEval specification, an OCR target, a
    scene of shapes. Its "image" is the path of the source image of an editing instruction.
    """

    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def input(self) -> Input:
        """The text, with the path of its source image if it has one."""
        image = self.metadata.get("image")
        return EditInput(self.text, image) if isinstance(image, str) and image else self.text


@dataclass(frozen=True)
class Level:
    """A point of a noise schedule: x = alpha * x0 + sigma * noise.

    Variance-preserving models keep alpha^2 + sigma^2 = 1, flow models alpha = 1 - sigma; one class serves both.
    Each field is a float64 CPU tensor, of shape () for one level or (B,) for a level per sample. ``time`` is the
    denoiser's time input (in the units of its own schedule, e.g. 0 to 1000).
    """

    alpha: Tensor
    sigma: Tensor
    time: Tensor

    def __getitem__(self, index: int | slice | Tensor) -> Level:
        """Select the level (or levels) at ``index`` of a batch of levels."""
        return Level(self.alpha[index], self.sigma[index], self.time[index])

    def __len__(self) -> int:
        return len(self.sigma)

    @property
    def is_flow(self) -> bool:
        """Whether alpha = 1 - sigma holds for every level."""
        return bool(((self.alpha + self.sigma - 1).abs() < 1e-9).all())


@dataclass(frozen=True)
class StepResult:
    """One transition of a sampler.

    x_next: (B, C, H, W), rounded to the dtype in which it is stored.
    mean: (B, C, H, W), float32 or wider; carries the gradient of the policy.
    std: () or (B,), float64 on the CPU, the true standard deviation of this step.
    log_prob: (B,), float64, the mean over the sample's dimensions of log N(x_next; mean, std);
        None where std is 0, because then there is no density.
    """

    x_next: Tensor
    mean: Tensor
    std: Tensor
    log_prob: Tensor | None


@dataclass(frozen=True)
class Conditioning:
    """Inputs of the denoiser for a batch of prompts.

    tensors: batch-first tensors, indexed and repeated together, e.g. embeddings (B, L, D) and pooled (B, P).
    shared: members without a batch axis, e.g. position ids.
    """

    tensors: Mapping[str, Tensor]
    shared: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, index: slice | Tensor | Sequence[int]) -> Conditioning:
        """Select the rows at ``index``."""
        return Conditioning({name: tensor[index] for name, tensor in self.tensors.items()}, self.shared)

    def to(self, *args: Any, **kwargs: Any) -> Conditioning:
        """Apply ``Tensor.to`` to every tensor, shared ones included."""
        from torch import Tensor

        shared = {
            name: value.to(*args, **kwargs) if isinstance(value, Tensor) else value
            for name, value in self.shared.items()
        }
        return Conditioning({name: tensor.to(*args, **kwargs) for name, tensor in self.tensors.items()}, shared)

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Concatenate batches; shared tensors come from the first."""
        import torch

        names = parts[0].tensors
        return Conditioning(
            {name: torch.cat([part.tensors[name] for part in parts]) for name in names}, parts[0].shared
        )


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance away from ``negative``, with ``scale`` as the model's own pipeline means it.

    ``DiffusionModel.guides`` returns whether a scale guides: above 1 in most families. Other scales cost one
    evaluation per step and ignore the negative. ``negative`` has one row, shared by every sample; None: the model's own
    ``unconditional``.
    ``detached``: the negative output is a constant, which halves the memory of the gradient path.
    ValueError: a scale below 0, or one that is not finite.
    """

    scale: float = 1.0
    negative: Conditioning | None = None
    detached: bool = False

    def __post_init__(self) -> None:
        check_guidance("guidance scale", self.scale)


def check_guidance(name: str, scale: float | None) -> None:
    """Refuse a guidance scale that is meaningless in every pipeline; None means that none is given.

    ValueError: it is below 0, or not finite.
    """
    if scale is not None and not 0 <= scale < math.inf:
        raise ValueError(f"{name} must be 0 or more and finite, got {scale:g}; 1 turns guidance off (Z-Image: 0)")


@dataclass(frozen=True)
class Scores:
    """Named rewards of B samples: each (B,), float32, NaN where a reward failed on that sample."""

    values: Mapping[str, Tensor]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)

    def __getitem__(self, name: str) -> Tensor:
        return self.values[name]


@dataclass(frozen=True)
class ImageSource:
    """An encoded image that is read on demand.

    name: for messages. content: its bytes, the path of its file, a function that returns either, or None if the data
    have no image. identity: an id or path that is equal for the same image in several pairs, if the data have one.
    within: folders of which one must contain the file after links are resolved; None allows any.
    """

    name: str
    content: bytes | Path | Callable[[], bytes | Path | None] | None = field(repr=False)
    identity: str | None = None
    within: tuple[Path, ...] | None = field(default=None, repr=False, compare=False)

    def read(self) -> bytes:
        """Read the encoded bytes, of regular files of bounded size only.

        OSError: the file cannot be read. ValueError: no image, no regular file, or a file outside ``within``.
        """
        content = self.content() if callable(self.content) else self.content
        if content is None:
            raise ValueError("no image")
        if isinstance(content, Path) and self.within is not None:
            check_inside(content, self.within)
        return read_bytes(content) if isinstance(content, Path) else content


@dataclass(frozen=True)
class Pair:
    """Two images of a prompt, and which of them is preferred.

    key: unique within its data set. label: the probability that the first image is preferred,
    [0, 1]; 1 and 0 are plain choices, 0.5 is a tie. mask: of both images, white where they count; None: everywhere.
    """

    key: str
    prompt: Prompt
    images: tuple[ImageSource, ImageSource]
    label: float
    mask: ImageSource | None = None

    @property
    def tie(self) -> bool:
        """Whether neither image is preferred."""
        return self.label == 0.5

    @property
    def winner(self) -> ImageSource:
        """The preferred image; of a tie the first."""
        return self.winner_first().images[0]

    @property
    def loser(self) -> ImageSource:
        """The other image; of a tie the second."""
        return self.winner_first().images[1]

    def swap(self) -> Pair:
        """Return the pair with the images in the other order."""
        return replace(self, images=(self.images[1], self.images[0]), label=1 - self.label)

    def winner_first(self) -> Pair:
        """Return the pair ordered so that the label is at least 0.5."""
        return self if self.label >= 0.5 else self.swap()


@dataclass(frozen=True)
class LabelledImage:
    """An image of a prompt with a label, liked or disliked, without another image to compare it with.

    mask: white where the image counts; None: everywhere.
    """

    key: str
    prompt: Prompt
    image: ImageSource
    liked: bool
    mask: ImageSource | None = None

    @property
    def images(self) -> tuple[ImageSource]:
        """The image as a tuple, as ``Pair.images``."""
        return (self.image,)
