"""Build a model on fake tensors: shapes, dtypes and storages without values, as loading its weights would make them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map_only
from transformers import AutoProcessor, AutoTokenizer, BatchEncoding
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from diffalign.models import DiffusionModel
from diffalign.models.meta_device import model_on_meta
from diffalign.models.offload import OffloadedModule, part_of
from diffalign.models.quantise import BYTES
from diffalign.models.single_file import layout
from diffalign.models.weights import WeightSets
from diffalign.runtime.trainer_config import TrainerConfig

UNBOUNDED = 10**6  # tokenizers without a limit of their own have a huge one
TOKENS = 77  # of a prompt, where the caller does not pad to a length


def fake_model(
    config: TrainerConfig, fake: FakeTensorMode, make_trainable: Callable[[DiffusionModel], nn.Module], late: bool
) -> tuple[DiffusionModel, nn.Module]:
    """Build the model that a configuration names, on fake CPU tensors, quantised if it says so.

    Args:
        config: The configuration.
        fake: The mode that makes fake tensors.
        make_trainable: Makes a model trainable, and returns the module that trains.
        late: Whether it needs outputs of the model; else it is called on the meta device, which peft can handle.

    Returns:
        The model and the module that trains.
    """
    model = model_on_meta(
        config.model,
        revision=config.revision,
        dtype=config.base_dtype,
        max_sequence_length=config.max_sequence_length,
        resolution=config.resolution,
        embedded_guidance=config.embedded_guidance,
    )
    if config.quantise != "no":
        quantise(model.raw_denoiser, BYTES[config.quantise])
    trained = None if late else make_trainable(model)
    for name, part in model.pipeline.components.items():
        if isinstance(part, nn.Module):
            make_fake(part, fake)
        elif part is None and name.startswith("tokenizer"):
            setattr(model.pipeline, name, _tokenizer(str(layout(config.model)), name))
        elif part is None and name == "processor":
            model.pipeline.processor = _processor(str(layout(config.model)), model.pipeline)
    if hasattr(model.pipeline, "tokenizer_max_length") and model.pipeline.tokenizer.model_max_length < UNBOUNDED:
        model.pipeline.tokenizer_max_length = model.pipeline.tokenizer.model_max_length  # unknown to the constructor
    if trained is None:
        return model, make_trainable(model)
    copies = model.weights.copies
    model.weights = WeightSets(trained, has_adapter=model.has_adapter)
    for name in copies:
        model.weights.keep_copy(name)
    return model, trained


def _tokenizer(path: str, name: str) -> Any:
    """Load a tokenizer of a local model; another model's has no vocabulary here."""
    if not (Path(path) / name).is_dir():
        return BlankTokenizer()
    return AutoTokenizer.from_pretrained(Path(path) / name, trust_remote_code=False)


def _processor(path: str, pipeline: Any) -> Any:
    """Load the processor of a local vision-language model; another model's has no vocabulary here."""
    if not (Path(path) / "processor").is_dir():
        return BlankProcessor(pipeline.text_encoder.config)
    return AutoProcessor.from_pretrained(Path(path) / "processor", trust_remote_code=False)


def make_fake(module: nn.Module, fake: FakeTensorMode) -> None:
    """Replace the parameters, buffers and other tensors of a module on the meta device by fake CPU tensors."""
    made: dict[int, Tensor] = {}

    def copied(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor) or isinstance(tensor, FakeTensor):
            return tensor
        if id(tensor) not in made:
            with fake:
                new = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu")
            is_weight = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(new, requires_grad=tensor.requires_grad) if is_weight else new
        return made[id(tensor)]

    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, tensor in table.items():
                table[name] = copied(tensor)
        for name, value in vars(part).items():
            if any(tensor.is_meta for tensor in _tensors(value)):
                setattr(part, name, tree_map_only(Tensor, copied, value))


def _tensors(value: Any) -> list[Tensor]:
    """List the tensors of a module's attribute: itself, or those that it is a list of."""
    found = value if isinstance(value, (list, tuple)) else [value]
    return [tensor for tensor in found if isinstance(tensor, Tensor)]


def offload(model: DiffusionModel, parts: Sequence[str]) -> None:
    """Offload parts of a fake model, as ``to_device`` does on a GPU."""
    model.offloaded = {
        part: OffloadedModule(part_of(model.pipeline, part).values(), torch.device("cpu")) for part in parts
    }


