"""``diffalign export``: every format of every family, read back as the programs read it that it is for."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffalign.cli import main
from diffalign.models import LoraConfig, load_model
from diffalign.models.checkpoint_context import with_tuned_weights
from diffalign.models.lora_reading import read_updates
from tests.models import tiny_unet_pipelines as tiny
from tests.models.families import FAMILIES, images_of, noise_of
from tests.models.tiny_edit_pipelines import FAMILIES as EDITS

STEPS = 2
# Neither kohya's tools nor ComfyUI load LoRAs of these.
UNNAMED = ("sana", "cogview4")
# diffusers converts the published sizes of FLUX.1 and Chroma alone, and no kohya file of SD3 and Lumina.
HARD_CODED = ("flux_dev", "flux_schnell", "chroma", "sd3", "sd35_medium", "lumina2")
WEIGHTS = "pytorch_lora_weights.safetensors"
# Format -> file that is read back; the folder where it is empty.
FORMATS = {"diffusers": WEIGHTS, "kohya": "kohya.safetensors", "peft": "adapter_model.safetensors", "merged": ""}


SCALED = LoraConfig(rank=4, alpha=6.0)


def perturb(model, config=SCALED, seed=1):
    """Give the model a LoRA that changes its images."""
    model.train(config, seed=3)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.weights.trainable:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.03)


def images(family, model):
    return images_of(FAMILIES[family], model, noise_of(model, 2), steps=STEPS)


def deltas(pipeline, file):
    read = read_updates(pipeline, file)
    return {(part, layer): own.delta() for part, layers in read.items() for layer, own in layers.items()}


@pytest.fixture(scope="module")
def trained(family_pipelines, tmp_path_factory):
    """Family -> (base model, folder of its LoRA, its images), made once."""
    made = {}

    def build(family):
        if family not in made:
            folder, options = family_pipelines[family], FAMILIES[family].options
            model = load_model(folder, **options)
            perturb(model)
            model.about = {"diffalign.base_model": str(folder)}
            run = tmp_path_factory.mktemp(family)
            model.save(run)
            made[family] = load_model(folder, **options), run, images(family, model)
        return made[family]

    return build


def export(run, folder, *options):
    assert main(["export", *([str(run)] if run else []), *options, "--output_dir", str(folder)]) == 0


SLOW = ("sd2", "sdxl", "flux_schnell", "qwen_image")  # of the layouts of others
LORAS = [name for name, family in FAMILIES.items() if family.lora]
BY_FAMILY = [pytest.param(n, marks=pytest.mark.slow if n in SLOW or FAMILIES[n].slow else ()) for n in LORAS]


@pytest.mark.parametrize("family", BY_FAMILY)
def test_every_format_gives_the_trainers_images(trained, family, tmp_path, capsys):
    base, run, expected = trained(family)
    assert (images(family, base) - expected).abs().max() > 1e-3, "the LoRA must matter"
    for format in FORMATS.keys() - {"merged"}:
        if format == "kohya" and family in UNNAMED:
            assert main(["export", str(run), "--format", format, "--output_dir", str(tmp_path / format)]) == 2
            assert "ComfyUI and kohya's tools load no LoRA for a" in capsys.readouterr().err
            continue
        export(run, tmp_path / format, "--format", format)
        file = "kohya.safetensors" if format == "kohya" else ""
        with with_tuned_weights(base, tmp_path / format / file):
            assert (images(family, base) - expected).abs().max() < 1e-5, format
    export(run, tmp_path / "merged", "--format", "merged")
    merged = load_model(tmp_path / "merged", **FAMILIES[family].options)
    assert (images(family, merged) - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=pytest.mark.slow if FAMILIES[name].slow else ())
        for name in LORAS
        if name not in (*UNNAMED, *HARD_CODED)
    ],
)
def test_plain_diffusers_reads_kohyas_format(trained, family, tmp_path):
    base, run, _ = trained(family)
    export(run, tmp_path / "lora", "--format", "kohya")
    pipe = DiffusionPipeline.from_pretrained(base.pipeline.config._name_or_path)
    pipe.load_lora_weights(tmp_path / "lora" / "lora.safetensors", adapter_name="read")
    denoiser = getattr(pipe, base.denoiser_name)
    expected = deltas(base.pipeline, run / WEIGHTS)
    loaded = {n: m for n, m in denoiser.named_modules() if hasattr(m, "get_delta_weight")}
    assert loaded.keys() == {layer for _, layer in expected}
    for name, layer in loaded.items():
        assert torch.equal(layer.get_delta_weight("read"), expected[base.denoiser_name, name]), name


@pytest.mark.parametrize("family", ["sd15", *(pytest.param(n, marks=pytest.mark.slow) for n in ("sdxl", "qwen_image"))])
def test_plain_diffusers_reads_layers_of_several_ranks_from_kohyas_format(family_pipelines, family, tmp_path):
    """It takes the alpha of one layer of a UNet for that of all."""
    model = load_model(family_pipelines[family], **FAMILIES[family].options)
    perturb(model, LoraConfig(rank=4, alpha=6.0, rank_pattern={"to_q": 2, "to_v": 6}, alpha_pattern={"to_k": 9.0}))
    file = model.save(tmp_path / "run")
    export(file, tmp_path / "lora", "--format", "kohya", "--model", str(family_pipelines[family]))
    pipe = DiffusionPipeline.from_pretrained(family_pipelines[family])
    expected = deltas(pipe, file)
    pipe.load_lora_weights(tmp_path / "lora" / "lora.safetensors", adapter_name="read")
    loaded = {n: m for n, m in getattr(pipe, model.denoiser_name).named_modules() if hasattr(m, "get_delta_weight")}
    assert loaded.keys() == {layer for _, layer in expected}
    # The alphas of a UNet's file, all the highest rank, are multiplied in and divided out again.
    rounded = 1e-6 if family != "qwen_image" else 0.0
    for (_, name), update in expected.items():
        torch.testing.assert_close(loaded[name].get_delta_weight("read"), update, rtol=rounded, atol=rounded / 100)


@pytest.mark.parametrize("family", ["qwen_image_edit", pytest.param("flux_kontext", marks=pytest.mark.slow)])
def test_editing_models_are_exported(family, tmp_path):
    """Their layers are those of the models that make images, whose files are sampled above."""
    tiny.write(EDITS[family], tmp_path / "base")
    model = load_model(tmp_path / "base", max_sequence_length=24)
    perturb(model)
    file = model.save(tmp_path / "run")
    expected = deltas(load_model(tmp_path / "base").pipeline, file)
    for format, name in FORMATS.items():
        export(file, tmp_path / format, "--format", format, "--model", str(tmp_path / "base"))
        if format == "merged":
            merged = DiffusionPipeline.from_pretrained(tmp_path / format)
            for (part, layer), update in expected.items():
                weight = getattr(model.pipeline, part).get_submodule(layer).base_layer.weight
                assert torch.equal(getattr(merged, part).get_submodule(layer).weight, weight + update), layer
            continue
        found = deltas(load_model(tmp_path / "base").pipeline, tmp_path / format / name)
        assert found.keys() == expected.keys()
        for key, update in expected.items():
            torch.testing.assert_close(found[key], update, rtol=1e-5, atol=1e-7)


def test_peft_reads_its_own_format(trained, tmp_path):
    base, run, _ = trained("sd3")
    export(run, tmp_path / "out", "--format", "peft")
    settings = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (4, 4)
    denoiser = DiffusionPipeline.from_pretrained(base.pipeline.config._name_or_path).transformer
    model = PeftModel.from_pretrained(denoiser, tmp_path / "out")
    expected = deltas(base.pipeline, run / WEIGHTS)
    layers = {n: m for n, m in model.base_model.model.named_modules() if hasattr(m, "get_delta_weight")}
    assert len(layers) == len(expected)
    for name, layer in layers.items():
        torch.testing.assert_close(layer.get_delta_weight("default"), expected["transformer", name])


def test_kohyas_header_tells_what_web_uis_sort_by(trained, tmp_path):
    _, run, _ = trained("sdxl")
    (run / "config.yaml").write_text(
        f"model: {load_header(run / WEIGHTS)['diffalign.base_model']}\nlearning_rate: 1e-4"
    )
    try:
        export(run, tmp_path / "style", "--format", "kohya", "--dtype", "fp16")
    finally:
        (run / "config.yaml").unlink()
    header = load_header(tmp_path / "style/style.safetensors")
    assert header["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert header["modelspec.title"] == header["ss_output_name"] == "style"
    assert float(header["ss_learning_rate"]) == 1e-4
    assert len(header["sshs_model_hash"]) == 64
    tensors = load_file(tmp_path / "style/style.safetensors")
    assert {t.dtype for n, t in tensors.items() if "alpha" not in n} == {torch.float16}
    assert {float(t) for n, t in tensors.items() if "alpha" in n} == {4.0}


def load_header(file):
    with safe_open(file, "pt") as opened:
        return opened.metadata()


@pytest.fixture(scope="module")
def second(family_pipelines, tmp_path_factory):
    """Another LoRA of SD 1.5, with convolutions and another rank."""
    model = load_model(family_pipelines["sd15"])
    perturb(model, LoraConfig(rank=6, targets=("to_q", "conv1")), seed=5)
    return model.save(tmp_path_factory.mktemp("second"))


def test_loras_are_combined_by_weights(trained, second, tmp_path):
    base, run, _ = trained("sd15")
    model = ["--model", str(base.pipeline.config._name_or_path)]
    export(None, tmp_path / "both", f"--models={run}@0.5,{second}@-2", *model)
    one, other, both = (deltas(base.pipeline, file) for file in (run / WEIGHTS, second, tmp_path / "both" / WEIGHTS))
    assert both.keys() == one.keys() | other.keys()
    for key, update in both.items():
        expected = 0.5 * one.get(key, torch.zeros_like(update)) - 2 * other.get(key, torch.zeros_like(update))
        torch.testing.assert_close(update, expected, rtol=1e-5, atol=1e-7)


def test_a_smaller_rank_is_the_best_approximation(trained, second, tmp_path, capsys):
    base, *_ = trained("sd15")
    export(second, tmp_path / "small", "--rank", "2", "--model", str(base.pipeline.config._name_or_path))
    whole, small = (deltas(base.pipeline, file) for file in (second, tmp_path / "small" / WEIGHTS))
    kept = total = 0.0
    for key, update in small.items():
        left, values, right = torch.linalg.svd(whole[key].flatten(1).double(), full_matrices=False)
        best = (left[:, :2] * values[:2]) @ right[:2]
        torch.testing.assert_close(update.flatten(1).double(), best, rtol=1e-4, atol=1e-6)
        kept, total = kept + (values[:2] ** 2).sum(), total + (values**2).sum()
    assert f"rank 2, {kept / total:.2%} of the squared norm kept" in capsys.readouterr().out


def test_merged_weights_have_the_dtype(trained, tmp_path):
    _, run, _ = trained("sd15")
    export(run, tmp_path / "half", "--format", "merged", "--dtype", "bf16")
    for file in sorted((tmp_path / "half").rglob("*.safetensors")):
        floats = {t.dtype for t in load_file(file).values() if t.is_floating_point()}
        assert floats == {torch.bfloat16}, file


@pytest.mark.parametrize(("dtype", "bits"), [("fp16", 11), ("bf16", 8)])
def test_merged_weights_are_rounded_once(trained, tmp_path, dtype, bits):
    """The base is not rounded before the sum, so the error is at most half of the last place."""
    base, run, _ = trained("sd15")
    export(run, tmp_path / "half", "--format", "merged", "--dtype", dtype)
    (file,) = (tmp_path / "half/unet").glob("*.safetensors")
    merged, stored = load_file(file), base.raw_denoiser.state_dict()
    for layer, own in read_updates(base.pipeline, run / WEIGHTS)["unet"].items():
        exact = stored[f"{layer}.weight"].double() + own.up.double() @ own.down.double()
        last_place = torch.ldexp(torch.ones(()).double(), (torch.frexp(exact).exponent - bits).clamp(min=-24))
        error = (merged[f"{layer}.weight"].double() - exact).abs()
        assert (error <= last_place / 2 * 1.01).all(), layer


@pytest.mark.slow
def test_a_merged_dora_is_rounded_once(family_pipelines, tmp_path):
    model = load_model(family_pipelines["sd15"])
    perturb(model, LoraConfig(rank=4, use_dora=True))
    file = model.save(tmp_path / "run")
    found = []
    for dtype in ("fp32", "fp16"):
        folder = tmp_path / dtype
        export(file, folder, "--format", "merged", "--dtype", dtype, "--model", str(family_pipelines["sd15"]))
        found.append(load_file(next((folder / "unet").glob("*.safetensors"))))
    assert all(torch.equal(half, found[0][name].half()) for name, half in found[1].items())


@pytest.mark.parametrize("family", ["sd15", pytest.param("pixart_sigma", marks=pytest.mark.slow)])
def test_full_weights_are_written_as_a_pipeline(family_pipelines, tmp_path, family, capsys):
    options = FAMILIES[family].options
    model = load_model(family_pipelines[family], **options)
    perturb(model, LoraConfig(rank=0))
    model.save(tmp_path / "run")
    (tmp_path / "run/config.yaml").write_text(f"model: {family_pipelines[family]}")
    export(tmp_path / "run", tmp_path / "out", "--format", "merged")
    read = load_model(tmp_path / "out", **options)
    assert (images(family, read) - images(family, model)).abs().max() < 1e-6
    for format in FORMATS.keys() - {"merged"}:
        assert "holds all weights of a denoiser, no LoRA: write --format merged" in refused(
            capsys, tmp_path / "run", "--format", format
        )


def refused(capsys, *argv):
    assert main(["export", *map(str, argv)]) == 2
    text = capsys.readouterr().err
    assert len(text) < 2000
    return text


def test_what_cannot_be_written_is_refused(trained, second, tmp_path, capsys):
    base, run, _ = trained("sana")
    folder = base.pipeline.config._name_or_path
    assert "load no LoRA for a SanaTransformer2DModel: use --format diffusers" in refused(
        capsys, run, "--format", "kohya"
    )
    assert "names no base model: write --model" in refused(capsys, second)
    assert "give the base that it was made for" in refused(capsys, second, "--model", folder)
    assert "rank 9 is more than the LoRA's 4" in refused(capsys, run, "--rank", 9)
    assert "which is read: name another folder" in refused(capsys, run, "--output_dir", run)
    assert "which is read" in refused(capsys, run, "--format", "merged", "--output_dir", folder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").touch()
    assert "holds other files" in refused(capsys, run, "--format", "merged", "--output_dir", tmp_path / "mine")
    assert "no such file or folder" in refused(capsys, "nobody/nothing")
    assert "no model is named" in refused(capsys, "--format", "peft")
    big = load_file(run / WEIGHTS)
    save_file({name: tensor * 1e6 for name, tensor in big.items()}, tmp_path / "big.safetensors")
    large = refused(
        capsys, tmp_path / "big.safetensors", "--model", folder, "--dtype", "fp16", "--output_dir", tmp_path / "big"
    )
    assert "is not finite in torch.float16: choose --dtype bf16 or fp32" in large
    assert not list((tmp_path / "big").glob("*"))
