"""Unused tensors of a weight file are reported, and a failed load leaves the model unchanged."""

import json
import re
import shutil
import warnings

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffalign import LoraConfig
from diffalign.cli import main
from diffalign.models import load_model, with_tuned_weights
from diffalign.models.checkpoint_context import ADAPTER
from diffalign.models.lora_file import _unfit
from tests.conftest import PROMPTS
from tests.models.families import FAMILIES, LORA, noise_of

NAME = "pytorch_lora_weights.safetensors"


def moved(model, generator=0):
    """Perturb the trainable weights."""
    source = torch.Generator().manual_seed(generator)
    with torch.no_grad():
        for parameter in model.weights.trainable:
            parameter.normal_(std=0.1, generator=source)
    return model


@pytest.fixture(scope="module")
def bases(family_pipelines):
    """One model per family; tests must not change it."""
    known = {}

    def get(name):
        if name not in known:
            known[name] = load_model(family_pipelines[name], **FAMILIES[name].options)
        return known[name]

    return get


@pytest.fixture(scope="module")
def loras(family_pipelines, tmp_path_factory):
    """Family -> file of a LoRA for it."""
    known, root = {}, tmp_path_factory.mktemp("loras")

    def get(name):
        if name not in known:
            model = load_model(family_pipelines[name], **FAMILIES[name].options)
            model.train(LoraConfig(rank=4, alpha=2.0))
            known[name] = moved(model).save(root / name)
        return known[name]

    return get


def contents(model):
    """Every tensor of every part by name, a copy, with the kinds of the modules and what they are called."""
    parts = {key: part for key, part in model.pipeline.components.items() if isinstance(part, torch.nn.Module)}
    tensors = {f"{key}.{n}": t.clone() for key, part in parts.items() for n, t in part.state_dict().items()}
    kinds = {f"{key}.{n}": type(m) for key, part in parts.items() for n, m in part.named_modules()}
    flags = {f"{key}.{n}": p.requires_grad for key, part in parts.items() for n, p in part.named_parameters()}
    left = [key for key, part in parts.items() if getattr(part, "peft_config", None)]
    return tensors, kinds, flags, left


def assert_same(model, before):
    after = contents(model)
    assert after[1:] == before[1:]
    assert all(torch.equal(after[0][name], tensor) for name, tensor in before[0].items())
    assert model.negative is None
    assert "weights" not in vars(model)
    assert "lora_state_dict" not in vars(model.pipeline)


def refused(model, path, message, **options):
    before = contents(model)
    with (
        pytest.raises((ValueError, FileNotFoundError), match=message) as caught,
        with_tuned_weights(model, path, **options),
    ):
        pytest.fail("it was loaded")
    assert len(str(caught.value)) < 2000
    assert str(path) in str(caught.value)
    assert_same(model, before)


def output(model):
    with torch.no_grad():
        return model.predict(noise_of(model, 1), model.levels(4)[1], model.encode(["a red circle"]))


def rewritten(file, folder, change, header=True):
    """A copy of a LoRA whose tensors went through ``change``."""
    folder.mkdir(exist_ok=True)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata() if header else None
    save_file({n: t.contiguous() for n, t in change(load_file(file)).items()}, folder / NAME, metadata)
    return folder / NAME


