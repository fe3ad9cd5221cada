"""Wrong images are sorted by the reason."""

import importlib
import json
from pathlib import Path

import torch
from torchvision.transforms.functional import to_pil_image

from diffalign.shapes import Object, render
from diffalign.structures import Prompt

ROOT = Path(__file__).parents[3]


def test_wrong_images_are_sorted_by_what_is_wrong(monkeypatch, tmp_path):
    fails = importlib.import_module("scripts.studies.what_fails")
    drawn = {
        "right": [("circle", "red"), ("square", "blue")],
        "other colour or place": [("circle", "red"), ("square", "green")],
        "other shapes": [("circle", "red"), ("triangle", "blue")],
        "too few": [("circle", "red")],
        "too many": [("circle", "red"), ("square", "blue"), ("circle", "green")],
    }
    spec = {"tag": "color_attr", "include": [{"class": "circle", "count": 1, "color": "red"}]}
    spec["include"].append({"class": "square", "count": 1, "color": "blue"})
    folder = tmp_path / "images/model"
    (folder / "images").mkdir(parents=True)
    lines = []
    for i, things in enumerate(drawn.values()):
        scene = [Object(s, c, 12.0 + 20 * j, 12.0 + 18 * j, 8.0) for j, (s, c) in enumerate(things)]
        to_pil_image(render([scene])[0]).save(folder / f"images/00000-{i}.png")
        lines.append(json.dumps({"prompt": 0, "sample": i, "rewards": {}}) + "\n")
    blot = torch.full((3, 64, 64), 0.0)
    blot[0, 10:14, 5:60] = 1.0
    to_pil_image(blot).save(folder / f"images/00000-{len(lines)}.png")
    lines.append(json.dumps({"prompt": 0, "sample": len(lines), "rewards": {}}) + "\n")
    (folder / "scores-0.jsonl").write_text("".join(lines))
    found = fails.reasons(folder, [Prompt("x", spec)])
    assert found == {("color_attr", name): 1 for name in (*drawn, "no clear shape")}
    monkeypatch.setattr(fails, "TAGS", ("color_attr",))
    fails.draw({"model": found}, tmp_path / "fails.png")
    assert (tmp_path / "fails.png").stat().st_size > 3000
