"""The same trainer on CUDA; skipped where there is none."""

from contextlib import contextmanager

import pytest
import torch

from diffalign import FlowGRPOTrainer
from diffalign.rewards import FunctionReward, get_reward
from diffalign.rollout import pinned_memory
from diffalign.rollout.scoring import ScoreBook
from diffalign.runtime.tracking import MetricsLog
from diffalign.structures import Prompt
from tests.conftest import ROOT
from tests.phases import collect

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_run_on_cuda_learns(small, train_prompts, precision):
    recompute = {} if precision == "no" else {"old_log_prob": "recompute"}
    args = small(mixed_precision=precision, max_train_steps=3, ema_decay=0.9, kl_beta=0.01, **recompute)
    trainer = FlowGRPOTrainer(args=args, train_dataset=train_prompts)
    assert trainer.model.device.type == "cuda"
    trainer.train()
    rows = [row for row in MetricsLog.read(args.output_dir / "metrics.jsonl") if "loss" in row]
    assert rows[0]["ratio_mean"] == 1.0
    assert all(row["grad_norm"] > 0 for row in rows)


def test_noise_does_not_depend_on_the_device(small, train_prompts):
    trainer = FlowGRPOTrainer(args=small(), train_dataset=train_prompts)
    batch = collect(trainer, 0)
    start = batch.buffer.x[batch.buffer.step == 0].cpu()
    addresses = [(0, group) for group in (0, 0, 0, 0, 1, 1, 1, 1)]
    assert torch.equal(start, trainer.run.rng.normal_batch(trainer.model.latent_shape(), "rollout/start", addresses))


# Latents in pinned memory --------------------------------------------------------------------------------------------


@contextmanager
def no_waiting():
    """In which a copy that waits for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_latents_go_there_and_back_without_a_wait():
    column, rows = torch.zeros(64, 4, 8, 8).pin_memory(), torch.tensor([40, 3, 17])
    values = torch.randn(3, 4, 8, 8, device="cuda").to(memory_format=torch.channels_last)
    with no_waiting():
        torch.cuda._sleep(10**8)
        pinned_memory.put(column, rows, values)
    pinned_memory.settle(column, values.device)
    with no_waiting():
        torch.cuda._sleep(10**8)
        found = [pinned_memory.take(column, order, values.device) for order in (rows, rows.flip(0))]
    assert torch.equal(found[0], values)
    assert torch.equal(found[1], values.flip(0))


@pytest.mark.parametrize("setting", [{}, {"loss": "grpo_guard", "old_log_prob": "recompute", "train_batch_size": 3}])
def test_latents_in_pinned_memory_train_the_same(small, train_prompts, monkeypatch, setting):
    found = []
    for limit in (1 << 40, 0):
        monkeypatch.setattr(pinned_memory, "ON_GPU", limit)
        trainer = FlowGRPOTrainer(args=small(**setting), train_dataset=train_prompts)
        batch = collect(trainer, 0)
        buffer = batch.buffer
        assert buffer.x.is_pinned() == (limit == 0)
        assert buffer.mean is None or buffer.mean.is_pinned() == buffer.x.is_pinned()
        assert buffer.device.type == "cuda"
        minibatches = trainer.algorithm.minibatches(batch, 0)
        micros = [micro for minibatch in minibatches for micro in minibatch.micros]
        losses = [trainer.algorithm.loss(micro)[0] * micro.weight for micro in micros]
        found.append([torch.stack(losses).cpu(), *(tensor.cpu().nan_to_num(9) for tensor in buffer.drawn().values())])
        again = trainer.algorithm.collector.restored(0, buffer.drawn(), {})
        assert torch.equal(again.buffer.x, buffer.x)
    assert all(torch.equal(card, pinned) for card, pinned in zip(*found, strict=True))


# Rewards on a stream of their own ------------------------------------------------------------------------------------


def late(images, prompts, metadata):
    torch.cuda._sleep(10**9)  # about half a second, in which the caller's stream goes on
    return images.mean((1, 2, 3))


def test_rewards_see_images_whole_and_none_of_the_next_ones():
    judge = str(ROOT / "assets/judges/pickscore")
    rewards = {"judge": get_reward("pickscore", path=judge, tokenizer=judge), "late": FunctionReward("late", late)}
    drawn = torch.rand(3, 8, 3, 256, 256, generator=torch.Generator().manual_seed(0)).cuda()
    found = []
    for aside in (False, True):
        with ScoreBook(rewards) as book:
            for part in drawn:
                torch.cuda._sleep(10**8)
                images = part + 0  # not there yet when it is added
                book.add(images, [Prompt("a red circle")] * 8, aside)
                del images
                torch.full_like(part, -1.0)  # would take its memory, were it free
            found.append(book.scores(torch.arange(24)))
    assert all(torch.equal(found[0][name], found[1][name]) for name in rewards)


def test_overlapped_rollouts_are_the_same(small, train_prompts):
    found = []
    for overlap in (False, True):
        trainer = FlowGRPOTrainer(args=small(overlap_rewards=overlap), train_dataset=train_prompts)
        for iteration in range(2):  # the first one takes turns
            batch = collect(trainer, iteration)
        found.append([tensor.cpu().nan_to_num(9) for tensor in batch.buffer.drawn().values()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
