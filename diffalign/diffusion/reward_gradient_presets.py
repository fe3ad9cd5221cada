"""Which recipe of direct reward gradients: every published one is a row of a table, and every cell can be overridden.

A recipe says which calls of a sampling carry the gradient and what the reward sees; ``draw`` turns it into courses.
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
    """A point of the grid that the published methods are points of. Shares are of the sampling's steps, in [0, 1].

    sees: "sample", the end of the sampling; "predicted", x0 as predicted where it stops; "recovered", a finished sample
        that was noised, moved one step and freed of the known noise; "straight_through", the end of the sampling with
        the gradient of leaps over it.
    choice: which calls carry a gradient: the "last", evenly "spaced" ones, all shifted at random, or "random" ones
        (those of leaps).
    gradient_steps: how many; 0 for all. truncate: from 1 to so many, at random. window: the shares between which what
        is random is drawn: where the sampling stops, is noised to, or leaps from. through: see ``GradientPath``.
    copies: finished samples that are renoised and denoised: beside the sampling's own end, or, for "recovered", in all.
    invert: every other course goes up, with the control words swapped. discount: weights of a loss at the first and the
        last level of the window, linear between them; a step's is that of its level with less noise.
    from_images: begins at real images, noised to the share ``image_start``, not at noise.
    eta: noise of the sampling up to where its gradient begins, as of DDIM: 0 follows the ODE, 1 is ancestral sampling.
        Recorded calls take steps of the ODE.
    guidance: on the gradient's path: "off", with the negative "detached", or "full". compensate: divides the loss by
        the guidance scale, by which a gradient is otherwise larger.
    reward_loss: a key of ``losses.refl.REWARD_LOSSES``. regulariser, regulariser_weight: "pretraining", the error of
        denoising real images, at random levels or, ``from_images``, where samplings begin; "reference", the squared
        distance of recorded outputs from the reference's.
    grad_scale: factor of the whole loss, and so of the gradient that ``max_grad_norm`` clips; AdamW undoes it.
    words: control words of SRPO, wanted ones and unwanted ones, each taken in turn. word_weight, word_weight_inverted:
        its k, as ``discount``, for steps down and up. gap_floor: LeapAlign's tau, None without its weights. negative:
        whether a negative prompt is trained, not the denoiser.
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
        """ValueError for what is no recipe, or says something that nothing would read."""
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
        """The place of the level at which samplings begin."""
        return math.floor(self.image_start * self.num_steps) if self.from_images else 0

    @property
    def places(self) -> range:
        """The places that the window holds: steps at which a call may be made."""
        low, high = self.window
        return range(
            max(self.first, min(math.floor(low * self.num_steps + 1e-9), self.num_steps - 1)),
            min(self.num_steps, math.ceil(high * self.num_steps - 1e-9)),
        )

    @property
    def raised(self) -> range:
        """The places at which a step up begins: those where one down, within the window, ends with noise left."""
        return range(max(self.places.start, 1) + 1, min(self.places.stop, self.num_steps - 1) + 1)

    def between(self, ends: tuple[float, float], level: int) -> float:
        """What lies at a level, by its place, on the line through ``ends``, those of the window."""
        low, high = ends
        return low + (high - low) * (level - self.places.start) / len(self.places)


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


# The last 10 of 40 steps.
LATE = {"window": (0.75, 1.0)}
# Between the 5th and the 25th of 50 steps, as the code of arXiv 2509.06942 has it.
RECOVERED = {"sees": "recovered", "copies": 1, "window": (0.1, 0.5), "guidance": "off", "reward_loss": "hinge"}
PRESETS: dict[str, dict[str, Any]] = {
    # arXiv 2304.05977, algorithm 1, where the reward has a weight of 1e-3 beside the loss of images. Departure: the
    # loss is 1000 times that, which AdamW undoes and max_grad_norm does not; "grad_scale: 0.001" takes it back.
    "refl": {
        **LATE,
        "guidance": "off",
        "reward_loss": "hinge",
        "regulariser": "pretraining",
        "regulariser_weight": 1000.0,
    },
    # Its authors' ReFL.py, which has the reward alone, and an AdamW with a weight decay of 1e-2 (adam_weight_decay,
    # which no recipe can set). Departures: 1. the script tells the UNet the number of the last step, 30 to 39, for its
    # time, and predicts x0 with the level of the step before; here both are of the step's own level; 2. its timesteps
    # are 975, 950 ... 0, here they are the pipeline's own.
    "refl_script": {**LATE, "eta": 1.0, "guidance": "off", "reward_loss": "hinge", "grad_scale": 1e-3},
    # arXiv 2309.17400. Departure: the gradients of draft_lv are averaged, not added.
    "draft_1": {"sees": "sample"},
    "draft_k": {"sees": "sample", "gradient_steps": 5},
    "draft_lv": {"sees": "sample", "copies": 2},
    # arXiv 2310.03739. Departures: 1. a sampling draws no noise on its way; 2. its loss |r - c|, of an aesthetic score,
    # is "distance"; 3. where the gradient ends is uniform, as in the paper; its code draws from N(42, 5) of 50 steps.
    "alignprop": {"sees": "sample", "gradient_steps": 0, "truncate": True},
    # arXiv 2405.00760: detached inputs, an early stop; its numbers and how its steps are shifted are FlowBP's.
    "drtune": {"choice": "spaced", "gradient_steps": 3, "through": 0.0, "window": (0.6, 1.0)},
    # arXiv 2505.22569. Departures: 1. of a real image's latents the mean, not a draw, is noised; 2. its code multiplies
    # the loss by 1e-3, before the gradient is clipped: recipe.grad_scale.
    "imagerefl": {
        **LATE,
        "guidance": "off",
        "from_images": True,
        "image_start": 0.75,
        "regulariser": "pretraining",
        "regulariser_weight": 0.01,
    },
    # arXiv 2509.06942: its Direct-Align alone, and with relative rewards, which make it SRPO; see ``losses.srpo`` for
    # departures. k is what the code calls a discount; there it runs over the window from little noise to much. With
    # PickScore the code has a threshold of 14, the window (0.1, 0.6), and for k (0.5, 0.1) and (0.01, 0.6).
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
    # arXiv 2604.15311: two leaps, and weights by how far they miss; see ``losses.leapalign`` for its constants.
    "leapalign": {
        "sees": "straight_through",
        "choice": "random",
        "gradient_steps": 2,
        "through": 0.3,
        "reward_loss": "hinge",
        "gap_floor": 0.1,
    },
    # arXiv 2412.19637, its prompt for all images: the last 10 of 30 steps. Its authors published no training code.
    "reneg": {"window": (2 / 3, 1.0), "negative": True},
}


