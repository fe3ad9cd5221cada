from diffalign.losses.registry import FORWARD_OBJECTIVES, POLICY_OBJECTIVES, PREFERENCE_LOSSES, REWARD_LOSSES
from diffalign.losses.tables import README, updated
from diffalign.plugins import declared_names


def test_the_readme_holds_the_tables_of_all_losses():
    text = README.read_text(encoding="utf-8")
    assert text == updated(text), "run scripts/build/tables.py"
    for name in (*PREFERENCE_LOSSES, *REWARD_LOSSES, *POLICY_OBJECTIVES, *FORWARD_OBJECTIVES):
        assert f"| `{name}` |" in text


def test_names_are_known_without_importing_the_losses():
    assert declared_names("losses", "preference_loss") == sorted(PREFERENCE_LOSSES)
    assert declared_names("losses", "reward_loss") == sorted(REWARD_LOSSES)
    assert declared_names("losses", "policy_objective") == sorted(POLICY_OBJECTIVES)
    assert declared_names("losses", "forward_objective") == sorted(FORWARD_OBJECTIVES)
