"""Forward-process RL: denoising losses on final images, weighted by advantages."""
