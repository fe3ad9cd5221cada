import pytest
import torch

from diffalign.losses.diffusion_dpo import diffusion_dpo
from diffalign.losses.objective import PairObjective
from diffalign.losses.options import anchor_term, clamp_margin, winner_term
from diffalign.losses.registry import PREFERENCE_LOSSES, get_loss
from diffalign.losses.sdpo import preserve_winner

PAIRED = [name for name, loss in PREFERENCE_LOSSES.items() if loss.paired]


@pytest.mark.parametrize("name", PAIRED)
def test_an_objective_without_options_is_its_loss(make_pair, name):
    pair, loss = make_pair(), get_loss(name)
    given = {} if loss.beta is None else {"beta": loss.beta}
    assert torch.equal(PairObjective(name)(pair), loss.function(pair, **given))
    assert PairObjective(name).needs_reference == loss.reference


def test_an_objective_sums_its_terms(make_pair):
    pair = make_pair()
    objective = PairObjective(
        "dpo", beta=3.0, max_margin=0.1, winner_mu=0.9, winner_weight=0.2, anchor_weight=0.7, options={"smoothing": 0.1}
    )
    label = torch.tensor([1.0, 0.5, 0.9, 0.6])
    for beta in (None, 8.0, torch.tensor(8.0)):
        kept = preserve_winner(clamp_margin(pair, 0.1), mu=0.9)
        dpo = diffusion_dpo(kept, beta=3.0 if beta is None else beta, label=label, smoothing=0.1)
        expected = dpo + 0.2 * winner_term(pair) + 0.7 * anchor_term(pair)
        found = objective(pair, beta=beta, label=label)
        torch.testing.assert_close(found, expected)
        sides = pair.winner.output, pair.loser.output
        for one, other in zip(*(torch.autograd.grad(v.sum(), sides) for v in (found, expected)), strict=True):
            torch.testing.assert_close(one, other)


def test_an_anchor_makes_a_reference_necessary(make_pair):
    objective = PairObjective("cpo", anchor_weight=0.1)
    assert objective.needs_reference
    assert not PairObjective("cpo").needs_reference
    with pytest.raises(ValueError, match="no reference"):
        objective(make_pair(reference=False))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "simpo"}, "unknown preference loss 'simpo'; use one of bco, cpo, spo, d3po, dpo"),
        ({"name": "kto"}, "'kto' learns from single images: use one of cpo, .*orpo$"),
        ({"name": "dro", "beta": 1.0}, "'dro' has no beta: leave it out"),
        ({"name": "dpo", "beta": 0.0}, "beta must be positive, got 0.0: 'dpo' starts well at 2000.0"),
        (
            {"name": "mapo", "max_margin": 1.0},
            "'mapo' has no margin to bound.*use one of dpo, dmpo, hinge, ipo, tailorpo$",
        ),
        ({"name": "linear_dpo", "max_margin": 1.0}, "'linear_dpo' has no margin to bound"),
        ({"name": "dpo", "max_margin": -1.0}, "largest margin must be positive"),
        ({"name": "dpo", "winner_mu": 2.0}, "mu must be in"),
        ({"name": "dpo", "winner_weight": -1.0}, "give 0 or more"),
        ({"name": "dpo", "options": {"alpha": 0.1}}, "'dpo' has no option alpha; its options: label, smoothing"),
        ({"name": "dpo", "options": {"smoothing": 0.7}}, "share of wrong labels"),
        ({"name": "dmpo", "options": {"alpha": 0.0}}, "alpha must be in"),
        ({"name": "linear_dpo", "options": {"eta": 0.5}}, "eta must be in"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused_when_the_objective_is_made(settings, message):
    with pytest.raises(ValueError, match=message):
        PairObjective(**settings)


def test_a_default_beta_is_not_used_for_sums(make_pair):
    pair = make_pair(reduction="sum")
    with pytest.raises(ValueError, match="these are sums: give beta"):
        PairObjective("dpo")(pair)
    assert torch.equal(PairObjective("dpo", beta=0.1)(pair), PairObjective("dpo")(pair, beta=0.1))
    assert PairObjective("dro")(pair).isfinite().all()