class BlankTokenizer:
    """A tokenizer of unknown vocabulary: prompts are as long as they may be, of token 0."""

    model_max_length = TOKENS
    pad_token_id = 0
    padding_side = "right"
    unique_no_split_tokens: Sequence[str] = ()
    added_tokens_encoder: Mapping[str, int] = {}

    def __call__(self, text: str | Sequence[str], *_: Any, **options: Any) -> BatchEncoding:
        """Return zeros for token ids and ones for masks: (B, L) tensors, or lists for a single text."""
        length = options.get("max_length") or self.model_max_length
        padded = options.get("padding") != "longest"
        if isinstance(text, str) and "return_tensors" not in options:
            return BatchEncoding({"input_ids": [0] * 8, "attention_mask": [1] * 8})
        count = 1 if isinstance(text, str) else len(text)
        shape = (count, length if padded else min(8, length))
        tensors = {
            "input_ids": torch.zeros(shape, dtype=torch.long),
            "attention_mask": torch.ones(shape, dtype=torch.long),
        }
        return BatchEncoding(tensors)

    def tokenize(self, text: str) -> list[str]:
        """Split at blanks."""
        return text.split()

    def encode(self, text: str, **_: Any) -> list[int]:
        """Return the ids of a short text."""
        return [0] * 8

    def apply_chat_template(self, messages: Sequence[Any], tokenize: bool = True, **options: Any) -> Any:
        """Return a text, or the tokens of a conversation each."""
        return self([""] * len(messages), **options) if tokenize else ""

    def batch_decode(self, ids: Tensor, **_: Any) -> list[str]:
        """Return empty texts."""
        return [""] * len(ids)


@dataclass(frozen=True)
class BlankProcessor:
    """A processor of Qwen2.5-VL with its published sizes and an unknown vocabulary: short texts of token 0.

    Attributes:
        config: Configuration of the vision-language model.
        template: Tokens around a prompt, in Qwen-Image-Edit's template.
        area: Smallest and largest number of pixels of an image.
    """

    config: Any
    template: int = 69
    area: tuple[int, int] = (56 * 56, 28 * 28 * 16384)

    def __call__(self, text: Sequence[str], images: Sequence[Image.Image], **_: Any) -> BatchEncoding:
        """Return ids and masks (B, L), patches of an image after each other, and grids (B, 3)."""
        vision, rows, grids = self.config.vision_config, [], []
        for image in images:
            unit = vision.patch_size * vision.spatial_merge_size
            height, width = smart_resize(image.height, image.width, unit, *self.area)
            grids.append([1, height // vision.patch_size, width // vision.patch_size])
            merged = grids[-1][1] * grids[-1][2] // vision.spatial_merge_size**2
            rows.append([0] * self.template + [self.config.image_token_id] * merged + [0] * 8)
        ids = torch.tensor(rows)
        width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        found = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "image_grid_thw": torch.tensor(grids)}
        return BatchEncoding({**found, "pixel_values": torch.zeros(sum(h * w for _, h, w in grids), width)})


class _Dequantised(torch.autograd.Function):
    """A matrix product with packed weights, which are unpacked for the product alone, as bitsandbytes does."""

    @staticmethod
    def forward(context: Any, x: Tensor, packed: Tensor, shape: Sequence[int]) -> Tensor:
        context.save_for_backward(packed)
        context.shape = shape
        return x @ packed.new_empty(shape, dtype=x.dtype).mT

    @staticmethod
    def backward(context: Any, *grads: Any) -> Any:
        ((grad,), (packed,)) = grads, context.saved_tensors
        return grad @ packed.new_empty(context.shape, dtype=grad.dtype), None, None


class PackedLinear(nn.Linear):
    """A frozen linear layer whose weight is stored in fewer bits, as bitsandbytes stores it."""

    def __init__(self, layer: nn.Linear, size: float) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        if layer.bias is not None:
            self.bias = layer.bias
        self.weight = nn.Parameter(
            torch.empty(int(layer.weight.numel() * size), dtype=torch.uint8, device="meta"), requires_grad=False
        )

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the unpacked weight."""
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        y = _Dequantised.apply(x.to(dtype), self.weight, (self.out_features, self.in_features))
        return y if self.bias is None else y + self.bias.to(dtype)


def quantise(module: nn.Module, size: float) -> None:
    """Store the weights of all linear layers in ``size`` bytes a number."""
    for part in list(module.modules()):
        for name, layer in part.named_children():
            if type(layer) is nn.Linear:
                setattr(part, name, PackedLinear(layer, size))
