import pytest
from accelerate.state import AcceleratorState

from diffalign import FlowGRPOConfig, FlowGRPOTrainer, LoraConfig
from diffalign.diffusion.plan import PlanConfig
from tests.conftest import PIPELINE, PROMPTS


@pytest.fixture(scope="session")
def eval_prompts(tmp_path_factory):
    """A file of six held-out prompts, one of each task."""
    lines = (PROMPTS / "shapes_held_out.jsonl").read_text().splitlines()[::70]
    path = tmp_path_factory.mktemp("prompts") / "six.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory, eval_prompts):
    """A finished run of two steps, with a checkpoint of each."""
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
    FlowGRPOTrainer(args=args).train()
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder
