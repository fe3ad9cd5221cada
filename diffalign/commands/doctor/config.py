"""Configuration of ``diffalign doctor``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from diffalign.config import Checked, option
from diffalign.embedded import ASSETS, root

PIPELINE = "shapes-sd3"


@dataclass(frozen=True, kw_only=True)
class DoctorConfig(Checked):
    """Configuration of ``diffalign doctor``."""

    usage: ClassVar[str] = "diffalign doctor [--field VALUE ...]"
    examples: ClassVar[tuple[str, ...]] = ("diffalign doctor", "diffalign doctor --output_dir /data/runs")

    essential: ClassVar[tuple[str, ...]] = ("output_dir", "assets")

    output_dir: Path = option(Path("runs"), "folder of run folders, whose disk is tested", section="run")
    assets: Path | None = option(
        None, "folder of the embedded world; default: assets/ here, else the package's own", section="run"
    )

    def world(self) -> Path | None:
        """Return the folder of the embedded world; None without one."""
        places = (self.assets,) if self.assets else (Path(ASSETS), root() / ASSETS)
        return next((place for place in places if (place / PIPELINE / "model_index.json").is_file()), None)
