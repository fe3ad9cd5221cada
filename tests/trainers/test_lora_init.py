"""Every trainer goes on from a LoRA, resumes, and says so in its products."""

import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from diffalign import LoraConfig
from diffalign.cli import main
from diffalign.models import load_model
from diffalign.models.lora_reading import read_updates
from tests.conftest import PIPELINE
from tests.reliability.trainers import TRAINERS, held_out, short

WEIGHTS = "pytorch_lora_weights.safetensors"
SLOW = ("diffusion_dpo", "online_dpo", "forward_rl", "refl")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A LoRA with its own rank and layers, whose update is not zero."""
    folder = tmp_path_factory.mktemp("source")
    model = load_model(PIPELINE, max_sequence_length=16)
    model.train(LoraConfig(rank=3, alpha=1.5, targets=("attn.to_q", "ff.net.2")), seed=1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.weights.trainable:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    model.about = {"diffalign.trained_alpha": "1.5"}
    model.save(folder)
    return folder


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in TRAINERS])
def test_every_trainer_goes_on_from_a_lora_and_resumes_bit_for_bit(name, source, tmp_path):
    changes = {"lora": LoraConfig(init=str(source)), "eval_prompts": held_out(tmp_path)}
    changes |= {"eval_rewards": ("brightness",), "eval_num_steps": 2}
    whole = short(name, tmp_path / "whole", **changes)
    TRAINERS[name].make(whole).train()
    shutil.copytree(tmp_path / "whole", tmp_path / "halves")
    shutil.rmtree(tmp_path / "halves/checkpoint-4")
    (tmp_path / "halves" / WEIGHTS).unlink()
    halves = short(name, tmp_path / "halves", **changes)
    TRAINERS[name].make(halves, resume_from_checkpoint="latest").train()
    first, second = (load_file(tmp_path / run / WEIGHTS) for run in ("whole", "halves"))
    assert all(torch.equal(first[key], second[key]) for key in first)

    start = load_file(source / WEIGHTS)
    assert {key: t.shape for key, t in first.items()} == {key: t.shape for key, t in start.items()}
    assert any(not torch.equal(first[key], start[key]) for key in first)
    assert max((first[key] - start[key]).abs().max() for key in first) < 0.1, "it went on, and did not begin again"
    with safe_open(tmp_path / "whole" / WEIGHTS, "pt") as file:
        header = file.metadata()
    assert header["diffalign.init"] == str(source)
    assert (header["diffalign.rank"], header["diffalign.trained_alpha"]) == ("3", "1.5")
    assert f"going on from the LoRA `{source}`" in (tmp_path / "whole/README.md").read_text()


@pytest.mark.slow
def test_what_went_on_from_it_is_exported(source, tmp_path):
    run = tmp_path / "run"
    args = short("flow_grpo", run, lora=LoraConfig(init=str(source)), max_train_steps=1)
    TRAINERS["flow_grpo"].make(args).train()
    assert main(["export", str(run), "--format", "kohya", "--output_dir", str(tmp_path / "kohya")]) == 0
    pipeline = load_model(PIPELINE).pipeline
    ours, theirs = (
        read_updates(pipeline, f)["transformer"] for f in (run / WEIGHTS, tmp_path / "kohya/kohya.safetensors")
    )
    assert ours.keys() == theirs.keys()
    for layer, own in ours.items():
        torch.testing.assert_close(theirs[layer].delta(), own.delta(), rtol=1e-5, atol=1e-7)


REFUSED = {
    "its rank": (
        ["--lora.init={source}", "--lora.rank=8"],
        "lora.rank: is the LoRA's own with lora.init; leave it out",
    ),
    "its layers": (["--lora.init={source}", "--lora.blocks=0"], "lora.blocks: is the LoRA's own with lora.init"),
    "no LoRA": (["--lora.reference=base"], "lora.reference: is read only with lora.init"),
    "two lists": (["--lora.layers=.*", "--lora.targets=to_q"], "lora.targets: is not read with lora.layers"),
    "full": (["--lora.rank=0", "--lora.use_dora=true"], "lora.use_dora: is read only with a LoRA"),
    "no file": (["--lora.init={source}/nothing"], "lora.init: {source}/nothing: no such file or folder"),
    "no hub id": (["--lora.init=nobody/nothing"], "lora.init: nobody/nothing: no such file or folder, and no LoRA on"),
    "base": (
        ["--lora.init={source}", "--base_share=0.5", "--recipe.preset=draft_k"],
        "lora.reference: init compares with base and LoRA: set lora.reference: base",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_that_would_not_be_read_are_refused_before_any_work(case, source, tmp_path, capsys):
    options, message = REFUSED[case]
    given = [option.format(source=source) for option in options]
    trainer = "refl" if case == "base" else "flow_grpo"
    config = ["--rewards", "brightness", "--model", str(PIPELINE), "--output_dir", str(tmp_path / "run")]
    prompts = ["--train_prompts", "assets/prompts/shapes_train.jsonl"]
    assert main(["train", trainer, *config, *prompts, *given]) == 2
    assert message.format(source=source) in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_dry_run_reads_the_lora(source, tmp_path, capsys):
    config = ["--rewards", "brightness", "--model", str(PIPELINE), "--output_dir", str(tmp_path / "run")]
    prompts = ["--train_prompts", "assets/prompts/shapes_train.jsonl", "--plan.num_steps=2", "--max_sequence_length=16"]
    assert main(["train", "flow_grpo", *config, *prompts, f"--lora.init={source}", "--dry_run"]) == 0
    assert f"init: {source}" in capsys.readouterr().out
