"""Collect the pairs to label: from tables, folders and rollout buffers, or drawn from models on the spot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.commands.label.comparison import Comparison
from diffalign.commands.label.config import BASE_NAME, LabelConfig, is_model
from diffalign.data.config import PreferenceDataConfig
from diffalign.data.formats import FORMATS, detect
from diffalign.data.pairs import Part, open_part
from diffalign.data.tables import Table
from diffalign.data.validation import Quarantine
from diffalign.evaluation.checkpoints import BASE, CheckpointSpec, parse_checkpoints
from diffalign.files import bounded, printable, shorten, some
from diffalign.structures import ImageSource, Pair, Prompt

if TYPE_CHECKING:
    from diffalign.evaluation.scored_images import ScoredImages

Scores = Mapping[str, tuple[float | None, float | None]]


def collect(config: LabelConfig) -> list[Comparison]:
    """Collect the pairs of all sources.

    Raises:
        ValueError: No source, a source without a pair that can be shown, or two sources with pairs of one name.
    """
    models = [text for text in config.models if is_model(text)]
    sources = [text for text in config.models if not is_model(text)]
    if not config.models:
        raise ValueError("name models or pairs: diffalign label base runs/a, or diffalign label pairs.parquet")
    found = [pair for source in sources for pair in read_pairs(source, config)]
    found += draw_pairs(config, models) if models else []
    names = [pair.key for pair in found]
    if len(set(names)) < len(names):
        twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
        raise ValueError(f"pairs come twice, such as {some(twice)}: name each source once")
    return found


def read_pairs(source: str, config: LabelConfig) -> list[Comparison]:
    """Read the pairs of a table, a folder, a rollout buffer or a hub data set; rows without a pair are left out.

    Prints a line per kind of fault. ValueError: no row has a pair, or more than ``data.max_bad_share`` are faulty.
    """
    part = open_pairs_quickly(source, config.data)
    quarantine = Quarantine(config.data.on_fault, config.data.max_bad_share)
    quarantine.notes += part.table.notes
    pairs = [(f"{row}.{index}", row, pair, label) for row, index, pair, label in part.pairs(quarantine)]
    quarantine.enforce()
    if lines := quarantine.lines():
        print(bounded("\n".join([f"{shorten(source)}:", *lines])))
    if not pairs:
        raise ValueError(f"{shorten(source)} holds no pair: diffalign check {shorten(source, 80)} says why")
    scores = score_pairs(source, config) if config.rewards else {}
    name = printable(Path(source))
    return [
        Comparison(
            f"{name}#{key}", pair.prompt, pair.images, _models(part.table, row, pair), scores.get(key, {}), label
        )
        for key, row, pair, label in _limited(pairs, config.limit)
    ]


def open_pairs_quickly(source: str, settings: PreferenceDataConfig) -> Part:
    """Open a source of pairs as ``open_part`` does; a local Parquet file without ``datasets``."""
    path = Path(source)
    if path.suffix.lower() != ".parquet" or not path.is_file():
        return open_part(source, settings)
    from diffalign.data.parquet_rows import parquet_rows

    rows = parquet_rows(path)
    if rows is None:
        return open_part(source, settings)
    if not rows:
        raise ValueError(f"{shorten(source)} holds no row: name a data set with at least one")
    root = settings.image_root or path.parent
    within = None if settings.allow_outside else (root, path.parent)
    table = Table(printable(path), rows, root, settings.mask, within)
    return Part(table, detect(table.columns, settings.format, FORMATS, table.name))


def score_pairs(source: str, config: LabelConfig) -> dict[str, Scores]:
    """Score the pairs of a source with ``config.rewards``; an interrupted or repeated command scores the rest only.

    Returns:
        Key of the pair in its source ("ROW.PLACE") -> reward -> scores of both images.
    """
    from diffalign.commands.relabel import relabel
    from diffalign.commands.relabel_config import RelabelConfig
    from diffalign.data.ai_labels import read_table

    folder = config.folder / "scores"
    file = folder / f"{CheckpointSpec(source.strip('/')).folder_name}.parquet"
    settings = {field.name: getattr(config.data, field.name) for field in fields(PreferenceDataConfig)}
    settings |= {"rewards": config.rewards, "reward_options": config.reward_options or {}, "labels": str(file)}
    settings |= {"allow_reward_code": config.allow_reward_code, "batch_size": config.batch_size or 8}
    rows = read_table(relabel(source, RelabelConfig(**settings)))
    names = [name.removesuffix("/0") for name in rows[0] if name.endswith("/0")]
    return {row["key"]: {name: (row[f"{name}/0"], row[f"{name}/1"]) for name in names} for row in rows}


def draw_pairs(config: LabelConfig, names: Sequence[str]) -> list[Comparison]:
    """Draw the images of models into the output folder, and pair those of equal prompt and noise.

    The images of a single model are paired with each other. Images that are there already are not drawn again.

    Args:
        config: The configuration.
        names: Models, as ``is_model`` knows them; a single one that is not the base is compared with the base.
    """
    from diffalign.commands.evaluate import draw_all
    from diffalign.commands.evaluate_config import ScoringConfig, resolve
    from diffalign.preflight import inspect

    tuned = tuple(name for name in names if name != BASE_NAME)
    scoring = ScoringConfig(**{field.name: getattr(config, field.name) for field in fields(ScoringConfig)})
    scoring = replace(scoring, models=tuned, rewards=config.rewards or ())
    resolved = resolve(scoring, config.folder, images_per_prompt=1 if tuned else 2, scores=False)
    inspect(resolved, weights=True)
    specs = parse_checkpoints(tuned, scales=config.scales, checkpoints=config.checkpoints)
    specs = specs if BASE_NAME in names or len(specs) == 2 else [spec for spec in specs if spec != BASE]
    if len(specs) == 1 and resolved.images_per_prompt < 2:
        raise ValueError(f"one image per prompt of {specs[0].name} makes no pair: write --images_per_prompt 2")
    drawn = draw_all(resolved, specs)
    return [] if drawn is None else list(pair_images(*drawn))


def pair_images(prompts: Sequence[Prompt], drawn: Mapping[str, ScoredImages]) -> Iterator[Comparison]:
    """Pair the images of every two models for equal prompt and sample; of a single model, every two of a prompt."""
    if len(drawn) == 1:
        ((name, own),) = drawn.items()
        for first, second in combinations(range(len(own.files)), 2):
            if own.prompt[first] == own.prompt[second]:
                yield _drawn(prompts, (name, own, first), (name, own, second))
        return
    for (a, ours), (b, theirs) in combinations(drawn.items(), 2):
        for row in range(len(ours.files)):
            yield _drawn(prompts, (a, ours, row), (b, theirs, row))


def _drawn(prompts: Sequence[Prompt], *sides: tuple[str, ScoredImages, int]) -> Comparison:
    (a, ours, first), (b, theirs, second) = sides
    images = (ours.files[first], theirs.files[second])
    scores = {name: (_number(ours.scores[name][first]), _number(theirs.scores[name][second])) for name in ours.scores}
    sources = (ImageSource(str(images[0]), images[0]), ImageSource(str(images[1]), images[1]))
    key = f"{a}|{b}|{images[0].stem}" + ("" if first == second else f"|{images[1].stem}")
    return Comparison(key, prompts[int(ours.prompt[first])], sources, (a, b), scores)


def _number(value: Any) -> float | None:
    return None if value.isnan() else float(value)


def _models(table: Table, row: int, pair: Pair) -> tuple[str, str]:
    """Return the models that Pick-a-Pic's columns name."""
    if not {"model_0", "model_1"} <= set(table.columns):
        return "", ""
    values = table.row(row).values
    first, second = ("" if values[name] is None else str(values[name]) for name in ("model_0", "model_1"))
    return first, second


def _limited(pairs: Sequence[Any], limit: int | None) -> list[Any]:
    count = len(pairs) if limit is None else min(limit, len(pairs))
    return [pairs[number * len(pairs) // count] for number in range(count)]
