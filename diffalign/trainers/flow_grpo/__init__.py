"""Flow-GRPO: policy gradients through the stochastic steps of a sampler."""
