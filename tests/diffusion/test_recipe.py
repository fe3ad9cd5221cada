"""Recipes: the published rows, what is drawn from them, and what is refused."""

import math
import random
from dataclasses import fields, replace

import pytest

from diffalign.diffusion.reward_gradient_config import RecipeConfig
from diffalign.diffusion.reward_gradient_presets import PRESETS, Recipe, draw, spaced


def drawn(number=200, seed=0, **options):
    """Every path of many draws."""
    rng = random.Random(seed)
    recipe = RecipeConfig(**options).resolve()
    return recipe, [draw(recipe, iteration, lambda low, high: rng.randrange(low, high)) for iteration in range(number)]


def starts(found):
    return {path.start for paths in found for path in paths}


def test_refl_predicts_x0_from_one_call_in_the_last_ten_of_forty_steps():
    _, found = drawn(preset="refl_script", num_steps=40)
    assert starts(found) == set(range(30, 40))
    for (path,) in found:
        (move,) = path.moves
        assert move.end is None
        assert not path.renoise


def test_the_authors_script_samples_with_noise_and_scales_its_loss():
    """THUDM/ImageReward's ReFL.py: DDPM's steps, and --grad_scale 1e-3 before clip_grad_norm_ at 1."""
    script = RecipeConfig("refl_script").resolve()
    assert (script.eta, script.grad_scale) == (1.0, 1e-3)
    others = [RecipeConfig(name).resolve() for name in PRESETS if name != "refl_script"]
    assert {(recipe.eta, recipe.grad_scale) for recipe in others} == {(0.0, 1.0)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eta": 1.5}, "eta must be at least 0 and at most 1, got 1.5"),
        ({"eta": math.nan}, "eta must be a number"),
        ({"preset": "srpo", "eta": 1.0}, "recovered follows the ODE's own states"),
        ({"preset": "leapalign", "eta": 0.5}, "straight_through follows the ODE's own states"),
        ({"grad_scale": 0.0}, "grad_scale must be more than 0"),
        ({"grad_scale": math.inf}, "grad_scale must be finite"),
    ],
)
def test_noise_and_scale_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        RecipeConfig(**options).resolve()


def test_single_control_words_are_lists_of_one():
    recipe = RecipeConfig(preset="srpo", words=("a", "b")).resolve()
    assert recipe.words == (("a",), ("b",))
    with pytest.raises(ValueError, match="words are a list of wanted ones"):
        replace(recipe, words=("a", "b"))


def test_draft_k_records_the_last_calls_of_the_whole_sampling():
    _, found = drawn(1, preset="draft_k", num_steps=8)
    ((path,),) = found
    assert [(m.start, m.end, m.gradient) for m in path.moves] == [(i, i + 1, True) for i in range(3, 8)]
    _, found = drawn(1, preset="draft_1", num_steps=8)
    assert [(m.start, m.end) for m in found[0][0].moves] == [(7, 8)]


def test_draft_lv_adds_two_noised_copies_of_the_end():
    _, found = drawn(1, preset="draft_lv", num_steps=8)
    own, *copies = found[0]
    assert [path.renoise for path in (own, *copies)] == [False, True, True]
    assert {path.moves for path in copies} == {own.moves}


def test_alignprop_truncates_anywhere():
    _, found = drawn(preset="alignprop", num_steps=8)
    assert {len(path.moves) for (path,) in found} == set(range(1, 9))
    assert all(path.moves[-1].end == 8 for (path,) in found)
    assert {len(c.moves) for (c,) in drawn(preset="alignprop", num_steps=8, truncate=False)[1]} == {8}


def test_drtune_detaches_inputs_and_spaces_its_steps_up_to_an_early_stop():
    _, found = drawn(preset="drtune", num_steps=20)
    stops = {path.moves[-1].start for (path,) in found}
    assert stops == set(range(12, 20))
    recorded = set()
    for (path,) in found:
        one, two, three = (m.start for m in path.moves if m.gradient)
        assert two - one == three - two == (path.moves[-1].start + 1) // 3
        assert path.input_grad_scale == 0
        assert path.moves[-1].end is None
        recorded |= {one, two, three}
    assert recorded == set(range(20))  # each step is taught at times


def test_spaced_calls_have_equal_gaps_and_begin_at_random():
    def both(*given):
        return [list(spaced(*given, draw)) for draw in (lambda low, high: low, lambda low, high: high - 1)]

    assert both(range(10), 3) == [[0, 3, 6], [3, 6, 9]]
    assert both(range(2, 5), 1) == [[2], [4]]
    assert both(range(4), 4) == [[0, 1, 2, 3]] * 2


def test_imagerefl_begins_at_its_images():
    recipe, found = drawn(preset="imagerefl", num_steps=40)
    assert recipe.first == 30
    assert starts(found) == set(range(30, 40))


