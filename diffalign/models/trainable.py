"""The trainable side of a model: LoRA or full fine-tuning, negative prompts, weight sets and saving."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin
from safetensors.torch import save_file
from torch import Tensor

from diffalign.atomic import replacing, replacing_folder
from diffalign.config.sections import LoraConfig
from diffalign.fsdp import FSDPConfig, gathered, is_sharded, shard, unsharded
from diffalign.lora_source import find_lora, lora_file
from diffalign.models import lora
from diffalign.models.lora_factors import Factors, Updates, merge, refuse_dora
from diffalign.models.lora_file import read_tensors
from diffalign.models.lora_reading import read_updates, trained_alpha
from diffalign.models.negative_prompt import NEGATIVE_NAME, NegativePrompt
from diffalign.models.text_training import attach, idle_layers, trained_updates
from diffalign.models.weights import REFERENCE, WeightSets
from diffalign.structures import Conditioning


class TrainableModel(ABC):
    """Make a model trainable, switch between its weight sets and save what was trained."""

    pipeline: DiffusionPipeline
    denoiser_name: str
    lora_targets: tuple[str, ...]
    # Conditioning tensor -> pipeline argument that takes it as a negative prompt.
    negative_names: Mapping[str, str] = {
        "embeds": "negative_prompt_embeds",
        "pooled": "negative_pooled_prompt_embeds",
    }
    # Text encoders that can train -> number of their last layers that the pipeline does not use.
    text_encoders: Mapping[str, int] = MappingProxyType({})
    weights: WeightSets
    has_adapter: bool
    negative: NegativePrompt | None
    # Provenance for the header of an exported LoRA.
    about: dict[str, str]
    # Updates of text encoders from the LoRA that training goes on from, merged into them.
    beside: Updates = MappingProxyType({})

    @property
    @abstractmethod
    def raw_denoiser(self) -> ModelMixin:
        """The pipeline's own denoiser."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The denoiser's device."""

    @property
    @abstractmethod
    def idle_layers(self) -> tuple[str, ...]:
        """Layers with unused output, which stay frozen."""

    @abstractmethod
    def unconditional(self) -> Conditioning:
        """Encode the default negative prompt of guidance: one row."""

    def train(
        self,
        config: LoraConfig,
        *,
        seed: int = 0,
        keep_reference: bool = False,
        shards: FSDPConfig | None = None,
    ) -> None:
        """Make the denoiser trainable: through a LoRA, or with rank 0 in full.

        Args:
            config: The LoRA.
            seed: Seed of its initial weights.
            keep_reference: Support ``using("reference")``; costs a copy of the weights in full fine-tuning and nothing
                for a LoRA.
            shards: FSDP2 settings; None keeps the whole denoiser on each process.

        Raises:
            ValueError: A LoRA of a pipeline that cannot load one, or see ``lora.inject``.
        """
        loads = hasattr(self.pipeline, "load_lora_weights") and hasattr(self.raw_denoiser, "add_adapter")
        if config.rank and not loads:
            raise ValueError(
                f"lora.rank {config.rank}: diffusers {diffusers.__version__} loads no LoRA into a "
                f"{type(self.pipeline).__name__}; train its weights in full with lora.rank: 0"
            )
        if config.text_encoder:
            self._check_text_encoders(config, shards)
        reference = config.reference
        if config.init is not None:
            self._start_from(config, seed)
        elif config.rank:
            lora.inject(self.raw_denoiser, config, self.lora_targets, seed, self.idle_layers)
            if config.text_encoder:
                self._train_text_encoders(config, seed, {}, None)
        if config.rank and shards is not None and self._adapter().use_dora:
            raise ValueError("lora: DoRA is not known to work with FSDP2: launch with ddp.yaml, or train a plain LoRA")
        if not config.rank:
            self.raw_denoiser.requires_grad_(True)
            for name in self.idle_layers:
                self.raw_denoiser.get_submodule(name).requires_grad_(False)
        if shards is not None:
            shard(self.raw_denoiser, shards)
        self.has_adapter = config.rank > 0
        self.weights = WeightSets(self.raw_denoiser, has_adapter=self.has_adapter)
        from_init = self.has_adapter and config.init is not None and reference == "init"
        if from_init or (keep_reference and not self.has_adapter):
            self.weights.keep_copy(REFERENCE)

    def _check_text_encoders(self, config: LoraConfig, shards: FSDPConfig | None) -> None:
        """Raise ValueError where text encoders cannot train."""
        kind = type(self.pipeline).__name__
        if not self.text_encoders:
            raise ValueError(
                f"lora.text_encoder: the text encoders of a {kind} do not train, only those of SD 1.x, 2.x and SDXL; "
                "leave it out"
            )
        if config.use_dora:
            raise ValueError("lora.text_encoder: diffusers loads no DoRA into text encoders; set lora.use_dora: false")
        if shards is not None:
            raise ValueError("lora.text_encoder is not known to work with FSDP2: launch with ddp.yaml, or leave it out")
        if any(
            getattr(getattr(self.pipeline, name).config, "use_attention_mask", False) for name in self.text_encoders
        ):
            raise ValueError("lora.text_encoder: this text encoder reads attention masks; leave it out")

    def _not_trained(self, name: str, layers: Mapping[str, Factors]) -> dict[str, Factors]:
        """Select the layers of a text encoder's LoRA that have no effect in this pipeline."""
        idle = idle_layers(getattr(self.pipeline, name), self.text_encoders.get(name, 0))
        return {layer: own for layer, own in layers.items() if layer in idle}

    def _train_text_encoders(self, config: LoraConfig, seed: int, initial: Updates, alpha: float | None) -> None:
        encoders = {name: getattr(self.pipeline, name) for name in self.text_encoders}
        attach(self.raw_denoiser, encoders, self.text_encoders, config, seed, initial, alpha)

    def _start_from(self, config: LoraConfig, seed: int) -> None:
        """Load the LoRA to go on from: as the adapter, or merged into the denoiser.

        Its parts of text encoders are merged, or go on too where these train.

        Raises:
            FileNotFoundError: There is no such file or repository.
            ValueError: It does not fit the model, or cannot be merged.
        """
        merged, file = not config.rank, lora_file(find_lora(str(config.init)))
        updates = dict(read_updates(self.pipeline, file))
        layers = {n: f for n, f in updates.pop(self.denoiser_name, {}).items() if n not in self.idle_layers}
        if not layers:
            raise ValueError(f"lora.init: {file} has no layers of the {self.denoiser_name}: give another LoRA")
        if merged and updates:
            raise ValueError(
                f"lora.init: {file} holds layers of {', '.join(updates)}, which full fine-tuning does not save: write "
                "diffalign export --format merged, and train the result"
            )
        alpha, trained = trained_alpha(self.pipeline, file), updates if config.text_encoder else {}
        updates = {} if config.text_encoder else updates
        refuse_dora(updates if not merged else {self.denoiser_name: layers}, "merged here")
        refuse_dora(trained, "trained on a text encoder")
        merge(self.pipeline, updates if not merged else {self.denoiser_name: layers})
        self.beside = {name: self._not_trained(name, own) for name, own in trained.items()} or updates
        if not merged:
            lora.inject_initial(self.raw_denoiser, layers, alpha)
        if config.text_encoder:
            self._train_text_encoders(replace(config, rank=self.adapter_rank, alpha=alpha), seed, trained, alpha)

    def _adapter(self) -> Any:
        """The adapter's settings in peft."""
        return vars(self.raw_denoiser)["peft_config"]["default"]

    @property
    def adapter_rank(self) -> int:
        """Rank of the trained LoRA; of most of its layers, where they differ."""
        return int(self._adapter().r)

    @property
    def adapter_alpha(self) -> float:
        """Numerator of the trained LoRA's scale."""
        return float(self._adapter().lora_alpha)

    def train_negative(self) -> NegativePrompt:
        """Train a negative prompt only, initialised from ``unconditional``, which is also the reference."""
        self.negative = NegativePrompt(self.unconditional().to(self.device))
        self.weights = WeightSets(self.negative, has_adapter=False)
        self.weights.keep_copy(REFERENCE)
        return self.negative

    @torch.no_grad()
    def load_negative(self, file: Path) -> None:
        """Load a negative prompt written by ``save``; ``unconditional`` becomes the reference.

        Raises:
            ValueError: The file is damaged, or belongs to another model or prompt length.
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
            here[argument].copy_(saved[argument])  # the parameter or a view of it

    def negative_arguments(self, row: Conditioning) -> dict[str, Tensor]:
        """Return a negative prompt as keyword arguments of the diffusers pipeline."""
        return {argument: row.tensors[name] for name, argument in self.negative_names.items() if name in row.tensors}

    def using(self, name: str) -> AbstractContextManager[None]:
        """Run the denoiser with weight set ``name`` within this context: "policy", "reference", "ema", ..."""
        return self.weights.using(name)

    def save(self, directory: Path, weights: Mapping[str, Tensor] | None = None) -> Path:
        """Save the trained weights as diffusers loads them: a LoRA file, full weights, or a negative prompt.

        Args:
            directory: Created if missing.
            weights: Gathered weights of a sharded denoiser by name: see ``saver``.

        Returns:
            The file or folder written.
        """
        directory.mkdir(parents=True, exist_ok=True)
        if self.negative is not None:
            named = self.negative_arguments(self.negative.conditioning(self.negative()))
            with replacing(directory / NEGATIVE_NAME) as staged:
                save_file({n: t.detach().cpu().contiguous() for n, t in named.items()}, staged)
            return directory / NEGATIVE_NAME
        if self.has_adapter:
            trained = trained_updates(self.raw_denoiser)
            beside = {
                name: {**self.beside.get(name, {}), **trained.get(name, {})} for name in {**self.beside, **trained}
            }
            return lora.export(self.pipeline, self.denoiser_name, directory, self.about, weights, beside)
        denoiser: ModelMixin = self.raw_denoiser if weights is None else unsharded(self.raw_denoiser, weights)
        with replacing_folder(directory / self.denoiser_name) as folder:
            denoiser.save_pretrained(folder)
        return directory / self.denoiser_name

    def saver(self, name: str, keep: bool = True) -> Callable[[Path], Path]:
        """Return a function that saves weight set ``name`` into a folder.

        Collective: every process must call this method, and one process calls the returned function.

        Args:
            name: A weight set.
            keep: Whether this process will call the returned function.
        """
        weights = None
        if is_sharded(self.raw_denoiser):
            with self.using(name):
                weights = gathered(self.raw_denoiser, trained_only=self.has_adapter, keep=keep)

        def write(directory: Path) -> Path:
            with self.using(name):
                return self.save(directory, weights)

        return write
