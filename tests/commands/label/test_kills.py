"""Killed at any moment, a sitting loses at most the answer that was under way, and doubles none."""

import pytest

from tests.commands.label.kills import Rater, check, command, forked, sit, write_pairs

PER_FOLDER = 10  # sittings that go on with the answers of those before


@pytest.mark.parametrize(
    ("start", "sittings"), [(forked, 12), pytest.param(command, 200, marks=pytest.mark.slow)], ids=["12", "200"]
)
def test_killed_sittings_lose_at_most_the_answer_under_way(start, sittings, tmp_path):
    pairs, answers = write_pairs(tmp_path), 0
    for number in range(sittings):
        if number % PER_FOLDER == 0:
            raters = [Rater("Ada"), Rater("Bob")]
        folder = tmp_path / str(number // PER_FOLDER)
        sit(start, pairs, folder, raters, number)
        if (folder / "answers.jsonl").exists():
            answers = check(folder, raters)
    assert answers > 0
