"""Images are scored while the next ones are sampled, and nothing else is different."""

import dataclasses
import signal
import threading

import pytest
import torch

from diffalign import FlowGRPOTrainer
from diffalign.diffusion.plan import PlanConfig
from diffalign.runtime.errors import StopRequested
from tests.phases import collect

PATIENCE = 20.0  # seconds; only a test that fails waits so long


class Watched:
    """A reward that notes in which thread it is asked, and does not answer aside until more was sampled."""

    def __init__(self):
        self.asked, self.evaluations, self.on_ask = [], 0, lambda: None
        self.sampled = threading.Event()

    def __call__(self, images, prompts, metadata):
        aside = threading.current_thread() is not threading.main_thread()
        self.asked.append("aside" if aside else "in turn")
        self.on_ask()
        if aside:
            assert self.sampled.wait(PATIENCE), "nothing was sampled beside it"
        return images.mean((1, 2, 3)) + torch.rand(len(images))

    def watch(self, model):
        evaluate = model.evaluate

        def noted(*args):
            if self.asked[-1:] == ["aside"]:
                self.sampled.set()
            return evaluate(*args)

        model.evaluate = noted


def left():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("rewards")]


def test_images_are_scored_while_the_next_ones_are_sampled(small, train_prompts):
    reward = Watched()
    args = small(group_size=6, plan=PlanConfig(preset="first_steps", num_steps=2, window_size=1))
    trainer = FlowGRPOTrainer(args=args, reward_funcs=reward, train_dataset=train_prompts)
    reward.watch(trainer.model)

    def asked_while_collecting(**changes):
        trainer.algorithm.collector.config = dataclasses.replace(trainer.args, **changes)
        reward.asked.clear()
        reward.sampled.clear()
        torch.manual_seed(0)
        batch = collect(trainer, 1)
        assert not left()
        return reward.asked.copy(), batch.buffer.drawn()

    in_turn = ["in turn"] * 3
    assert asked_while_collecting()[0] == in_turn, "rewards load when they are first asked"
    asked, beside = asked_while_collecting()
    assert asked == ["aside", "aside", "in turn"], "beside the last images there is nothing to do"
    asked, plain = asked_while_collecting(overlap_rewards=False)
    assert asked == in_turn
    assert all(torch.equal(plain[name].nan_to_num(9), beside[name].nan_to_num(9)) for name in plain)
    assert asked_while_collecting(attention="_native_math")[0] == in_turn, "which kernels may be used is the process's"
    trainer.model.plain_attention = True
    assert asked_while_collecting()[0] == in_turn
    trainer.model.plain_attention = False

    def stop():
        trainer.run.heartbeat.signals.received = signal.SIGTERM
        reward.sampled.set()

    reward.on_ask = stop
    with pytest.raises(StopRequested):
        asked_while_collecting()
    assert reward.asked == ["aside"]
    assert not left()
