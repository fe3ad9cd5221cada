"""Sixty mistakes in configurations, and their one-sentence answers from a file, the command line and Python."""

import re

import pytest

from diffalign.config import from_dict, parse, yaml_dialect
from diffalign.trainers.registry import config_class

# (trainer, dotted key, value as YAML text, the answer: a pattern that begins with the key).
MISTAKES = [
    ("flow_grpo", "num_groups", "x", "num_groups: expected int, got 'x'"),
    ("flow_grpo", "num_groups", "1.5", "num_groups: expected int, got '?1.5"),
    ("flow_grpo", "num_groups", "true", "num_groups: expected int, got '?[tT]rue"),
    ("flow_grpo", "num_groups", "[1, 2]", r"num_groups: expected int, got (a list|\[1, 2\])"),
    ("flow_grpo", "num_groups", "0", "num_groups must be at least 1 and at most 1000000, got 0"),
    ("flow_grpo", "num_groups", "-3", "num_groups must be at least 1 and at most 1000000, got -3"),
    ("flow_grpo", "group_size", "2000000", "group_size must be at least 1 and at most 1000000, got 2000000"),
    ("flow_grpo", "learning_rate", "fast", "learning_rate: expected float, got 'fast'"),
    ("flow_grpo", "learning_rate", "0", "learning_rate must be more than 0, got 0"),
    ("flow_grpo", "learning_rate", ".inf", "learning_rate must be finite, got inf: give more than 0"),
    ("flow_grpo", "learning_rate", ".nan", "learning_rate must be a number, got nan: give more than 0"),
    ("flow_grpo", "adam_beta1", "1.0", "adam_beta1 must be at least 0 and less than 1, got 1.0"),
    ("flow_grpo", "adam_weight_decay", "-0.1", "adam_weight_decay must be at least 0, got -0.1"),
    ("flow_grpo", "ema_decay", "1.0", "ema_decay must be .*, got 1.0: 0 turns it off, 0.9 to 0.999 are usual"),
    ("flow_grpo", "checkpoints_total_limit", "1", "checkpoints_total_limit must be at least 2, got 1: with 1, a crash"),
    ("flow_grpo", "max_train_steps", "0", "max_train_steps must be at least 1, got 0"),
    ("flow_grpo", "eval_steps", "-1", "eval_steps must be at least 0, got -1"),
    ("flow_grpo", "seed", "18446744073709551616", r"seed must fit 64 bits \(-2\*\*63 to 2\*\*63 - 1\)"),
    ("flow_grpo", "mixed_precision", "fp8", r"mixed_precision: expected no\|bf16\|fp16, got 'fp8'"),
    ("flow_grpo", "mixed_precision", "false", r"mixed_precision: expected no\|bf16\|fp16, got '?[fF]alse"),
    ("flow_grpo", "lr_scheduler", "cosin", r"lr_scheduler: expected constant\|linear\|cosine, got 'cosin'"),
    ("flow_grpo", "optimizer", "sgd", r"optimizer: expected adamw\|adamw_8bit, got 'sgd'"),
    ("flow_grpo", "schedule", "karras", r"schedule: expected pipeline\|uniform, got 'karras'"),
    ("flow_grpo", "compile", "maybe", "compile: expected bool, got 'maybe'"),
    ("flow_grpo", "shared_start", "2", "shared_start: expected bool, got '?2"),
    ("flow_grpo", "offload", "[vea]", r"offload.0: expected text_encoders\|vae\|rewards, got 'vea'"),
    ("flow_grpo", "offload", "{vae: 1}", r"offload: expected tuple\[text_encoders\|vae\|rewards, ...\], got"),
    ("flow_grpo", "rewards", "{shapes: high}", "rewards.shapes: expected float"),
    ("flow_grpo", "rewards", "{shapes: [1]}", "rewards.shapes: expected"),
    ("flow_grpo", "lora.rank", "-1", "lora.rank must be at least 0 and at most 65536, got -1"),
    ("flow_grpo", "lora.rank", "big", "lora.rank: expected int, got 'big'"),
    ("flow_grpo", "lora.alpha", "0", "lora.alpha must be more than 0, got 0.*: leave it out for alpha = rank"),
    ("flow_grpo", "lora.rnk", "4", "unknown key 'lora.rnk'; did you mean 'lora.rank'"),
    ("flow_grpo", "plan.num_steps", "1", "plan.num_steps must be at least 2 .*, got 1: the last step is not trained"),
    ("flow_grpo", "plan.num_steps", "ten", "plan.num_steps: expected int, got 'ten'"),
    ("flow_grpo", "plan.window_range", "[1, x]", "plan.window_range(.1)?: expected"),
    ("flow_grpo", "plan.window_range", "[1]", "plan.window_range: expected"),
    ("flow_grpo", "plan.num_stps", "3", "unknown key 'plan.num_stps'; did you mean 'plan.num_steps'"),
    ("flow_grpo", "plan.window_size", "0", "plan.window_size must be at least 1, got 0"),
    ("flow_grpo", "plan.noise_level", "-0.5", "plan.noise_level must be at least 0, got -0.5"),
    ("flow_grpo", "learning_rte", "1e-4", "unknown key 'learning_rte'; did you mean 'learning_rate'"),
    ("flow_grpo", "num_steps", "4", "unknown key 'num_steps'; did you mean 'plan.num_steps'"),
    ("flow_grpo", "guidance_scale", "-1", r"guidance_scale must be at least 0, got -1.*: 1 turns guidance off"),
    ("flow_grpo", "max_unscored", "1.5", "max_unscored must be at least 0 and at most 1, got 1.5"),
    ("flow_grpo", "clip_range", "0", "clip_range must be more than 0, got 0"),
    ("flow_grpo", "advantage_clip", "-1", "advantage_clip must be more than 0, got -1"),
    ("flow_grpo", "kl_beta", "-0.1", "kl_beta must be at least 0, got -0.1"),
    ("flow_grpo", "resolution", "wide", r"resolution: expected int\|tuple\[int, int\]\|null, got 'wide'"),
    ("diffusion_dpo", "num_pairs", "0", "num_pairs must be at least 1 and at most 1000000, got 0"),
    ("diffusion_dpo", "prompt_dropout", "1", "prompt_dropout must be at least 0 and less than 1, got 1"),
    ("diffusion_dpo", "times", "[2000]", "times.0 must be at least 0 and at most 1000, got 2000"),
    ("diffusion_dpo", "auto_beta", "0.5", "auto_beta must be more than 0 and less than 0.5, got 0.5"),
    ("diffusion_dpo", "winner_mu", "2", "winner_mu must be at least 0 and at most 1, got 2"),
    ("diffusion_dpo", "data.ties", "keep", r"data.ties: expected drop\|soft\|error, got 'keep'"),
    ("diffusion_dpo", "data.min_side", "0", "data.min_side must be at least 1, got 0"),
    ("diffusion_dpo", "data.max_bad_share", "2", "data.max_bad_share must be at least 0 and at most 1, got 2"),
    ("diffusion_dpo", "data.formt", "pairs", "unknown key 'data.formt'; did you mean 'data.format'"),
    ("diffusion_dpo", "advantage_clip", "5.0", "advantage_clip: Diffusion-DPO computes no advantages; leave it out"),
    ("refl", "base_share", "1", "base_share must be at least 0 and less than 1, got 1"),
    ("refl", "alarm_factor", "1", "alarm_factor must be more than 1, got 1"),
    ("refl", "recipe.eta", "1.5", "recipe.eta must be at least 0 and at most 1, got 1.5"),
    ("refl", "recipe.window", "[0.1, 2]", "recipe.window.1 must be at least 0 and at most 1, got 2"),
    ("refl", "recipe.presett", "draft_1", "unknown key 'recipe.presett'; did you mean 'recipe.preset'"),
    ("refl", "decode_slice", "-1", "decode_slice must be at least 0, got -1"),
]


