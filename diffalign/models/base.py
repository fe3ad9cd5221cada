"""One interface between the trainers and a diffusers pipeline."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffalign.atomic import replacing, replacing_folder
from diffalign.fsdp import FSDPConfig, gathered, is_sharded, shard, unsharded
from diffalign.models import lora
from diffalign.models.lora_file import read_tensors
from diffalign.models.negative_prompt import NEGATIVE_NAME, NegativePrompt
from diffalign.models.offload import VAE, OffloadedModule, needs, to_device
from diffalign.models.weights import REFERENCE, WeightSets
from diffalign.structures import Conditioning, Guidance, Level

SCHEDULES = ("pipeline", "uniform")


def check_resolution(resolution: tuple[int, int], unit: int) -> None:
    """Refuse an image size that a pipeline would round or reject.

    Args:
        resolution: height and width, in pixels.
        unit: what both must be multiples of.

    Raises:
        ValueError: a side is below 1, or no multiple of ``unit``.
    """
    for side in resolution:
        if side < 1 or side % unit:
            down = max(side // unit, 0) * unit
            sizes = f"{down} or {down + unit}" if down else f"{unit} or more"
            raise ValueError(
                f"resolution {resolution[0]} x {resolution[1]}: sides of this model's images are multiples of {unit} "
                f"pixels; set resolution: {sizes}"
            )


def check_schedule(schedule: str) -> None:
    """ValueError for an unknown schedule."""
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}; known: {', '.join(SCHEDULES)}")


class DiffusionModel(ABC):
    """A pipeline, its denoiser and the named weight sets of that denoiser.

    Latents are B x C x h x w in the scale that the denoiser sees; images are float, [0, 1], B x 3 x H x W.
    """

    parameterization: str
    # The pipeline guides at scales above this one.
    unguided_scale: float = 1.0
    denoiser_name: str = "transformer"
    lora_targets: tuple[str, ...]
    # Keyword arguments of ``from_pretrained``: parts of the pipeline that no training needs.
    load_options: Mapping[str, Any] = {}
    # What conditionings call the members of a negative prompt -> what the pipeline calls its arguments.
    negative_names: Mapping[str, str] = {
        "embeds": "negative_prompt_embeds",
        "pooled": "negative_pooled_prompt_embeds",
    }
    # How the pipeline is called with ``negative``, what ``save`` wrote of a trained one; the prompt comes as a literal.
    negative_call = "image = pipe({prompt}, **negative, guidance_scale={scale:g}).images[0]"
    weights: WeightSets

    def __init__(self, pipeline: DiffusionPipeline, resolution: int | None = None) -> None:
        self.pipeline = pipeline
        self.resolution = resolution
        if resolution is not None:
            self.check_resolution((resolution, resolution))
        for component in pipeline.components.values():
            if isinstance(component, nn.Module):
                component.requires_grad_(False).eval()
        # Convolutions of the decoder run up to three times faster in this layout, on CPUs and GPUs alike. By hand,
        # because a module of films has kernels of five dimensions beside those of four, and ``Module.to`` refuses it.
        for parameter in pipeline.vae.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.to(memory_format=torch.channels_last)
        self.denoiser = self.raw_denoiser
        # Parts that are on the device only while they are used: see ``to_device``.
        self.offloaded: dict[str, OffloadedModule] = {}
        # Weights in 4 or 8 bits are stored as whole numbers.
        self.dtype = next(p.dtype for p in self.raw_denoiser.parameters() if p.is_floating_point())
        self.has_adapter = False
        self.negative: NegativePrompt | None = None
        # What the header of an exported LoRA says of its making.
        self.about: dict[str, str] = {}
        # To be set for training in bfloat16 on a CPU: the backward pass of its fused attention takes ten times as long
        # as plain matrix products.
        self.plain_attention = False

    # What a family defines ------------------------------------------------------------------------------------------

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> Conditioning:
        """The conditioning of a list of texts, a row each, without gradients; decorated with ``needs``."""

    @abstractmethod
    def levels(self, num_steps: int, schedule: str = "pipeline", resolution: tuple[int, int] | None = None) -> Level:
        """The N + 1 levels of a schedule: "pipeline" is what ``pipe(..., num_inference_steps=N)`` visits,
        "uniform" what ``pipe(..., sigmas=linspace(1, 1 / N, N))`` does. ValueError for an unknown schedule.
        """

    @abstractmethod
    def level_at(self, time: Tensor) -> Level:
        """The levels at any times of training, one per sample, as noisy as their times are late.

        time: (B,), any dtype, in [0, T] with T = ``num_train_timesteps``, so that T u with u uniform in [0, 1) is
        uniform over the levels of every family. Variance-preserving models know whole timesteps only, and round down;
        a flow model has sigma = time / T, without the shift that its scheduler may apply when sampling.
        ValueError for times outside.
        """

    @abstractmethod
    def evaluate(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """One call of the denoiser. x: (B, C, h, w); time: (B,), float32."""

    def unconditional(self) -> Conditioning:
        """What guidance leads away from when no negative prompt is given, and a dropped prompt becomes: one row."""
        return self.encode([""])

    @property
    @abstractmethod
    def token_limit(self) -> int:
        """Tokens that the text encoder with the longest view reads of a prompt, counted as ``count_tokens`` does."""

    @abstractmethod
    def count_tokens(self, text: str) -> int:
        """Count the tokens of a prompt for that encoder, with those that the pipeline adds."""

    @property
    def idle_layers(self) -> tuple[str, ...]:
        """Layers whose output nothing reads. They are not trained: processes would wait for their gradients."""
        return ()

    def with_sizes(self, conditioning: Conditioning, original: Tensor, crop: Tensor, target: Tensor) -> Conditioning:
        """The conditioning of images that were resized and cropped, for denoisers that are told; others ignore it.

        original: (B, 2), height and width in pixels before any resizing. crop: (B, 2), top and left of the crop after
        it. target: (B, 2), height and width of what is trained on.
        """
        return conditioning

    # What all families share ----------------------------------------------------------------------------------------

    @property
    def raw_denoiser(self) -> nn.Module:
        """The pipeline's own denoiser, whatever wrapper ``denoiser`` has since been given."""
        return getattr(self.pipeline, self.denoiser_name)

    def set_denoiser(self, module: nn.Module) -> None:
        """Replaces the pipeline's denoiser, e.g. by one with other weights."""
        setattr(self.pipeline, self.denoiser_name, module)
        self.denoiser = module

    def to_device(self, device: torch.device, offload: Sequence[str] = (), *, denoiser: bool = True) -> None:
        """Moves the pipeline to ``device``; without ``denoiser``, which stays where it is, if that will be sharded.

        offload: "text_encoders", "vae": they come when they are used, and leave after it, or after ``keeping``.
        """
        self.offloaded = to_device(self.pipeline, device, offload, without=None if denoiser else self.denoiser_name)

    @contextmanager
    def keeping(self, *parts: str) -> Iterator[None]:
        """A phase within which ``parts`` do not leave the device again once they have come; others come and go."""
        with ExitStack() as stack:
            for part in parts:
                if part in self.offloaded:
                    stack.enter_context(self.offloaded[part].pinned())
            yield

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return next(self.raw_denoiser.parameters()).device

    @property
    def num_train_timesteps(self) -> int:
        """T: ``time`` runs from 0 to T."""
        return self.pipeline.scheduler.config.num_train_timesteps

    @property
    def default_resolution(self) -> tuple[int, int]:
        """Height and width, in pixels: ``resolution``, else what the pipeline generates when not told otherwise."""
        size = self.resolution or self.raw_denoiser.config.sample_size * self.pipeline.vae_scale_factor
        return size, size

    def latent_shape(self, resolution: tuple[int, int] | None = None) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a resolution in pixels. ValueError: see ``check_resolution``."""
        resolution = resolution or self.default_resolution
        self.check_resolution(resolution)
        height, width = (side // self.pipeline.vae_scale_factor for side in resolution)
        return self.latent_channels, height, width

    @property
    def latent_channels(self) -> int:
        """C of the latents, as the scheduler sees them."""
        return self.raw_denoiser.config.in_channels

    @property
    def resolution_unit(self) -> int:
        """What sides of images are multiples of, in pixels, as the pipeline checks it."""
        return self.pipeline.vae_scale_factor

    def check_resolution(self, resolution: tuple[int, int]) -> None:
        """Refuse (height, width) in pixels that this family cannot draw. ValueError with sizes that it can."""
        check_resolution(resolution, self.resolution_unit)

    def predict(self, x: Tensor, level: Level, conditioning: Conditioning, guidance: Guidance | None = None) -> Tensor:
        """The denoiser's output, guided: (B, C, h, w), float32 or wider.

        level: fields () or (B,). Guidance doubles the batch of one call instead of making two, unless its negative is
        detached and gradients are recorded; at scales that do not guide it costs nothing (see ``guides``).
        """
        time = level.time.to(x.device, torch.float32, non_blocking=True).expand(len(x))
        with sdpa_kernel(SDPBackend.MATH) if self.plain_attention else nullcontext():
            if guidance is None or not self.guides(guidance.scale):
                return self.evaluate(x, time, conditioning)
            guidance = self.resolve_guidance(guidance)
            assert guidance is not None
            assert guidance.negative is not None
            negative = guidance.negative[torch.zeros(len(x), dtype=torch.long, device=x.device)]
            if guidance.detached and torch.is_grad_enabled():
                with torch.no_grad():
                    against = self.evaluate(x, time, negative)
                towards = self.evaluate(x, time, conditioning)
            else:
                both = Conditioning.cat([negative, conditioning])
                against, towards = self.evaluate(torch.cat([x, x]), torch.cat([time, time]), both).chunk(2)
        return self.guide(against, towards, guidance.scale)

    def guides(self, scale: float | None) -> bool:
        """Tell whether the pipeline guides at ``scale``; None is no guidance."""
        return scale is not None and scale > self.unguided_scale

    def resolve_guidance(self, guidance: Guidance | None) -> Guidance | None:
        """Fill in the negative where the scale guides and leaves it out: for several steps with one encoding."""
        if guidance is None or guidance.negative is not None or not self.guides(guidance.scale):
            return guidance
        return replace(guidance, negative=self.unconditional())

    def guide(self, against: Tensor, towards: Tensor, scale: float) -> Tensor:
        """Combine a negative and a positive output, as the pipeline does at ``scale``."""
        return against + scale * (towards - against)

    def guidance_factor(self, scale: float | None) -> float:
        """Return the weight of the positive output at ``scale``; 1 without guidance."""
        return float(scale) if scale is not None and self.guides(scale) else 1.0

    @needs(VAE)
    def decode(self, latents: Tensor) -> Tensor:
        """Images of latents, differentiable."""
        vae = self.pipeline.vae
        latents = latents.to(vae.dtype) / vae.config.scaling_factor + self._latent_shift
        return (vae.decode(latents, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)

    @needs(VAE)
    def encode_images(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents of images, scaled for the denoiser.

        The mean of the encoder's distribution; with noise (B, C, h, w), standard normal, the sample mean + std noise.
        """
        vae = self.pipeline.vae
        found = vae.encode((images * 2 - 1).to(vae.dtype)).latent_dist
        latents = found.mean if noise is None else found.mean + found.std * noise.to(found.std)
        return (latents - self._latent_shift) * vae.config.scaling_factor

    @property
    def _latent_shift(self) -> float:
        """Of SD3's VAE and later ones; earlier configurations do not know the word, or say null."""
        return self.pipeline.vae.config.get("shift_factor") or 0.0

    def train(
        self,
        config: lora.LoraConfig,
        *,
        seed: int = 0,
        keep_reference: bool = False,
        shards: FSDPConfig | None = None,
    ) -> None:
        """Makes the denoiser trainable: a LoRA, or with rank 0 all of it.

        keep_reference: whether ``using("reference")`` will be needed; it costs a copy for full fine-tuning, nothing for
        a LoRA. shards: how the denoiser is spread over all processes; None: each has all of it.
        """
        if config.rank:
            lora.inject(self.raw_denoiser, config, self.lora_targets, seed, self.idle_layers)
        else:
            self.raw_denoiser.requires_grad_(True)
            for name in self.idle_layers:
                self.raw_denoiser.get_submodule(name).requires_grad_(False)
        if shards is not None:
            shard(self.raw_denoiser, shards)
        self.has_adapter = config.rank > 0
        self.weights = WeightSets(self.raw_denoiser, has_adapter=self.has_adapter)
        if keep_reference and not self.has_adapter:
            self.weights.keep_copy(REFERENCE)

    def train_negative(self) -> NegativePrompt:
        """Makes a negative prompt trainable, and nothing else: from ``unconditional`` on, which is the reference."""
        self.negative = NegativePrompt(self.unconditional()).to(self.device)
        self.weights = WeightSets(self.negative, has_adapter=False)
        self.weights.keep_copy(REFERENCE)
        return self.negative

    @torch.no_grad()
    def load_negative(self, file: Path) -> None:
        """Puts a negative prompt that ``save`` wrote in the place of the empty one, which is the reference.

        ValueError: it is damaged, or of another model or length.
        """
        negative = self.train_negative()
        here, saved = self.negative_arguments(negative.conditioning(negative())), read_tensors(file)
        sizes, found = ({name: tuple(t.shape) for name, t in named.items()} for named in (here, saved))
        if sizes != found:
            raise ValueError(
                f"{file} holds {found}, and a negative prompt of this model is {sizes}: "
                "give the model and the max_sequence_length that it was trained with"
            )
        for name in negative.trained:
            argument = self.negative_names[name]
            here[argument].copy_(saved[argument])  # a view of what is trained, or all of it

    def negative_arguments(self, row: Conditioning) -> dict[str, Tensor]:
        """A negative prompt as arguments of the plain pipeline, by name."""
        return {argument: row.tensors[name] for name, argument in self.negative_names.items() if name in row.tensors}

    def using(self, name: str) -> AbstractContextManager[None]:
        """A context in which the denoiser has the weights of set ``name``: "policy", "reference", "ema", ..."""
        return self.weights.using(name)

    def save(self, directory: Path, weights: Mapping[str, Tensor] | None = None) -> Path:
        """Writes what is trained as plain diffusers loads it: a LoRA file, full weights, or a negative prompt.

        weights: those of the denoiser by name, where it has shards: see ``saver``.
        """
        directory.mkdir(parents=True, exist_ok=True)
        if self.negative is not None:
            named = self.negative_arguments(self.negative.conditioning(self.negative()))
            with replacing(directory / NEGATIVE_NAME) as staged:
                save_file({n: t.detach().cpu().contiguous() for n, t in named.items()}, staged)
            return directory / NEGATIVE_NAME
        if self.has_adapter:
            return lora.export(self.pipeline, self.denoiser_name, directory, self.about, weights)
        denoiser = self.raw_denoiser if weights is None else unsharded(self.raw_denoiser, weights)
        with replacing_folder(directory / self.denoiser_name) as folder:
            denoiser.save_pretrained(folder)
        return directory / self.denoiser_name

    def saver(self, name: str, keep: bool = True) -> Callable[[Path], Path]:
        """What saves weight set ``name`` into a folder, by one process: all must ask for it, and one calls it.

        keep: whether it is this one.
        """
        weights = None
        if is_sharded(self.raw_denoiser):
            with self.using(name):
                weights = gathered(self.raw_denoiser, trained_only=self.has_adapter, keep=keep)

        def write(directory: Path) -> Path:
            with self.using(name):
                return self.save(directory, weights)

        return write
