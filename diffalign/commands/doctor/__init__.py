"""``diffalign doctor``: what of this package works on this machine, found by trying, and what to do about the rest."""
