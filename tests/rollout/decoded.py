"""Trees of a buffer, sampled and decoded."""

import torch

from diffalign.rollout.generate import decode, rollout_latents


def rollouts(model, plan, conditioning, keys, buffer, size, decode_dtype=torch.float32):
    """Sample the trees of a buffer, and yield each micro-batch of leaves with its images."""
    for leaves, final in rollout_latents(model, plan, conditioning, keys, buffer, size):
        yield leaves, decode(model, final, decode_dtype)
