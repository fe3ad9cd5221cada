"""``diffalign eval`` and ``diffalign compare``: the same images, as figures and as pictures to look at."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import PartialState
from tqdm import tqdm

from diffalign.atomic import write_text
from diffalign.commands.evaluate_config import EvaluationConfig, resolve
from diffalign.commands.gallery import Gallery
from diffalign.data.prompts import load_prompts
from diffalign.evaluation.embedding import ImageEmbedder
from diffalign.evaluation.sampling import spread_evenly
from diffalign.evaluation.scored_images import ScoredImages
from diffalign.models import load_model
from diffalign.models.checkpoint_context import check_weights
from diffalign.preflight import inspect
from diffalign.report.grids import Totals, compare_grid
from diffalign.report.html import write_page
from diffalign.report.plots import plot_figures
from diffalign.report.results import Figures, diversity_of, figures, set_line, to_json, to_markdown
from diffalign.rewards.support.probe import try_rewards
from diffalign.runtime.processes import check_world, connect
from diffalign.structures import Prompt

ROWS = 12  # of compare.png; the page shows every prompt


def draw_all(config: EvaluationConfig) -> tuple[list[Prompt], dict[str, ScoredImages]] | None:
    """Draws and scores the images of every model; on processes other than the first, None.

    config: resolved. Prompts are dealt over processes.
    """
    connect()
    state = PartialState()
    check_world(state.num_processes)
    subjects = config.subjects()
    everything = load_prompts(config.prompts)
    places = spread_evenly(len(everything), config.limit)
    prompts = [everything[i] for i in places]
    rewards = config.build_rewards()
    try_rewards(rewards, prompts, config.resolution)
    gallery = Gallery(
        config.output_dir / "images",
        config.sampling(),
        prompts,
        rewards,
        process=state.process_index,
        processes=state.num_processes,
        cache=config.cache_dir,
        allow_partial=config.allow_partial,
        places=places,
    )
    model = load_model(
        config.model,
        revision=config.revision,
        max_sequence_length=config.max_sequence_length,
        resolution=config.resolution,
        embedded_guidance=config.embedded_guidance,
    )
    for subject in subjects:
        check_weights(model, subject.path, allow_partial=config.allow_partial)
    model.to_device(state.device, config.offload)
    total = sum(i % state.num_processes == state.process_index for i in range(len(prompts))) * config.images_per_prompt
    for subject in subjects:
        with tqdm(total=total, desc=subject.name, unit="img", disable=not state.is_main_process) as bar:
            gallery.draw(model, subject, config.batch_size, bar.update)
    state.wait_for_everyone()
    return (prompts, {s.name: gallery.load(s) for s in subjects}) if state.is_main_process else None


def evaluate(config: EvaluationConfig) -> dict[str, Figures] | None:
    """Figures of every model, into ``results.json``, ``results.md`` and ``results.png`` of ``output_dir``."""
    config = resolve(config, Path("runs/eval"), images_per_prompt=2)
    inspect(config, weights=True)
    drawn = draw_all(config)
    if drawn is None:
        return None
    prompts, judged = drawn
    base = next(iter(judged))
    tags = [str(prompts[i].metadata.get("tag", "all")) for i in judged[base].prompt.tolist()]
    embedder = ImageEmbedder(config.embedder, PartialState().device) if config.embedder else None
    found = {
        name: figures(
            own.prompt,
            own.scores,
            tags,
            None if name == base else judged[base].scores,
            diversity_of(own.images(), own.prompt, embedder),
        )
        for name, own in judged.items()
    }
    settings = {"prompts": str(config.prompts), "number_of_prompts": len(prompts), **vars(config.sampling())}
    folder = config.output_dir
    write_text(folder / "results.json", json.dumps(to_json(found, settings), indent=1) + "\n")
    table = f"{set_line(found[base], len(prompts), config.prompts)}\n\n{to_markdown(found)}"
    write_text(folder / "results.md", table + "\n")
    plot_figures(found, folder / "results.png")
    print(table)
    return found


def compare(config: EvaluationConfig) -> Path | None:
    """``compare.png`` and ``compare.html``: rows are prompts, columns models, rewards under each image."""
    config = resolve(config, Path("runs/compare"), images_per_prompt=1)
    inspect(config, weights=True)
    drawn = draw_all(config)
    if drawn is None:
        return None
    prompts, judged = drawn
    page = config.output_dir / "compare.html"
    write_page(page, f"{config.model}: {', '.join(judged)}", prompts, judged)
    rows = spread_evenly(len(prompts), ROWS)
    _grid(config.output_dir / "compare.png", [prompts[i].text for i in rows], rows, judged)
    print(f"{page} and {config.output_dir / 'compare.png'}")
    return page


def _grid(path: Path, texts: list[str], rows: list[int], judged: Mapping[str, ScoredImages]) -> None:
    columns, scores = {}, {}
    for name, found in judged.items():
        chosen = [(found.prompt == row).nonzero()[0].item() for row in rows]
        columns[name] = found.images(chosen)
        scores[name] = {reward: values[torch.tensor(chosen)] for reward, values in found.scores.items()}
    first = next(iter(judged.values()))
    means = {r: {name: own.scores[r].nanmean().item() for name, own in judged.items()} for r in first.scores}
    # All rows, an image each, have one mean: that of these.
    totals = Totals(len(first.prompt), means) if len(first.prompt) > len(rows) else None
    compare_grid(columns, texts, scores, path, totals)