def resolve(preset: str, changes: Mapping[str, Any]) -> Recipe:
    """Return the recipe of a preset with changes. ValueError: an unknown preset, or options that do not go together."""
    _one_of("recipe.preset", preset, tuple(PRESETS))
    return Recipe(**{**PRESETS[preset], **changes})


def draw(recipe: Recipe, iteration: int, integers: Integers) -> tuple[GradientPath, ...]:
    """The courses of one batch of samples: a function of its arguments.

    integers(low, high): a draw from [low, high). iteration: tells whose turn it is to be inverted.
    """
    courses = DRAWS[recipe.sees](recipe, iteration, integers)
    return tuple(
        replace(course, words=_words(recipe, iteration, number, course.inverted))
        for number, course in enumerate(courses)
    )


def _words(recipe: Recipe, iteration: int, number: int, inverted: bool) -> tuple[str, str] | None:
    if recipe.words is None:
        return None
    # A step down and the step up that follows it have the same words.
    turn = (iteration * recipe.copies + number) // 2 if recipe.invert else iteration
    wanted, unwanted = (side[turn % len(side)] for side in recipe.words)
    return (unwanted, wanted) if inverted else (wanted, unwanted)


def _chain(recipe: Recipe, iteration: int, integers: Integers) -> tuple[GradientPath, ...]:
    """The sampling itself, to its end or to where it stops; its last calls, or some of them, carry the gradient."""
    predicted = recipe.sees == "predicted"
    stop = integers(recipe.places.start, recipe.places.stop) if predicted else recipe.num_steps - 1
    calls = range(recipe.first, stop + 1)
    count = recipe.gradient_steps or len(calls)
    count = min(integers(1, count + 1) if recipe.truncate else count, len(calls))
    chosen = spaced(calls, count, integers) if recipe.choice == "spaced" else calls[-count:]
    moves = tuple(
        Segment(place, None if predicted and place == stop else place + 1, place in chosen)
        for place in range(chosen[0], stop + 1)
    )
    course = GradientPath(moves, recipe.through)
    return (course, *(replace(course, renoise=True),) * recipe.copies)


def spaced(calls: range, count: int, integers: Integers) -> range:
    """``count`` of the calls, as far apart as fits everywhere, the first of them at random."""
    stride = len(calls) // count
    first = integers(0, len(calls) - (count - 1) * stride)
    return calls[first::stride][:count]


def _known_noise(recipe: Recipe, iteration: int, integers: Integers) -> tuple[GradientPath, ...]:
    """One step from any level: down, or up where it is inverted, to a level that is not pure noise."""
    found = []
    for number in range(recipe.copies):
        up = recipe.invert and (iteration * recipe.copies + number) % 2 == 1
        among = recipe.raised if up else recipe.places
        place = integers(among.start, among.stop)
        move = Segment(place, place - 1 if up else place + 1)
        low = place if up else place + 1  # of the two levels the one with less noise
        weight = recipe.between(recipe.discount, low)
        k = recipe.between(recipe.word_weight_inverted if up else recipe.word_weight, low)
        found.append(
            GradientPath((move,), recipe.through, renoise=True, direct_align=True, weight=weight, word_weight=k)
        )
    return tuple(found)


def _leaps(recipe: Recipe, iteration: int, integers: Integers) -> tuple[GradientPath, ...]:
    """Random places, and leaps from each to the next, the last one to the end of the sampling."""
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
