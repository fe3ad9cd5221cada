"""What every run needs, whatever it optimises: the loop, checkpoints, addressed noise, EMA, tracking."""
