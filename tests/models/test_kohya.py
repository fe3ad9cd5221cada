"""LoRAs in kohya's format: names and updates against ComfyUI's published key maps, at full size."""

from types import SimpleNamespace

import diffusers
import pytest
import torch
import transformers
from diffusers import FluxPipeline, QwenImagePipeline, StableDiffusionXLPipeline, ZImagePipeline
from safetensors.torch import save_file
from torch import nn

from diffalign.models.kohya import from_kohya, kohya_modules, to_kohya
from diffalign.models.kohya_header import header
from diffalign.models.lora_factors import Factors
from diffalign.models.published_configs import published_config
from tests.models.comfyui import deltas, key_map

MODELS = {
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd21": "stabilityai/stable-diffusion-2-1",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sd35_medium": "stabilityai/stable-diffusion-3.5-medium",
    "flux_dev": "black-forest-labs/FLUX.1-dev",
    "qwen_image": "Qwen/Qwen-Image",
    "z_image": "Tongyi-MAI/Z-Image-Turbo",
}
CLIP = {"sd15": 1, "sd21": 1, "sdxl": 2, "sd35_medium": 2, "flux_dev": 1}


@pytest.fixture(scope="module")
def full_size():
    """Family -> denoiser and CLIP encoders of published shape on the meta device."""
    made = {}

    def build(family):
        if family not in made:
            hub, denoiser = MODELS[family], "unet" if family.startswith(("sd1", "sd2", "sdx")) else "transformer"
            config = published_config(hub, denoiser)
            with torch.device("meta"):
                network = getattr(diffusers, config["_class_name"]).from_config(config)
            parts = {denoiser: network}
            for name in ("text_encoder", "text_encoder_2")[: CLIP.get(family, 0)]:
                config = published_config(hub, name)
                kind = getattr(transformers, config["architectures"][0])
                with torch.device("meta"):
                    parts[name] = kind(transformers.CLIPTextConfig(**config))
            scheduler = SimpleNamespace(config=published_config(hub, "scheduler"))
            parts["scheduler"] = scheduler
            made[family] = SimpleNamespace(components=parts, **parts)
        return made[family]

    return build


@pytest.mark.parametrize("family", MODELS)
def test_comfyui_knows_every_module_and_changes_the_rows_that_diffusers_layers_have(full_size, family):
    published = key_map(family)
    modules = kohya_modules(full_size(family))
    assert {module.name for module in modules} <= published.keys()
    for module in modules:
        start, target = 0, published[module.name]
        assert not target.rows
        for layer, rows in zip(module.layers, module.rows, strict=True):
            own = (
                f"transformer.{layer}" if module.component == "transformer" else f"lora_unet_{layer.replace('.', '_')}"
            )
            if not module.component.startswith("text_encoder"):
                read = published[own]
                assert read.weight == target.weight, module
                assert (read.start, read.rows or rows, read.swapped) == (start, rows, module.swapped), module
            start += rows


@pytest.mark.parametrize("family", MODELS)
def test_fused_factors_give_the_same_weights_as_diffusers_layers(full_size, family):
    """ComfyUI reads both formats: the update of each of its weights must be the same."""
    pipeline, generator = full_size(family), torch.Generator().manual_seed(0)
    denoiser = "unet" if "unet" in pipeline.components else "transformer"
    network = getattr(pipeline, denoiser)
    first = {}  # one module of each kind is enough
    for module in kohya_modules(pipeline):
        if module.component == denoiser:
            first.setdefault(tuple("".join(c for c in layer if not c.isdigit()) for layer in module.layers), module)
    layers = {}
    for module in first.values():
        for place, layer in enumerate(module.layers):
            weight = network.get_submodule(layer).weight
            rank = 2 + place  # layers of one module may have different ranks
            down = torch.randn(rank, *weight.shape[1:], generator=generator)
            up = torch.randn(len(weight), rank, *[1] * (weight.ndim - 2), generator=generator)
            if place != 1 or len(module.layers) == 1:  # one of several is not adapted
                layers[layer] = Factors(down, up)
    tensors = to_kohya(pipeline, {denoiser: layers})
    rows = {key_map(family)[module.name].weight: sum(module.rows) for module in first.values()}
    prefix = "transformer.{}" if denoiser == "transformer" else "lora_unet_{}"
    named = {}
    for layer, own in layers.items():
        name = prefix.format(layer if denoiser == "transformer" else layer.replace(".", "_"))
        named |= {f"{name}.lora_A.weight": own.down, f"{name}.lora_B.weight": own.up}
    ours, theirs = deltas(family, tensors, rows), deltas(family, named, rows)
    assert ours.keys() == theirs.keys() == rows.keys()
    for weight, update in theirs.items():
        torch.testing.assert_close(ours[weight], update, rtol=1e-4, atol=1e-3, msg=weight)

    back = from_kohya(pipeline, tensors)
    assert len(back) == 2 * len(layers)
    for layer, own in layers.items():
        down, up = (back[f"{denoiser}.{layer}.lora_{part}.weight"] for part in "AB")
        assert torch.equal(down, own.down), layer
        assert torch.equal(up, own.up), layer


