"""A reward, a preference loss and a model family, each in one file of a few lines outside the package.

Each works in ``train``, ``--dry_run``, resume and ``--help`` with no edit elsewhere. ``doctor`` tries what this machine
can do with the trainers and the embedded world, and takes no reward, loss or family: there is nothing to hold there.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from diffalign.cli import main
from diffalign.losses import registry as losses
from diffalign.models import registry as families
from diffalign.rewards import base as rewards
from diffalign.runtime.tracking import MetricsLog
from tests.conftest import PIPELINE, PROMPTS, ROOT
from tests.reliability.compare import same_checkpoint

REWARD = """\
def warmth(images, prompts, metadata):
    return (images[:, 0] - images[:, 2]).mean((1, 2))
"""
LOSS = """\
from torch.nn.functional import softplus

def steep(pair, *, beta=400.0, slope=2.0):
    return softplus(-slope * beta * pair.margin)
"""
SINGLE_LOSS = """\
def liked_only(denoised, liked, *, beta=400.0):
    return -beta * denoised.gain * liked
"""
FAMILY = """\
from diffalign.models import register_family
from diffalign.models.sd3 import SD3Model

@register_family("StableDiffusion3PAGPipeline")
class OwnModel(SD3Model):
    pass
"""
COMMON = {"model": str(PIPELINE), "max_sequence_length": 16, "lora": {"rank": 2}, "learning_rate": 1e-3}
COMMON |= {"max_train_steps": 4, "checkpointing_steps": 2, "lr_scheduler": "cosine"}
ROLLOUTS = {"num_groups": 1, "group_size": 4, "rollout_batch_size": 4, "train_batch_size": 4}
ROLLOUTS |= {"train_prompts": str(PROMPTS / "shapes_train.jsonl"), "rewards": ["jpeg_compressibility"]}
ROLLOUTS |= {"plan": {"preset": "first_steps", "num_steps": 2, "window_size": 1}}
PAIRS = {"train_data": [str(ROOT / "assets/preferences/shapes.parquet")], "data": {"scan": 4}, "num_pairs": 2}
PAIRS |= {"train_batch_size": 2, "cache": False}


def foreign_pipeline(folder: Path) -> Path:
    """Make a model whose pipeline class no family of this package drives: the embedded one, renamed."""
    folder.mkdir(parents=True)
    for part in PIPELINE.iterdir():
        (folder / part.name).symlink_to(part)
    (folder / "model_index.json").unlink()
    index = json.loads((PIPELINE / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusion3PAGPipeline"}))
    return folder


@dataclass(frozen=True)
class Extension:
    """A user's file, and how a configuration names what is in it. ``{spec}`` is ``file.py:name``."""

    code: str
    name: str
    trainer: str
    settings: dict
    use: dict = field(default_factory=dict)
    help: str = "file.py:function"
    foreign: bool = False


CASES = {
    "reward": Extension(
        REWARD, "warmth", "flow_grpo", ROLLOUTS, {"rewards": {"warmth": {"reward": "{spec}"}}}, "reward"
    ),
    "preference loss": Extension(LOSS, "steep", "diffusion_dpo", PAIRS, {"loss": "{spec}"}),
    "loss of single images": Extension(SINGLE_LOSS, "liked_only", "diffusion_dpo", PAIRS, {"loss": "{spec}"}),
    "model family": Extension(FAMILY, "OwnModel", "flow_grpo", ROLLOUTS, {"family": "{spec}"}, "file.py:Class", True),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture
def command(case, tmp_path, monkeypatch):
    """The command that trains with the extension, without consent; what the file registers is removed afterwards."""
    monkeypatch.setattr(rewards, "REWARDS", dict(rewards.REWARDS))
    monkeypatch.setattr(losses, "_LOADED", {})
    (tmp_path / "own.py").write_text(case.code)
    settings = (
        COMMON | case.settings | json.loads(json.dumps(case.use).replace("{spec}", f"{tmp_path}/own.py:{case.name}"))
    )
    if case.foreign:
        settings["model"] = str(foreign_pipeline(tmp_path / "model"))
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    yield ["train", case.trainer, "--config", str(tmp_path / "run.yaml"), "--output_dir"]
    families.FAMILIES.pop("StableDiffusion3PAGPipeline", None)


@pytest.mark.parametrize(
    "case",
    [pytest.param(name, marks=[] if name == "reward" else [pytest.mark.slow]) for name in CASES],
    indirect=True,
)
def test_it_trains_resumes_bit_exactly_and_is_named_in_the_run(case, command, tmp_path, capsys, monkeypatch):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    assert main([*command, str(straight), "--allow_reward_code"]) == 0
    rows = [row for row in MetricsLog.read(straight / "metrics.jsonl") if "loss" in row]
    assert len(rows) == 4
    assert case.name != "warmth" or all(any("warmth" in key for key in row) for row in rows)

    again = [*command, str(resumed), "--resume_from_checkpoint", str(straight / "checkpoint-2"), "--allow_reward_code"]
    assert main(again) == 0
    same_checkpoint(straight / "checkpoint-4", resumed / "checkpoint-4")

    # config.yaml names the code, never the consent, and the model card gives the command with it.
    assert "--allow_reward_code\n" in (straight / "README.md").read_text()
    monkeypatch.setattr(losses, "_LOADED", {})  # as in a new process
    own = ["train", case.trainer, "--config", str(straight / "config.yaml"), "--dry_run"]
    assert main(own) == 2
    assert "--allow_reward_code" in capsys.readouterr().err
    assert main([*own, "--allow_reward_code"]) == 0


def test_a_dry_run_shows_it_and_writes_nothing(case, command, tmp_path, capsys):
    dry = [*command, str(tmp_path / "run"), "--dry_run"]
    assert main(dry) == 2, "a file alone is no consent to run code"
    assert "--allow_reward_code" in capsys.readouterr().err
    assert main([*dry, "--allow_reward_code"]) == 0
    assert f"own.py:{case.name}" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_help_says_how_it_is_given(case, capsys):
    assert main(["train", case.trainer, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert case.help in shown
    assert "--allow_reward_code" in shown


@pytest.mark.parametrize("code", ["raise RuntimeError('no licence')", "def (", "x = 1", "import no_such_package_here"])
def test_code_that_cannot_be_used_ends_with_what_to_try(case, command, tmp_path, capsys, code):
    (tmp_path / "own.py").write_text(code)
    assert main([*command, str(tmp_path / "run"), "--allow_reward_code"]) == 2
    said = capsys.readouterr().err
    assert f"own.py:{case.name}" in said
    assert "write module:" in said
    assert len(said) < 2000
    assert not (tmp_path / "run").exists()
