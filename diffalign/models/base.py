"""The model interface: what trainers call to drive a diffusers pipeline."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffalign.models.offload import VAE, OffloadedModule, needs, to_device
from diffalign.models.sampling_cache import trajectory
from diffalign.models.trainable import TrainableModel
from diffalign.structures import Conditioning, Guidance, Input, Level, Resolution, image_size, text_of

SCHEDULES = ("pipeline", "uniform")


def check_resolution(resolution: tuple[int, int], unit: int) -> None:
    """Refuse an image size that a pipeline would round or reject.

    Args:
        resolution: Height and width in pixels.
        unit: Number of pixels that both must be multiples of.

    Raises:
        ValueError: A side is below 1 or not a multiple of ``unit``; the message names the nearest valid sizes.
    """
    for side in resolution:
        if side < 1 or side % unit:
            down = max(side // unit, 0) * unit
            sizes = f"{down} or {down + unit}" if down else f"{unit} or more"
            if resolution[0] != resolution[1]:
                sizes = str([max(round(length / unit), 1) * unit for length in resolution])
            raise ValueError(
                f"resolution {resolution[0]} x {resolution[1]}: sides of this model's images are multiples of {unit} "
                f"pixels; set resolution: {sizes}"
            )


def check_schedule(schedule: str) -> None:
    """Raise ValueError for an unknown schedule."""
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}; known: {', '.join(SCHEDULES)}")


class DiffusionModel(TrainableModel):
    """A pipeline, its denoiser and the denoiser's named weight sets.

    Latents are (B, C, *spatial), scaled for the denoiser; images are (B, 3, H, W), float, in [0, 1].
    """

    parameterization: str
    # The pipeline applies guidance at scales above this one.
    unguided_scale: float = 1.0
    # Pipeline argument with the scale of classifier-free guidance; None: the pipeline has no such guidance.
    guidance_argument: str | None = "guidance_scale"
    # Negative prompt of a pipeline that does not guide without one.
    negative_text: str | None = None
    denoiser_name: str = "transformer"
    # Whether prompts need a source image, which the pipeline edits.
    edits: bool = False
    # Conditioning tensor with the sizes of the image, for denoisers that have it: see ``with_sizes``.
    sizes_name: str | None = None
    # Text of a dropped prompt of a model that edits, whose source image stays.
    empty_text: str = ""
    lora_targets: tuple[str, ...]
    # Keyword arguments of ``from_pretrained`` that leave out components unused in training.
    load_options: Mapping[str, Any] = {}
    # Components that the pipeline can go without, whose folders may be missing.
    optional_parts: tuple[str, ...] = ()
    # Source of the pipeline call with a saved negative prompt, ``negative``; the prompt is inserted as a literal.
    negative_call = "image = pipe({prompt}, **negative, guidance_scale={scale:g}).images[0]"

    def __init__(self, pipeline: DiffusionPipeline, resolution: Resolution = None) -> None:
        self.pipeline = pipeline
        self.resolution = image_size(resolution)
        if self.resolution is not None:
            self.check_resolution(self.resolution)
        for component in pipeline.components.values():
            if isinstance(component, nn.Module):
                component.requires_grad_(False).eval()
        # channels_last makes the decoder's convolutions up to three times faster, on CPUs and GPUs alike. Set per
        # parameter, because ``Module.to`` refuses video VAEs, which mix 4-D and 5-D kernels.
        for parameter in pipeline.vae.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.to(memory_format=torch.channels_last)
        self.denoiser = self.raw_denoiser
        # Parts that are on the device only while in use: see ``to_device``.
        self.offloaded: dict[str, OffloadedModule] = {}
        # 4-bit and 8-bit weights are stored as integers.
        self.dtype = next(p.dtype for p in self.raw_denoiser.parameters() if p.is_floating_point())
        self.has_adapter = False
        self.negative = None
        self.about = {}
        # Set for bfloat16 training on a CPU, where the backward pass of fused attention takes ten times as long as
        # plain matrix products.
        self.plain_attention = False

    # What a family defines ------------------------------------------------------------------------------------------

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> Conditioning:
        """Encode prompts to a conditioning of one row each, without gradients; decorate with ``needs``."""

    @abstractmethod
    def levels(self, num_steps: int, schedule: str = "pipeline", resolution: tuple[int, int] | None = None) -> Level:
        """Return the N + 1 levels of a schedule.

        Args:
            num_steps: N.
            schedule: "pipeline" for the levels of ``pipe(..., num_inference_steps=N)``, "uniform" for those of
                ``pipe(..., sigmas=linspace(1, 1 / N, N))``.
            resolution: Height and width in pixels, for schedules that shift with image size.

        Raises:
            ValueError: Unknown schedule.
        """

    @abstractmethod
    def level_at(self, time: Tensor) -> Level:
        """Return the level of each training time; noise increases with time.

        Variance-preserving models have integer timesteps only, and round down; a flow model has sigma = time / T,
        without the shift that its scheduler may apply when sampling.

        Args:
            time: (B,), any dtype, in [0, T] with T = ``num_train_timesteps``, so that T u with u uniform in [0, 1) is
                uniform over the levels of every family.

        Raises:
            ValueError: A time is out of range.
        """

    @abstractmethod
    def evaluate(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """Run the denoiser once. x: (B, C, *spatial); time: (B,), float32."""

    def source_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the (height, width) of the source of a result of (height, width), for models that edit."""
        return size

    def encode_input(self, given: Input) -> Conditioning:
        """Encode a prompt, for models that edit with its source image: one row."""
        return self.encode([text_of(given)])

    def unconditional(self) -> Conditioning:
        """Encode the default negative prompt of guidance, which also replaces dropped prompts: one row."""
        return self.encode([self.negative_text or ""])

    @property
    @abstractmethod
    def token_limit(self) -> int:
        """Maximum prompt tokens of the text encoder with the longest context, counted like ``count_tokens``."""

    def count_tokens(self, text: str) -> int:
        """Count the prompt tokens for that encoder, including those that the pipeline adds."""
        return self.prompt_tokens(self.pipeline.tokenizer, text)

    @staticmethod
    def prompt_tokens(tokenizer: Any, text: str) -> int:
        """Count the tokens that one of the pipeline's tokenizers makes of a prompt, chat template included."""
        return len(tokenizer(text, verbose=False).input_ids)

    @property
    def idle_layers(self) -> tuple[str, ...]:
        """Layers with unused output. They stay frozen, since DDP would wait for their gradients."""
        return ()

    def with_sizes(self, conditioning: Conditioning, original: Tensor, crop: Tensor, target: Tensor) -> Conditioning:
        """Add size and crop conditioning for denoisers that have it; others return ``conditioning`` unchanged.

        Args:
            conditioning: B rows.
            original: (B, 2), height and width in pixels before resizing.
            crop: (B, 2), top and left of the crop after resizing.
            target: (B, 2), height and width of the training image.
        """
        if self.sizes_name is None:
            return conditioning
        # float32, because bfloat16 has no odd integers above 256.
        sizes = torch.cat([original, crop, target], dim=1).float().to(self.device)
        return Conditioning({**conditioning.tensors, self.sizes_name: sizes}, conditioning.shared)

    def at_size(self, conditioning: Conditioning, size: tuple[int, int]) -> Conditioning:
        """Add the size conditioning of uncropped images of (height, width), as the pipeline does when it samples."""
        whole = torch.tensor([size]).expand(len(conditioning), 2)
        return self.with_sizes(conditioning, whole, torch.zeros_like(whole), whole)

    def match_images(self, negative: Conditioning, conditioning: Conditioning) -> Conditioning:
        """Give a negative the inputs of ``conditioning`` that describe the image, not the prompt; B rows each."""
        if self.sizes_name is None:
            return negative
        sizes = {self.sizes_name: conditioning.tensors[self.sizes_name]}
        return Conditioning({**negative.tensors, **sizes}, negative.shared)

    @property
    def size_arguments(self) -> Mapping[str, str]:
        """Further arguments, as Python source, of a pipeline call with height and width."""
        return {}

    # What all families share ----------------------------------------------------------------------------------------

    @property
    def raw_denoiser(self) -> ModelMixin:
        """The pipeline's own denoiser, without any wrapper that ``denoiser`` may have."""
        return getattr(self.pipeline, self.denoiser_name)

    def set_denoiser(self, module: nn.Module) -> None:
        """Replace the pipeline's denoiser, e.g. by one with other weights."""
        setattr(self.pipeline, self.denoiser_name, module)
        self.denoiser = module

    def to_device(self, device: torch.device, offload: Sequence[str] = (), *, denoiser: bool = True) -> None:
        """Move the pipeline to a device.

        Args:
            device: Target device.
            offload: Parts, "text_encoders" or "vae", that are loaded for each use and unloaded after it or at the end
                of ``keeping``.
            denoiser: False leaves the denoiser where it is, for a denoiser that will be sharded.
        """
        self.offloaded = to_device(self.pipeline, device, offload, without=None if denoiser else self.denoiser_name)

    @contextmanager
    def keeping(self, *parts: str) -> Iterator[None]:
        """Keep ``parts`` on the device, once loaded, until this context ends; other parts unload after each use."""
        with ExitStack() as stack:
            for part in parts:
                if part in self.offloaded:
                    stack.enter_context(self.offloaded[part].pinned())
            yield

    @property
    def device(self) -> torch.device:
        """The denoiser's device."""
        return next(self.raw_denoiser.parameters()).device

    @property
    def num_train_timesteps(self) -> int:
        """T, the upper end of ``time``, which starts at 0."""
        return self.pipeline.scheduler.config.num_train_timesteps

    @property
    def default_resolution(self) -> tuple[int, int]:
        """Height and width in pixels: ``resolution``, or the pipeline's default."""
        side = self.raw_denoiser.config.sample_size * self.pipeline.vae_scale_factor
        return self.resolution or (side, side)

    def latent_shape(self, resolution: tuple[int, int] | None = None) -> tuple[int, ...]:
        """Return the latent shape (C, *spatial) of a resolution in pixels; (C, h, w) here.

        Raises:
            ValueError: See ``check_resolution``.
        """
        resolution = resolution or self.default_resolution
        self.check_resolution(resolution)
        height, width = (side // self.latent_stride for side in resolution)
        return self.latent_channels, height, width

    @property
    def latent_channels(self) -> int:
        """Number of latent channels C, as the scheduler sees them."""
        return self.raw_denoiser.config.in_channels

    @property
    def latent_stride(self) -> int:
        """Pixels per side of a latent position."""
        return self.pipeline.vae_scale_factor

    @property
    def resolution_unit(self) -> int:
        """Number of pixels that image sides must be multiples of, as the pipeline checks it."""
        return self.latent_stride

    def check_resolution(self, resolution: tuple[int, int]) -> None:
        """Raise ValueError, with valid sizes, for a (height, width) in pixels that this family cannot generate."""
        check_resolution(resolution, self.resolution_unit)

    def trajectory(self) -> AbstractContextManager[None]:
        """Return a context for the steps of one sampling, which a cache may connect."""
        return trajectory(self.raw_denoiser)

    def predict(self, x: Tensor, level: Level, conditioning: Conditioning, guidance: Guidance | None = None) -> Tensor:
        """Predict with the denoiser, guided.

        Guidance runs one call at twice the batch size, or two calls if its negative is detached and gradients are
        recorded. At scales where the pipeline applies no guidance it costs nothing (see ``guides``).

        Args:
            x: (B, C, *spatial).
            level: Fields () or (B,).
            conditioning: B rows.
            guidance: None for no guidance.

        Returns:
            (B, C, *spatial), float32 or wider.
        """
        time = level.time.to(x.device, torch.float32, non_blocking=True).expand(len(x))
        with sdpa_kernel(SDPBackend.MATH) if self.plain_attention else nullcontext():
            if guidance is None or not self.guides(guidance.scale):
                return self.evaluate(x, time, conditioning)
            guidance = self.resolve_guidance(guidance)
            assert guidance is not None
            assert guidance.negative is not None
            rows = torch.zeros(len(x), dtype=torch.long, device=x.device)
            negative = self.match_images(guidance.negative[rows], conditioning)
            if guidance.detached and torch.is_grad_enabled():
                with torch.no_grad():
                    against = self.evaluate(x, time, negative)
                towards = self.evaluate(x, time, conditioning)
            else:
                both = Conditioning.cat([negative, conditioning])
                against, towards = self.evaluate(torch.cat([x, x]), torch.cat([time, time]), both).chunk(2)
        return self.guide(against, towards, guidance.scale)

    def guides(self, scale: float | None) -> bool:
        """Tell whether the pipeline applies guidance at ``scale``; None is no guidance.

        Raises:
            ValueError: The scale asks for guidance, and the pipeline has none.
        """
        guided = scale is not None and scale > self.unguided_scale
        if guided and self.guidance_argument is None:
            raise ValueError(
                f"guidance_scale {scale:g}: a {type(self.pipeline).__name__} has no classifier-free guidance; leave it "
                "out (embedded_guidance sets the scale that a guidance-distilled model takes as an input)"
            )
        return guided

    def guidance_arguments(self, scale: float | None) -> dict[str, str]:
        """Return the arguments of the pipeline call that guide at ``scale``, as Python source."""
        guided = self.guides(scale)
        if self.guidance_argument is None:
            return {}
        if not guided:
            return {self.guidance_argument: f"{self.unguided_scale:.1f}"}
        negative = {} if self.negative_text is None else {"negative_prompt": f'"{self.negative_text}"'}
        return {self.guidance_argument: f"{scale:g}", **negative}

    def resolve_guidance(self, guidance: Guidance | None) -> Guidance | None:
        """Fill in a missing negative at scales that guide, to encode it once for several steps."""
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
        """Decode latents to images (B, 3, H, W), float, in [0, 1]; differentiable."""
        vae = self.pipeline.vae
        latents = latents.to(vae.dtype) / vae.config.scaling_factor + self._latent_shift
        return (vae.decode(latents, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)

    @needs(VAE)
    def encode_images(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Encode images to latents, scaled for the denoiser.

        Args:
            images: (B, 3, H, W), float, in [0, 1].
            noise: (B, C, *spatial), standard normal, for the sample mean + std * noise of the encoder's distribution;
                None for its mean.
        """
        vae = self.pipeline.vae
        found = vae.encode((images * 2 - 1).to(vae.dtype)).latent_dist
        latents = found.mean if noise is None else found.mean + found.std * noise.to(found.std)
        return (latents - self._latent_shift) * vae.config.scaling_factor

    @property
    def _latent_shift(self) -> float:
        """``shift_factor`` of SD3's and later VAEs; missing or null in earlier configurations."""
        return self.pipeline.vae.config.get("shift_factor") or 0.0
