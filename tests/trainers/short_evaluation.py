"""An evaluation of fewer prompts than processes, for ``test_evaluation``: each process writes its figures."""

import json
from pathlib import Path

import torch
from accelerate import Accelerator

from diffalign import FlowGRPOConfig, load_model
from diffalign.data.prompts import load_prompts
from diffalign.evaluation.heldout import Evaluation, Shown
from diffalign.models import DiffusionModel
from diffalign.models.prompt_cache import PromptEmbeddingCache
from diffalign.rewards import get_reward
from diffalign.rng import KeyedRNG
from diffalign.rollout.sampler import SamplingPlan, ode_plan
from diffalign.runtime.run import Heartbeat, Progress, Run
from diffalign.runtime.watchdog import Watchdog
from diffalign.structures import Guidance
from tests.conftest import PIPELINE, PROMPTS


def evaluated(model: DiffusionModel, even: bool) -> tuple[dict[str, float], Shown]:
    """Two images of one prompt."""
    config, accelerator = FlowGRPOConfig(eval_images_per_prompt=2), Accelerator()
    run = Run(
        config,
        model,
        model.raw_denoiser,
        accelerator,
        KeyedRNG(0),
        PromptEmbeddingCache(model),
        Progress(),
        Heartbeat(accelerator, Watchdog(config.hang_timeout, config.output_dir)),
    )
    prompts = load_prompts(PROMPTS / "shapes_validation.jsonl", 1)
    evaluation = Evaluation(run, prompts, {"shapes": get_reward("shapes")}, even=even)
    evaluation.batch_size = 2
    return evaluation.run(SamplingPlan(ode_plan(2), model.levels(2), Guidance()))


def write(folder: Path) -> None:
    """The figures, with and without images for the sake of others, and what there is to show."""
    model = load_model(PIPELINE, max_sequence_length=16)
    calls: list[int] = []
    model.raw_denoiser.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    found = {}
    for even in (False, True):
        calls.clear()
        figures, shown = evaluated(model, even)
        found[str(even)] = {"figures": figures, "shown": shown.texts, "calls": len(calls)}
    (folder / f"{Accelerator().process_index}.json").write_text(json.dumps(found))