def renamed(state):
    """The second half of the layers is put where the model has none."""
    layers = sorted({name.rsplit(".lora_", 1)[0] for name in state})
    gone = set(layers[len(layers) // 2 :])
    return {
        (n.replace(".lora_", "_elsewhere.lora_") if n.rsplit(".lora_", 1)[0] in gone else n): t
        for n, t in state.items()
    }


# Layers that the model lacks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LORA)
def test_layers_that_the_model_lacks_are_named_or_left_out_with_a_warning(bases, loras, name, tmp_path):
    model, file = bases(name), rewritten(loras(name), tmp_path, renamed)
    before, count = contents(model), len(load_file(file))
    refused(model, file, rf"\d+ of {count} tensors do not fit this model \(.*_elsewhere.*no such layer.*allow_partial")
    with pytest.warns(UserWarning, match="no such layer"), with_tuned_weights(model, file, allow_partial=True):
        loaded = [n for n, _ in model.raw_denoiser.named_parameters() if ADAPTER in n]
    assert 0 < len(loaded) < count
    assert_same(model, before)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with with_tuned_weights(model, loras(name)):
            assert not torch.equal(output(model), base := output_of_base(model))
    assert torch.equal(output(model), base)


def output_of_base(model):
    with model.using("reference"):
        return output(model)


@pytest.mark.parametrize(
    ("name", "other"), [("sd3", "sd15"), ("sd15", "sd3"), ("sd15", "sdxl"), ("sdxl", "sd15"), ("flux_dev", "z_image")]
)
@pytest.mark.parametrize("partial", [False, True])
def test_a_lora_of_another_family_is_refused(bases, loras, name, other, partial, tmp_path):
    # Layers of the middle have the same names in both UNets.
    file = rewritten(loras(other), tmp_path, lambda state: {n: t for n, t in state.items() if "mid_block" not in n})
    refused(bases(name), file, "tensors do not fit this model .* another family", allow_partial=partial)


# Text encoders --------------------------------------------------------------------------------------------------------


def with_text(file, prefix, folder, layer="encoder.layers.0.self_attn.q_proj", width=24):
    return rewritten(
        file,
        folder,
        lambda state: {
            **state,
            f"{prefix}.{layer}.lora_A.weight": torch.ones(2, width) / 10,
            f"{prefix}.{layer}.lora_B.weight": torch.ones(width, 2) / 10,
        },
        header=False,
    )


@pytest.mark.parametrize("name", ["sd15", "sdxl", "flux_dev"])
def test_a_text_encoders_part_is_used(bases, loras, name, tmp_path):
    model, file = bases(name), with_text(loras(name), "text_encoder", tmp_path)
    before, plain = contents(model), model.encode(["a red circle"])
    with with_tuned_weights(model, file):
        assert any(ADAPTER in n for n, _ in model.pipeline.text_encoder.named_parameters())
        tuned_row = model.encode(["a red circle"])
    assert any(not torch.equal(tuned_row.tensors[key], plain.tensors[key]) for key in plain.tensors)
    assert_same(model, before)


@pytest.mark.parametrize(
    ("name", "prefix", "layer", "width"),
    [
        ("sd15", "text_encoder", "encoder.layers.9.self_attn.q_proj", 24),
        ("sd15", "text_encoder", "encoder.layers.0.self_attn.q_proj", 25),
        ("sd15", "text_encoder_2", "encoder.layers.0.self_attn.q_proj", 24),
        ("sdxl", "text_encoder_2", "encoder.layers.9.self_attn.q_proj", 16),
        ("sd3", "text_encoder_3", "encoder.block.0.layer.0.SelfAttention.q", 24),
        ("flux_dev", "text_encoder_2", "encoder.block.0.layer.0.SelfAttention.q", 24),
        ("qwen_image", "text_encoder", "layers.0.self_attn.q_proj", 16),
        ("sana", "text_encoder", "layers.0.self_attn.q_proj", 16),
        ("z_image", "text_encoder", "layers.0.self_attn.q_proj", 16),
    ],
)
def test_a_text_encoders_part_that_cannot_be_loaded_is_refused(bases, loras, name, prefix, layer, width, tmp_path):
    file = with_text(loras(name), prefix, tmp_path, layer, width)
    refused(bases(name), file, rf"2 of \d+ tensors do not fit this model \({prefix}\..*allow_partial")
    with pytest.warns(UserWarning, match="2 of"), with_tuned_weights(bases(name), file, allow_partial=True):
        assert any(ADAPTER in n for n, _ in bases(name).raw_denoiser.named_parameters())


def test_a_text_encoders_part_that_diffusers_cannot_convert_is_converted_here(bases, loras, tmp_path):
    name = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"  # alone: it guesses the layout by the output layer
    parts = {f"{name}.lora_down.weight": torch.ones(2, 24) / 10, f"{name}.lora_up.weight": torch.ones(24, 2) / 10}
    file = rewritten(loras("sd15"), tmp_path, lambda state: {**kohya(state, 1.0), **parts}, header=False)
    before = contents(bases("sd15"))
    with with_tuned_weights(bases("sd15"), file):
        encoder = bases("sd15").pipeline.text_encoder
        loaded = {n: m for n, m in encoder.named_modules() if hasattr(m, "get_delta_weight")}
        assert [n.removeprefix("text_model.") for n in loaded] == ["encoder.layers.0.self_attn.q_proj"]
        delta = next(iter(loaded.values())).get_delta_weight("compared")
        torch.testing.assert_close(delta, torch.full((24, 24), 0.02))
    assert_same(bases("sd15"), before)


@pytest.mark.parametrize("name", ["sd15", "sd3"])
@pytest.mark.parametrize("where", ["load_lora_into_text_encoder", "set_adapters"])
def test_a_load_that_breaks_half_way_leaves_no_trace(bases, loras, name, where, monkeypatch):
    def breaks(*arguments, **options):
        raise RuntimeError("half-way")

    model = bases(name)
    monkeypatch.setattr(type(model.pipeline), where, breaks)
    refused(model, loras(name), "does not load into this model: half-way")
    monkeypatch.undo()
    before = contents(model)
    with with_tuned_weights(model, loras(name)):
        assert not torch.equal(output(model), output_of_base(model))
    assert_same(model, before)


def test_an_error_of_the_caller_is_the_callers_and_leaves_no_trace(bases, loras):
    model = bases("sd15")
    before = contents(model)
    with pytest.raises(KeyError, match="mine"), with_tuned_weights(model, loras("sd15")):
        raise KeyError("mine")
    assert_same(model, before)


# Formats --------------------------------------------------------------------------------------------------------------


def kohya(state, alpha):
    """The same LoRA in kohya's names, with an alpha a layer that undoes what is multiplied into B."""
    found = {}
    for index, name in enumerate(sorted({n.rsplit(".lora_", 1)[0] for n in state})):
        down, up = (state[f"{name}.lora_{part}.weight"] for part in "AB")
        prefix = "lora_unet_" + name.removeprefix("unet.").replace(".", "_")
        own = alpha * (1 + index % 3)
        found |= {f"{prefix}.lora_down.weight": down, f"{prefix}.lora_up.weight": up * len(down) / own}
        found[f"{prefix}.alpha"] = torch.tensor(own)
    return found


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_file_of_kohya_with_its_own_alphas_is_the_same_lora(bases, loras, name, tmp_path):
    model = bases(name)
    file = rewritten(loras(name), tmp_path, lambda state: kohya(state, 1.5), header=False)
    with with_tuned_weights(model, loras(name)):
        expected = output(model)
    with with_tuned_weights(model, file):
        assert (output(model) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["sd15", "sd3", "z_image"])
def test_a_file_in_half_precision_is_the_same_lora_but_for_its_rounding(bases, loras, name, dtype, tmp_path):
    model = bases(name)
    file = rewritten(loras(name), tmp_path, lambda state: {n: t.to(dtype) for n, t in state.items()})
    file.rename(tmp_path / "pytorch_lora_weights.fp16.safetensors")
    with with_tuned_weights(model, loras(name)):
        expected, size = output(model), (output(model) - output_of_base(model)).abs().max()
    with with_tuned_weights(model, tmp_path):
        assert (output(model) - expected).abs().max() < 0.05 * size


def test_a_dora_of_peft_is_used_whole(bases, family_pipelines, tmp_path):
    source = load_model(family_pipelines["sd3"], **FAMILIES["sd3"].options)
    network, model = source.raw_denoiser, bases("sd3")
    network.add_adapter(
        PeftLoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=["attn.to_q"], init_lora_weights=False)
    )
    with torch.no_grad():
        for n, p in network.named_parameters():
            if "magnitude" in n:
                p.mul_(1.3)
    network.save_lora_adapter(tmp_path)
    state = load_file(tmp_path / NAME)
    assert any("magnitude" in n for n in state)
    with safe_open(tmp_path / NAME, "pt") as opened:
        config = json.loads(opened.metadata()["lora_adapter_metadata"])
    header = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in config.items()})}
    save_file({f"transformer.{n}": t for n, t in state.items()}, tmp_path / NAME, {"format": "pt", **header})
    with with_tuned_weights(model, tmp_path):
        assert (output(model) - output(source)).abs().max() < 1e-5


