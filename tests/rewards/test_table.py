"""The reward table of the README is the one that the cards give."""

from pathlib import Path

import torch

from diffalign import rewards
from diffalign.rewards.base import get_reward
from diffalign.rewards.support.table import reward_table
from tests.rewards.test_registry import NAMES

README = Path(rewards.__file__).parent / "README.md"


def test_the_table_is_up_to_date():
    assert reward_table(NAMES) in README.read_text(), "paste the table of diffalign.rewards.support.table"


def test_the_example_of_a_custom_reward_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(rewards.base, "REWARDS", dict(rewards.base.REWARDS))
    text = README.read_text()
    start = text.index("from diffalign import register")
    (tmp_path / "my_rewards.py").write_text(text[start : text.index("```", start)])
    reward = get_reward(f"{tmp_path}/my_rewards.py:warmth", allow_code=True, strength=2.0)
    image = torch.zeros(1, 3, 4, 4)
    image[:, 0] = 1
    assert reward(image, [""], [{}]).tolist() == [2.0]
