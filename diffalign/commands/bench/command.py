"""``diffalign bench``: sample, judge and aggregate a benchmark, beside published figures."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from diffalign.benchmarks.bootstrap import interval
from diffalign.benchmarks.protocol import Benchmark, find_benchmark
from diffalign.commands.bench.columns import Column, columns
from diffalign.commands.bench.config import BenchConfig
from diffalign.commands.bench.judging import Asked, ask, broken_images, build_judges, chosen_judges, collect
from diffalign.commands.bench.official import write_official
from diffalign.commands.gallery import Gallery
from diffalign.data.validation import DataWarning
from diffalign.evaluation.sampling import spread_evenly
from diffalign.models import load_model
from diffalign.models.checkpoint_context import check_weights
from diffalign.report.benchmark_report import ColumnResult, write_report
from diffalign.rewards.support.weights import resident
from diffalign.runtime.processes import joined
from diffalign.structures import Prompt


def run(config: BenchConfig) -> dict[str, ColumnResult] | None:
    """Run a benchmark; print and write its table. None on all but the main process, and for a dry run."""
    benchmark = find_benchmark(config.benchmark)
    benchmark = benchmark.with_judges(chosen_judges(benchmark, config.judges))
    protocol = benchmark.protocol
    config = replace(
        config,
        output_dir=config.output_dir or Path("runs/bench") / config.benchmark,
        images_per_prompt=config.images_per_prompt or protocol.images_per_prompt,
    )
    found = columns(config)
    every = benchmark.load(config.prompts)
    indices = spread_evenly(len(every), config.limit)
    prompts = [every[i] for i in indices]
    if config.dry_run:
        print(forecast(benchmark, found, prompts))
        return None

    state = joined()
    judges = build_judges(protocol.judges, prompts, config.allow_reward_code)
    galleries = [_gallery(column, prompts, indices) for column in found]
    _sample(list(zip(found, galleries, strict=True)), state)
    for asked in judges:
        with resident(leave=True):  # one judge on the device at a time
            for column, gallery in zip(found, galleries, strict=True):
                _ask(asked, column, gallery, prompts, state)
    state.wait_for_everyone()
    if not state.is_main_process:
        return None

    results = {}
    for column, gallery in zip(found, galleries, strict=True):
        results[column.title] = _result(benchmark, judges, column, gallery, prompts)
        if config.official_layout:
            write_official(benchmark, gallery, column, prompts, indices)
    assert config.output_dir is not None
    departures = list(_departures(config, benchmark, len(every), len(prompts)))
    print(write_report(config.output_dir, benchmark, results, departures))
    return results


def forecast(benchmark: Benchmark, found: Sequence[Column], prompts: Sequence[Prompt]) -> str:
    """Describe the work: images and evaluations of the denoiser per column, and questions per judge."""
    count = found[0].config.images_per_prompt
    assert count is not None
    images = len(prompts) * count
    lines = [f"{benchmark.protocol.title}: {len(prompts)} prompts x {count} images = {images} images per column"]
    for column in found:
        work = images * column.evaluations
        lines.append(f"{column.title}: {images} images, {column.config.num_steps} steps, {work} denoiser evaluations")
    for name, judge in benchmark.protocol.judges.items():
        asked = sum(len(judge.asks(prompt)) for prompt in prompts) * count
        lines.append(f"judge {name} ({judge.reward}): {asked} questions per column, {asked * len(found)} in all")
    total = sum(images * column.evaluations for column in found)
    lines.append(f"in all: {images * len(found)} images, {total} denoiser evaluations; nothing was written")
    return "\n".join(lines)


def _gallery(column: Column, prompts: Sequence[Prompt], indices: Sequence[int]) -> Gallery:
    state, config = PartialState(), column.config
    return Gallery(
        column.folder,
        config.sampling(),
        prompts,
        {},
        process=state.process_index,
        processes=state.num_processes,
        cache=config.cache_dir,
        allow_partial=config.allow_partial,
        prompt_indices=indices,
    )


def _sample(found: Sequence[tuple[Column, Gallery]], state: PartialState) -> None:
    """Sample the missing images, one base model after the other, and free each."""
    for _, group in groupby(found, key=lambda pair: replace(pair[0].config, guidance_scale=None, models=())):
        own = list(group)
        # A base model is compared by the settings; weights of a run only by loading them.
        if all(column.spec.path is None and not gallery.missing(column.spec) for column, gallery in own):
            continue
        config = own[0][0].config
        assert config.model is not None
        model = load_model(
            config.model,
            revision=config.revision,
            max_sequence_length=config.max_sequence_length,
            resolution=config.resolution,
            embedded_guidance=config.embedded_guidance,
        )
        for column, _ in own:
            check_weights(model, column.spec.path, allow_partial=config.allow_partial)
        model.to_device(state.device, config.offload or ())
        for column, gallery in own:
            with _bar(len(gallery.pairs()), column.title, "img", state) as bar:
                gallery.draw(model, column.spec, config.batch_size or 1, bar.update)
        del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    state.wait_for_everyone()


def _ask(asked: Asked, column: Column, gallery: Gallery, prompts: Sequence[Prompt], state: PartialState) -> None:
    files = {pair: gallery.file(column.spec, *pair) for pair in gallery.pairs()}
    with _bar(len(files), f"{asked.name}: {column.title}", "img", state) as bar:
        ask(
            asked,
            gallery.model_folder(column.spec),
            files,
            prompts,
            process=state.process_index,
            size=column.config.batch_size or 1,
            device=state.device,
            progress=bar.update,
        )


def _bar(total: int, what: str, unit: str, state: PartialState) -> tqdm:
    return tqdm(total=total, desc=what, unit=unit, disable=not state.is_main_process)


def _result(
    benchmark: Benchmark, judges: Sequence[Asked], column: Column, gallery: Gallery, prompts: Sequence[Prompt]
) -> ColumnResult:
    pairs = gallery.all_pairs()
    judged = collect(judges, gallery.model_folder(column.spec), pairs, prompts)
    if not judged:
        raise ValueError(f"{column.title}: no image could be judged: run the command again, or see the warnings above")
    answered = {(one.index, one.sample) for one in judged}
    broken = broken_images({pair: gallery.file(column.spec, *pair) for pair in pairs if pair not in answered})
    for file, reason in broken[:3]:
        problem = f"{file} cannot be read ({reason}) and is left out; delete it and run the command again"
        warnings.warn(problem, DataWarning, stacklevel=2)
    failed = {
        asked.name: sum(any(value != value for value in one.answers[asked.name]) for one in judged) for asked in judges
    }
    return ColumnResult(
        benchmark.summarise(judged),
        str(column.config.model),
        None if column.spec.path is None else str(column.spec.path),
        column.config.guidance_scale or 0.0,
        column.config.num_steps or 0,
        len(pairs),
        [str(file) for file, _ in broken],
        {name: count for name, count in failed.items() if count},
        interval(benchmark, judged),
    )


def _departures(config: BenchConfig, benchmark: Benchmark, every: int, used: int) -> Iterator[str]:
    """Yield what differs from the protocol in this run."""
    protocol = benchmark.protocol
    if used < every:
        yield f"{used} of {every} prompts"
    if every != protocol.size:
        yield f"the prompts number {every}, the benchmark has {protocol.size}"
    if config.images_per_prompt != protocol.images_per_prompt:
        yield f"{config.images_per_prompt} images per prompt instead of {protocol.images_per_prompt}"
    for name, judge in protocol.judges.items():
        if name in config.judges:
            yield f"judge {name}: {judge.reward} with options of yours"
