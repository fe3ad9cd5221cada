"""LoRAs in kohya's format: names and updates against ComfyUI's published key maps, at full size."""

from types import SimpleNamespace

import diffusers
import pytest
import torch
import transformers
from diffusers import Flux2Pipeline, FluxPipeline, QwenImagePipeline, StableDiffusionXLPipeline, ZImagePipeline
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lumina2_lora_to_diffusers
from diffusers.loaders.single_file_utils import (
    convert_flux2_transformer_checkpoint_to_diffusers,
    convert_lumina2_to_diffusers,
)
from safetensors.torch import save_file
from torch import nn

from diffalign.models.kohya import from_kohya, kohya_modules, to_kohya
from diffalign.models.kohya_header import header
from diffalign.models.lora_factors import Factors
from diffalign.models.lora_file import read_lora
from diffalign.models.lora_reading import read_updates
from diffalign.models.meta_device import model_on_meta
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
    "chroma": "lodestones/Chroma1-HD",
    "flux2_dev": "black-forest-labs/FLUX.2-dev",
    "flux2_klein": "black-forest-labs/FLUX.2-klein-base-4B",
    "lumina2": "Alpha-VLLM/Lumina-Image-2.0",
}
# How diffusers reads the original weights, where ComfyUI does not know all of diffusers' names.
CONVERTERS = {
    "flux2_dev": convert_flux2_transformer_checkpoint_to_diffusers,
    "flux2_klein": convert_flux2_transformer_checkpoint_to_diffusers,
    "lumina2": convert_lumina2_to_diffusers,
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


def comfyui_name(component, layer):
    """ComfyUI's key of a layer of diffusers' denoiser, in a file in diffusers' format."""
    return f"transformer.{layer}" if component == "transformer" else f"lora_unet_{layer.replace('.', '_')}"


@pytest.mark.parametrize("family", MODELS)
def test_comfyui_knows_every_module_and_changes_the_rows_that_diffusers_layers_have(full_size, family):
    published = key_map(family)
    modules = kohya_modules(full_size(family))
    assert {module.name for module in modules} <= published.keys()
    for module in modules:
        start, target = 0, published[module.name]
        assert not target.rows
        for layer, rows in zip(module.layers, module.rows, strict=True):
            own = comfyui_name(module.component, layer)
            unknown = family in CONVERTERS or layer.startswith("distilled_guidance_layer.")
            if not module.component.startswith("text_encoder") and (own in published or not unknown):
                read = published[own]
                assert read.weight == target.weight, module
                assert (read.start, read.rows or rows, read.swapped) == (start, rows, module.swapped), module
            start += rows


@pytest.mark.parametrize("family", CONVERTERS)
def test_diffusers_gives_the_rows_of_the_original_weights_to_the_same_layers(full_size, family):
    modules = kohya_modules(full_size(family))
    known = dict(full_size(family).transformer.named_modules())
    numbered, start = {}, 0
    for module in modules:
        rows = sum(module.rows)
        numbered[f"{key_map(family)[module.name].weight}.weight"] = torch.arange(start, start + rows)[:, None]
        start += rows
    original = dict(numbered)
    read = CONVERTERS[family](dict(numbered))
    assert len(read) == sum(len(module.layers) for module in modules)
    for module in modules:
        weight = original[f"{key_map(family)[module.name].weight}.weight"]
        weight = torch.cat(weight.chunk(2)[::-1]) if module.swapped else weight
        for layer, part in zip(module.layers, weight.split(module.rows), strict=True):
            assert layer in known
            assert torch.equal(read[f"{layer}.weight"], part), layer


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
    published = key_map(family)
    rows = {published[module.name].weight: sum(module.rows) for module in first.values()}
    named = {}
    for layer, own in layers.items():
        name = comfyui_name(denoiser, layer)
        if name in published or family not in CONVERTERS:
            named |= {f"{name}.lora_A.weight": own.down, f"{name}.lora_B.weight": own.up}
    named = {name: tensor for name, tensor in named.items() if "distilled_guidance_layer" not in name}
    ours, theirs = deltas(family, tensors, rows), deltas(family, named, rows)
    assert ours.keys() == rows.keys()
    assert bool(theirs) == (family != "lumina2")
    for weight, update in theirs.items():
        torch.testing.assert_close(ours[weight], update, rtol=1e-12, atol=1e-9, msg=weight)

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
    "flux2_dev": Flux2Pipeline,
}


PROJECTIONS = (".to_q", ".to_k", ".to_v", ".to_out.0", ".add_q_proj", ".proj_mlp", ".to_qkv_mlp_proj", ".attn.to_out")


@pytest.mark.parametrize("family", READ_BY)
def test_diffusers_reads_the_file_at_full_size(full_size, family, tmp_path):
    """The names of numbered blocks and the widths of fused layers are fixed in its converters."""
    pipeline, generator = full_size(family), torch.Generator().manual_seed(0)
    denoiser = "unet" if family == "sdxl" else "transformer"
    network = getattr(pipeline, denoiser)
    layers = {}
    for name, layer in network.named_modules():
        attention = name.endswith(PROJECTIONS)
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
        update = up[:64].double() @ down.double()
        torch.testing.assert_close(update, own.up[:64].double() @ own.down.double(), rtol=1e-12, atol=1e-12)


