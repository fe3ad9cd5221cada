"""Configuration of ``diffalign doctor``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from diffalign.config import option

PIPELINE = "shapes-sd3"
SOURCE = Path(__file__).parents[3]


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Fields of ``diffalign doctor``."""

    output_dir: Path = option(Path("runs"), "where run folders will go: its disk is tried")
    assets: Path | None = option(None, "the embedded world; default: assets/ here, else in the package's checkout")

    def world(self) -> Path | None:
        """The folder of the embedded world, where there is one."""
        places = (self.assets,) if self.assets else (Path("assets"), SOURCE / "assets")
        return next((place for place in places if (place / PIPELINE / "model_index.json").is_file()), None)
