"""Rewards that see source and result: similarity, the verifier of edits, and judges."""

import dataclasses
import json
import math
import random

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from diffalign.rewards import get_reward
from diffalign.rewards.editscore import two_scores
from diffalign.rewards.source_similarity import ssim
from diffalign.rewards.support.http_client import RemoteError
from diffalign.rewards.support.reward_server import ScoreRequest
from diffalign.rewards.support.sources import portable, source_images, without_paths
from diffalign.rewards.vlm_judge import Answer
from diffalign.shapes import render
from diffalign.shapes.edits import KINDS, judge_edits, phrase, random_edit, vocabulary, wrong_edit


@pytest.fixture(scope="module")
def drawn():
    rng = random.Random(3)
    return [random_edit(rng) for _ in range(40)]


@pytest.fixture(scope="module")
def metadata(drawn, tmp_path_factory):
    folder, rows = tmp_path_factory.mktemp("sources"), []
    for number, (before, edit, _) in enumerate(drawn):
        path = folder / f"{number}.png"
        to_pil_image(render([before])[0]).save(path)
        rows.append({"image": str(path), "edit": edit})
    return rows


def images(drawn, which):
    return render([scenes[which] for scenes in drawn])


# The verifier -------------------------------------------------------------------------------------------------------


def test_the_edited_scene_is_right_and_the_source_is_not(drawn, metadata):
    prompts = [""] * len(drawn)
    for name in ("shapes_edit", "shapes_edit_strict"):
        reward = get_reward(name)
        scores, extras = reward(images(drawn, 2), prompts, metadata)
        assert torch.equal(scores, torch.ones(len(drawn)))
        assert extras["unedited_difference"].max() < 0.01
        kept, _ = get_reward("shapes_edit_kept")(images(drawn, 2), prompts, metadata)
        torch.testing.assert_close(kept, 1 - extras["unedited_difference"])
        unedited, _ = reward(images(drawn, 0), prompts, metadata)
        assert unedited.max() < 1
    assert {edit["kind"] for _, edit, _ in drawn} == set(KINDS)


def test_a_wrong_edit_is_wrong_and_less_is_a_lower_score(drawn):
    rng = random.Random(0)
    wrong = [wrong_edit(edit, before, rng) for before, edit, _ in drawn]
    verdicts = judge_edits(images(drawn, 0), images(drawn, 2), wrong)
    assert not any(verdict.correct for verdict in verdicts)
    assert all(0 <= verdict.score < 1 for verdict in verdicts)
    blank = judge_edits(images(drawn, 0), torch.ones_like(images(drawn, 0)), [edit for _, edit, _ in drawn])
    assert max(verdict.score for verdict in blank) == 0


def test_objects_that_move_grow_or_appear_are_errors(drawn):
    before, edit, after = next(scenes for scenes in drawn if len(scenes[0]) == 2 and scenes[1]["kind"] == "recolor")
    source, kept = render([before]), next(o for o in after if o in before)
    rest = [o for o in after if o is not kept]
    moved = dataclasses.replace(kept, x=kept.x + (6 if kept.x < 32 else -6))
    grown = dataclasses.replace(kept, radius=kept.radius * 1.6)
    for scene in ([*rest, moved], [*rest, grown], rest):
        verdict = judge_edits(source, render([scene]), [edit])[0]
        assert not verdict.correct
        assert verdict.score < 1


def test_changes_outside_the_edit_are_measured(drawn, metadata):
    result = images(drawn, 2)
    result[:, :, :4] = 0  # a black bar
    _, extras = get_reward("shapes_edit")(result, [""] * len(drawn), metadata)
    assert (extras["unedited_difference"] > 0.03).all()


def test_instructions_have_no_other_words(drawn):
    rng = random.Random(0)
    assert {word for _, edit, _ in drawn for word in phrase(edit, rng).split()} <= set(vocabulary())


