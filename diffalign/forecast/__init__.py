"""``--dry_run``: what a run will compute, hold and take, before it starts."""
