"""Every preference loss against a transcription of its paper's formula, and what must hold for all of them."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffalign.losses.errors import Denoised, DenoisedPair
from diffalign.losses.mapo import RELEASED
from diffalign.losses.preference_metrics import preference_metrics
from diffalign.losses.registry import PREFERENCE_LOSSES, get_loss

PAIRED = [name for name, loss in PREFERENCE_LOSSES.items() if loss.paired]
UNPAIRED = [name for name in PREFERENCE_LOSSES if name not in PAIRED]
LIKED = torch.tensor([True, False, True, False])


def log_sigmoid(x):
    return -math.log(1 + math.exp(-x))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


class Sample:
    """One row of a side in numpy: L, R and the arrays they come from."""

    def __init__(self, side, row):
        self.output, self.target = (getattr(side, n)[row].detach().numpy() for n in ("output", "target"))
        self.L = ((self.output - self.target) ** 2).mean()
        if side.reference is not None:
            self.reference = side.reference[row].numpy()
            self.R = ((self.reference - self.target) ** 2).mean()


def delta(w, x):
    return (w.L - x.L) - (w.R - x.R)


def phi(x):
    return x / (math.exp(x) - 1)


def kl(p, q):
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def dspo(w, x, b, weight):
    pull = weight * b * (1 - sigmoid(-0.5 * b * delta(w, x)))
    return (((w.output - w.target) - pull * (w.output - w.reference)) ** 2).mean()


def clipped(x, c=0.1):
    return math.log(min(max(math.exp(x.R - x.L), 1 - c), 1 + c))


# Name, options, and the loss of winner w and loser x at beta b.
FORMULAS = [
    ("dpo", {}, lambda w, x, b: -log_sigmoid(-0.5 * b * delta(w, x))),
    (
        "dpo",
        {"smoothing": 0.2},
        lambda w, x, b: -0.8 * log_sigmoid(-0.5 * b * delta(w, x)) - 0.2 * log_sigmoid(0.5 * b * delta(w, x)),
    ),
    ("ipo", {}, lambda w, x, b: (-delta(w, x) - 1 / (2 * b)) ** 2),
    ("hinge", {}, lambda w, x, b: max(0, 1 - b * -delta(w, x))),
    ("dmpo", {"alpha": 0.03}, lambda w, x, b: kl(sigmoid(-0.5 * b * delta(w, x)), 0.97)),
    ("dspo", {}, lambda w, x, b: dspo(w, x, b, 1)),
    ("dspo", {"weight": 0.2}, lambda w, x, b: dspo(w, x, b, 0.2)),
    (
        "linear_dpo",
        {"eta": 0.05},
        lambda w, x, b: min(max(0.2 * b * delta(w, x) + 0.5, 0.05), 0.95) * (w.L - x.L),
    ),
    ("mapo", {}, lambda w, x, b: w.L - 1 / b * log_sigmoid(b * phi(w.L) - b * phi(x.L))),
    (
        "mapo",
        {"weight": 0.1, "scale": 0.5},
        lambda w, x, b: w.L - 0.1 * log_sigmoid(b * (phi(0.5 * w.L) - phi(0.5 * x.L))),
    ),
    ("cpo", {}, lambda w, x, b: -log_sigmoid(-0.5 * b * (w.L - x.L)) + w.L),
    ("orpo", {}, lambda w, x, b: w.L - b * log_sigmoid(x.L - w.L)),
    ("dro", {}, lambda w, x, b: w.L - x.L),
    ("spo", {}, lambda w, x, b: -log_sigmoid(b * clipped(w) - b * clipped(x))),
    ("d3po", {"clip": 0.3}, lambda w, x, b: -log_sigmoid(b * clipped(w, 0.3) - b * clipped(x, 0.3))),
    ("tailorpo", {}, lambda w, x, b: -log_sigmoid(-b * delta(w, x))),
]


@pytest.mark.parametrize(("name", "options", "formula"), FORMULAS)
@pytest.mark.parametrize("beta", [0.3, 4.0])
def test_pair_losses_are_their_papers_formulas(make_pair, name, options, formula, beta):
    pair, loss = make_pair(moved=0.5), get_loss(name)
    given = options if loss.beta is None else {"beta": beta, **options}
    expected = [formula(Sample(pair.winner, i), Sample(pair.loser, i), beta) for i in range(4)]
    assert len({round(value, 6) for value in expected}) > 1
    np.testing.assert_allclose(loss.function(pair, **given).detach().numpy(), expected, rtol=1e-11, atol=1e-13)


UNPAIRED_FORMULAS = [
    ("kto", {"kl": torch.tensor(0.2)}, lambda x, s, b: 1 - sigmoid(s * b * (x.R - x.L - 0.2))),
    ("kto", {"kl": torch.tensor(-0.2)}, lambda x, s, b: 1 - sigmoid(s * b * (x.R - x.L))),
    (
        "kto",
        {"kl": torch.tensor(0.0), "utility": "loss_averse", "liked_weight": 0.5, "disliked_weight": 2.0},
        lambda x, s, b: (0.5 if s > 0 else 2) * (1 - log_sigmoid(s * b * (x.R - x.L))),
    ),
    (
        "kto",
        {"kl": torch.tensor(0.0), "utility": "risk_seeking"},
        lambda x, s, b: 1 + log_sigmoid(-s * b * (x.R - x.L)),
    ),
    ("bco", {"shift": 0.3}, lambda x, s, b: -log_sigmoid(s * (b * (x.R - x.L) - 0.3))),
    ("dro_unpaired", {}, lambda x, s, b: -(1 - 2 * (s > 0)) * x.L),
    ("sft", {}, lambda x, s, b: (s > 0) * x.L),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "formula"), UNPAIRED_FORMULAS)
@pytest.mark.parametrize("beta", [0.3, 4.0])
def test_losses_of_single_images_are_their_papers_formulas(make_denoised, name, options, formula, beta):
    denoised, loss = make_denoised(), get_loss(name)
    given = options if loss.beta is None else {"beta": beta, **options}
    expected = [formula(Sample(denoised, i), 1 if LIKED[i] else -1, beta) for i in range(4)]
    found = loss.function(denoised, LIKED, **given)
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-7)


def test_every_loss_has_a_formula():
    assert {name for name, *_ in FORMULAS} == set(PAIRED)
    assert {name for name, *_ in UNPAIRED_FORMULAS} == set(UNPAIRED)


def arguments(loss, **more):
    """What the loss needs at beta 1, and a clip range that holds these pairs."""
    needed = {name: value for name, value in (("shift", 0.0), ("clip", 0.999)) if name in loss.options}
    return ({} if loss.beta is None else {"beta": 1.0}) | needed | more


@pytest.mark.parametrize("name", PAIRED)
def test_descent_lowers_the_winners_error_and_raises_the_losers(learned_pair, name):
    pair, loss = learned_pair(0.02), get_loss(name)
    loss.function(pair, **arguments(loss)).sum().backward()
    for side, sign in ((pair.winner, 1), (pair.loser, -1)):
        assert ((side.output.grad * side.error_gradient * sign).flatten(1).sum(1) > 0).all()


@pytest.mark.parametrize("name", UNPAIRED)
def test_descent_lowers_the_errors_of_liked_images_alone(make_denoised, name):
    denoised, loss = make_denoised(), get_loss(name)
    loss.function(denoised, LIKED, **arguments(loss)).sum().backward()
    assert torch.equal((denoised.output.grad * denoised.error_gradient).flatten(1).sum(1) > 0, LIKED)


@pytest.mark.parametrize("name", PAIRED)
def test_pairs_do_not_mix(make_pair, name):
    pair, loss = make_pair(), get_loss(name)
    loss.function(pair, **arguments(loss))[1].backward()
    for side in (pair.winner, pair.loser):
        assert torch.equal(side.output.grad.flatten(1).any(1), torch.tensor([False, True, False, False]))


@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize("step", [-0.9, 0.0, 0.9])
@pytest.mark.parametrize("scale", [0.0, 1e-5, 1.0, 1e3])
def test_losses_and_gradients_stay_finite_at_huge_margins(learned_pair, name, step, scale):
    pair, loss = learned_pair(step, scale=scale, dtype=torch.float32), get_loss(name)
    settings = [{}] if loss.beta is None else [{"beta": loss.beta}, {"beta": 1e4}]
    settings += [RELEASED] if name == "mapo" else []
    for given in settings:
        value = loss.function(pair, **given)
        gradients = torch.autograd.grad(value.sum(), (pair.winner.output, pair.loser.output))
        assert all(tensor.isfinite().all() for tensor in (value, *gradients))


@pytest.mark.parametrize("name", UNPAIRED)
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e3])
def test_losses_of_single_images_stay_finite(learned_pair, name, scale):
    loss = get_loss(name)
    for side in (learned_pair(0.9, scale=scale, dtype=torch.float32).winner, learned_pair(-0.9, scale=scale).winner):
        value = loss.function(side, LIKED, **arguments(loss) | ({} if loss.beta is None else {"beta": 1e4}))
        (gradient,) = torch.autograd.grad(value.sum(), side.output)
        assert value.isfinite().all()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("name", PAIRED)
def test_half_precision_gives_float32_losses(make_pair, name):
    pair, loss = make_pair(dtype=torch.bfloat16), get_loss(name)
    value = loss.function(pair, **arguments(loss))
    exact = [replace(s, output=s.output.double(), target=s.target.double(), reference=s.reference.double())
             for s in (pair.winner, pair.loser)]  # fmt: skip
    assert value.dtype == torch.float32
    torch.testing.assert_close(
        value.double(), loss.function(DenoisedPair(*exact), **arguments(loss)), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_the_registry_says_truly_whether_a_loss_needs_a_reference(make_pair, name):
    pair, loss = make_pair(reference=False), get_loss(name)
    batch = (pair,) if loss.paired else (pair.winner, LIKED)
    if loss.reference:
        with pytest.raises(ValueError, match="no reference to compare with"):
            loss.function(*batch, **arguments(loss))
    else:
        assert loss.function(*batch, **arguments(loss)).isfinite().all()


@pytest.mark.parametrize("name", PAIRED)
def test_the_registry_says_truly_whether_a_bound_of_the_margin_ends_the_gradient(learned_pair, name):
    pair, loss = learned_pair(), get_loss(name)
    value = loss.function(replace(pair, max_margin=pair.margin.min().item() / 2), **arguments(loss))
    gradients = torch.autograd.grad(value.sum(), (pair.winner.output, pair.loser.output), allow_unused=True)
    assert loss.margin == (not any(g is not None and g.any() for g in gradients))


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_losses_never_synchronise_with_the_device(name):
    """A tensor without data has nothing that could be read: what needs a value on the host raises."""
    x, loss = torch.zeros(4, 3, 4, 4, device="meta"), get_loss(name)
    side = Denoised(x.clone().requires_grad_(), x, x, mask=x[:, :1])
    batch = (DenoisedPair(side, side),) if loss.paired else (side, torch.zeros(4, dtype=torch.bool, device="meta"))
    loss.function(*batch, **arguments(loss)).sum().backward()
    metrics = preference_metrics(DenoisedPair(side, side), beta=torch.zeros((), device="meta"), position=x[:, 0, 0, 0])
    assert all(value.ndim == 0 for value in metrics.values())


def test_an_unknown_loss_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown preference loss 'simpo'; use one of bco, cpo, spo, d3po, dpo"):
        get_loss("simpo")
    assert get_loss("dpo").options == ("label", "smoothing")
    assert get_loss("dro").options == ()