def nested(path: str, value: object) -> dict:
    """A mapping that holds ``value`` at a dotted path."""
    for name in reversed(path.split(".")):
        value = {name: value}
    return value


def from_file(cls, path, text, folder):
    lines = [f"{'  ' * depth}{name}:" for depth, name in enumerate(path.split("."))]
    (folder / "run.yaml").write_text("\n".join(lines) + f" {text}\n")
    parse(cls, ["--config", str(folder / "run.yaml")])


def from_options(cls, path, text, folder):
    parse(cls, [f"--{path}={text}"])


def from_python(cls, path, text, folder):
    cls(**nested(path, yaml_dialect.load(text)))


def test_there_are_sixty():
    assert len(MISTAKES) >= 60
    assert len({mistake[:3] for mistake in MISTAKES}) == len(MISTAKES)


@pytest.mark.parametrize("route", [from_file, from_options, from_python])
@pytest.mark.parametrize(("trainer", "path", "text", "answer"), MISTAKES, ids=lambda value: str(value)[:30])
def test_a_mistake_is_answered_in_a_sentence(trainer, path, text, answer, route, tmp_path):
    cls = config_class(trainer)
    # A class that gets a keyword that it lacks answers as any Python function does.
    unknown = "." not in path and ("unknown key" in answer or "leave it out" in answer)
    error, wanted = (TypeError, path) if route is from_python and unknown else (ValueError, answer)
    with pytest.raises(error) as caught:
        route(cls, path, text, tmp_path)
    message = str(caught.value)
    # Python code constructs a section on its own, so that its key is the one within the section.
    assert re.search(wanted, message) or re.search(wanted.replace(f"{path.split('.')[0]}.", "", 1), message), message
    assert len(message.splitlines()) == 1
    assert len(message) < 1000


def test_replace_is_checked_like_a_construction():
    from dataclasses import replace

    config = config_class("flow_grpo")()
    with pytest.raises(ValueError, match="num_groups: expected int, got 'x'"):
        replace(config, num_groups="x")
    with pytest.raises(ValueError, match=r"lora\.rank must be at least 0"):
        replace(config, lora={"rank": -1})
    config.num_groups = 0
    with pytest.raises(ValueError, match="num_groups must be at least 1"):
        config.check()


def test_all_mistakes_of_one_configuration_come_together():
    with pytest.raises(ValueError, match="3 problems") as caught:
        from_dict(config_class("refl"), {"num_groups": "x", "seed": 1.5, "base_share": 3}, "run.yaml")
    assert str(caught.value).count("run.yaml: ") == 3