def test_diffusers_reads_lumina_under_the_names_of_the_original_weights(full_size):
    """Its converter takes dotted names alone; those are what the file's names stand for."""
    pipeline, generator = full_size("lumina2"), torch.Generator().manual_seed(0)
    layers = {}
    for module in kohya_modules(pipeline):
        for layer in module.layers if ".0." in module.layers[0] else ():
            weight = pipeline.transformer.get_submodule(layer).weight
            layers[layer] = Factors(
                torch.randn(4, weight.shape[1], generator=generator),
                torch.randn(weight.shape[0], 4, generator=generator),
            )
    tensors, named = to_kohya(pipeline, {"transformer": layers}), {}
    for name in tensors:
        module, _, part = name.partition(".")
        if part != "alpha":
            part = part.replace("lora_down", "lora_A").replace("lora_up", "lora_B")
            named[f"diffusion_model.{key_map('lumina2')[module].weight}.{part}"] = tensors[name]
    read = _convert_non_diffusers_lumina2_lora_to_diffusers(named)
    assert len(read) == 2 * len(layers)
    for layer, own in layers.items():
        down, up = (read[f"transformer.{layer}.lora_{part}.weight"] for part in "AB")
        update = up[:64].double() @ down.double()
        torch.testing.assert_close(update, own.up[:64].double() @ own.down.double(), rtol=1e-12, atol=1e-12)


ARCHITECTURES = {
    "sd15": ("stable-diffusion-v1/lora", "sd_v1"),
    "sd21": ("stable-diffusion-v2-768-v/lora", "sd_v2_v"),
    "sdxl": ("stable-diffusion-xl-v1-base/lora", "sdxl_base_v1-0"),
    "sd35_medium": ("stable-diffusion-3-5-medium/lora", "5-medium"),
    "flux_dev": ("flux-1-dev/lora", "flux1"),
    "qwen_image": ("Qwen-Image/lora", "qwen_image"),
    "z_image": ("Z-Image/lora", "z_image"),
    "chroma": ("chroma/lora", "chroma"),
    "flux2_dev": ("Flux.2-dev/lora", "flux_2_dev"),
    "flux2_klein": ("Flux.2-klein-4b/lora", "flux_2_klein_4b"),
    "lumina2": ("lumina-2/lora", "lumina2"),
}


@pytest.mark.parametrize("family", MODELS)
def test_the_header_names_the_architecture(full_size, family):
    found = header(full_size(family), 8)
    assert (found["modelspec.architecture"], found["ss_base_model_version"]) == ARCHITECTURES[family]
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("8", "8.0")


def test_chroma_has_the_names_of_flux_for_the_blocks_that_both_have(full_size):
    own = {module.name for module in kohya_modules(full_size("chroma"))}
    flux = {module.name for module in kohya_modules(full_size("flux_dev")) if module.component == "transformer"}
    assert len(own & flux) == 19 * 8 + 38 * 2 + 3
    assert {name.split("_layers")[0] for name in own - flux if "_layers" in name} == {
        "lora_unet_distilled_guidance_layer"
    }


@pytest.mark.parametrize("kind", ["SanaTransformer2DModel", "CogView4Transformer2DModel"])
def test_a_class_of_which_no_program_loads_a_lora_is_refused(kind):
    with torch.device("meta"):
        network = getattr(diffusers, kind)()
    pipeline = SimpleNamespace(components={"transformer": network}, transformer=network)
    with pytest.raises(
        ValueError, match=f"ComfyUI and kohya's tools load no LoRA for a {kind}: use --format diffusers"
    ):
        kohya_modules(pipeline)


def test_a_class_without_published_names_is_refused():
    network = nn.Linear(2, 2)
    pipeline = SimpleNamespace(components={"transformer": network}, transformer=network)
    with pytest.raises(ValueError, match="no names of kohya's format are known here for a Linear: use"):
        kohya_modules(pipeline)


def test_modules_that_diffusers_converter_drops_are_read_or_named(tmp_path):
    """It leaves modulations and unknown modules of FLUX.2 out with a warning only."""
    pipeline = model_on_meta(MODELS["flux2_klein"]).pipeline
    layer = pipeline.transformer.single_stream_modulation.linear
    factors = Factors(torch.randn(2, layer.in_features), torch.randn(layer.out_features, 2))
    tensors = to_kohya(pipeline, {"transformer": {"single_stream_modulation.linear": factors}})
    save_file(tensors, tmp_path / "lora.safetensors")
    assert not read_lora(pipeline, tmp_path / "lora.safetensors").unused
    (update,) = read_updates(pipeline, tmp_path / "lora.safetensors")["transformer"].values()
    assert torch.equal(update.delta(), factors.delta())

    other = {name.replace("single_stream", "triple_stream"): t.clone() for name, t in tensors.items()}
    save_file({**tensors, **other}, tmp_path / "more.safetensors")
    assert read_lora(pipeline, tmp_path / "more.safetensors").unused.keys() >= other.keys()


@pytest.mark.parametrize(
    "name", ["base_model.model.proj.lora_A.weight", "transformer.proj.lora_A.weight", "lora_unet_proj"]
)
def test_a_lora_for_a_pipeline_into_which_diffusers_loads_none_is_refused(tmp_path, name):
    class PixArtSigmaPipeline(SimpleNamespace): ...

    save_file({name: torch.ones(1, 2)}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="loads no LoRA into a PixArtSigmaPipeline; give full weights"):
        read_lora(PixArtSigmaPipeline(components={}), tmp_path / "lora.safetensors")
