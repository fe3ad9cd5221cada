"""Launchers of the trainers; benchmarks, builders of the embedded world and studies in the folders below."""

from pathlib import Path

ROOT = Path(__file__).parents[1]  # of the repository
