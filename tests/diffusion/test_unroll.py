"""Gradients through an unrolled sampling: against literal float64 references, finite differences, and themselves."""

import pytest
import torch
from torch import nn

from diffalign.diffusion.parameterization import add_noise, target, to_x0
from diffalign.diffusion.schedule import flow_levels, vp_levels
from diffalign.diffusion.trajectory import GradientPath, Segment, clean, in_slices, passing, recover, unroll

SHAPE = (3, 2, 4, 4)
STEPS = 5
FLOW = flow_levels(torch.linspace(1, 0, STEPS + 1, dtype=torch.float64) ** 0.8)
VP = vp_levels(torch.linspace(0.999, 0.01, 1000, dtype=torch.float64), [900, 700, 500, 300, 100], 0.999)
LEVELS = {"flow": FLOW, "epsilon": VP, "v": VP}


class Lora(nn.Module):
    """A frozen convolution with a low-rank update, a nonlinearity, and the level: float64."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.w, self.out = (0.3 * torch.randn(2, 2, 3, 3, generator=g, dtype=torch.float64) for _ in range(2))
        self.a = nn.Parameter(0.3 * torch.randn(2, 18, generator=g, dtype=torch.float64))
        self.b = nn.Parameter(0.3 * torch.randn(2, 2, generator=g, dtype=torch.float64))

    def forward(self, x, level, gradient=True):
        weight = self.w + (self.b @ self.a).reshape(2, 2, 3, 3)
        hidden = torch.tanh(nn.functional.conv2d(x, weight, padding=1) + level.time / 1000)
        return nn.functional.conv2d(hidden, self.out, padding=1) + 0.5 * x


def randn(seed, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reward(x):
    """Not linear, so that the value of the reward's input matters."""
    return (torch.sin(x) + 0.1 * x.square()).flatten(1).sum(1)


def gradient(model, value):
    return torch.cat([g.flatten() for g in torch.autograd.grad(value.sum(), [model.a, model.b], retain_graph=True)])


def literal_step(kind, x, output, level, next_level):
    """DDIM, written with x0 and noise."""
    x0 = to_x0(kind, x, output, level)
    noise = (x - level.alpha * x0) / level.sigma
    return next_level.alpha * x0 + next_level.sigma * noise


def last(count, predicted=False, **options):
    first = STEPS - count
    moves = [Segment(i, i + 1) for i in range(first, STEPS)]
    if predicted:
        moves[-1] = Segment(STEPS - 1, None)
    return GradientPath(tuple(moves), **options)


COURSES = {
    "sample, K = 1": last(1),
    "sample, K = 2": last(2),
    "sample, all": last(STEPS),
    "predicted, K = 1": last(1, True),
    "predicted, K = 2": last(2, True),
    "predicted, all": last(STEPS, True),
    "predicted early": GradientPath((Segment(2, None),)),
    "recovered, K = 1": GradientPath((Segment(2, 3),), renoise=True, direct_align=True),
    "recovered, K = 2": GradientPath((Segment(2, 3), Segment(3, 4)), renoise=True, direct_align=True),
    "recovered, all": GradientPath(tuple(Segment(i, i + 1) for i in range(1, STEPS)), renoise=True, direct_align=True),
    "recovered, inverted": GradientPath((Segment(3, 2),), renoise=True, direct_align=True),
    "renoised": GradientPath((Segment(4, 5),), renoise=True),
}
STRAIGHT = {
    "one leap": GradientPath((Segment(2, 5),), straight_through=True),
    "two leaps": GradientPath((Segment(1, 3), Segment(3, 5)), straight_through=True),
    "all": GradientPath(tuple(Segment(i, i + 1) for i in range(STEPS)), straight_through=True),
}


def start_of(path, kind="flow"):
    # Epsilon at pure noise does not determine x0; these levels begin below it.
    return randn(1)


def literal(model, path, levels, kind, start, noise, share=1.0):
    """Unroll a path in plain autograd and return the reward's input."""
    x = levels[path.start].alpha * start + levels[path.start].sigma * noise if path.renoise else start
    for move in path.moves:
        level, end = levels[move.start], clean(levels) if move.end is None else levels[move.end]
        inputs = x if share == 1 else x.detach() + share * (x - x.detach())
        output = model(inputs, level)
        x = literal_step(kind, x, output if move.gradient else output.detach(), level, end)
    return (x - end.sigma * noise) / end.alpha if path.direct_align else x


