"""Rehearse the training of a judge on fake tensors: its network, loss and optimizer at full size, without weights."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from diffalign.config import to_yaml
from diffalign.forecast.cards import SHARE_OF_RATE, Card, seconds
from diffalign.forecast.counter import BLOCK, Counter
from diffalign.forecast.dry_run import Place
from diffalign.forecast.fake_model import make_fake
from diffalign.forecast.fake_rewards import Unpublished, reward_config
from diffalign.forecast.rehearsal import (
    BACKWARD,
    ENCODE,
    EVALUATING,
    SAMPLING,
    STEPPING,
    TRAINING,
    WEIGHTS,
    Rehearsed,
    warm_up,
)
from diffalign.forecast.report import GIB
from diffalign.forecast.stand_ins import FiniteValues, OneOfMany, cuda_autocast
from diffalign.losses.paired_comparison import comparison_loss
from diffalign.models.offload import tensors_of
from diffalign.models.quiet import quiet_libraries
from diffalign.rewards.support.judge_network import JudgeNetwork, layout_of
from diffalign.runtime.progress import duration
from diffalign.runtime.state import LoopState
from diffalign.trainers.reward.algorithm import make_trainable
from diffalign.trainers.reward.config import RewardTrainerConfig
from diffalign.trainers.reward.data import JudgeData, read_judge_data
from diffalign.trainers.reward.trainer import check_processes, new_network, opening, read_judges

PHASES = {
    WEIGHTS: "weights and optimizer state",
    SAMPLING: "outputs of frozen towers",
    TRAINING: "forward and backward",
    STEPPING: "optimizer step",
    EVALUATING: "a batch of held-out pairs",
}


def blank_backbone(config: RewardTrainerConfig) -> PreTrainedModel:
    """Build the backbone of a folder or a hub id on the meta device. Unpublished: its configuration is not known."""
    try:
        found = reward_config(config.backbone)
        known = AutoConfig.for_model(found.pop("model_type"), **found)
    except Unpublished as error:
        try:
            known = AutoConfig.from_pretrained(config.backbone, revision=config.revision, trust_remote_code=False)
        except OSError:
            raise error from None
    with torch.device("meta"):
        backbone: PreTrainedModel = layout_of(known, config.backbone).model(known)
    return backbone


def rehearse_judge(
    config: RewardTrainerConfig, raters: int, world: int = 1, *, block: int = BLOCK, cpu: bool = False
) -> Rehearsed:
    """Rehearse an optimizer step and an evaluation.

    Args:
        config: The validated configuration.
        raters: Number of raters that the judge tells apart; 0 for one judge of all.
        world: Number of processes.
        block: Bytes to which the allocator rounds up.
        cpu: Whether the run is on a CPU.

    Raises:
        Unpublished: The package has no configuration of the backbone.
    """
    with torch.device("meta"):
        network = make_trainable(new_network(blank_backbone(config), config, raters), config)
    counter = Counter(block)
    make_fake(network, counter.fake)
    with ExitStack() as stack:
        stack.enter_context(quiet_libraries())
        if not cpu:
            stack.enter_context(cuda_autocast())
        stack.enter_context(FiniteValues())
        accelerator: Any = OneOfMany(config.mixed_precision, world)
        stack.enter_context(counter)
        with counter.during(WEIGHTS):
            counter.hold(tensors_of([network]))
            state = LoopState(network, config, accelerator)
            warm_up(state, counter, config)
            counter.restart()
        _phases(config, network, state, counter, world)
    tables = ({key: n for key, n in t.items() if key[0]} for t in (counter.peaks, counter.flops, counter.traffic))
    peaks, flops, traffic = tables
    return Rehearsed(peaks, flops, traffic, {}, 1, 0)


def _phases(config: RewardTrainerConfig, network: JudgeNetwork, state: LoopState, counter: Counter, world: int) -> None:
    """Run the phases of a step: with a head alone, on outputs of towers that were computed before."""
    head = config.train == "head"
    if head:
        with counter.during(SAMPLING), counter.within(ENCODE), torch.no_grad():
            _pool(network, config.eval_batch_size)
    own = config.num_pairs // world
    size = min(config.train_batch_size, own)
    with counter.during(TRAINING):
        if own > size:
            for parameter in state.parameters:
                parameter.grad = torch.zeros_like(parameter)
        with counter.repeated(own / size):
            scores = state.module(**_batch(network, size, head))
            label = torch.ones(size)
            loss = comparison_loss(scores[:, 0] - scores[:, 1], label, config.tie_model, network.tie).mean()
            with counter.within(BACKWARD):
                loss.backward()
            del loss, scores
        torch.nn.utils.clip_grad_norm_(state.parameters, config.max_grad_norm)
    with counter.during(STEPPING):
        state.step(None, torch.nan)
    with counter.during(EVALUATING), torch.no_grad():
        network(**_batch(network, config.eval_batch_size, head))


def _images(network: JudgeNetwork, count: int) -> tuple[Tensor, Tensor]:
    """Make blank images (N, 2, 3, S, S) and token ids (N, L), as long as they may be."""
    config = network.backbone.config
    side, length = config.vision_config.image_size, config.text_config.max_position_embeddings
    return torch.empty(count, 2, 3, side, side), torch.zeros(count, length, dtype=torch.long)


def _pool(network: JudgeNetwork, count: int) -> None:
    images, ids = _images(network, count)
    network.pool_images(images.flatten(0, 1))
    network.pool_texts(ids, None if network.layout.padded else torch.ones_like(ids))


def _batch(network: JudgeNetwork, count: int, pooled: bool) -> Mapping[str, Any]:
    config = network.backbone.config
    rater = torch.zeros(count, dtype=torch.long) if network.raters else None
    if pooled:
        images = torch.empty(count, 2, config.vision_config.hidden_size)
        return {"images": images, "texts": torch.empty(count, network.text_head.in_features), "pooled": True,
                "rater": rater}  # fmt: skip
    images, ids = _images(network, count)
    mask = None if network.layout.padded else torch.ones_like(ids)
    return {"images": images, "texts": ids, "mask": mask, "rater": rater}


# Report -------------------------------------------------------------------------------------------------------------


def lines(found: Rehearsed, config: RewardTrainerConfig, place: Place) -> list[str]:
    """Format a line per phase, the peak with what would lower it, and the memory that is free."""
    rows = []
    for phase, title in PHASES.items():
        if any(where == phase for where, _ in found.peaks):
            flops = found.total(found.flops, phase)
            work = f"{flops / 1e12:12,.2f} TFLOP" if flops else ""
            rows.append(f"{title:28} {found.peak_of(phase) / GIB:8.2f} GiB {work}".rstrip())
    phase = found.peak_at[0]
    batch = "eval_batch_size" if phase in (SAMPLING, EVALUATING) else "train_batch_size"
    lower = f"a smaller {batch}" + ("" if config.train == "head" else " or train: head")
    free, where = place.free
    peak = f"peak: {found.peak / GIB:.2f} GiB ({PHASES[phase]}); {lower} would lower it"
    return [*rows, peak, f"free: {free / GIB:.1f} GiB, {where}"]


def time_lines(found: Rehearsed, config: RewardTrainerConfig, data: JudgeData, card: Card) -> list[str]:
    """Forecast the time on a card: of outputs that are computed once, and of all optimizer steps."""
    half = config.mixed_precision != "no"

    def of(phase: str) -> float:
        return seconds(card, found.total(found.flops, phase), found.total(found.traffic, phase), half)

    once = of(SAMPLING) * (len(data.train) + len(data.held_out)) / config.eval_batch_size
    each = of(TRAINING) + of(STEPPING)
    total = once + each * config.max_train_steps
    return [
        f"{card.title}: {once:.1f} s to encode all pairs, {each:.3f} s per optimizer step, {duration(total)} in all",
        f"assumed: {SHARE_OF_RATE:.0%} of the peak rate ({card.source}); without reading images, other judges, "
        "evaluations and checkpoints; measured on no card",
    ]


def print_plan(config: RewardTrainerConfig, place: Place) -> int:
    """Print what a run of a configuration will do and needs; load no weights, write nothing.

    Returns:
        0, or 1 if it does not fit into memory.

    Raises:
        ValueError: The run cannot start.
    """
    config.validate()
    check_processes(config, place.share.world, None)
    read_judges(config)
    data = read_judge_data(config)
    print(f"configuration\n{to_yaml(config)}")
    try:
        found = rehearse_judge(config, len(data.raters), place.share.world, cpu=place.cpu)
    except Unpublished as error:
        print(f"{opening(config, data)}\nmemory and time are not forecast: {error}")
        return 0
    print(opening(config, data))
    print("\nmemory of a process, and what it computes in a step", *lines(found, config, place), sep="\n  ")
    if place.card is not None:
        print("\ntime", *time_lines(found, config, data, place.card), sep="\n  ")
    if found.peak > place.free[0]:
        print("  it does not fit")
        return 1
    return 0