def test_keys_that_diffusers_would_filter_out_are_named(bases, loras, tmp_path):
    def dora(state):
        found = kohya(state, 1.0)
        first = next(iter(found)).split(".")[0]
        return {**found, f"{first}.dora_scale": torch.ones(1, 8)}

    file = rewritten(loras("sd15"), tmp_path, dora, header=False)
    refused(bases("sd15"), file, r"1 of \d+ tensors do not fit this model \(lora_unet_.*dora_scale")
    with pytest.warns(UserWarning, match="dora_scale"), with_tuned_weights(bases("sd15"), file, allow_partial=True):
        pass


# Damaged files --------------------------------------------------------------------------------------------------------


def half(state):
    gone = next(name for name in state if "lora_B" in name)
    return {name: t for name, t in state.items() if name != gone}


def wide(state):
    first = next(name for name in state if "lora_A" in name)
    return {**state, first: torch.ones(4, 999)}


def kernels(state):
    first = next(name for name in state if "lora_A" in name)
    return {**state, first: state[first][..., None, None]}


def infinite(state):
    return {name: t / 0 if index == 0 else t for index, (name, t) in enumerate(state.items())}


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux_dev"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (half, "half of a pair"),
        (wide, "wide here"),
        (kernels, r"a linear layer here, shape \(\d+, \d+, 1, 1\) there"),
        (infinite, "not finite"),
        (lambda state: {}, "holds no weights"),
        (lambda state: {"something.else": torch.ones(2)}, "do not fit this model|is no LoRA for"),
    ],
)
def test_damaged_loras_are_refused(bases, loras, name, change, message, tmp_path):
    refused(bases(name), rewritten(loras(name), tmp_path, change), message)


