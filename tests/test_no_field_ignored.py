"""No field of a trainer's configuration is ignored: what a mode accepts, a run of that mode reads.

Each mode trains two steps with an evaluation and an export, while reads of its configuration are recorded. Reads by
validation and by what copies, compares or writes configurations do not count. A run that evaluates, saves and resumes
must read every field that ``unread`` does not refuse.
"""

import dataclasses
import sys
from contextlib import contextmanager

import pyarrow
import pytest
from pyarrow import parquet

from diffalign import LoraConfig, RewardTrainer, RewardTrainerConfig
from diffalign.config.schema import arms_of, init_fields
from diffalign.config.unread import covering, unread_names
from diffalign.data.config import PreferenceDataConfig
from diffalign.diffusion.plan_config import PlanConfig
from diffalign.diffusion.reward_gradient_config import RecipeConfig
from diffalign.trainers.diffusion_dpo.siblings_config import SiblingsConfig
from tests.conftest import PIPELINE, PROMPTS, ROOT
from tests.reliability.trainers import PAIRS, TRAINERS, Case, held_out

COMMON = {"model": str(PIPELINE), "max_sequence_length": 16, "lora": LoraConfig(rank=2), "max_train_steps": 2}
COMMON |= {"eval_images_per_prompt": 1}
ROLLOUTS = {"rewards": {"brightness": 1.0}, "num_groups": 2, "group_size": 2, "rollout_batch_size": 4}
ROLLOUTS |= {"train_batch_size": 4, "train_prompts": PROMPTS / "shapes_train.jsonl", "eval_num_steps": 2}
NOISY = {"plan": PlanConfig(preset="first_steps", num_steps=2, window_size=1)}
ODE = {"plan": PlanConfig(preset="ode", num_steps=2), "shared_start": False}
DATA = {"train_data": (PAIRS,), "data": PreferenceDataConfig(scan=2), "num_pairs": 2, "train_batch_size": 2}
DATA |= {"cache": False, "plan": PlanConfig(num_steps=2)}
SIBLINGS = {"pairs": "siblings", "siblings": SiblingsConfig("spo", first_step=0), "loss": "spo", **NOISY}
REFL = {"rewards": {"brightness": 1.0}, "num_groups": 2, "rollout_batch_size": 2, "train_batch_size": 2}
REFL |= {"eval_num_steps": 2, "recipe": RecipeConfig(preset="draft_k", num_steps=2, gradient_steps=1)}
PRETRAINING = RecipeConfig(preset="draft_k", num_steps=2, gradient_steps=1, regulariser="pretraining")
REWARD = {"backbone": str(ROOT / "assets/judges/pickscore"), "num_pairs": 4, "max_train_steps": 2, "label_next": 2}
REWARD |= {"judges": {"brightness": 1.0}, "held_out_share": 0.5, "tokenizer": str(ROOT / "assets/judges/pickscore")}
MODES = {
    "flow_grpo": ("flow_grpo", ROLLOUTS | NOISY),
    "flow_grpo trees": ("flow_grpo", ROLLOUTS | {"plan": PlanConfig("branch_grpo", num_steps=3, split_steps=(0,)),
                                                 "shared_start": True, "best_path_weight": 0.1}),
    "flow_grpo kl": ("flow_grpo", ROLLOUTS | NOISY | {"kl_beta": 0.1}),
    "diffusion_dpo pairs": ("diffusion_dpo", DATA | {"time_sampling": "logit_normal", "auto_beta": 0.2}),
    "diffusion_dpo single images": ("diffusion_dpo", DATA | {"loss": "kto"}),
    "diffusion_dpo reference": ("diffusion_dpo", DATA | {"losers": "reference", "plan": ODE["plan"]}),
    "diffusion_dpo streaming": ("diffusion_dpo", DATA | {"streaming": True, "times": (500.0,)}),
    "diffusion_dpo online": ("diffusion_dpo", ROLLOUTS | ODE),
    "diffusion_dpo online single images": ("diffusion_dpo", ROLLOUTS | ODE | {"loss": "sft"}),
    "diffusion_dpo online siblings": ("diffusion_dpo", ROLLOUTS | SIBLINGS),
    "diffusion_dpo online paths": ("diffusion_dpo", ROLLOUTS | SIBLINGS | {"siblings": SiblingsConfig("d3po"),
                                                                          "loss": "d3po"}),
    "forward_rl": ("forward_rl", ROLLOUTS | {"plan": ODE["plan"]}),
    "forward_rl anchors": ("forward_rl", ROLLOUTS | {"plan": ODE["plan"], "preset": "awm", "num_times": 1,
                                                     "time_fraction": 1.0, "reference_guidance": 2.0}),
    "forward_rl groups": ("forward_rl", ROLLOUTS | {"plan": ODE["plan"], "preset": "crd", "num_times": 2}),
    "forward_rl filters": ("forward_rl", ROLLOUTS | {"plan": ODE["plan"], "preset": "v_grpo", "num_times": 2,
                                                     "times": "logit_normal", "updates_per_rollout": 2}),
    "refl": ("refl", REFL | {"train_prompts": PROMPTS / "shapes_train.jsonl"}),
    "refl images": ("refl", REFL | {"train_prompts": PROMPTS / "shapes_train.jsonl", "train_images": (PAIRS,),
                                    "recipe": PRETRAINING, "data": PreferenceDataConfig(scan=2)}),
    "reward": ("reward", REWARD | {"prototypes": 2, "rater_model": "pal_a", "train": "lora"}),
    "reward heads": ("reward", REWARD | {"tie_model": "davidson"}),
}  # fmt: skip