def test_direct_align_begins_anywhere_and_srpo_turns_every_other_time():
    _, found = drawn(preset="direct_align", num_steps=8, window=(0.0, 1.0))
    assert starts(found) == set(range(8))
    _, found = drawn(preset="srpo", copies=1, num_steps=8, window=(0.0, 1.0), discount=(0.5, 2.5))
    assert [paths[0].inverted for paths in found[:4]] == [False, True, False, True]
    for (path,) in found:
        (move,) = path.moves
        assert path.direct_align
        assert move.end == move.start + (-1 if path.inverted else 1)
        assert move.end >= 1
        assert path.weight == pytest.approx(0.5 + 0.25 * max(move.start, move.end))


def test_srpo_steps_within_the_published_window_and_k_runs_over_it():
    _, found = drawn(preset="srpo", num_steps=50)
    assert all((d.inverted, u.inverted) == (False, True) for d, u in found)
    down = {d.start: d.word_weight for d, _ in found}
    up = {u.start: u.word_weight for _, u in found}
    assert set(down) == set(range(5, 25))
    assert set(up) == set(range(6, 26))  # the same pairs of levels, the other way
    # As if the window's 20 steps were 1000 and k read where the noise is less.
    assert (down[5], down[24]) == pytest.approx((0.1 + 0.15 * 19 / 20, 0.1))
    assert (up[6], up[25]) == pytest.approx((0.3 - 0.29 * 19 / 20, 0.3))
    assert all(path.weight == 1 for paths in found for path in paths)


@pytest.mark.parametrize("copies", [1, 2])
def test_srpo_takes_its_words_in_turn_and_swaps_them_going_up(copies):
    recipe, found = drawn(40, preset="srpo", copies=copies, num_steps=50)
    paths = [path for paths in found for path in paths]
    for turn, (down, up) in enumerate(zip(paths[::2], paths[1::2], strict=True)):
        assert down.words == (recipe.words[0][turn % 4], recipe.words[1][turn % 5])
        assert up.words == down.words[::-1]
    assert drawn(1, preset="draft_1", words=(("a", "b"), ("c",)))[1][0][0].words == ("a", "c")
    assert drawn(1, preset="draft_1")[1][0][0].words is None


def test_reneg_predicts_x0_from_the_last_ten_of_thirty_steps():
    recipe, found = drawn(preset="reneg", num_steps=30)
    assert starts(found) == set(range(20, 30))
    assert (recipe.sees, recipe.guidance, recipe.negative) == ("predicted", "full", True)


def test_leapalign_leaps_twice_to_the_end():
    _, found = drawn(preset="leapalign", num_steps=8)
    pairs = {tuple(m.start for m in path.moves) for (path,) in found}
    assert pairs == {(k, j) for j in range(8) for k in range(j)}
    (path,) = found[0]
    assert path.straight_through
    assert path.states == (path.start, path.moves[0].end, 8)


def test_states_lists_the_states_that_a_path_needs():
    _, ((own, copy, _),) = drawn(1, preset="draft_lv", num_steps=8)
    assert own.states == (7,)
    assert copy.states == ()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("num_steps", [5, 8, 40])
def test_every_preset_draws_paths_within_any_number_of_steps(preset, num_steps):
    recipe, found = drawn(preset=preset, num_steps=num_steps)
    for paths in found:
        for path in paths:
            ends = [m.end for m in path.moves if m.end is not None]
            assert all(recipe.first <= m.start < num_steps for m in path.moves)
            assert all(0 <= end <= num_steps for end in ends)


def test_every_cell_of_a_preset_can_be_overridden():
    recipe = RecipeConfig(preset="drtune", through=0.5, gradient_steps=2, reward_loss="hinge").resolve()
    assert (recipe.through, recipe.gradient_steps, recipe.reward_loss, recipe.choice) == (0.5, 2, "hinge", "spaced")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "reflex"}, "recipe.preset must be one of refl,"),
        ({"sees": "nothing"}, "recipe.sees must be one of sample"),
        ({"guidance": "half"}, "recipe.guidance must be one of off"),
        ({"window": (0.5, 0.5)}, "window is two shares"),
        ({"preset": "draft_k", "num_steps": 4}, r"gradient_steps lies in 0\.\.4"),
        ({"copies": 1}, "copies are of finished samples"),
        ({"choice": "random"}, "random steps go with straight_through"),
        ({"preset": "direct_align", "invert": True}, "need control words"),
        ({"words": (("a",), ())}, "words are a list of wanted ones"),
        ({"gap_floor": 0.1}, "gap_floor goes with straight_through"),
        ({"preset": "imagerefl", "window": (0.2, 0.5)}, "window lies before image_start"),
        ({"preset": "srpo", "num_steps": 2}, "no step of the window can be inverted"),
        ({"preset": "direct_align", "copies": 0}, "recovered needs at least one"),
        ({"preset": "direct_align", "from_images": True}, "images are noised to image_start"),
    ],
)
def test_invalid_recipes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RecipeConfig(**options).resolve()


def test_a_recipe_and_its_configuration_have_the_same_cells():
    assert {field.name for field in fields(Recipe)} == {field.name for field in fields(RecipeConfig)} - {"preset"}
