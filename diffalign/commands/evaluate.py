"""``diffalign eval`` and ``diffalign compare``: sample and score models, and report numbers or image grids."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from diffalign.atomic import write_text
from diffalign.commands.evaluate_config import EvaluationConfig, ResolvedEvaluation, resolve
from diffalign.commands.gallery import Gallery
from diffalign.data.prompts import load_prompts
from diffalign.evaluation.checkpoints import CheckpointSpec
from diffalign.evaluation.sampling import spread_evenly
from diffalign.evaluation.scored_images import ScoredImages
from diffalign.models import load_model
from diffalign.models.checkpoint_context import check_weights
from diffalign.models.load import edits
from diffalign.models.meta_device import model_on_meta
from diffalign.preflight import inspect
from diffalign.report.grids import OverallMeans, compare_grid
from diffalign.report.html import write_page
from diffalign.report.plots import plot_figures
from diffalign.report.results import ModelResults, diversity_of, figures, set_line, to_json, to_markdown
from diffalign.rewards.support.embedding import ImageEmbedder
from diffalign.rewards.support.probe import try_rewards
from diffalign.rewards.support.sources import source_images
from diffalign.runtime.processes import joined
from diffalign.structures import Prompt

GRID_ROWS = 12  # prompts in compare.png; compare.html has all


def draw_all(
    config: ResolvedEvaluation, specs: Sequence[CheckpointSpec] | None = None
) -> tuple[list[Prompt], dict[str, ScoredImages]] | None:
    """Sample and score the images of every model; prompts are split over processes.

    Args:
        config: The evaluation.
        specs: The models; default: the base and those of ``config``.

    Returns:
        The prompts, and model name -> scored images in the order of ``specs`` (by default the base first); None on all
        but the main process.
    """
    state = joined()
    specs = config.checkpoint_specs() if specs is None else specs
    all_prompts = load_prompts(config.prompts)
    prompt_indices = spread_evenly(len(all_prompts), config.limit)
    prompts = [all_prompts[i] for i in prompt_indices]
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
        prompt_indices=prompt_indices,
    )
    model = load_model(
        config.model,
        revision=config.revision,
        max_sequence_length=config.max_sequence_length,
        resolution=config.resolution,
        embedded_guidance=config.embedded_guidance,
    )
    for spec in specs:
        check_weights(model, spec.path, allow_partial=config.allow_partial)
    model.to_device(state.device, config.offload)

    total = sum(i % state.num_processes == state.process_index for i in range(len(prompts))) * config.images_per_prompt
    for spec in specs:
        with tqdm(total=total, desc=spec.name, unit="img", disable=not state.is_main_process) as bar:
            gallery.draw(model, spec, config.batch_size, bar.update)
    state.wait_for_everyone()
    return (prompts, {s.name: gallery.load(s) for s in specs}) if state.is_main_process else None


def evaluate(config: EvaluationConfig) -> dict[str, ModelResults] | None:
    """Write ``results.json``, ``results.md`` and ``results.png`` to ``output_dir``; return model name -> results.

    With ``sizes`` they are those of each size, in a folder such as ``768x1344``, and ``output_dir`` has the tables of
    all; the names returned are those of model and size, e.g. ``base 768x1344``.
    """
    if config.sizes:
        return _evaluate_sizes(config)
    resolved = resolve(config, Path("runs/eval"), images_per_prompt=2)
    inspect(resolved, weights=True)
    drawn = draw_all(resolved)
    if drawn is None:
        return None
    prompts, scored = drawn
    base = next(iter(scored))
    tags = [str(prompts[i].metadata.get("tag", "all")) for i in scored[base].prompt.tolist()]
    embedder = ImageEmbedder(config.embedder, PartialState().device) if config.embedder else None

    results = {
        name: figures(
            own.prompt,
            own.scores,
            tags,
            None if name == base else scored[base].scores,
            diversity_of(own.images(), own.prompt, embedder),
        )
        for name, own in scored.items()
    }

    settings = {"prompts": str(resolved.prompts), "number_of_prompts": len(prompts), **vars(resolved.sampling())}
    folder = resolved.output_dir
    write_text(folder / "results.json", json.dumps(to_json(results, settings), indent=1) + "\n")
    table = f"{set_line(results[base], len(prompts), resolved.prompts)}\n\n{to_markdown(results)}"
    write_text(folder / "results.md", table + "\n")
    plot_figures(results, folder / "results.png", len(prompts))
    print(table)
    return results


def check_sizes(config: EvaluationConfig) -> None:
    """Raise ValueError for a size that the model cannot have, before images of another one are sampled."""
    resolved = resolve(config, Path("runs/eval"), images_per_prompt=1)
    for size in config.sizes:
        model_on_meta(resolved.model, revision=resolved.revision, resolution=size)


def _evaluate_sizes(config: EvaluationConfig) -> dict[str, ModelResults] | None:
    check_sizes(config)
    root, speaks = config.output_dir or Path("runs/eval"), joined().is_main_process
    found: dict[str, ModelResults] = {}
    tables, files = [], {}
    for size, one in config.by_size(root):
        if speaks:
            print(f"\n{size}, height x width:")
        own = evaluate(one)
        if own is not None:
            found |= {f"{name} {size}": results for name, results in own.items()}
            tables.append(f"## {size}\n\n{(root / size / 'results.md').read_text()}")
            files[size] = json.loads((root / size / "results.json").read_text())
    if not files:  # not the main process
        return None
    write_text(root / "results.md", "\n".join(tables))
    write_text(root / "results.json", json.dumps({"sizes": files}, indent=1) + "\n")
    return found


def compare(config: EvaluationConfig) -> Path | None:
    """Write ``compare.png`` and ``compare.html``: a row per prompt, a column per model, rewards below each image.

    With ``sizes`` there is one of each per size, in a folder such as ``768x1344``. Returns the (last) page.
    """
    if config.sizes:
        check_sizes(config)
        return [compare(one) for _, one in config.by_size(config.output_dir or Path("runs/compare"))][-1]
    resolved = resolve(config, Path("runs/compare"), images_per_prompt=1)
    inspect(resolved, weights=True)
    drawn = draw_all(resolved)
    if drawn is None:
        return None
    prompts, scored = drawn
    page = resolved.output_dir / "compare.html"
    shows_sources = edits(resolved.model, resolved.revision)
    write_page(page, f"{resolved.model}: {', '.join(scored)}", prompts, scored, shows_sources)
    rows = spread_evenly(len(prompts), GRID_ROWS)
    _grid(resolved.output_dir / "compare.png", [prompts[i] for i in rows], rows, scored, shows_sources)
    print(f"{page} and {resolved.output_dir / 'compare.png'}")
    return page


def _grid(
    path: Path, prompts: list[Prompt], rows: list[int], scored: Mapping[str, ScoredImages], shows_sources: bool
) -> None:
    columns, scores = {}, {}
    for name, own in scored.items():
        chosen = [int((own.prompt == row).nonzero()[0]) for row in rows]
        columns[name] = own.images(chosen)
        scores[name] = {reward: values[torch.tensor(chosen)] for reward, values in own.scores.items()}

    first = next(iter(scored.values()))
    means = {r: {name: own.scores[r].nanmean().item() for name, own in scored.items()} for r in first.scores}
    # If the grid shows every image, its own means are the overall ones.
    count = len(first.prompt)
    totals = OverallMeans(count, means, count / len(first.prompt.unique())) if count > len(rows) else None
    height, width = next(iter(columns.values())).shape[-2:]
    sources = source_images([prompt.metadata for prompt in prompts], (height, width)) if shows_sources else None
    compare_grid(columns, [prompt.text for prompt in prompts], scores, path, totals, sources)