# Callers whose reads are no use of a value: they check, copy, compare or write configurations.
NO_USE = ("diffalign.config", "dataclasses", "copy", "diffalign.preflight", "diffalign.runtime.diagnosis", "tests")
CHECKS = ("validate", "_validate", "unread", "check", "__post_init__")
# Start of a mode's name -> field -> why no run here reads it.
BUFFER = "read where train_data is a rollout buffer"
SINGLE = {
    **dict.fromkeys(("anchor_weight", "max_margin", "winner_mu", "winner_weight"), "refused unless it is off"),
}
DATA_SETS = {
    "data.split": "read for folders and data sets of the hub",
    "data.subset": "read for data sets of the hub",
    "data.ties": "read at a label of 0.5",
    **dict.fromkeys((f"data.rollouts.{name}" for name in ("min_gap", "rewards", "rule", "scale")), BUFFER),
}
KNOWN = {
    "": {
        "auto_batch": "read when memory runs out",
        "cache_dir": "read with cache: true, and refused by validate without",
    },
    "diffusion_dpo": DATA_SETS,
    "refl images": DATA_SETS,
    "reward": DATA_SETS,
    "diffusion_dpo single": SINGLE,
    "diffusion_dpo online single": {**SINGLE, "losers": "refused unless it is data"},
}


def is_config(module: str) -> bool:
    """Whether a module declares configurations, whose properties read fields on behalf of their caller."""
    return module.rpartition(".")[2].endswith("config")


def uses(frame) -> bool:
    """Whether the code that reads a field uses its value."""
    while frame is not None:
        module, function = frame.f_globals.get("__name__", ""), frame.f_code.co_name
        if function == "recording":  # below a property
            frame = frame.f_back
            continue
        if module.startswith(NO_USE):
            return False
        if not is_config(module):
            return not frame.f_code.co_filename.startswith("<")  # generated __eq__, __hash__, __repr__
        if function.startswith(CHECKS):
            return False
        frame = frame.f_back
    return False


def sections(cls, prefix=""):
    """Yield (dotted prefix, class) of a configuration class and its sections."""
    yield prefix, cls
    for field, hint in init_fields(cls):
        for arm in arms_of(hint):
            if dataclasses.is_dataclass(arm):
                yield from sections(arm, f"{prefix}{field.name}.")


@contextmanager
def recorded(cls):
    """Yield the set of (class, field) that is read and used inside the context."""
    found, classes = set(), {section for _, section in sections(cls)}
    names = {section: {field.name for field, _ in init_fields(section)} for section in classes}

    def recording(self, name):
        if name in names.get(type(self), ()) and (type(self), name) not in found and uses(sys._getframe(1)):
            found.add((type(self), name))
        return object.__getattribute__(self, name)

    with pytest.MonkeyPatch.context() as patch:
        for section in classes:
            patch.setattr(section, "__getattribute__", recording, raising=False)
        yield found


def accepted(config):
    """Yield (dotted path, class, field) of what a configuration accepts."""
    refused = unread_names(config)
    for prefix, cls in sections(type(config)):
        for field, hint in init_fields(cls):
            path = prefix + field.name
            is_section = any(dataclasses.is_dataclass(arm) for arm in arms_of(hint))
            if not is_section and covering(refused, path) is None:
                yield path, cls, field.name


def extra(name, folder):
    """Settings of every mode of a trainer: where it writes, and what it is evaluated on."""
    if name == "reward":
        rows = parquet.read_table(PAIRS).slice(0, 12).to_pylist()
        table = [{**row, "user_id": "ab"[i % 2]} for i, row in enumerate(rows)]
        parquet.write_table(pyarrow.Table.from_pylist(table), folder / "pairs.parquet")
        pairs = (str(folder / "pairs.parquet"),)
        return {"output_dir": folder / "run", "train_data": pairs, "label_data": pairs}
    return {"output_dir": folder / "run", "eval_prompts": held_out(folder), "eval_rewards": ("brightness",)}


@pytest.mark.parametrize(
    "mode", [pytest.param(mode, marks=pytest.mark.slow) if mode == "reward heads" else mode for mode in MODES]
)
def test_a_run_reads_every_field_that_its_mode_accepts(mode, tmp_path):
    name, settings = MODES[mode]
    case = TRAINERS[name] if name in TRAINERS else Case(RewardTrainer, RewardTrainerConfig, {})
    config = case.config(**(({} if name == "reward" else COMMON) | settings | extra(name, tmp_path)))
    config.validate()
    with recorded(case.config) as found:
        case.trainer(args=config).train()
    ignored = {path for path, cls, field in accepted(config) if (cls, field) not in found}
    known = {path for start, paths in KNOWN.items() if mode.startswith(start) for path in paths}
    assert sorted(ignored - known) == [], f"{mode}: accepted and not read"
