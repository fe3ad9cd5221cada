"""The configuration of a run folder is untrusted: what it may name."""

import pytest

from diffalign.config.sections import RewardConfig
from diffalign.evaluation.runs import RunConfig


@pytest.mark.parametrize("entry", [
    {"path": "outside"}, {"reward": "judge", "options": {"path": "outside"}},
    {"reward": "pickscore", "path": "outside"}, {"path": "outside", "options": {"rater": "ann"}},
])  # fmt: skip
@pytest.mark.parametrize("name", ["mine", "pickscore"])
def test_a_judge_outside_an_untrusted_run_is_not_used(name, entry, tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "run").mkdir()
    entry = {**entry, **({"path": str(tmp_path / "outside")} if "path" in entry else {})}
    run = RunConfig(tmp_path / "run", {"rewards": {name: entry}})
    with pytest.raises(ValueError, match="not a file inside the run"):
        run.reward_options((name,), typed=False)


def test_a_judge_inside_a_run_is_used_and_its_rater_is_a_choice(tmp_path):
    (tmp_path / "judge").mkdir()
    entry = {"path": str(tmp_path / "judge"), "options": {"rater": "ann"}}
    found = RunConfig(tmp_path, {"rewards": {"mine": entry}}).reward_options(("mine",), typed=False)
    assert found["mine"] == RewardConfig(reward="judge", options={"path": str(tmp_path / "judge"), "rater": "ann"})
