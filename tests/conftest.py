"""What several tests share: the shipped pipeline, loaded once per need, and small runs on it."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    # Each worker has cores of its own, and so have the processes that it starts: many here take all that they see.
    number, count = os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"), os.environ["PYTEST_XDIST_WORKER_COUNT"]
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[int(number) :: int(count)] or cores)

import pytest
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline

from diffalign import FlowGRPOConfig, FlowGRPOTrainer, LoraConfig, Prompt, load_model
from diffalign.data.prompts import load_prompts
from diffalign.diffusion.plan import PlanConfig

ROOT = Path(__file__).parents[1]
PIPELINE = ROOT / "assets/shapes-sd3"
PROMPTS = ROOT / "assets/prompts"


PLOT = "diffalign.report.run_report.plot_curves"


@pytest.fixture(scope="session", autouse=True)
def plot_curves():
    """Leave out the curves of finished runs, which take longer than the runs here; return what draws them."""
    with pytest.MonkeyPatch.context() as patch:
        drawn = import_module("diffalign.report.run_report").plot_curves
        patch.setattr(PLOT, lambda *_, **__: None)
        yield drawn


@pytest.fixture
def curves(plot_curves, monkeypatch):
    """Draw the curves of finished runs in this test."""
    monkeypatch.setattr(PLOT, plot_curves)


@pytest.fixture(scope="session")
def pipeline() -> DiffusionPipeline:
    """The shipped pipeline, as plain diffusers loads it; no test may change it."""
    pipe = DiffusionPipeline.from_pretrained(PIPELINE)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Lazy(dict):
    """A dictionary that makes a missing value from its key."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def __missing__(self, key):
        self[key] = self.make(key)
        return self[key]


@pytest.fixture(scope="session")
def family_pipelines(tmp_path_factory):
    """Family -> folder, written when first asked for and the same at every call; no test may write there."""
    from tests.models import tiny_unet_pipelines as tiny
    from tests.models.families import FAMILIES

    root = tmp_path_factory.mktemp("pipelines")

    def written(name):
        if (build := FAMILIES[name].build) is None:
            return PIPELINE
        tiny.write(build, root / name)
        return root / name

    return Lazy(written)


@pytest.fixture(scope="session")
def frozen():
    """The shipped pipeline behind the model interface; no test may change it."""
    return load_model(PIPELINE, max_sequence_length=16)


@pytest.fixture
def model():
    """A fresh copy, to be trained."""
    return load_model(PIPELINE, max_sequence_length=16)


@pytest.fixture(scope="session")
def train_prompts() -> list[Prompt]:
    """Six training prompts, one of each task type."""
    return load_prompts(PROMPTS / "shapes_train.jsonl")[::70]


@pytest.fixture
def small(tmp_path):
    """A configuration that trains in seconds; keyword arguments override it."""

    def make(**changes) -> FlowGRPOConfig:
        settings = {
            "model": str(PIPELINE),
            "max_sequence_length": 16,
            "output_dir": tmp_path / "run",
            "rewards": {"shapes": 1.0},
            "lora": LoraConfig(rank=4),
            "plan": PlanConfig(preset="first_steps", num_steps=4, window_size=2),
            "num_groups": 2,
            "group_size": 4,
            "rollout_batch_size": 4,
            "train_batch_size": 4,
            "max_train_steps": 2,
            "learning_rate": 1e-3,
        }
        return FlowGRPOConfig(**(settings | changes))

    return make


@pytest.fixture(scope="session")
def eval_prompts(tmp_path_factory):
    """A file of six held-out prompts, one of each task."""
    lines = (PROMPTS / "shapes_validation.jsonl").read_text().splitlines()[::70]
    path = tmp_path_factory.mktemp("prompts") / "six.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory, eval_prompts, plot_curves):
    """A finished run of two steps, with a checkpoint of each and its curves."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    args = FlowGRPOConfig(
        model=str(PIPELINE),
        max_sequence_length=16,
        train_prompts=PROMPTS / "shapes_train.jsonl",
        eval_prompts=eval_prompts,
        output_dir=folder,
        rewards={"shapes": 1.0},
        eval_rewards=("shapes", "shapes_strict"),
        lora=LoraConfig(rank=4),
        plan=PlanConfig(preset="first_steps", num_steps=4, window_size=2),
        num_groups=2,
        group_size=4,
        rollout_batch_size=4,
        train_batch_size=4,
        max_train_steps=2,
        checkpointing_steps=1,
        learning_rate=5e-2,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PLOT, plot_curves)
        FlowGRPOTrainer(args=args).train()
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps one state per process, which would refuse the next test's precision."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