@pytest.mark.parametrize("kind", LEVELS)
@pytest.mark.parametrize("name", COURSES)
def test_the_gradient_is_that_of_the_unrolled_reference(kind, name):
    model, path, levels = Lora(), COURSES[name], LEVELS[kind]
    start, noise = start_of(path), randn(2)
    found = unroll(model, path, levels, start, parameterization=kind, noise=noise)
    expected = literal(model, path, levels, kind, start, noise)
    torch.testing.assert_close(found.x, expected, rtol=1e-9, atol=1e-11)
    own, theirs = gradient(model, reward(found.x)), gradient(model, reward(expected))
    assert theirs.norm() > 1e-3
    assert (own - theirs).norm() < 1e-8 * theirs.norm()


@pytest.mark.parametrize("name", COURSES)
def test_the_gradient_is_that_of_finite_differences(name):
    model, path = Lora(), COURSES[name]
    start, noise = start_of(path), randn(2)

    def value():
        return reward(unroll(model, path, FLOW, start, parameterization="flow", noise=noise).x).sum()

    own = gradient(model, value())
    numbers, h = [], 1e-5
    with torch.no_grad():
        for parameter in (model.a, model.b):
            for index in range(parameter.numel()):
                kept = parameter.view(-1)[index].item()
                sides = []
                for sign in (1, -1):
                    parameter.view(-1)[index] = kept + sign * h
                    sides.append(value().item())
                parameter.view(-1)[index] = kept
                numbers.append((sides[0] - sides[1]) / (2 * h))
    theirs = torch.tensor(numbers, dtype=torch.float64)
    assert (own - theirs).norm() < 1e-4 * theirs.norm()


@pytest.mark.parametrize("name", STRAIGHT)
def test_straight_through_has_the_true_end_as_value_and_the_gradient_of_its_leaps(name):
    model, path = Lora(), STRAIGHT[name]
    truth = {index: randn(10 + index) for index in range(STEPS + 1)}
    found = unroll(model, path, FLOW, truth[path.start], parameterization="flow", truth=truth)
    assert torch.equal(found.x, truth[STEPS])
    # By hand: d end / d theta is the sum over leaps, the later ones linearised at the true states.
    total, slope = 0.0, None
    x = truth[path.start]
    for move in path.moves:
        x = x.detach() + (0 if slope is None else slope - slope.detach())
        level, end = FLOW[move.start], FLOW[move.end]
        slope = literal_step("flow", x, model(x, level), level, end)
        gap = (slope - truth[move.end]).abs().flatten(1).mean(1).detach()
        torch.testing.assert_close(found.gaps[path.moves.index(move)], gap)
        x = truth[move.end]
    total = (reward_slope(truth[STEPS]) * slope).sum()
    own, theirs = gradient(model, reward(found.x)), gradient(model, total)
    assert theirs.norm() > 1e-3
    assert (own - theirs).norm() < 1e-8 * theirs.norm()


def reward_slope(x):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(reward(x).sum(), x)[0]


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_detached_inputs_leave_out_the_denoisers_own_jacobians(share):
    model = Lora()
    path = last(3, predicted=True, input_grad_scale=share)
    start = start_of(path)
    found = unroll(model, path, FLOW, start, parameterization="flow")
    expected = literal(model, path, FLOW, "flow", start, None, share)
    plain = unroll(model, last(3, predicted=True), FLOW, start, parameterization="flow")
    assert torch.equal(found.x, plain.x)
    own, theirs = gradient(model, reward(found.x)), gradient(model, reward(expected))
    assert (own - theirs).norm() < 1e-8 * theirs.norm()
    assert (own - gradient(model, reward(plain.x))).norm() > 1e-3 * theirs.norm()


def test_detached_inputs_give_the_sum_over_steps_of_the_samplers_own_path():
    """With constant inputs x_N is linear in the outputs: dx_N/dv_i is the length of step i on flow levels."""
    model, path = Lora(), last(3, input_grad_scale=0.0)
    start = start_of(path)
    found = unroll(model, path, FLOW, start, parameterization="flow")
    slope, x, total = reward_slope(found.x), start, 0.0
    for index in range(2, STEPS):
        length = FLOW.sigma[index + 1] - FLOW.sigma[index]
        output = model(x.detach(), FLOW[index])
        total = total + (slope * length * output).sum()
        x = x + length * output.detach()
    own, theirs = gradient(model, reward(found.x)), gradient(model, total)
    assert (own - theirs).norm() < 1e-8 * theirs.norm()


def test_calls_without_a_gradient_are_constants_and_x_keeps_its_path():
    model = Lora()
    moves = (Segment(1, 2), Segment(2, 3, False), Segment(3, 4), Segment(4, 5, False))
    path = GradientPath(moves, input_grad_scale=0.0)
    start = start_of(path)
    asked = []

    def denoise(x, level, recorded):
        asked.append((recorded, torch.is_grad_enabled()))
        return model(x, level)

    found = unroll(denoise, path, FLOW, start, parameterization="flow")
    assert asked == [(True, True), (False, False), (True, True), (False, False)]
    assert len(found.calls) == 2
    expected = literal(model, path, FLOW, "flow", start, None, 0.0)
    own, theirs = gradient(model, reward(found.x)), gradient(model, reward(expected))
    assert (own - theirs).norm() < 1e-8 * theirs.norm()
    assert found.calls[0].output.requires_grad
    assert not found.calls[1].x.requires_grad


