"""A tensor left on the wrong device, in any phase of any trainer, is found on the strict device."""

from __future__ import annotations

import re
from contextlib import contextmanager

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from diffalign.rewards.base import FunctionReward
from tests.conftest import PROMPTS
from tests.device.runs import ONLINE, is_on_device, make
from tests.phases import collect

# Runs that reach every kind of tensor: a reference, lagged copies, an average of the weights.
RUNS = {
    "flow_grpo": ("flow_grpo", {"rewards": None, "kl_beta": 0.1, "ema_decay": 0.9}),
    "forward_rl": ("forward_rl", {"rewards": None, "reference_weight": 0.1, "ema_decay": 0.9}),
    "refl": (
        "refl",
        {"rewards": None, "recipe": {"preset": "draft_1", "num_steps": 4, "reward_loss": "negative"}, "ema_decay": 0.9},
    ),
    "diffusion_dpo": ("diffusion_dpo", {"ema_decay": 0.9, "reference_decay": 0.5}),
    "diffusion_dpo_online": ("diffusion_dpo", {**ONLINE, "rewards": None, "ema_decay": 0.9}),
}


def brightness(images, prompts, metadata):
    """A reward that wants images of the device: elsewhere it would be slow without a word."""
    assert is_on_device(images), "images are not on the same device"
    return images.mean((1, 2, 3))


@pytest.fixture
def built(tmp_path):
    """Return a function that builds a trainer whose rewards want images of the device."""
    held_out, lines = tmp_path / "two.jsonl", (PROMPTS / "shapes_validation.jsonl").read_text().splitlines()
    held_out.write_text("\n".join(lines[:2]) + "\n")

    def build(run):
        name, changes = RUNS[run]
        reward = FunctionReward("brightness", brightness, differentiable=True)
        judges = {"eval_prompts": str(held_out), "eval_rewards": ["shapes"]}
        return make(
            name, tmp_path / "run", reward_funcs=None if run == "diffusion_dpo" else reward, **judges, **changes
        )

    return build


class Phases:
    """The phases of an iteration, in order; each checks that what it hands over is on the device."""

    def __init__(self, trainer):
        self.trainer, self.algorithm, self.state = trainer, trainer.algorithm, trainer.loop.state

    def evaluate(self):
        self.trainer.outputs.evaluate(0)

    def sample(self):
        self.batch = collect(self.trainer)

    def first_batch(self):
        self.algorithm.on_first_batch(self.batch)

    def probe(self):
        assert all(map(is_on_device, self.algorithm.probe(self.batch))), "same device"

    def loss(self):
        (minibatch, *_) = self.algorithm.minibatches(self.batch, 0)
        self.state.optimizer.zero_grad(set_to_none=True)
        loss, self.metrics = self.algorithm.loss(minibatch.micros[0])
        self.trainer.run.accelerator.backward(loss)

    def step(self):
        self.state.step(None, 1.0)
        self.algorithm.on_step(self.batch, {name: float(value) for name, value in self.metrics.items()})
        assert not stray(self.trainer), f"not on the same device: {stray(self.trainer)}"


ORDER = ("evaluate", "sample", "first_batch", "probe", "loss", "step")


def stray(trainer):
    """Names of the parts of a training's state with tensors that are not on the device."""
    state, model = trainer.loop.state, trainer.model
    tensors, _ = state.state_dict()
    parts = {**tensors, "copies": list(model.weights.copies.values()), "algorithm": trainer.algorithm.state_dict()[0]}
    parts["networks"] = [p for part in trainer.model.pipeline.components.values() for p in parameters(part)]
    found = {name: [t for t in tree_leaves(part) if isinstance(t, torch.Tensor)] for name, part in parts.items()}
    return [name for name, part in found.items() if any(t.numel() > 1 and not is_on_device(t) for t in part)]


def parameters(part):
    return part.parameters() if isinstance(part, torch.nn.Module) else ()


def networks(trainer):
    """The networks whose outputs a training uses at once; embeddings are cached, and moved where they are used."""
    vae = trainer.model.pipeline.vae
    return {"denoiser": trainer.model.raw_denoiser, "vae.encoder": vae.encoder, "vae.decoder": vae.decoder}


@contextmanager
def output_on_the_cpu(network):
    """In which a network's output is left on the CPU; yields whether it ran."""
    ran = []

    def leave(module, inputs, output):
        ran.append(True)
        return tree_map_only(torch.Tensor, torch.Tensor.cpu, output)

    hook = network.register_forward_hook(leave)
    try:
        yield ran
    finally:
        hook.remove()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("run", RUNS)
def test_a_network_that_leaves_its_output_on_the_cpu_fails_every_phase_that_runs_it(run, built):
    trainer = built(run)
    phases, reached = Phases(trainer), set()
    for phase in ORDER:
        for name, network in networks(trainer).items():
            if (phase, name) == ("evaluate", "vae.decoder"):
                continue  # held-out images are kept in main memory
            with output_on_the_cpu(network) as ran:
                failed = fails(getattr(phases, phase))
            # Other methods' check of the first batch compares outputs with each other, wherever they are.
            harmless = phase == "first_batch" and run != "flow_grpo"
            assert failed or not ran or harmless, f"{phase}: {name} left its output on the CPU without an error"
            reached |= {(phase, name)} if ran else set()
        getattr(phases, phase)()
    assert {("evaluate", "denoiser"), ("probe", "denoiser"), ("loss", "denoiser")} <= reached
    assert run == "diffusion_dpo" or ("sample", "denoiser") in reached


def fails(call):
    """Whether a call fails because of devices; another error is the test's."""
    try:
        call()
    except (RuntimeError, AssertionError, ValueError) as error:
        # An index of the wrong device has an error of its own, and a reward that fails is reported by its number.
        assert re.search("same device|rewards failed", str(error)), error  # noqa: PT017
        return True
    return False


# Tensors that no network makes: who leaves which on the CPU


def moments(trainer):
    first = trainer.loop.state.parameters[0]
    trainer.loop.state.optimizer.optimizer.state[first]["exp_avg"] = torch.zeros(first.shape)


def averages(trainer):
    shadow = trainer.loop.state.ema.shadow
    shadow[:] = [tensor.cpu() for tensor in shadow]


def copies(trainer):
    for kept in trainer.model.weights.copies.values():
        kept[:] = [tensor.cpu() for tensor in kept]


def part_of_the_model(trainer):
    trainer.model.pipeline.vae.to("cpu")


PLANTS = {moments: "optimizer", averages: "ema", copies: "copies", part_of_the_model: "networks"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("run", RUNS)
def test_state_on_the_cpu_is_found(run, built):
    trainer = built(run)
    phases = Phases(trainer)
    for phase in ("sample", "loss", "step"):
        getattr(phases, phase)()
    for plant, name in PLANTS.items():
        plant(trainer)
        assert name in stray(trainer) or (name == "copies" and not trainer.model.weights.copies)
    with pytest.raises((RuntimeError, AssertionError), match="same device"):
        phases.step()