@pytest.mark.parametrize("edit", [None, {}, {"kind": "recolor", "class": "circle", "color": "red"}, {"kind": "remove"}])
def test_an_unreadable_edit_is_named(edit, metadata):
    with pytest.raises(ValueError, match=r'cannot read the edit of .make it.: add metadata such as "edit"'):
        get_reward("shapes_edit")(torch.rand(1, 3, 64, 64), ["make it"], [{**metadata[0], "edit": edit}])


# Similarity ---------------------------------------------------------------------------------------------------------


def test_similarity_is_1_for_the_source_and_falls_with_each_change(drawn, metadata):
    reward, source = get_reward("source_similarity"), images(drawn, 0)
    prompts = [""] * len(drawn)
    scores = [reward(source + scale * torch.randn_like(source), prompts, metadata).mean() for scale in (0, 0.02, 0.1)]
    assert scores[0] > 0.999
    assert scores[0] > scores[1] > scores[2]
    assert reward(images(drawn, 2), prompts, metadata).min() > 0.5


def test_similarity_equals_a_plain_computation():
    one, other = torch.rand(2, 1, 3, 24, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    offset = torch.arange(11, dtype=torch.float64) - 5
    total = 0.0
    for channel in range(3):
        for y in range(24):
            for x in range(20):
                rows, columns = torch.arange(max(0, y - 5), min(24, y + 6)), torch.arange(max(0, x - 5), min(20, x + 6))
                weight = torch.exp(-(((rows - y)[:, None] ** 2 + (columns - x)[None] ** 2) / 4.5).double())
                weight /= weight.sum()
                a, b = (image[0, channel][rows][:, columns] for image in (one, other))
                mean, mean_b = (weight * a).sum(), (weight * b).sum()
                var, var_b = (weight * (a - mean) ** 2).sum(), (weight * (b - mean_b) ** 2).sum()
                both = (weight * (a - mean) * (b - mean_b)).sum()
                total += ((2 * mean * mean_b + 1e-4) * (2 * both + 9e-4)) / (
                    (mean**2 + mean_b**2 + 1e-4) * (var + var_b + 9e-4)
                )
    assert len(offset) == 11
    assert ssim(one, other).item() == pytest.approx(float(total) / (3 * 24 * 20), abs=1e-9)


def test_its_gradient_leads_to_the_source(drawn, metadata):
    source = images(drawn, 0)[:4]
    noisy = (source + 0.1 * torch.randn_like(source)).requires_grad_()
    get_reward("source_similarity")(noisy, [""] * 4, metadata[:4]).sum().backward()
    assert ((source - noisy) * noisy.grad).sum() > 0


@pytest.mark.parametrize("name", ["source_similarity", "shapes_edit"])
def test_a_missing_source_is_named(name):
    edit = {"edit": {"kind": "add", "class": "circle", "color": "red"}}
    with pytest.raises(ValueError, match='no source image: add "image": "FILE"'):
        get_reward(name)(torch.rand(1, 3, 16, 16), ["p"], [edit])
    with pytest.raises(ValueError, match=r"source image /none\.png: no such file.*check the path"):
        get_reward(name)(torch.rand(1, 3, 16, 16), ["p"], [{**edit, "image": "/none.png"}])


def test_a_server_gets_the_source_itself(metadata):
    sent = [portable(entry) for entry in metadata[:3]]
    assert json.loads(json.dumps(sent)) == sent
    assert not any("/" in entry["image"][:4] for entry in sent)
    assert torch.equal(source_images(sent, (64, 64)), source_images(metadata[:3], (64, 64)))
    assert portable({"image": "no file", "tag": 1}) == {"image": "no file", "tag": 1}
    # A client names no file of the server: there, only images that were sent are sources.
    assert [without_paths(entry) for entry in sent] == sent
    body = {"reward": "r", "prompts": ["a", "b"], "metadata": [{**metadata[0], "tag": 1}, sent[1]], "images": [0, 0]}
    first, second = ScoreRequest.parse(json.dumps(body).encode()).prompts
    assert first.metadata == {k: v for k, v in body["metadata"][0].items() if k != "image"}
    assert second.metadata == sent[1]


def test_sources_are_fitted_to_the_results(tmp_path):
    Image.new("RGB", (60, 20), "red").save(tmp_path / "wide.png")
    found = source_images([{"image": str(tmp_path / "wide.png")}] * 2, (32, 16))
    assert found.shape == (2, 3, 32, 16)
    assert torch.equal(found[0, :, 0, 0], torch.tensor([1.0, 0.0, 0.0]))


# Judges -------------------------------------------------------------------------------------------------------------


class Judge:
    """Answers in place of an endpoint, and records what it is asked."""

    def __init__(self, monkeypatch, answers):
        self.asked, self.answers = [], answers
        monkeypatch.setattr("diffalign.rewards.vlm_judge.Endpoint.ask", self.ask)
        monkeypatch.setattr(
            "diffalign.rewards.vlm_judge.Endpoint.encode", lambda _, image: round(image.mean().item(), 4)
        )

    def ask(self, text, images, one_word=False):
        self.asked.append((text, list(images)))
        return Answer(self.answers(text), {})


SERVER = {"url": "http://127.0.0.1:1", "model": "judge", "concurrency": 1}


def test_editscore_asks_for_both_images_then_for_the_result(monkeypatch, drawn, metadata):
    def answers(text):
        pair = "[20, 10]" if "Editing instruction" in text else "[25, 16]"
        return f'```json\n{{"reasoning" : "the "red" one\\nis gone", "score" : {pair}}}\n```'

    judge = Judge(monkeypatch, answers)
    scores, extras = get_reward("editscore", **SERVER)(images(drawn, 2)[:2], ["add it", "do {it}"], metadata[:2])
    assert scores.tolist() == pytest.approx([math.sqrt(10 * 16) * 0.4] * 2)
    assert {name: values[0].item() for name, values in extras.items()} == pytest.approx(
        {"prompt_following": 8.0, "consistency": 4.0, "perceptual_quality": 6.4}
    )
    semantic, quality = judge.asked[:2]
    assert len(semantic[1]) == 2
    assert semantic[1][0] == pytest.approx(images(drawn, 0)[0].mean().item(), abs=2e-3)  # the source comes first
    assert semantic[0].rstrip().endswith("Editing instruction: add it")
    assert quality[1] == semantic[1][1:]
    assert any(text.rstrip().endswith("do {it}") for text, _ in judge.asked)


@pytest.mark.parametrize(
    "text", ["", "none", '{"score": [1]}', '{"score": [1, 26]}', '{"score": 3}', '{"score": [-1, 2]}']
)
def test_editscore_takes_no_other_answer(text):
    with pytest.raises(RemoteError, match="the judge said"):
        two_scores(text)


def test_an_answer_without_numbers_costs_its_image(monkeypatch, drawn, metadata):
    Judge(monkeypatch, lambda text: "sorry" if "add it" in text else '{"score": [25, 25]}')
    with pytest.warns(UserWarning, match="the judge said 'sorry'"):
        scores, _ = get_reward("editscore", **SERVER)(images(drawn, 2)[:2], ["add it", "paint it"], metadata[:2])
    assert scores.isnan().tolist() == [True, False]
    assert scores[1] == 10


def test_a_rating_judge_sees_the_source_first(monkeypatch, drawn, metadata):
    judge = Judge(monkeypatch, lambda text: '{"score": 7}')
    reward = get_reward("vlm_rating", source=True, **SERVER)
    assert reward(images(drawn, 2)[:1], ["add it"], metadata[:1]).tolist() == [7.0]
    ((text, seen),) = judge.asked
    assert len(seen) == 2
    assert seen[0] == pytest.approx(images(drawn, 0)[0].mean().item(), abs=2e-3)
    assert 'the edit "add it"' in text
    with pytest.raises(ValueError, match="takes no source"):
        get_reward("vlm_checklist", source=True, **SERVER)