def test_a_convolution_needs_factors_of_its_kernel(bases):
    """Added to its weight, those of a linear layer would be repeated over the kernel."""
    part = bases("sd15").pipeline.unet
    name, layer = next((n, m) for n, m in part.named_modules() if getattr(m, "kernel_size", ()) == (3, 3))
    down, up = torch.ones(2, layer.in_channels), torch.ones(layer.out_channels, 2)

    def found(down, up):
        return _unfit(part, {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up})

    assert len(found(down, up)) == 2
    assert not found(down[..., None, None].expand(-1, -1, 3, 3), up[..., None, None])


@pytest.mark.parametrize(
    "content", [b"", b"\x08\0\0\0\0\0\0\0{}", b"not safetensors at all, but long enough to be read"]
)
def test_files_that_are_no_safetensors_are_refused(bases, content, tmp_path):
    for name in (NAME, "negative_prompt.safetensors"):
        (tmp_path / name).write_bytes(content)
        refused(bases("sd15"), tmp_path / name, "no readable safetensors file|holds no weights")


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_is_finite(bases, loras, scale, capsys):
    refused(bases("sd15"), loras("sd15"), "is not finite", scale=scale)
    assert main(["compare", "--models", f"[{loras('sd15')}@{scale}]"]) == 2
    assert f"the scale must be finite, got {scale}; write PATH@0.5" in capsys.readouterr().err


# Full weights ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def full(bases, tmp_path):
    """Full weights of SD 1.5, other than the base's: (folder, file)."""
    folder = tmp_path / "full" / "unet"
    bases("sd15").raw_denoiser.save_pretrained(folder)
    file = folder / "diffusion_pytorch_model.safetensors"
    save_file({n: t * 1.1 for n, t in load_file(file).items()}, file, {"format": "pt"})
    return tmp_path / "full", file