@pytest.mark.parametrize("kind", LEVELS)
@pytest.mark.parametrize("index", range(1, STEPS))
def test_direct_align_recovers_x0_exactly_with_the_true_noise(kind, index):
    levels, x0, noise = LEVELS[kind], randn(1), randn(2)
    torch.testing.assert_close(recover(add_noise(x0, noise, levels[index]), noise, levels[index]), x0)
    # And so after a step, if the denoiser is right.
    truth = target(kind, x0, noise, levels[index])
    path = GradientPath((Segment(index, index + 1),), renoise=True, direct_align=True)
    found = unroll(lambda *_: truth, path, levels, x0, parameterization=kind, noise=noise)
    torch.testing.assert_close(found.x, x0, rtol=1e-9, atol=1e-9)


def test_direct_align_is_the_papers_formula_on_flow_levels():
    model, x0, noise = Lora(), randn(1), randn(2)
    path = GradientPath((Segment(2, 3),), renoise=True, direct_align=True)
    found = unroll(model, path, FLOW, x0, parameterization="flow", noise=noise)
    s, t = FLOW.sigma[2], FLOW.sigma[3]
    x = s * noise + (1 - s) * x0
    torch.testing.assert_close(found.x, (x + (t - s) * model(x, FLOW[2]) - t * noise) / (1 - t))


def test_a_step_up_has_the_opposite_slope():
    """d recovered / d output is negative going down and positive going up, which is what makes inversion a penalty."""
    for end, sign in ((3, -1), (1, 1)):
        output = torch.zeros(SHAPE, dtype=torch.float64, requires_grad=True)
        path = GradientPath((Segment(2, end),), renoise=True, direct_align=True)
        found = unroll(lambda *_, o=output: o, path, FLOW, randn(1), parameterization="flow", noise=randn(2))
        slope = torch.autograd.grad(found.x.sum(), output)[0]
        assert (slope * sign > 0).all()
        assert path.inverted == (sign > 0)


@pytest.mark.parametrize("name", COURSES)
def test_checkpointed_and_plain_gradients_are_equal(name):
    model, path = Lora(), COURSES[name]
    start, noise = start_of(path), randn(2)
    found = [
        gradient(
            model,
            reward(unroll(model, path, FLOW, start, parameterization="flow", noise=noise, checkpointed=checkpointed).x),
        )
        for checkpointed in (False, True)
    ]
    assert torch.equal(*found)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_slices_give_the_exact_value_and_gradient(size):
    model, path = Lora(), COURSES["sample, K = 2"]
    weights = torch.tensor([0.5, -2.0, 1.0], dtype=torch.float64)
    x = unroll(model, path, FLOW, start_of(path), parameterization="flow").x
    inputs = []

    def loss(piece, rows):
        inputs.append(rows)
        return (weights[rows] * reward(piece)).sum()

    value = in_slices(loss, x, size)
    whole = (weights * reward(x)).sum()
    torch.testing.assert_close(value, whole, rtol=1e-12, atol=0)
    assert len(inputs) == -(-3 // size)
    own, theirs = gradient(model, value), gradient(model, (weights * reward(x)).sum())
    assert (own - theirs).norm() < 1e-12 * theirs.norm()


def test_a_share_of_the_gradient_changes_no_value():
    x = randn(3).requires_grad_()
    for share in (0.0, 0.25, 1.0):
        passed = passing(x * 1.0, share)
        assert torch.equal(passed, x)
        found = torch.autograd.grad(passed.sum(), x)[0] if passed.requires_grad else torch.zeros(SHAPE)
        assert (found == share).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GradientPath((Segment(0, 1, False), Segment(1, 2))), "the first segment must carry a gradient"),
        (lambda: GradientPath((Segment(0, 1), Segment(2, 3))), "must start where the previous one ended"),
        (lambda: GradientPath((Segment(0, 1),), input_grad_scale=1.5), r"must lie in \[0, 1\]"),
        (lambda: GradientPath((Segment(0, 1),), direct_align=True), "direct_align needs known noise"),
        (
            lambda: unroll(
                Lora(), GradientPath((Segment(0, 1),), renoise=True), FLOW, randn(1), parameterization="flow"
            ),
            "needs noise",
        ),
    ],
)
def test_invalid_gradient_paths_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
