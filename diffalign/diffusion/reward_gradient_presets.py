"""Presets of direct reward gradients: a published method is a row of a table, and every cell can be overridden.

A recipe says which denoiser calls of a trajectory carry the gradient and which image the reward sees; ``draw`` turns it
into gradient paths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from diffalign.diffusion.plan import MAX_STEPS
from diffalign.diffusion.trajectory import GradientPath, Segment

MAX_COPIES = 1000
SEES = ("sample", "predicted", "recovered", "straight_through")
CHOICES = ("last", "spaced", "random")
GUIDANCES = ("off", "detached", "full")
REGULARISERS = ("none", "pretraining", "reference")
Integers = Callable[[int, int], int]


@dataclass(frozen=True)
class Recipe:
    """Options of direct reward gradients; every published method is one combination.

    Positions within a trajectory (``window``, ``image_start``) are fractions of its steps, in [0, 1].

    Attributes:
        num_steps: Sampling steps, from 2 to ``MAX_STEPS``.
        sees: Input of the reward. "sample": the end of the trajectory; "predicted": x0 as predicted at the step where
            sampling stops; "recovered": a finished sample, renoised, moved by one step and freed of the known noise;
            "straight_through": the end of the trajectory, with the gradient of leaps over its steps.
        choice: Calls that carry a gradient: the "last" ones; evenly "spaced" ones with a random offset; or "random"
            ones, which are the starts of leaps.
        gradient_steps: Number of calls with a gradient; 0 for all.
        truncate: Draw the number of calls with a gradient from 1 to ``gradient_steps``.
        window: Range from which random steps are drawn: the step to stop at, to renoise to, or to leap from.
        through: See ``GradientPath.input_grad_scale``.
        copies: Renoised copies of a finished sample: in addition to the sample itself, or, for "recovered", in all.
        invert: Make every other path a step up in noise, with the control words swapped.
        discount: Loss weights at the first and the last level of the window, linear between them; a step has the
            weight of its less noisy level.
        from_images: Start from real images, noised to ``image_start``, instead of noise.
        image_start: Start level of ``from_images``, in [0, 1).
        eta: DDIM noise of the steps before the gradient begins: 0 follows the ODE, 1 is ancestral sampling. Recorded
            calls take steps of the ODE.
        guidance: Guidance of recorded calls: "off", "detached" (a constant negative output), or "full".
        compensate: Divide the loss by the guidance scale, which otherwise multiplies the gradient.
        reward_loss: A key of ``losses.refl.REWARD_LOSSES``.
        regulariser: "pretraining": the denoising error of real images, at random levels or, with ``from_images``, at
            the start level; "reference": the squared distance of recorded outputs from the reference's.
        regulariser_weight: Its weight, 0 or more.
        grad_scale: Factor of the whole loss, and so of the gradient that ``max_grad_norm`` clips; AdamW undoes it.
        words: SRPO's control words, (wanted, unwanted), each used in turn.
        word_weight: SRPO's k for steps down in noise, at both ends of the window, as ``discount``.
        word_weight_inverted: SRPO's k for steps up in noise.
        gap_floor: LeapAlign's tau; None turns its weights off.
        negative: Train a negative prompt instead of the denoiser.
    """

    num_steps: int = 10
    sees: str = "predicted"
    choice: str = "last"
    gradient_steps: int = 1
    truncate: bool = False
    window: tuple[float, float] = (0.0, 1.0)
    through: float = 1.0
    copies: int = 0
    invert: bool = False
    discount: tuple[float, float] = (1.0, 1.0)
    from_images: bool = False
    image_start: float = 0.0
    eta: float = 0.0
    guidance: str = "full"
    compensate: bool = False
    reward_loss: str = "negative"
    regulariser: str = "none"
    regulariser_weight: float = 1.0
    grad_scale: float = 1.0
    words: tuple[tuple[str, ...], tuple[str, ...]] | None = None
    word_weight: tuple[float, float] = (0.0, 0.0)
    word_weight_inverted: tuple[float, float] = (0.0, 0.0)
    gap_floor: float | None = None
    negative: bool = False

    def __post_init__(self) -> None:
        """Check ranges and combinations. Raises ValueError, also for an option that the others leave unused."""
        for name, known in (("sees", SEES), ("choice", CHOICES), ("guidance", GUIDANCES)):
            _one_of(f"recipe.{name}", getattr(self, name), known)
        _one_of("recipe.regulariser", self.regulariser, REGULARISERS)
        low, high = self.window
        for wrong, message in (
            (not 2 <= self.num_steps <= MAX_STEPS, f"num_steps lies in 2..{MAX_STEPS}, got {self.num_steps}"),
            (not 0 <= low < high <= 1, f"window is two shares, the lower first, got {low}, {high}"),
            (not 0 <= self.through <= 1, f"through is a share in [0, 1], got {self.through}"),
            (not 0 <= self.image_start < 1, f"image_start is a share in [0, 1), got {self.image_start}"),
            (not 0 <= self.eta <= 1, f"eta lies in [0, 1], got {self.eta}"),
            (
                self.eta > 0 and self.sees not in ("sample", "predicted"),
                f"{self.sees} follows the ODE's own states: see sample or predicted, or make eta 0",
            ),
            (not 0 < self.grad_scale < math.inf, f"grad_scale must be positive, got {self.grad_scale}"),
            (not 0 <= self.gradient_steps <= self.num_steps, f"gradient_steps lies in 0..{self.num_steps}"),
            (not 0 <= self.copies <= MAX_COPIES, f"copies lies in 0..{MAX_COPIES}, got {self.copies}"),
            (self.regulariser_weight < 0, f"regulariser_weight must be 0 or more, got {self.regulariser_weight}"),
            (self.gap_floor is not None and not self.gap_floor > 0, f"gap_floor must be positive: {self.gap_floor}"),
            (
                self.sees == "predicted" and self.copies > 0,
                "copies are of finished samples: see sample or recovered, or make copies 0",
            ),
            (self.sees == "recovered" and not self.copies, "recovered needs at least one of copies"),
            ((self.choice == "random") != (self.sees == "straight_through"), "random steps go with straight_through"),
            (self.invert and not self.words, "inverted steps need control words to swap: give words"),
            (
                any(isinstance(side, str) or not side for side in self.words or ()),
                "words are a list of wanted ones and one of unwanted ones, at least one each",
            ),
            (self.invert and self.sees != "recovered", "only what sees recovered can be inverted"),
            (self.invert and not self.raised, "no step of the window can be inverted: give num_steps or window more"),
            (self.gap_floor is not None and self.sees != "straight_through", "gap_floor goes with straight_through"),
            (self.from_images and self.image_start >= high, "the window lies before image_start: move one of them"),
            (
                self.from_images and self.sees in ("recovered", "straight_through"),
                "images are noised to image_start: see sample or predicted",
            ),
        ):
            if wrong:
                raise ValueError(f"recipe: {message}")

    @property
    def first(self) -> int:
        """Index of the level at which trajectories start."""
        return math.floor(self.image_start * self.num_steps) if self.from_images else 0

    @property
    def places(self) -> range:
        """Steps inside the window: those whose denoiser call may carry a gradient."""
        low, high = self.window
        return range(
            max(self.first, min(math.floor(low * self.num_steps + 1e-9), self.num_steps - 1)),
            min(self.num_steps, math.ceil(high * self.num_steps - 1e-9)),
        )

    @property
    def raised(self) -> range:
        """Levels from which a step up may start: those that a step down inside the window reaches with noise left."""
        return range(max(self.places.start, 1) + 1, min(self.places.stop, self.num_steps - 1) + 1)

    def between(self, ends: tuple[float, float], level: int) -> float:
        """Interpolate linearly between the values at both ends of the window.

        Args:
            ends: Values at the first and the last level of the window.
            level: Index of the level.
        """
        low, high = ends
        return low + (high - low) * (level - self.places.start) / len(self.places)


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


# ReFL trains on the last 10 of 40 steps.
LATE = {"window": (0.75, 1.0)}
# Steps 5 to 25 of 50, as in the code of arXiv 2509.06942.
RECOVERED = {"sees": "recovered", "copies": 1, "window": (0.1, 0.5), "guidance": "off", "reward_loss": "hinge"}
PRESETS: dict[str, dict[str, Any]] = {
    # arXiv 2304.05977, algorithm 1, which weights the reward by 1e-3 and the image loss by 1. Departure: the loss is
    # 1000 times that, which AdamW undoes and max_grad_norm does not; "grad_scale: 0.001" restores it.
    "refl": {
        **LATE,
        "guidance": "off",
        "reward_loss": "hinge",
        "regulariser": "pretraining",
        "regulariser_weight": 1000.0,
    },
    # The authors' ReFL.py: the reward loss alone, and AdamW with a weight decay of 1e-2 (set adam_weight_decay).
    # Departures: 1. the script passes the step number, 30 to 39, to the UNet as its time, and predicts x0 with the
    # level of the previous step; here both use the step's own level; 2. its timesteps are 975, 950 ... 0, here they are
    # the pipeline's own.
    "refl_script": {**LATE, "eta": 1.0, "guidance": "off", "reward_loss": "hinge", "grad_scale": 1e-3},
    # arXiv 2309.17400. Departure: the gradients of draft_lv are averaged, not added.
    "draft_1": {"sees": "sample"},
    "draft_k": {"sees": "sample", "gradient_steps": 5},
    "draft_lv": {"sees": "sample", "copies": 2},
    # arXiv 2310.03739. Departures: 1. sampling steps draw no noise; 2. its loss |r - c| of an aesthetic score is the
    # reward loss "distance"; 3. the truncation is uniform, as in the paper; its code draws from N(42, 5) of 50 steps.
    "alignprop": {"sees": "sample", "gradient_steps": 0, "truncate": True},
    # arXiv 2405.00760: detached inputs and early stop; the numbers and the random offset are FlowBP's.
    "drtune": {"choice": "spaced", "gradient_steps": 3, "through": 0.0, "window": (0.6, 1.0)},
    # arXiv 2505.22569. Departures: 1. the mean of the VAE posterior of a real image is noised, not a sample; 2. its
    # code multiplies the loss by 1e-3 before the gradient is clipped: recipe.grad_scale.
    "imagerefl": {
        **LATE,
        "guidance": "off",
        "from_images": True,
        "image_start": 0.75,
        "regulariser": "pretraining",
        "regulariser_weight": 0.01,
    },
    # arXiv 2509.06942: Direct-Align alone, and with relative rewards (SRPO); for departures see ``losses.srpo``. The
    # code calls k a discount, and lists it from the low-noise end of the window. For PickScore the code has a threshold
    # of 14, the window (0.1, 0.6), and k of (0.5, 0.1) and (0.01, 0.6).
    "direct_align": RECOVERED,
    "srpo": {
        **RECOVERED,
        "copies": 2,
        "invert": True,
        "words": (
            ("Natural-lighting.", "Detail.", "Detailed.", "Real."),
            ("Concept art.", "Painting.", "Anime.", "Flat.", "Oil."),
        ),
        "word_weight": (0.25, 0.1),
        "word_weight_inverted": (0.01, 0.3),
    },
    # arXiv 2604.15311: two leaps, weighted by their gap to the trajectory; see ``losses.leapalign`` for the constants.
    "leapalign": {
        "sees": "straight_through",
        "choice": "random",
        "gradient_steps": 2,
        "through": 0.3,
        "reward_loss": "hinge",
        "gap_floor": 0.1,
    },
    # arXiv 2412.19637, one negative prompt for all images: the last 10 of 30 steps. No training code was published.
    "reneg": {"window": (2 / 3, 1.0), "negative": True},
}


def resolve(preset: str, changes: Mapping[str, Any]) -> Recipe:
    """Return the recipe of a preset with changes. ValueError: an unknown preset, or options that do not go together."""
    _one_of("recipe.preset", preset, tuple(PRESETS))
    return Recipe(**{**PRESETS[preset], **changes})


def draw(recipe: Recipe, iteration: int, integers: Integers) -> tuple[GradientPath, ...]:
    """Draw the gradient paths of one batch of samples; a function of its arguments.

    Args:
        recipe: The recipe.
        iteration: From 0; decides which paths are inverted and which control words are used.
        integers: ``integers(low, high)`` draws from [low, high).
    """
    paths = DRAWS[recipe.sees](recipe, iteration, integers)
    return tuple(
        replace(path, words=_words(recipe, iteration, number, path.inverted)) for number, path in enumerate(paths)
    )


def _words(recipe: Recipe, iteration: int, number: int, inverted: bool) -> tuple[str, str] | None:
    if recipe.words is None:
        return None
    # A step down and the next step up share their words.
    turn = (iteration * recipe.copies + number) // 2 if recipe.invert else iteration
    wanted, unwanted = (side[turn % len(side)] for side in recipe.words)
    return (unwanted, wanted) if inverted else (wanted, unwanted)


def _chain(recipe: Recipe, iteration: int, integers: Integers) -> tuple[GradientPath, ...]:
    """Unroll the trajectory to its end or a random stop; the last or evenly spaced calls carry the gradient."""
    predicted = recipe.sees == "predicted"
    stop = integers(recipe.places.start, recipe.places.stop) if predicted else recipe.num_steps - 1
    calls = range(recipe.first, stop + 1)
    count = recipe.gradient_steps or len(calls)
    count = min(integers(1, count + 1) if recipe.truncate else count, len(calls))
    chosen = spaced(calls, count, integers) if recipe.choice == "spaced" else calls[-count:]
    moves = tuple(
        Segment(step, None if predicted and step == stop else step + 1, step in chosen)
        for step in range(chosen[0], stop + 1)
    )
    path = GradientPath(moves, recipe.through)
    return (path, *(replace(path, renoise=True),) * recipe.copies)


def spaced(calls: range, count: int, integers: Integers) -> range:
    """Select ``count`` calls at the largest stride that fits, from a random first one."""
    stride = len(calls) // count
    first = integers(0, len(calls) - (count - 1) * stride)
    return calls[first::stride][:count]


def _known_noise(recipe: Recipe, iteration: int, integers: Integers) -> tuple[GradientPath, ...]:
    """Draw one step from a random level: down in noise or, if inverted, up to a level that is not pure noise."""
    found = []
    for number in range(recipe.copies):
        up = recipe.invert and (iteration * recipe.copies + number) % 2 == 1
        among = recipe.raised if up else recipe.places
        step = integers(among.start, among.stop)
        move = Segment(step, step - 1 if up else step + 1)
        low = step if up else step + 1  # the less noisy level
        weight = recipe.between(recipe.discount, low)
        k = recipe.between(recipe.word_weight_inverted if up else recipe.word_weight, low)
        found.append(
            GradientPath((move,), recipe.through, renoise=True, direct_align=True, weight=weight, word_weight=k)
        )
    return tuple(found)


def _leaps(recipe: Recipe, iteration: int, integers: Integers) -> tuple[GradientPath, ...]:
    """Draw random steps and leap from each to the next, from the last one to the end of the trajectory."""
    left = list(recipe.places)
    count = min(recipe.gradient_steps or len(left), len(left))
    chosen = sorted(left.pop(integers(0, len(left))) for _ in range(count))
    ends = [*chosen[1:], recipe.num_steps]
    moves = tuple(Segment(start, end) for start, end in zip(chosen, ends, strict=True))
    return (GradientPath(moves, recipe.through, straight_through=True),)


DRAWS: dict[str, Callable[[Recipe, int, Integers], tuple[GradientPath, ...]]] = {
    "sample": _chain,
    "predicted": _chain,
    "recovered": _known_noise,
    "straight_through": _leaps,
}
