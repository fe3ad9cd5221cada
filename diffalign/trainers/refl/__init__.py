"""ReFL and its kin: gradients of differentiable rewards through the sampler."""
