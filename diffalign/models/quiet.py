"""Loading bars of the libraries that load models."""

from __future__ import annotations

import diffusers
import transformers


def no_bars() -> None:
    """Turn off the bars of diffusers and transformers, which nest while a pipeline loads; downloads keep theirs."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
