"""Generate sets of prompts: objects in GenEval's format, words to render, animals.

A prompt belongs to "train" or "test" by its own digest, so that no seed or limit lets the two overlap. ``geneval``
leaves out GenEval's 553 test prompts (``geneval_test.txt`` holds their digests), and with them every prompt that asks
for the same scene with the two objects in the other order. Since all 80 prompts of its single_object task are among
the 553, that task is worded differently here.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

Drawn = tuple[str, dict[str, Any]]
Draw = Callable[[random.Random], Drawn]


def _words(listed: str) -> list[str]:
    return listed.split(", ")


SIZES = {"train": 5000, "test": 500}  # prompts of a set, unless it has fewer
TRIES = 200  # draws for each prompt before a set counts as exhausted
CLASSES = _words(  # COCO's classes, by GenEval's names
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, "
    "parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, "
    "handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, "
    "surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, "
    "broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, "
    "computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, "
    "clock, vase, scissors, teddy bear, hair drier, toothbrush"
)
THINGS = CLASSES[1:]  # no colours of persons
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
SINGLE = ("a picture of", "an image of", "a photograph of", "a snapshot of", "a close-up photo of", "a clear photo of")
ANIMALS = _words(
    "cat, dog, horse, monkey, rabbit, zebra, spider, bird, sheep, deer, cow, goat, lion, tiger, bear, raccoon, fox, "
    "wolf, lizard, beetle, ant, butterfly, fish, shark, whale, dolphin, squirrel, mouse, rat, snake, turtle, frog, "
    "chicken, duck, goose, bee, pig, turkey, fly, llama, camel, bat, gorilla, hedgehog, kangaroo"
)
ACTIVITIES = ("", " washing the dishes", " riding a bike", " playing chess")
PLACES = (
    "a neon sign above a bar that reads {}",
    "a shop window with the words {} in gold letters",
    "a handwritten note on a fridge that says {}",
    "a road sign in the desert that says {}",
    "a birthday cake with {} written in icing",
    "a chalkboard in a café with {} in white chalk",
    "a book cover with the title {}",
    "a film poster with the title {}",
    "a t-shirt printed with {}",
    "a coffee mug that says {}",
    "graffiti on a brick wall that spells {}",
    "a billboard along a motorway that reads {}",
    "a wooden sign at a trailhead that says {}",
    "a newspaper with the headline {}",
    "a robot holding a card that says {}",
    "a banner behind an aeroplane that reads {}",
)
OPENINGS = _words(
    "welcome, open, fresh, happy, last, hidden, quiet, golden, wild, free, lost, new, secret, bright, slow"
)
NOUNS = _words("coffee, garden, summer, market, river, music, bread, station, ocean, library, mountain, night, winter")
ENDINGS = _words(", today, club, for all, ahead, since 1984, festival, street, no. 7, and more, only")


def generate(name: str, split: str, seed: int) -> Iterator[Drawn]:
    """Yield (text, metadata) of a set's prompts, all different; the same ones for the same arguments."""
    draw, rng, seen = SETS[name], random.Random(seed), set[str]()
    for _ in range(SIZES[split]):
        for text, metadata in (draw(rng) for _ in range(TRIES)):
            if text and text not in seen and held_out(text) == (split == "test"):
                seen.add(text)
                yield text, metadata
                break
        else:
            return


def held_out(text: str) -> bool:
    """Return whether a text belongs to the tenth that is held out.

    The order of words does not count, so that a scene stays on one side whichever of its objects is named first.
    """
    words = sorted(text.replace("right of", "left of").replace("above", "below").split())
    return int.from_bytes(blake2b(" ".join(words).encode(), digest_size=8).digest(), "big") % 10 == 0


@cache
def official() -> frozenset[str]:
    """Return the digests of GenEval's 553 test prompts (github.com/djghosh13/geneval, MIT)."""
    return frozenset((Path(__file__).parent / "geneval_test.txt").read_text(encoding="ascii").split())


def is_official(text: str) -> bool:
    """Return whether a text is one of GenEval's test prompts."""
    return blake2b(text.encode(), digest_size=4).hexdigest() in official()


def _a(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _counted(name: str, count: int) -> str:
    return f"{NUMBERS[count]} {name}{'es' if name.endswith('s') else 's'}"


def _entry(name: str, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": name, "count": count, **more}


def _single(rng: random.Random) -> Drawn:
    name = rng.choice(CLASSES)
    return f"{rng.choice(SINGLE)} {_a(name)}", {"tag": "single_object", "include": [_entry(name)]}


def _two(rng: random.Random) -> Drawn:
    a, b = rng.sample(CLASSES, 2)
    return _unofficial(
        "two_object", f"a photo of {_a(a)} and {_a(b)}", [_entry(a), _entry(b)], f"a photo of {_a(b)} and {_a(a)}"
    )


def _number(most: int) -> Draw:
    def draw(rng: random.Random) -> Drawn:
        name, count = rng.choice(CLASSES), rng.randint(2, most)
        text, found = _unofficial("counting", f"a photo of {_counted(name, count)}", [_entry(name, count)])
        return text, {**found, "exclude": [_entry(name, count + 1)]} if found else found

    return draw


def _color(rng: random.Random) -> Drawn:
    name, color = rng.choice(THINGS), rng.choice(COLORS)
    return _unofficial("colors", f"a photo of {_a(color)} {name}", [_entry(name, color=color)])


def _position(rng: random.Random) -> Drawn:
    (a, b), relation = rng.sample(CLASSES, 2), rng.choice(list(OPPOSITE))
    return _unofficial(
        "position",
        f"a photo of {_a(a)} {relation} {_a(b)}",
        [_entry(b), _entry(a, position=[relation, 0])],
        f"a photo of {_a(b)} {OPPOSITE[relation]} {_a(a)}",
    )


def _two_colors(rng: random.Random) -> Drawn:
    names, colors = rng.sample(THINGS, 2), rng.sample(COLORS, 2)
    first, second = (f"{_a(color)} {name}" for name, color in zip(names, colors, strict=True))
    include = [_entry(name, color=color) for name, color in zip(names, colors, strict=True)]
    return _unofficial("color_attr", f"a photo of {first} and {second}", include, f"a photo of {second} and {first}")


def _unofficial(tag: str, text: str, include: list[dict[str, Any]], mirrored: str = "") -> Drawn:
    """Return a prompt with its specification; an empty one if GenEval tests it, also in the other order."""
    return (text, {"tag": tag, "include": include}) if not (is_official(text) or is_official(mirrored)) else ("", {})


def _mixed(*shares: tuple[int, Draw]) -> Draw:
    draws, weights = [draw for _, draw in shares], [share for share, _ in shares]
    return lambda rng: rng.choices(draws, weights)[0](rng)


def _word(rng: random.Random) -> Drawn:
    words = " ".join(filter(None, (rng.choice(OPENINGS), rng.choice(NOUNS), rng.choice(ENDINGS))))
    words = rng.choice((words.upper(), words.title(), words.capitalize()))
    return rng.choice(PLACES).format(f'"{words}"'), {"text": words}


def _animal(rng: random.Random) -> Drawn:
    return f"{_a(rng.choice(ANIMALS))}{rng.choice(ACTIVITIES)}", {}


SETS: dict[str, Draw] = {
    "geneval": _mixed((7, _position), (5, _number(4)), (3, _two), (1, _color), (1, _two_colors), (1, _single)),
    "counting": _number(6),
    "spatial": _position,
    "ocr": _word,
    "animals": _animal,
}
