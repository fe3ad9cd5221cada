"""R36 to R38: the LoRA loads in plain diffusers, says what it is, and is not exported in silence when it is nothing."""

import json
import subprocess
import sys
import warnings

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file

from diffalign import FlowGRPOTrainer
from diffalign.evaluation.image_quality import ruined
from diffalign.models import LoraConfig, load_model
from diffalign.rollout.sampler import SamplingPlan, ode_plan, sample
from diffalign.runtime.provenance import config_hash
from tests.conftest import PIPELINE
from tests.models.tiny_unet_pipelines import FAMILIES, build
from tests.reliability.trainers import QUICK, TRAINERS, held_out, short

TEXT = "a red circle"
STEPS = 4


@pytest.fixture(scope="module")
def plain():
    pipe = DiffusionPipeline.from_pretrained(PIPELINE)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe, noise, **kwargs):
    options = {"num_inference_steps": STEPS, "guidance_scale": 1.0, "output_type": "pt", "max_sequence_length": 16}
    return pipe([TEXT], latents=noise, **options, **kwargs).images


@pytest.mark.parametrize("name", QUICK)
def test_r36_every_saved_lora_draws_what_the_trainer_draws(name, tmp_path, plain, caplog):
    trainer = TRAINERS[name].make(short(name, tmp_path / "run", learning_rate=0.03, checkpointing_steps=1))
    model, noise = trainer.model, trainer.run.rng.normal((1, *trainer.model.latent_shape()), "probe")
    images, save = {}, trainer.loop.save

    def draw():
        with torch.no_grad(), model.using("ema"):
            words = trainer.run.prompts([TEXT])
            return model.decode(sample(model, SamplingPlan(ode_plan(STEPS), model.levels(STEPS)), words, noise))

    def watched(last=False):
        path = save(last)
        images[path.name] = draw()
        return path

    trainer.loop.save = watched
    trainer.train()
    base = drawn(plain, noise)
    folders = [*(tmp_path / "run").glob("checkpoint-*"), tmp_path / "run"]
    assert len(folders) == 3
    for folder in folders:
        caplog.clear()
        plain.unload_lora_weights()
        plain.load_lora_weights(folder)
        loaded = {n for n, _ in plain.transformer.named_parameters() if "lora_" in n}
        assert len(loaded) == len(load_file(folder / "pytorch_lora_weights.safetensors"))
        expected = images.get(folder.name, images["checkpoint-4"])
        found = drawn(plain, noise)
        assert (found - expected).abs().max() <= 1e-5
        assert (found - base).abs().max() > 1e-4
        assert torch.equal(drawn(plain, noise, joint_attention_kwargs={"scale": 0.0}), base)
        assert "missing keys" not in caplog.text.lower()
        assert "unexpected keys" not in caplog.text.lower()
        plain.unload_lora_weights()


@pytest.mark.parametrize("family", FAMILIES)
def test_r36_so_does_that_of_every_family(family, tmp_path):
    build(family, tmp_path / "base")
    model = load_model(tmp_path / "base")
    model.train(LoraConfig(rank=2), seed=3)
    with torch.no_grad():
        for k, parameter in enumerate(model.weights.trainable):
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(k)))
    model.save(tmp_path / "lora")
    words, x = model.encode([TEXT]), torch.randn(1, *model.latent_shape(), generator=torch.Generator().manual_seed(0))
    other = load_model(tmp_path / "base")
    with torch.no_grad():
        own, base = model.predict(x, model.levels(4)[1], words), other.predict(x, other.levels(4)[1], words)
        other.pipeline.load_lora_weights(tmp_path / "lora")
        found = other.predict(x, other.levels(4)[1], words)
    assert (found - own).abs().max() <= 1e-5
    assert (own - base).abs().max() > 1e-4


@pytest.mark.slow  # the same for models is in tests/models/test_lora.py
def test_r36_a_fresh_process_without_this_package_loads_it(tmp_path):
    trainer = FlowGRPOTrainer(args=short("flow_grpo", tmp_path / "run", max_train_steps=2, learning_rate=0.03))
    trainer.train()
    code = (
        "import sys; from diffusers import DiffusionPipeline\n"
        f"pipe = DiffusionPipeline.from_pretrained({str(PIPELINE)!r})\n"
        f"pipe.load_lora_weights({str(tmp_path / 'run')!r})\n"
        "print(sum('lora_' in n for n, _ in pipe.transformer.named_parameters()))\n"
        "assert 'diffalign' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    stored = load_file(tmp_path / "run/pytorch_lora_weights.safetensors")
    assert int(done.stdout.split()[-1]) == len(stored)


@pytest.mark.parametrize("name", QUICK)
def test_r37_the_file_says_what_it_is(name, tmp_path):
    trainer = TRAINERS[name].make(short(name, tmp_path / "run", seed=5, max_train_steps=2, checkpointing_steps=1))
    trainer.train()
    for folder in (tmp_path / "run", tmp_path / "run/checkpoint-2", tmp_path / "run/raw"):
        with safe_open(folder / "pytorch_lora_weights.safetensors", "pt") as file:
            said = file.metadata()
        origin = trainer.loop.outputs.origin()
        expected = {"base_model": str(PIPELINE), "rank": "2", "alpha": "2", "seed": "5"}
        expected["trainer"] = trainer.algorithm.name
        expected |= {"config_sha256": config_hash(origin["config"]), "data_sha256": origin["data_sha256"]}
        assert {key: said[f"diffalign.{key}"] for key in expected} == expected
        assert said["diffalign.version"]
        assert len(said["diffalign.data_sha256"]) == 64
        assert json.loads(said["lora_adapter_metadata"])["transformer.r"] == 2


def test_r38_a_lora_that_learned_nothing_is_a_warning(tmp_path):
    flat = lambda images, prompts, metadata: torch.ones(len(images))  # noqa: E731
    with pytest.warns(UserWarning, match="this LoRA changes nothing"):
        FlowGRPOTrainer(args=short("flow_grpo", tmp_path, max_train_steps=2), reward_funcs=flat).train()


RAMP = torch.linspace(0, 1, 32).expand(8, 3, 32, 32) * torch.linspace(0.5, 1, 8)[:, None, None, None]
NOISE = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("tuned", "said"),
    [
        (RAMP, None),
        (RAMP * 0.8 + 0.1, None),
        (RAMP.flip(-1), None),
        (torch.full_like(RAMP, 0.5), "lost their contrast"),
        (RAMP[:1].expand(8, 3, 32, 32), "all alike"),
        (NOISE, "look like noise"),
        (torch.full_like(RAMP, torch.nan), "lost their contrast"),
    ],
)
def test_r38_images_that_have_collapsed_are_told_from_those_that_have_not(tuned, said):
    found = "\n".join(ruined(RAMP, tuned))
    assert said in found if said else not found


def test_r38_a_run_whose_images_collapse_says_so(tmp_path):
    prompts = held_out(tmp_path)
    evaluated = {"eval_prompts": prompts, "eval_rewards": ("brightness",), "eval_images_per_prompt": 1}
    for rate, ruins in ((1e-4, False), (3.0, True)):
        args = short("flow_grpo", tmp_path / str(rate), learning_rate=rate, ema_decay=0.0, clip_range=1e6,
                     max_grad_spike=0.0, **evaluated)  # fmt: skip
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            FlowGRPOTrainer(args=args).train()
        assert any("look at compare.png" in str(w.message) for w in said) == ruins
