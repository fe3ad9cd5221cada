"""Prompts and their order."""
