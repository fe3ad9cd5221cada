"""A stand-in of the hub's data sets on disk, in its own layouts."""

import json

import datasets
import huggingface_hub.constants
from datasets import Dataset

from diffalign.data.prompt_source import LISTED


def stand_in(tmp_path, monkeypatch):
    """Return a function that puts rows on a stand-in of the hub, as sharded parquet of a split or as files by name."""
    here, cache = tmp_path / "hub", tmp_path / "cache"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(cache))
    loads = datasets.load_dataset
    monkeypatch.setattr(
        datasets, "load_dataset", lambda source, **k: loads(str(here / source) if "/" in source else source, **k)
    )

    def put(repository, rows=None, split="train", files=None):
        if rows is not None:
            data = here / repository / "data"
            data.mkdir(parents=True, exist_ok=True)
            for shard, part in enumerate((rows[: len(rows) // 2], rows[len(rows) // 2 :])):
                Dataset.from_list(part).to_parquet(data / f"{split}-{shard:05d}-of-00002-0a1b2c3d4e5f6071.parquet")
        kept = cache / f"datasets--{repository.replace('/', '--')}"
        for name, content in (files or {}).items():
            path = kept / "snapshots" / ("a" * 40) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content))
        (kept / "refs").mkdir(parents=True, exist_ok=True)
        (kept / "refs/main").write_text("a" * 40)
        (kept / "snapshots" / ("a" * 40)).mkdir(parents=True, exist_ok=True)
        (kept / "snapshots" / ("a" * 40) / "README.md").write_text("---\nlicense: mit\n---\n")

    return put


# The columns of the hub's sets, in its own layout: rows of a split, or files.
LAYOUTS = {
    "pickapic": {"rows": [{"caption": f"a cat {n // 2}", "ranking_id": n, "label_0": 0.5} for n in range(400)]},
    "hpdv2": {"files": {"train.json": [{"prompt": "a", "image_path": ["1.jpg", "2.jpg"], "human_preference": [1, 0]}]}},
    "hpdv2_benchmark": {"files": {name: [f"in {name}"] for name in LISTED["hpdv2_benchmark"].splits["test"]["files"]}},
    "parti": {"rows": [{"Prompt": p, "Category": "Abstract", "Challenge": "Basic", "Note": ""} for p in ("a", "b")]},
    "drawbench": {"rows": [{"Prompts": p, "Category": "Colors"} for p in ("a", "b")]},
    "open_image_preferences": {"rows": [{"prompt": p, "category": "c", "chosen": None} for p in ("a", "b")]},
}
