"""Single-file checkpoints are the models of their folders, to the bit, and name their file in all that a run writes."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffalign import FlowGRPOConfig, LoraConfig
from diffalign.cli import main
from diffalign.models import load_model, single_file
from diffalign.models.meta_device import model_on_meta
from diffalign.report.load_snippet import load_snippet
from tests.conftest import PIPELINE
from tests.models import original_layout

WHOLE = ["sd15", "sd2", "sdxl", "sd3"]
# Families whose denoiser diffusers reads from single files; their originals have fixed sizes, so its own names serve.
TRANSFORMERS = ["flux_dev", "qwen_image", "sana", "z_image", "chroma", "lumina2", "flux2_klein"]
WITHOUT = ["cogview4", "pixart_sigma"]


@pytest.fixture(scope="module")
def files(family_pipelines, tmp_path_factory):
    """Family -> (its single file, its folder)."""
    folder, made = tmp_path_factory.mktemp("files"), {}

    def get(name, only=""):
        path = folder / f"{name}{only}safetensors"
        if path not in made:
            pipe = DiffusionPipeline.from_pretrained(family_pipelines[name])
            made[path] = original_layout.write(pipe, folder / f"{name}{len(made)}.safetensors", only)
        return made[path], family_pipelines[name]

    return get


def weights(pipe):
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return {f"{name}.{key}": tensor for name, part in parts.items() for key, tensor in part.state_dict().items()}


def assert_same(found, expected):
    ours, theirs = weights(found), weights(expected)
    assert ours.keys() == theirs.keys()
    assert not [name for name, tensor in theirs.items() if not torch.equal(ours[name], tensor)]
    assert type(found) is type(expected)
    assert found.scheduler.config == expected.scheduler.config


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n == "sd2" else ()) for n in WHOLE])
def test_a_file_with_all_parts_is_its_folder(name, files):
    file, folder = files(name)
    model = load_model(f"{file}?base={folder}")
    assert_same(model.pipeline, load_model(folder).pipeline)
    assert model.default_resolution == load_model(folder).default_resolution
    assert type(model_on_meta(f"{file}?base={folder}")) is type(model)


def test_parts_that_a_file_lacks_come_from_the_base(files):
    file, folder = files("sd3", "model.diffusion_model.")
    assert_same(load_model(f"{file}?base={folder}").pipeline, load_model(folder).pipeline)


def test_a_file_may_have_some_text_encoders(files, tmp_path):
    file, folder = files("sd3")
    some = {name: t for name, t in load_file(file).items() if not name.startswith(("text_encoders.t5xxl", "vae"))}
    save_file(some, tmp_path / "incl_clips.safetensors")
    assert_same(load_model(f"{tmp_path}/incl_clips.safetensors?base={folder}").pipeline, load_model(folder).pipeline)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_transformer_of_each_family_is_read(name, family_pipelines, tmp_path):
    folder = family_pipelines[name]
    changed = {key: t + 1 for key, t in load_file(folder / "transformer/diffusion_pytorch_model.safetensors").items()}
    save_file(changed, tmp_path / "tuned.safetensors")
    found = load_model(f"{tmp_path}/tuned.safetensors?base={folder}").pipeline
    assert not [key for key, t in found.transformer.state_dict().items() if not torch.equal(t, changed[key])]
    assert found.text_encoder is not None


@pytest.mark.parametrize("name", WITHOUT)
def test_a_family_that_diffusers_reads_no_files_of_is_refused(name, family_pipelines):
    folder = family_pipelines[name]
    file = folder / "transformer/diffusion_pytorch_model.safetensors"
    with pytest.raises(ValueError, match=r"reads no single files of a .*; give a folder"):
        load_model(f"{file}?base={folder}")


def made(**shapes):
    return {name.replace("/", "."): torch.empty(shape, device="meta") for name, shape in shapes.items()}


LDM = "model.diffusion_model."
KINDS = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": {
        f"{LDM}output_blocks.11.0.skip_connection.weight": (320, 640, 1, 1)
    },
    "stabilityai/stable-diffusion-2-1": {f"{LDM}input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024)},
    "stabilityai/stable-diffusion-xl-base-1.0": {
        f"{LDM}input_blocks.4.1.norm.weight": (640,),
        "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": (1280,),
    },
    "black-forest-labs/FLUX.1-dev": {
        "double_blocks.0.img_attn.norm.key_norm.scale": (128,),
        "guidance_in.in_layer.bias": (3072,),
        "img_in.weight": (3072, 64),
    },
    "black-forest-labs/FLUX.1-schnell": {"double_blocks.0.img_attn.norm.key_norm.scale": (128,)},
    "stabilityai/stable-diffusion-3.5-medium": {
        "joint_blocks.0.context_block.adaLN_modulation.1.bias": (9216,),
        "joint_blocks.0.x_block.attn2.qkv.weight": (1, 1),
        "pos_embed": (1, 384 * 384, 1536),
    },
}


@pytest.mark.parametrize("base", KINDS)
def test_the_base_is_what_diffusers_knows_for_a_kind_of_file(base, tmp_path, monkeypatch):
    (tmp_path / "x.safetensors").touch()
    monkeypatch.setattr(single_file, "header", lambda path: made(**KINDS[base]))
    assert single_file.layout(tmp_path / "x.safetensors") == base


def test_a_file_of_the_hub_is_downloaded(files, monkeypatch):
    file, folder = files("sd15")
    asked = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *a, **k: asked.append((a, k)) or str(file))
    for name in ("me/x/blob/main/a/b.safetensors", "https://huggingface.co/me/x/resolve/main/a/b.safetensors"):
        assert load_model(f"{name}?base={folder}").pipeline.unet is not None
    assert {str(call) for call in asked} == {"(('me/x', 'a/b.safetensors'), {'revision': 'main'})"}


BAD = {
    "lora": ({"unet.a.lora_A.weight": torch.zeros(1)}, "is a LoRA, not a model; give its base as model"),
    "vae": ({"decoder.conv_in.weight": torch.zeros(1)}, "has no known UNet or transformer"),
    "fp8": ({"layers.0.a.weight": torch.zeros(1), "layers.0.a.scale_weight": torch.zeros(1)}, "has scaled fp8 weights"),
    "cut": ({f"{LDM}joint_blocks.0.x_block.attn.proj.bias": torch.zeros(1)}, "its tensors do not fit .*FILE.base="),
    "other": (None, "its tensors do not fit .*FILE.base=owner/name"),
    "empty": (b"", "cannot be read .*copy it again"),
    "ckpt": (b"x", r"\.ckpt files are not read \(pickles can run code\)"),
    "option": ({"layers.0.a.weight": torch.zeros(1)}, "write FILE.safetensors.base=FOLDER"),
    "gone": ({}, "no such file"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_model_is_refused_before_a_run(kind, files, tmp_path, capsys):
    content, message = BAD[kind]
    file = tmp_path / f"{kind}.{'ckpt' if kind == 'ckpt' else 'safetensors'}"
    if kind == "other":
        file = files("sd15")[0]
    elif isinstance(content, bytes):
        file.write_bytes(content)
    elif kind != "gone":
        save_file(content, file)
    model = f"{file}?bass=x" if kind == "option" else f"{file}?base={PIPELINE}"
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_model(model)
    if kind not in ("cut", "other"):
        assert (
            main(["train", "flow_grpo", "--model", model, "--rewards", "brightness", "--train_prompts", "geneval"]) == 2
        )
        assert len(capsys.readouterr().err) < 2000


def test_a_missing_base_is_named_with_what_to_try(files, capsys):
    file, _ = files("sdxl")
    for base in ("/nowhere", "owner/name"):
        command = ["train", "flow_grpo", "--model", f"{file}?base={base}", "--rewards", "brightness"]
        assert main([*command, "--train_prompts", "geneval"]) == 2
        message = capsys.readouterr().err
        assert base in message
        assert "FILE?base=FOLDER or ?base=owner/name" in message


@pytest.mark.parametrize(("name", "only"), [("sdxl", ""), ("sd3", LDM), ("sd3", "clips")])
def test_the_lines_of_the_card_make_the_same_pipeline(name, only, files, tmp_path):
    file, folder = files(name, "" if only == "clips" else only)
    if only == "clips":
        some = {key: t for key, t in load_file(file).items() if not key.startswith("text_encoders.t5xxl")}
        save_file(
            {k: t for k, t in some.items() if "clip_l.transformer.text_projection" not in k}, tmp_path / "x.safetensors"
        )
        file = tmp_path / "x.safetensors"
    model = load_model(f"{file}?base={folder}")
    args = FlowGRPOConfig(model=f"{file}?base={folder}", rewards={"brightness": 1.0}, output_dir=tmp_path)
    model.train(LoraConfig(rank=4))
    lines = [
        line for line in load_snippet(model, args, "x").split("\nimage")[0].splitlines() if "load_lora" not in line
    ]
    names = {}
    exec("\n".join(lines), names)
    ours = {key.replace(".base_layer", ""): t for key, t in weights(model.pipeline).items() if "lora_" not in key}
    # By its size alone diffusers tells CLIP-L, without a projection, from CLIP-G; here they have the same.
    skipped = ("text_encoder.text_projection", "text_encoder_2.") if only == "clips" else ()
    theirs = {key: t for key, t in weights(names["pipe"]).items() if not key.startswith(skipped)}
    assert not [key for key, t in theirs.items() if not torch.equal(ours[key], t)]


def test_a_run_names_its_file(files, tmp_path, capsys):
    file, folder = files("sd3", LDM)
    command = ["train", "flow_grpo", "--model", f"{file}?base={folder}", "--rewards", "brightness", "--output_dir"]
    command += [str(tmp_path / "run"), "--num_groups", "1", "--group_size", "2", "--rollout_batch_size", "2"]
    command += ["--train_batch_size", "2", "--max_train_steps", "1", "--plan.num_steps", "2"]
    command += ["--train_prompts", str(PIPELINE.parent / "prompts/shapes_train.jsonl"), "--max_sequence_length", "16"]
    assert main(command) == 0
    assert f"{file}?base={folder}" in (tmp_path / "run/config.yaml").read_text()
    assert file.name in (tmp_path / "run/README.md").read_text()
    with safe_open(tmp_path / "run/pytorch_lora_weights.safetensors", "pt") as opened:
        assert opened.metadata()["diffalign.base_model"] == f"{file}?base={folder}"
    capsys.readouterr()
    assert main(["export", str(tmp_path / "run"), "--format", "merged", "--output_dir", str(tmp_path / "merged")]) == 0
    assert json.loads((tmp_path / "merged/model_index.json").read_text())["_class_name"] == "StableDiffusion3Pipeline"
    assert main([*command, "--resume_from_checkpoint", "latest", "--max_train_steps", "2", "--dry_run"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_a_file_of_each_layout_trains(name, files, tmp_path):
    file, folder = files(name)
    command = ["train", "diffusion_dpo", "--model", f"{file}?base={folder}", "--max_train_steps", "1"]
    command += ["--train_data", str(PIPELINE.parent / "preferences/shapes.parquet"), "--train_batch_size", "2"]
    command += ["--output_dir", str(tmp_path / "run"), "--data.scan", "4", "--resolution", "32"]
    assert main(command) == 0
    assert load_file(tmp_path / "run/pytorch_lora_weights.safetensors")
    drawn = ["--limit", "1", "--rewards", "brightness", "--num_steps", "2", "--output_dir", str(tmp_path / "compare")]
    prompts = str(PIPELINE.parent / "prompts/shapes_test.jsonl")
    assert main(["compare", str(tmp_path / "run"), "--prompts", prompts, *drawn]) == 0
