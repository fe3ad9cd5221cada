"""Collect the pairs to label: from tables, folders and rollout buffers, or drawn from models on the spot."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.commands.label.comparison import Comparison, Scores
from diffalign.commands.label.config import LabelConfig
from diffalign.commands.label.kinds import BASE_NAME, Kind, kind_of
from diffalign.commands.label.pictures import pair_folders
from diffalign.commands.label.rollouts import Line, buffer_rows, read_buffer, scores_of, stored_rewards
from diffalign.data.config import PreferenceDataConfig
from diffalign.data.formats import LABELLESS, detect
from diffalign.data.pairs import Part, open_part
from diffalign.data.tables import Table
from diffalign.data.validation import Quarantine
from diffalign.evaluation.checkpoints import BASE, CheckpointSpec, parse_checkpoints
from diffalign.files import bounded, printable, shorten, some
from diffalign.remote import address, local, mapped
from diffalign.structures import ImageSource, Pair, Prompt

if TYPE_CHECKING:
    from diffalign.evaluation.scored_images import ScoredImages


def collect(config: LabelConfig) -> list[Comparison]:
    """Collect the pairs of all sources.

    Raises:
        ValueError: No source, one that is named twice, or one without a pair that can be shown.
    """
    if not config.models:
        raise ValueError("name models or pairs: diffalign label base runs/a, or diffalign label pairs.parquet")
    texts: dict[Kind, list[str]] = {"pairs": [], "pictures": [], "model": []}
    for text in config.models:
        texts[kind_of(text)].append(text)
    found = [pair for name, source in named(texts["pairs"]).items() for pair in read_pairs(source, config, name)]
    if texts["pictures"]:
        pictures = _limited(pair_folders(texts["pictures"], config.data, config.prompts), config.limit)
        found += score_pictures(pictures, config) if config.rewards else pictures
    return found + (draw_pairs(config, texts["model"]) if texts["model"] else [])


def named(sources: Sequence[str]) -> dict[str, str]:
    """Name each source by the last part of its path, which stays when folders are moved; by all of it if two share it.

    ValueError: a source is named twice.
    """
    paths = {source: Path(source).resolve() if Path(source).exists() else Path(source) for source in sources}
    if len(set(paths.values())) < len(sources):
        raise ValueError(f"a source is named twice among {some(sources, 10)}: name each once")
    counts = Counter(path.name for path in paths.values())
    return {printable(path if counts[path.name] > 1 else path.name): source for source, path in paths.items()}


def read_pairs(source: str, config: LabelConfig, name: str) -> list[Comparison]:
    """Read the pairs of a table, a folder, a rollout buffer or a hub data set; rows without a pair are left out.

    Pairs need no label. Their keys start with ``name``. Prints a line per kind of fault.

    Raises:
        ValueError: No row has a pair, or more than ``data.max_bad_share`` are faulty.
    """
    source = source if address(source) is None else str(local(source))
    buffer = read_buffer(Path(source))
    part = open_pairs_quickly(source, config.data, buffer)
    quarantine = Quarantine(config.data.on_fault, config.data.max_bad_share)
    quarantine.notes += part.table.notes
    found = [(f"{row}.{index}", row, pair, label) for row, index, pair, label in part.pairs(quarantine)]
    quarantine.enforce()
    if lines := quarantine.lines():
        print(bounded("\n".join([f"{shorten(source)}:", *lines])))
    if not found:
        raise ValueError(f"{shorten(source)} holds no pair: diffalign check {shorten(source, 80)} says why")
    scores = score_pairs(source, config) if config.rewards and buffer is None else {}
    stored = stored_rewards(buffer or (), Path(source))
    made = [
        Comparison(
            key=f"{name}#{key}",
            prompt=pair.prompt,
            images=pair.images,
            models=_models(part.table, row, pair),
            scores={**scores_of(pair, stored), **scores.get(key, {})},
            label=label,
        )
        for key, row, pair, label in _limited(found, config.limit)
    ]
    return score_pictures(made, config) if config.rewards and buffer is not None else made


def open_pairs_quickly(source: str, settings: PreferenceDataConfig, buffer: Sequence[Line] | None = None) -> Part:
    """Open a source of pairs as ``open_part`` does; a Parquet file without ``datasets``, a buffer by its lines."""
    path = Path(source)
    if buffer is not None:
        paired = buffer_rows(buffer, settings, path)
        inside = None if settings.allow_outside else (path,)
        return Part(Table(printable(path), paired, path, within=inside), LABELLESS["pairs"])
    if path.suffix.lower() != ".parquet" or not path.is_file():
        return open_part(source, settings, LABELLESS)
    from diffalign.data.parquet_rows import parquet_rows

    rows = parquet_rows(path)
    if rows is None:
        return open_part(source, settings, LABELLESS)
    if not rows:
        raise ValueError(f"{shorten(source)} holds no row: name a data set with at least one")
    root = path.parent if settings.image_root is None else mapped(settings.image_root)
    within = None if settings.allow_outside else (root, path.parent)
    table = Table(printable(path), rows, root, settings.mask, within, sources=settings.source)
    return Part(table, detect(table.columns, settings.format, LABELLESS, table.name))


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
    rows = read_table(relabel(source, RelabelConfig(**settings), LABELLESS))
    names = [name.removesuffix("/0") for name in rows[0] if name.endswith("/0")]
    return {row["key"]: {name: (row[f"{name}/0"], row[f"{name}/1"]) for name in names} for row in rows}


def score_pictures(pairs: Sequence[Comparison], config: LabelConfig) -> list[Comparison]:
    """Score image files with ``config.rewards``, each once; other scores of a pair stay."""
    from diffalign.commands.score import score_images
    from diffalign.rewards.config import build_rewards

    options = config.reward_options or {}
    table = {name: options.get(name, 1.0) for name in config.rewards or ()}
    rewards = build_rewards(table, config.allow_reward_code)[0]
    asked = {(image.name, pair.prompt.text): (image, pair.prompt) for pair in pairs for image in pair.images}
    images, prompts = zip(*asked.values(), strict=True)
    found = score_images(
        [image.content for image in images],
        [prompt.text for prompt in prompts],
        rewards,
        [prompt.metadata for prompt in prompts],
        config.batch_size or 16,
    )
    rows = {key: row for row, key in enumerate(asked)}

    def scored(pair: Comparison, reward: str) -> tuple[float | None, float | None]:
        first, second = (_number(found[reward][rows[image.name, pair.prompt.text]]) for image in pair.images)
        return first, second

    return [replace(pair, scores={**pair.scores, **{n: scored(pair, n) for n in rewards}}) for pair in pairs]


def draw_pairs(config: LabelConfig, names: Sequence[str]) -> list[Comparison]:
    """Draw the images of models into the output folder, and pair those of equal prompt and noise.

    The images of a single model are paired with each other. Images that are there already are not drawn again.

    Args:
        config: The configuration.
        names: Models; a single one that is not the base is compared with the base.
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
