"""The same trainer on CUDA; skipped where there is none."""

import pytest
import torch

from diffalign import FlowGRPOTrainer
from diffalign.runtime.tracking import MetricsLog

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
    trainer.collect(0)
    start = trainer.buffer.x[trainer.buffer.step == 0].cpu()
    addresses = [(0, group) for group in (0, 0, 0, 0, 1, 1, 1, 1)]
    assert torch.equal(start, trainer.noise.normal_batch(trainer.model.latent_shape(), "rollout/start", addresses))
