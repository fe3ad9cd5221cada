import json

import pytest
import torch

from diffalign.evaluation.diversity import embedding_distance
from diffalign.report.plots import plot_figures
from diffalign.report.results import diversity_of, figures, to_json, to_markdown

PROMPT = torch.arange(8) // 2
TAGS = ["a", "a", "a", "a", "b", "b", "b", "b"]
BASE = {"right": torch.tensor([0.0, 1, 0, 0, 1, 1, 0, 1]), "nice": torch.linspace(0, 1, 8)}
BETTER = {"right": torch.tensor([1.0, 1, 0, 1, 1, 1, 0, 1]), "nice": torch.linspace(0.1, 1.1, 8)}


@pytest.fixture
def models():
    return {
        "base": figures(PROMPT, BASE, TAGS, None, {"pixels": 0.2}),
        "tuned": figures(PROMPT, BETTER, TAGS, BASE, {"pixels": 0.1}),
    }


def test_figures_by_hand(models):
    base, tuned = models["base"], models["tuned"]
    assert base.rewards["right"].mean == 0.5
    assert (base.tasks["a"].mean, base.tasks["b"].mean) == (0.25, 0.75)
    assert base.wins == {}
    assert tuned.wins["right"].rate.mean == (0.75 + 0.75 + 0.5 + 0.5) / 4
    assert (tuned.wins["right"].wins, tuned.wins["right"].ties, tuned.wins["right"].losses) == (2, 6, 0)
    assert tuned.wins["nice"].rate.mean == 1.0


def test_prompts_of_one_task_have_no_tasks():
    assert figures(PROMPT, BASE, ["all"] * 8, None, {}).tasks == {}


def test_json_holds_every_figure(models):
    text = json.dumps(to_json(models, {"seed": 3}))
    found = json.loads(text)
    assert found["settings"] == {"seed": 3}
    assert found["models"]["tuned"]["wins"]["right"]["wins"] == 2
    assert found["models"]["base"]["rewards"]["right"]["mean"] == 0.5


def test_the_table_has_a_column_per_model_and_a_row_per_figure(models):
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in to_markdown(models).splitlines()]
    assert rows[0] == ["", "base", "tuned"]
    assert [row[0] for row in rows[2:]] == [
        "right", "nice", "right: a", "right: b", "right: wins over base", "nice: wins over base", "diversity (pixels)",
    ]  # fmt: skip
    assert rows[2][1].startswith("0.500 ± ")
    assert rows[6][1] == "–"
    assert rows[6][2].startswith("0.625 [")
    assert rows[6][2].endswith("(2 / 6 / 0)")
    assert rows[8][1:] == ["0.2", "0.1"]


NOWHERE = torch.full((8,), torch.nan)


@pytest.mark.parametrize("lost", [("base", "tuned"), ("tuned",)])
def test_a_reward_that_scored_nothing_has_no_figure_and_costs_no_other_one(lost, tmp_path):
    base, tuned = ({**own, **({"right": NOWHERE} if name in lost else {})}
                   for name, own in (("base", BASE), ("tuned", BETTER)))  # fmt: skip
    found = {"base": figures(PROMPT, base, TAGS, None, {}), "tuned": figures(PROMPT, tuned, TAGS, base, {})}
    assert found["tuned"].rewards["right"] is None
    assert found["tuned"].rewards["nice"].mean == pytest.approx(0.6)
    assert list(found["tuned"].wins) == ["nice"]
    rows = {line.split(" | ")[0].strip("| "): line for line in to_markdown(found).splitlines()}
    assert rows["right"].endswith("| – |")
    assert rows["right: wins over base"] == "| right: wins over base | – | – |"
    assert ("right: a" in rows) == ("base" not in lost)
    assert json.loads(json.dumps(to_json(found, {}), allow_nan=False))["models"]["tuned"]["rewards"]["right"] is None
    plot_figures(found, tmp_path / "results.png", 2)


def test_the_picture_is_written(models, tmp_path):
    plot_figures(models, tmp_path / "results.png", 2)
    assert (tmp_path / "results.png").stat().st_size > 5000
    plot_figures({"base": models["base"]}, tmp_path / "alone.png", 2)  # no win rates


def test_diversity_by_pixels_and_by_embedding():
    images = torch.zeros(4, 3, 2, 2)
    images[1] = 1
    prompt = torch.tensor([0, 0, 1, 1])
    angles = torch.tensor([0.0, torch.pi / 2, 0.0, torch.pi / 3])
    found = diversity_of(images, prompt, lambda _: torch.stack([angles.cos(), 2 * angles.sin()], 1))
    assert found["pixels"] == pytest.approx(0.5)
    second = 1 - 0.5 / (0.25 + 3) ** 0.5
    assert found["embedding"] == pytest.approx((1 + second) / 2)
    assert diversity_of(images, torch.arange(4)) == {}


def test_embeddings_must_match_and_pair():
    with pytest.raises(ValueError, match="one id per image"):
        embedding_distance(torch.ones(3, 2), torch.zeros(2))
    with pytest.raises(ValueError, match="two images"):
        embedding_distance(torch.ones(2, 2), torch.arange(2))
