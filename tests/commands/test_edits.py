"""The embedded editing task, as a user meets it: trained, compared beside the sources, and forecast."""

import json
import re

import pytest
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from diffalign.cli import main
from diffalign.data.prompts import load_prompts
from diffalign.models import load_model
from diffalign.models.load import edits
from diffalign.shapes.edits import apply_edit
from diffalign.shapes.verifier import find_objects, nearest_colors
from tests.conftest import PIPELINE, PROMPTS, ROOT

KONTEXT = ROOT / "assets/shapes-kontext"
SETS = {name: f"{PROMPTS}/shapes_edit_{name}.parquet?image=image" for name in ("train", "validation", "test")}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.mark.slow
def test_the_shipped_edits_can_be_made_and_no_scene_is_in_two_sets():
    sources = {}
    for name, source in SETS.items():
        prompts = load_prompts(source)
        assert len(prompts) == (600 if name == "train" else 200)
        sources[name] = {prompt.metadata["image"] for prompt in prompts}
        for prompt in prompts[::20]:
            with Image.open(prompt.metadata["image"]) as image:
                pixels = pil_to_tensor(image)[None].float() / 255
            apply_edit(find_objects(nearest_colors(pixels)[0]), prompt.metadata["edit"])
    assert not sources["train"] & sources["validation"]
    assert not (sources["train"] | sources["validation"]) & sources["test"]


def test_the_shipped_pipeline_edits():
    assert edits(KONTEXT)
    assert not edits(PIPELINE)
    assert load_model(KONTEXT, max_sequence_length=16, resolution=64).latent_shape() == (8, 8, 8)


SMALL = ["--num_groups", "2", "--group_size", "2", "--rollout_batch_size", "4", "--train_batch_size", "4"]
SMALL += ["--max_train_steps", "1", "--eval_steps", "1", "--mixed_precision", "no", "--decode_precision", "no"]


@pytest.mark.parametrize("trainer", ["flow_grpo", pytest.param("forward_rl", marks=pytest.mark.slow)])
def test_a_run_and_a_comparison_show_source_base_and_tuned(trainer, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config, run, out = ROOT / f"configs/{trainer}/shapes_edit.yaml", tmp_path / "run", tmp_path / "out"
    held_out = SETS["validation"] + "&limit=3"
    own = ["--output_dir", str(run), "--eval_prompts", held_out, "--eval_num_steps", "2"]
    assert main(["train", trainer, "--config", str(config), *SMALL, *own]) == 0
    columns = {}
    command = ["compare", str(run), "--output_dir", str(out), "--prompts", held_out, "--rewards", "shapes_edit_strict"]
    assert main([*command, "--num_steps", "2"]) == 0
    for file in (run / "compare.png", out / "compare.png"):
        with Image.open(file) as grid:
            columns[file] = (grid.width - 200) // (128 + 8)
    assert set(columns.values()) == {3}
    page = (out / "compare.html").read_text()
    content = json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page)[1])
    assert all(row["source"].startswith("data:image/png") for row in content["rows"])
    assert len({row["source"] for row in content["rows"]}) == 3
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any(name.endswith("unedited_difference") for row in metrics for name in row)


@pytest.mark.slow
def test_a_dry_run_of_an_edit_needs_no_sources(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    config = ROOT / "configs/flow_grpo/shapes_edit.yaml"
    own = ["--output_dir", str(tmp_path / "run"), "--dry_run", "--card", "h100"]
    assert main(["train", "flow_grpo", "--config", str(config), *own]) == 0
    assert "peak:" in capsys.readouterr().out