def test_full_weights_are_used_in_fp16_only_too(bases, full):
    model, (folder, file) = bases("sd15"), full
    before, base = contents(model), output(model)
    with with_tuned_weights(model, folder):
        expected = output(model)
    assert (expected - base).abs().max() > 1e-3
    half = {n: t.half() for n, t in load_file(file).items()}
    file.unlink()
    save_file(half, file.with_name("diffusion_pytorch_model.fp16.safetensors"), {"format": "pt"})
    with with_tuned_weights(model, folder):
        assert (output(model) - expected).abs().max() < 1e-2
    assert_same(model, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: {n: t for n, t in s.items() if n != "conv_in.weight"},
            r"lacks 1 of \d+ weights \(conv_in\.weight\)",
        ),
        (lambda s: {**s, "conv_in.weight": torch.ones(3)}, r"1 weights have other shapes \(conv_in\.weight \(3,\)"),
        (lambda s: {**s, "more.weight": torch.ones(3)}, r"1 weights have no place in this model \(more\.weight\)"),
        (lambda s: {}, "lacks"),
    ],
)
def test_full_weights_that_do_not_fit_are_refused(bases, full, change, message):
    folder, file = full
    save_file(change(load_file(file)), file, {"format": "pt"})
    before = contents(bases("sd15"))
    with pytest.raises(ValueError, match=message), with_tuned_weights(bases("sd15"), folder):
        pytest.fail("they were loaded")
    assert_same(bases("sd15"), before)


def test_full_weights_with_something_more_may_be_used_in_part(bases, full):
    folder, file = full
    with with_tuned_weights(bases("sd15"), folder):
        expected = output(bases("sd15"))
    save_file({**load_file(file), "more.weight": torch.ones(3)}, file, {"format": "pt"})
    with (
        pytest.warns(UserWarning, match=r"more\.weight"),
        with_tuned_weights(bases("sd15"), folder, allow_partial=True),
    ):
        assert (output(bases("sd15")) - expected).abs().max() < 1e-5


def test_full_weights_of_another_class_or_in_a_pickle_are_refused(bases, full):
    folder, file = full
    file.rename(file.with_name("diffusion_pytorch_model.bin"))
    with pytest.raises(ValueError, match="no diffusion_pytorch_model"), with_tuned_weights(bases("sd15"), folder):
        pass
    config = file.with_name("config.json")
    config.write_text(config.read_text().replace("UNet2DConditionModel", "SD3Transformer2DModel"))
    with pytest.raises(ValueError, match="holds a SD3Transformer2DModel"), with_tuned_weights(bases("sd15"), folder):
        pass


# Bases ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux_dev"])
def test_a_base_of_fp16_files_alone_loads(bases, family_pipelines, name, tmp_path):
    folder = shutil.copytree(family_pipelines[name], tmp_path / "base")
    for file in list(folder.rglob("*.safetensors")):
        save_file({n: t.half() for n, t in load_file(file).items()}, file, {"format": "pt"})
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    model = load_model(folder, **FAMILIES[name].options)
    assert model.dtype == torch.float32
    assert (output(model) - output(bases(name))).abs().max() < 0.05


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_a_base_that_lacks_weights_is_refused(family_pipelines, part, tmp_path):
    folder = shutil.copytree(family_pipelines["sd15"], tmp_path / "base")
    (file,) = (folder / part).glob("*.safetensors")
    state = load_file(file)
    gone = sorted(state)[3]
    save_file({n: t for n, t in state.items() if n != gone}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{re.escape(str(folder))}: weights are missing.*{re.escape(gone)}"):
        load_model(folder)


def test_a_base_whose_weights_have_another_shape_is_refused(family_pipelines, tmp_path):
    folder = shutil.copytree(family_pipelines["sd15"], tmp_path / "base")
    (file,) = (folder / "text_encoder").glob("*.safetensors")
    state = load_file(file)
    name = sorted(state)[3]
    save_file({**state, name: torch.zeros(7)}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"do not fit its configuration.*{re.escape(name)}"):
        load_model(folder)


# Commands -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["compare", "eval"])
def test_commands_refuse_it_and_go_on_where_they_may(bases, loras, family_pipelines, command, tmp_path, capsys):
    file = rewritten(loras("sd15"), tmp_path / "lora", renamed)
    arguments = [command, "--models", f"[part={file}]", "--model", str(family_pipelines["sd15"])]
    arguments += ["--prompts", str(PROMPTS / "shapes_validation.jsonl"), "--limit", "2", "--num_steps", "2"]
    arguments += ["--rewards", "[shapes]", "--output_dir", str(tmp_path / "out"), "--images_per_prompt", "1"]
    assert main(arguments) == 2
    assert "do not fit this model" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.png")), "it was refused before anything was drawn"
    with pytest.warns(UserWarning, match="do not fit this model"):
        assert main([*arguments, "--allow_partial", "true"]) == 0
