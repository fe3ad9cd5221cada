"""Report a benchmark as JSON, Markdown and a picture: the user's models beside published figures."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from diffalign.atomic import replacing, write_text
from diffalign.benchmarks.protocol import Benchmark
from diffalign.benchmarks.published import Published, published
from diffalign.report.markdown import inert
from diffalign.report.plots import COLORS

GREY, OWN = "#c3c9d1", COLORS[1:]  # published figures, and those of the run
NONE = "–"
Bar = tuple[str, float, tuple[float, float] | None, str]  # title, value, interval, colour
MAX_GROUPS = 12  # figures in the second panel


@dataclass(frozen=True)
class ColumnResult:
    """Figures of one model with one guidance scale.

    Attributes:
        figures: Figure -> value.
        model: Base model.
        weights: Tuned weights; None for the base.
        guidance_scale: Scale of classifier-free guidance.
        num_steps: Steps of sampling.
        images: Number of images.
        broken: Image files that could not be read, and are left out.
        failed: Judge -> images about which an answer is missing.
        interval: 95 % interval of the headline figure over prompts.
    """

    figures: dict[str, float]
    model: str
    weights: str | None
    guidance_scale: float
    num_steps: int
    images: int
    broken: list[str]
    failed: dict[str, int]
    interval: tuple[float, float] | None = None


def write_report(
    folder: Path, benchmark: Benchmark, results: Mapping[str, ColumnResult], departures: Sequence[str]
) -> str:
    """Write ``results.json``, ``results.md`` and ``results.png``; return the Markdown.

    Args:
        folder: Output folder.
        benchmark: What was run.
        results: Title -> result.
        departures: What differs from the protocol in this run.
    """
    protocol, others = benchmark.protocol, published(benchmark.name)
    content = {
        "benchmark": benchmark.name,
        "source": protocol.source,
        "comparable": protocol.comparable,
        "departures": list(departures),
        "judges": {name: judge.reward for name, judge in protocol.judges.items()},
        "columns": {title: asdict(result) for title, result in results.items()},
        "published": [asdict(row) for row in others],
    }
    write_text(folder / "results.json", json.dumps(_plain(content), indent=1) + "\n")
    text = "\n".join(_markdown(benchmark, results, others, departures)) + "\n"
    write_text(folder / "results.md", text)
    _plot(folder / "results.png", benchmark, results, others)
    return text


def _plain(value: object) -> object:
    """Replace NaN, which is not JSON, by None."""
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def _markdown(
    benchmark: Benchmark, results: Mapping[str, ColumnResult], others: Sequence[Published], departures: Sequence[str]
) -> Iterator[str]:
    protocol = benchmark.protocol
    yield f"# {protocol.title}"
    yield ""
    yield f"{protocol.source}. {protocol.comparable}"
    if departures:
        yield f"**This run departs from the protocol** ({inert('; '.join(departures))}): compare its columns only."
    yield from _losses(results)
    yield ""
    names = list(dict.fromkeys(name for result in results.values() for name in result.figures))
    yield from _table(
        ["", *results],
        [[name, *(_cell(result, name, protocol.headline) for result in results.values())] for name in names],
    )
    if any(result.interval for result in results.values()):
        yield f"\nIn brackets: a 95 % interval of {inert(protocol.headline)} over prompts (bootstrap)."
    if not others:
        return
    yield ""
    yield "## Published"
    yield ""
    shown = list(dict.fromkeys(name for row in others for name in row.figures))
    yield from _table(
        ["model", *shown, "source"],
        [
            [row.title, *(_number(row.figures.get(name)) for name in shown), f"{row.source}, {row.year}"]
            for row in others
        ],
    )
    if protocol.unread:
        yield f"\nNot measured here: {protocol.unread}."


def _losses(results: Mapping[str, ColumnResult]) -> Iterator[str]:
    for title, result in results.items():
        if result.broken:
            named = f", {Path(result.broken[0]).name} the first" if len(result.broken) > 1 else ""
            lost = f"{len(result.broken)} of {result.images} images"
            yield f"{inert(title)}: {lost} cannot be read and are left out{named}."
        for name, count in result.failed.items():
            yield f"{inert(title)}: judge {inert(name)} gave no answer about {count} of {result.images} images."


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(map(inert, header))} |"
    yield f"| --- |{' ---: |' * (len(header) - 1)}"
    for row in rows:
        yield f"| {' | '.join(map(inert, row))} |"


def _cell(result: ColumnResult, name: str, headline: str) -> str:
    text = _number(result.figures.get(name))
    if name != headline or result.interval is None:
        return text
    return f"{text} ({_number(result.interval[0])} to {_number(result.interval[1])})"


def _number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return NONE
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.3f}"


def _plot(path: Path, benchmark: Benchmark, results: Mapping[str, ColumnResult], others: Sequence[Published]) -> None:
    headline = benchmark.protocol.headline
    known: list[Bar] = [(row.title, row.figures[headline], None, GREY) for row in others if headline in row.figures]
    own: list[Bar] = [
        (title, result.figures.get(headline, math.nan), result.interval, OWN[number % len(OWN)])
        for number, (title, result) in enumerate(results.items())
    ]
    groups = [name for name in next(iter(results.values())).figures if name != headline][:MAX_GROUPS]
    height = max(2.6, 0.6 + 0.26 * max(len(known) + len(own), len(groups) * (len(own) + 1) * 0.7))
    figure = Figure(figsize=(11, height), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _bars(left, f"{benchmark.protocol.title}: {headline} (grey: published)", own + known)
    for number, (_, result) in enumerate(results.items()):
        places = [group * (len(own) + 1) + number for group in range(len(groups))]
        right.barh(places, [result.figures.get(name, math.nan) for name in groups], color=own[number][3])
    right.set_yticks([group * (len(own) + 1) + (len(own) - 1) / 2 for group in range(len(groups))], groups, fontsize=8)
    _style(right, "other figures")
    with replacing(path) as staged:
        figure.savefig(staged, dpi=120)


def _bars(axes: Axes, title: str, rows: Sequence[Bar]) -> None:
    for place, (_, value, interval, color) in enumerate(rows):
        axes.barh(place, value, color=color)
        if interval is not None:
            axes.plot(interval, (place, place), color="#404040", linewidth=1)
    axes.set_yticks(range(len(rows)), [row[0][:48] for row in rows], fontsize=8)
    _style(axes, title)


def _style(axes: Axes, title: str) -> None:
    axes.invert_yaxis()
    axes.set_title(title, fontsize=9, loc="left")
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", color="#e3e3e3", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
