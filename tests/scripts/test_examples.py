"""The examples run; the lint of the project checks their types."""

import json
import runpy

from PIL import Image

from tests.conftest import PIPELINE, ROOT

EXAMPLES = ROOT / "scripts/examples"


def example(name):
    return runpy.run_path(str(EXAMPLES / name))


def test_scores_without_a_model(tmp_path, capsys):
    path = tmp_path / "white.png"
    Image.new("RGB", (64, 64), "white").save(path)
    example("score_images.py")["main"]("a red circle", [str(path)])
    assert f"{path} redness 0.000 jpeg_compressibility" in capsys.readouterr().out


def test_log_probs_of_a_rollout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = example("sample_log_probs.py")["main"](str(PIPELINE), "a red circle", 2)
    assert found.shape == (2, 7)
    assert found.isfinite().all()
    # The mean over dimensions of log N(mean + std z; mean, std) + log std is near -(1 + log 2 pi) / 2.
    assert (found.diff(dim=0).abs() < 1).all()
    assert (tmp_path / "samples.png").is_file()


def test_a_loss_and_a_callback_of_ones_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    from diffalign.losses import registry

    monkeypatch.setattr(registry, "PREFERENCE_LOSSES", dict(registry.PREFERENCE_LOSSES))
    small = {"max_train_steps": 2, "num_pairs": 4, "train_batch_size": 4, "eval_prompts": None, "eval_rewards": ()}
    example("own_loss.py")["main"](str(tmp_path / "run"), **small)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert any("loss" in row for row in rows)
    assert capsys.readouterr().out.splitlines()[-1].startswith("step ")


def test_every_example_is_short_and_says_how_to_run_it():
    for path in EXAMPLES.glob("*.py"):
        text = path.read_text()
        body = text.split('"""', 2)[2]
        lines = [line for line in body.splitlines() if line.strip() and not line.startswith(("import", "from"))]
        assert len(lines) <= 25, path.name
        assert f"python scripts/examples/{path.name}" in text
