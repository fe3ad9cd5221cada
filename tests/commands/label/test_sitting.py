"""What raters are shown, and what becomes of their answers."""

import threading
from collections import Counter

import pytest

from diffalign.commands.label.answers import AnswerLog
from diffalign.commands.label.sitting import UnknownPair
from tests.commands.label.world import comparison, sitting_in


def work(sitting, rater, picks, count=None):
    """Answer pairs in turn; returns the tokens."""
    tokens = []
    while (shown := sitting.upcoming(rater)) and (count is None or len(tokens) < count):
        tokens.append(shown[0].token)
        assert sitting.answer(rater, shown[0].token, picks[len(tokens) % len(picks)], 1.0)
    return tokens


def stored(folder):
    with AnswerLog(folder / "answers.jsonl") as log:
        return log.answers()


def test_sides_are_shuffled_by_the_seed_and_answers_name_the_image(tmp_path):
    pairs = [comparison(number) for number in range(200)]
    with sitting_in(tmp_path, pairs) as sitting:
        work(sitting, "Ada", ["left"])
    answers = stored(tmp_path)
    lefts = Counter(answer.left for answer in answers)
    assert min(lefts.values()) > 70
    assert all(answer.choice == ("first", "second")[answer.left] for answer in answers)
    assert all(answer.models == ("base", "tuned") and answer.seconds == 1.0 for answer in answers)
    for seed, same in ((0, True), (1, False)):
        with sitting_in(tmp_path / str(seed), pairs, seed=seed) as other:
            found = {f"pair {number}": other.left("Ada", number) for number in range(200)}
            assert (found == {answer.pair: answer.left for answer in answers}) is same


def test_what_a_rater_gets_tells_nothing_about_the_models(tmp_path):
    pairs = [comparison(number) for number in range(30)]
    with sitting_in(tmp_path, pairs) as sitting, sitting_in(tmp_path / "b", pairs) as other:
        ours, theirs = ({sitting._token("Ada", i) for i in range(30)} for sitting in (sitting, other))
        assert len(ours) == 30
        assert not ours & theirs  # another folder has another key
        assert not any(word in token for token in ours for word in ("base", "tuned", "pair"))


def test_two_raters_at_once_do_not_mix(tmp_path):
    """Eight raters answer by a rule of their own, at the same time; each stored answer follows its rater's rule."""
    pairs = [comparison(number) for number in range(25)]
    names = [f"rater {number}" for number in range(8)]
    rules = {name: ("left", "right", "equal", "bad", "skip")[i % 5] for i, name in enumerate(names)}
    with sitting_in(tmp_path, pairs) as sitting:
        threads = [threading.Thread(target=work, args=(sitting, name, [rules[name]])) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for name in names:
            assert sitting.progress(name) == (25, 25)
    answers = stored(tmp_path)
    assert Counter(answer.rater for answer in answers) == dict.fromkeys(names, 25)
    for answer in answers:
        side = {"left": answer.left, "right": 1 - answer.left}.get(rules[answer.rater])
        assert answer.choice == (rules[answer.rater] if side is None else ("first", "second")[side])


def test_a_token_of_another_rater_is_refused(tmp_path):
    with sitting_in(tmp_path, [comparison(0)]) as sitting:
        (shown,) = sitting.upcoming("Ada")
        sitting.upcoming("Bob")
        with pytest.raises(UnknownPair, match="reload the page"):
            sitting.answer("Bob", shown.token, "left", 1.0)
        assert stored(tmp_path) == []


def test_an_answer_that_is_sent_twice_counts_once(tmp_path):
    with sitting_in(tmp_path, [comparison(0), comparison(1)]) as sitting:
        token = sitting.upcoming("Ada")[0].token
        assert sitting.answer("Ada", token, "left", 1.0)
        assert not sitting.answer("Ada", token, "right", 1.0)
        assert sitting.progress("Ada") == (1, 2)
    assert len(stored(tmp_path)) == 1


def test_a_page_that_was_open_before_a_restart_can_still_answer(tmp_path):
    pairs = [comparison(number) for number in range(5)]
    with sitting_in(tmp_path, pairs) as sitting:
        token, index = sitting.upcoming("Ada")[0].token, sitting.find("Ada", sitting.upcoming("Ada")[0].token)
    with sitting_in(tmp_path, pairs[::-1]) as sitting:  # the same pairs in another order
        assert sitting.answer("Ada", token, "left", 1.0)
    assert stored(tmp_path)[0].pair == f"pair {index}"


def test_undo_shows_the_pair_again(tmp_path):
    pairs = [comparison(number) for number in range(5)]
    with sitting_in(tmp_path, pairs) as sitting:
        tokens = work(sitting, "Ada", ["left"], count=3)
        assert sitting.undo("Ada").token == tokens[2]
        assert sitting.upcoming("Ada")[0].token == tokens[2]
        assert sitting.undo("Ada").token == tokens[1]
        assert sitting.progress("Ada") == (1, 5)
        work(sitting, "Ada", ["right"])
        assert sitting.undo("Bob") is None
    assert len(stored(tmp_path)) == 5


@pytest.mark.parametrize("most", [1, 2])
def test_a_pair_is_shown_to_so_many_raters(tmp_path, most):
    pairs = [comparison(number) for number in range(12)]
    with sitting_in(tmp_path, pairs, raters_per_pair=most) as sitting:
        names = ["Ada", "Bob", "Cleo"]
        while any(sitting.upcoming(name) for name in names):
            for name in names:
                if shown := sitting.upcoming(name):
                    sitting.answer(name, shown[0].token, "left", 1.0)
    counts = Counter(answer.pair for answer in stored(tmp_path))
    assert set(counts.values()) == {most}
    assert len(counts) == 12


@pytest.mark.parametrize(("pick", "seconds"), [("up", 1), ("first", 1), ("left", -1), ("left", float("nan")), ("", 1)])
def test_impossible_answers_are_refused(tmp_path, pick, seconds):
    with sitting_in(tmp_path, [comparison(0)]) as sitting:
        token = sitting.upcoming("Ada")[0].token
        with pytest.raises(ValueError, match="an answer is one of left, right, equal, bad, skip after 0 to"):
            sitting.answer("Ada", token, pick, seconds)


def test_a_prompt_that_changed_is_asked_again(tmp_path):
    with sitting_in(tmp_path, [comparison(0)]) as sitting:
        work(sitting, "Ada", ["left"])
    changed = comparison(0)
    object.__setattr__(changed.prompt, "text", "another")
    with sitting_in(tmp_path, [changed]) as sitting:
        assert sitting.progress("Ada") == (0, 1)
        assert [shown.prompt for shown in sitting.upcoming("Ada")] == ["another"]
