"""A judge of one's own: files, raters, and how configurations name it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor

from diffalign.config.sections import RewardConfig
from diffalign.rewards import get_reward
from diffalign.rewards.base import RewardUnavailable
from diffalign.rewards.config import build_rewards
from diffalign.rewards.support.judge_files import About, load_backbone, load_tokenizer, merged_state, save_judge
from diffalign.rewards.support.judge_network import JudgeNetwork, preprocess_of, tokenize
from diffalign.rewards.support.judge_raters import NETWORKS
from tests.rewards import tiny_judges

IMAGES = torch.randint(0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0)).float() / 255
PROMPTS = ["a red circle", "two squares", "a red circle", "a blue triangle"]


def scored(path, **options):
    return get_reward("judge", path=str(path), **options)(IMAGES, PROMPTS, [{}] * 4)


@pytest.fixture(scope="module")
def siglip_backbone(tmp_path_factory):
    return tiny_judges.siglip(tmp_path_factory.mktemp("siglip_both"))


@pytest.fixture(params=["clip", "siglip"])
def folder(request, tmp_path):
    backbone = request.getfixturevalue("clip_folder" if request.param == "clip" else "siglip_backbone")
    return tiny_judges.own_judge(tmp_path / "mine", backbone)


@torch.no_grad()
def test_the_folder_is_a_plain_model_of_its_family_with_the_scores_of_the_mean_rater(folder):
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    pictures = [(image.permute(1, 2, 0) * 255).byte().numpy() for image in IMAGES]
    padding = "max_length" if model.config.model_type == "siglip" else True
    inputs = processor(text=PROMPTS, images=pictures, return_tensors="pt", padding=padding, truncation=True)
    if model.config.model_type == "siglip":
        inputs.pop("attention_mask", None)
    logits = model(**inputs).logits_per_image.diag()
    bias = getattr(model, "logit_bias", torch.zeros(()))
    torch.testing.assert_close(scored(folder), logits - bias, rtol=1e-4, atol=1e-4)


def test_each_rater_has_a_score_of_its_own_and_the_mean_rater_lies_at_the_mean_of_their_points(folder):
    every = {name: scored(folder, rater=name) for name in ("ann", "bob", "carl", "mean")}
    assert torch.equal(every["mean"], scored(folder))
    assert not torch.allclose(every["ann"], every["bob"], atol=1e-3)
    # Mean weights of (s, 1-s), (1-s, s) and (1/2, 1/2) are (1/2, 1/2), which are carl's.
    torch.testing.assert_close(every["carl"], every["mean"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", NETWORKS)
@torch.no_grad()
def test_scores_of_the_network_in_training_are_those_of_the_saved_judge_of_each_rater(kind, clip_folder, tmp_path):
    network = NETWORKS[kind](load_backbone(str(clip_folder)), raters=2, prototypes=3, seed=4)
    if kind == "pal_a":  # away from its start
        for parameter in (network.points, *network.latent.parameters()):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    network.rater_logits.copy_(torch.tensor([[1.0, 2.0, -1.0], [0.0, -3.0, 2.0]]))
    save_judge(network, load_tokenizer(str(clip_folder)), tmp_path, About("x", ("a", "b")))
    pixels = preprocess_of(network.backbone.config)(IMAGES, quantize=True)[:, None].expand(-1, 2, -1, -1, -1)
    ids, mask = tokenize(load_tokenizer(str(clip_folder)), network.backbone.config, PROMPTS)
    for row, name in ((0, "a"), (1, "b"), (-1, None)):
        own = network(pixels, ids, mask, rater=torch.full((4,), row))[:, 0]
        torch.testing.assert_close(scored(tmp_path, rater=name), own, rtol=1e-5, atol=1e-5)
    pooled = network(
        network.pool_images(pixels.flatten(0, 1)).unflatten(0, (4, 2)), network.pool_texts(ids, mask), pooled=True
    )
    torch.testing.assert_close(pooled, network(pixels, ids, mask), rtol=1e-6, atol=1e-6)


def test_a_judge_without_training_scores_as_its_backbone(clip_folder, tmp_path):
    network = JudgeNetwork(load_backbone(str(clip_folder)))
    save_judge(network, load_tokenizer(str(clip_folder)), tmp_path, About())
    assert load_file(tmp_path / "model.safetensors").keys() == merged_state(network.backbone).keys()
    options = {"path": str(clip_folder), "tokenizer": str(clip_folder)}
    torch.testing.assert_close(scored(tmp_path), get_reward("pickscore", **options)(IMAGES, PROMPTS, [{}] * 4))


def test_a_path_alone_names_a_judge_in_every_table_of_rewards(judge_folder):
    for entry in (RewardConfig(path=str(judge_folder)), RewardConfig(reward="judge", path=str(judge_folder))):
        assert entry == RewardConfig(reward="judge", options={"path": str(judge_folder)})
    reward = build_rewards({"mine": RewardConfig(path=str(judge_folder), options={"rater": "bob"})})[0]["mine"]
    assert reward.rater == "bob"
    combined = get_reward("combined", rewards={"mine": {"path": str(judge_folder)}, "brightness": 1.0})
    assert combined.rewards["mine"][0].weights.path == str(judge_folder)
    assert RewardConfig(reward="pickscore", path="w").options == {"path": "w"}
    with pytest.raises(ValueError, match=r"path 'a' and options.path: give one"):
        RewardConfig(path="a", options={"path": "b"})


def test_what_holds_no_judge_is_refused_when_the_reward_is_built(judge_folder, clip_folder, tmp_path):
    (tmp_path / "unfinished/checkpoint-3").mkdir(parents=True)
    cases = {
        str(tmp_path / "nowhere"): r"there is no folder .*nowhere.*diffalign train reward",
        "tests/nowhere": r"there is no folder tests/nowhere",
        str(clip_folder): r"holds no judge \(there is no judge.json in it\).*options.path",
        str(tmp_path / "unfinished"): r"has not finished.*--resume_from_checkpoint latest",
    }
    for path, message in cases.items():
        with pytest.raises(ValueError, match=message):
            build_rewards({"mine": RewardConfig(path=path)})
    with pytest.raises(ValueError, match=r"rater 'zoe': .* no such rater; it knows ann, bob, carl"):
        get_reward("judge", path=str(judge_folder), rater="zoe")


@pytest.mark.parametrize("text", ["", "[]", '{"format": 9}', "{", '{"format": 1, "raters": 3}'])
def test_a_damaged_description_is_an_error_with_its_name(text, judge_folder, tmp_path):
    folder = shutil.copytree(judge_folder, tmp_path / "mine")
    (folder / "judge.json").write_text(text)
    with pytest.raises((ValueError, RewardUnavailable), match=r"judge.json describes no judge"):
        scored(folder)


def test_a_judge_of_one_rater_knows_no_names(clip_folder, tmp_path):
    save_judge(JudgeNetwork(load_backbone(str(clip_folder))), load_tokenizer(str(clip_folder)), tmp_path, About())
    assert not (tmp_path / "raters.safetensors").exists()
    assert json.loads((tmp_path / "judge.json").read_text())["raters"] == []
    with pytest.raises(ValueError, match="one judge of all raters"):
        get_reward("judge", path=str(tmp_path), rater="ann")
