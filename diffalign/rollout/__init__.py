"""From prompts to a scored buffer of transitions: sampler, scoring, advantages, buffer."""
