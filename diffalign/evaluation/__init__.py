"""Held-out evaluation and its metrics: accuracy, win rates, diversity, sharpness."""
