"""``diffalign bench``: run a published benchmark on models."""
