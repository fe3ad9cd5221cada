"""Shared parts of rewards: weights, images, prompts, HTTP, isolation of user code and of failures."""
