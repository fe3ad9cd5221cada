"""What a run achieved: comparison grids, curves, accuracy, diversity, and the model card."""
