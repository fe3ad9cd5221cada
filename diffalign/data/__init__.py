"""Readers of prompts and preference data, their order, and their validation."""
