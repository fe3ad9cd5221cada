"""Evaluations and rollouts score on the device, and networks of judges leave it after an evaluation."""

from contextlib import contextmanager

import pytest
import torch

from diffalign.rewards import get_reward
from diffalign.rewards.support import weights
from tests.conftest import PROMPTS, ROOT
from tests.device import strict
from tests.device.runs import ONLINE, PICKSCORE, is_on_device, make

IMAGES_HELD_OUT, BATCH = 5, 2
HPS = {"hpsv2.1": {"options": {"path": str(ROOT / "assets/judges/hps")}}}


class Group:
    """A group reward that records the devices of its arguments."""

    name, differentiable, range, needs_groups = "group", False, (0.0, 1.0), True

    def __init__(self):
        self.seen = []

    def __deepcopy__(self, memo):
        return Group()  # the trial before the run

    def __call__(self, images, prompts, metadata, groups):
        self.seen.append((len(images), is_on_device(images), is_on_device(groups)))
        return images.mean((1, 2, 3))


def network(name):
    """The network of a judge; loaded when the trainer tries its rewards."""
    kind = {"pickscore": "CLIPModel", "hpsv2.1": "CLIP"}[name]
    (found,) = {
        id(part): part
        for parts in weights._LOADED.values()
        for part in (parts if isinstance(parts, tuple) else (parts,))
        if type(part).__name__ == kind
    }.values()
    return found


@contextmanager
def moves(network, monkeypatch):
    """Yields the devices that a network is moved to, without moves to where it is."""
    found, move = [], torch.nn.Module.to

    def to(self, device, *args):
        before = next(self.parameters()).device
        result = move(self, device, *args)
        if self is network and next(self.parameters()).device != before:
            found.append(next(self.parameters()).device.type)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Module, "to", to)
        yield found


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    """A run that trains on a network and a group reward, and evaluates with another network too."""
    monkeypatch.setattr(weights, "_LOADED", {})
    lines = (PROMPTS / "shapes_validation.jsonl").read_text().splitlines()
    (held_out := tmp_path / "held_out.jsonl").write_text("\n".join(lines[:IMAGES_HELD_OUT]) + "\n")
    judge = get_reward("pickscore", path=PICKSCORE, tokenizer=PICKSCORE)
    evaluated = {"eval_prompts": str(held_out), "eval_images_per_prompt": 1, "held_out": HPS}

    def build(trainer="flow_grpo", offload=()):
        changes = {**(ONLINE if trainer == "diffusion_dpo" else {}), "rewards": None, "offload": list(offload)}
        return make(
            trainer, tmp_path / "run", reward_funcs=[judge, Group()], rollout_batch_size=BATCH, **changes, **evaluated
        )

    return build


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("offload", [(), ("rewards",)], ids=["", "offload"])
def test_an_evaluation_scores_on_the_device_in_batches_and_its_judges_leave(offload, trainer, monkeypatch):
    run = trainer(offload=offload)
    trained, judge = network("pickscore"), network("hpsv2.1")
    seen = []
    for one in (trained.vision_model, judge.visual):
        one.register_forward_pre_hook(
            lambda module, inputs, kwargs: seen.append(
                next((len(t), is_on_device(t)) for t in (*inputs, *kwargs.values()) if isinstance(t, torch.Tensor))
            ),
            with_kwargs=True,
        )
    with moves(trained, monkeypatch) as of_trained, moves(judge, monkeypatch) as of_judge:
        assert not is_on_device(next(judge.parameters())), "it leaves after the trial, too"
        figures = run.outputs.evaluate(0)
    assert {"pickscore", "hpsv2.1"} <= figures.keys()
    assert seen == 2 * [(BATCH, True), (BATCH, True), (IMAGES_HELD_OUT % BATCH, True)]
    assert of_judge == [strict.NAME, "cpu"], "once there, once back"
    assert of_trained == ([strict.NAME, "cpu"] if offload else [])
    assert is_on_device(next(trained.parameters())) != bool(offload), "a trained one stays"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["flow_grpo", "diffusion_dpo"])
def test_a_group_reward_of_a_rollout_gets_all_images_on_the_device(name, trainer):
    run = trainer(name)
    (group,) = (reward for reward in run.inputs.rewards.values() if isinstance(reward, Group))
    batch = run.algorithm.sample(0)
    run.algorithm.score(batch)
    assert group.seen == [(run.args.num_groups * run.args.group_size, True, True)]


def test_a_network_leaves_after_a_failed_call_and_one_that_was_there_stays():
    on, place = torch.device(strict.NAME, 0), weights.Weights("")
    away, there = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).to(on)

    def use(one):
        with weights.on_device(one, place, on):
            raise RuntimeError("a reward's own")

    for one in (away, there):
        with pytest.raises(RuntimeError, match="own"), weights.resident(leave=True):
            use(one)
    assert not is_on_device(away.weight)
    assert is_on_device(there.weight)