READ_BY = {
    "sdxl": StableDiffusionXLPipeline,
    "flux_dev": FluxPipeline,
    "qwen_image": QwenImagePipeline,
    "z_image": ZImagePipeline,
}


@pytest.mark.parametrize("family", READ_BY)
def test_diffusers_reads_the_file_at_full_size(full_size, family, tmp_path):
    """The names of numbered blocks and the widths of fused layers are fixed in its converters."""
    pipeline, generator = full_size(family), torch.Generator().manual_seed(0)
    denoiser = "unet" if family == "sdxl" else "transformer"
    network = getattr(pipeline, denoiser)
    layers = {}
    for name, layer in network.named_modules():
        attention = name.endswith((".to_q", ".to_k", ".to_v", ".to_out.0", ".add_q_proj", ".proj_mlp"))
        if isinstance(layer, nn.Linear) and attention and any(f".{i}." in name for i in (0, 1)):
            layers[name] = Factors(
                torch.randn(4, layer.in_features, generator=generator),
                torch.randn(layer.out_features, 4, generator=generator),
            )
    assert len(layers) > 8
    tensors = to_kohya(pipeline, {denoiser: layers})
    save_file(tensors, tmp_path / "lora.safetensors")
    options = {"unet_config": network.config} if family == "sdxl" else {}
    found = READ_BY[family].lora_state_dict(tmp_path, weight_name="lora.safetensors", **options)
    state = found[0] if isinstance(found, tuple) else found
    for name, own in layers.items():
        if family == "sdxl":
            stem = f"unet.{name}".replace(".to_", ".processor.to_").replace("to_out.0", "to_out")
            down, up = (state[f"{stem}_lora.{part}.weight"] for part in ("down", "up"))
        else:
            down, up = (state[f"transformer.{name}.lora_{part}.weight"] for part in "AB")
        torch.testing.assert_close((up[:64] @ down), own.up[:64] @ own.down, rtol=1e-4, atol=1e-4)


ARCHITECTURES = {
    "sd15": ("stable-diffusion-v1/lora", "sd_v1"),
    "sd21": ("stable-diffusion-v2-768-v/lora", "sd_v2_v"),
    "sdxl": ("stable-diffusion-xl-v1-base/lora", "sdxl_base_v1-0"),
    "sd35_medium": ("stable-diffusion-3-5-medium/lora", "5-medium"),
    "flux_dev": ("flux-1-dev/lora", "flux1"),
    "qwen_image": ("Qwen-Image/lora", "qwen_image"),
    "z_image": ("Z-Image/lora", "z_image"),
}


@pytest.mark.parametrize("family", MODELS)
def test_the_header_names_the_architecture(full_size, family):
    found = header(full_size(family), 8)
    assert (found["modelspec.architecture"], found["ss_base_model_version"]) == ARCHITECTURES[family]
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("8", "8.0")


def test_chroma_has_the_names_of_flux():
    """ComfyUI's class of it is one of FLUX.1, with fewer layers."""
    with torch.device("meta"):
        network = diffusers.ChromaTransformer2DModel()
    pipeline = SimpleNamespace(components={"transformer": network}, transformer=network)
    names = {module.name for module in kohya_modules(pipeline)}
    assert len(names) == 19 * 8 + 38 * 2 + 3
    assert names <= key_map("flux_dev").keys()
    assert header(pipeline, 4)["modelspec.architecture"] == "chroma/lora"


def test_a_class_without_published_names_is_refused():
    network = nn.Linear(2, 2)
    pipeline = SimpleNamespace(components={"transformer": network}, transformer=network)
    with pytest.raises(ValueError, match="no names of kohya's format are known here for a Linear: use"):
        kohya_modules(pipeline)
