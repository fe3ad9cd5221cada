"""Evaluations in processes that have no prompt of their own."""

import json

from tests.reliability.forks import finished
from tests.trainers.short_evaluation import evaluated, write


def test_fewer_prompts_than_processes(frozen, tmp_path):
    expected, shown = evaluated(frozen, even=False)
    finished(2, tmp_path, write)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    for even, calls in (("False", 0), ("True", 2)):
        assert first[even] == {"figures": expected, "shown": shown.texts, "calls": 2}
        assert second[even] == {"figures": expected, "shown": [], "calls": calls}
