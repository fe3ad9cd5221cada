"""A file in diffalign/rewards is a reward: it is imported, registered and found without an entry in a list."""

from pathlib import Path

from diffalign import rewards
from diffalign.plugins import declared_names
from diffalign.rewards import base

FOLDER = Path(rewards.__file__).parent
NAMES = [
    "aesthetic",
    "aesthetic_v2.5",
    "brightness",
    "clipscore",
    "combined",
    "deqa",
    "dina_lrm",
    "editscore",
    "evalmuse",
    "f_clipscore",
    "geneval",
    "geneval_graded",
    "hp",
    "hpsv2",
    "hpsv2.1",
    "hpsv3",
    "ict",
    "ict_hp",
    "image_doctor",
    "image_reward",
    "jpeg_compressibility",
    "jpeg_incompressibility",
    "judge",
    "mps",
    "ocr",
    "pickscore",
    "prompt_echo",
    "q_eval_alignment",
    "q_eval_quality",
    "remote",
    "shapes",
    "shapes_correct",
    "shapes_edit",
    "shapes_edit_kept",
    "shapes_edit_strict",
    "shapes_strict",
    "sharpness",
    "soft_tifa",
    "soft_tifa_gm",
    "source_similarity",
    "unified_reward",
    "unified_reward_pairs",
    "unified_reward_think",
    "vision_reward",
    "vlm_checklist",
    "vlm_pairwise",
    "vlm_rating",
    "vqascore",
    "vqascore_qwen2.5",
    "vqascore_qwen3",
    "vqascore_xl",
]


def test_the_rewards_of_the_package():
    assert declared_names("rewards", "register") == NAMES
    assert set(NAMES) <= base.REWARDS.keys()


def test_a_new_file_is_enough(monkeypatch, tmp_path):
    monkeypatch.setattr(base, "REWARDS", dict(base.REWARDS))
    monkeypatch.setattr(rewards, "__path__", [*rewards.__path__, str(tmp_path)])
    (tmp_path / "glow.py").write_text(
        "from diffalign.rewards.base import FunctionReward, RewardCard, register\n"
        "@register('glow', RewardCard('mean of all pixels', 0.1))\n"
        "def glow(name):\n    return FunctionReward(name, lambda i, p, m: i.mean((1, 2, 3)))\n"
    )
    rewards._import_rewards()
    assert base.get_reward("glow").name == "glow"


def test_support_is_not_imported_as_rewards():
    assert list((FOLDER / "support").glob("*.py"))
    assert declared_names("rewards/support", "register") == []
