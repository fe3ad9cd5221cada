"""A run opens with what it will do and closes with what it achieved; its rate and its estimate count steps alone."""

import time
from types import SimpleNamespace

import pytest
from tqdm.auto import tqdm

from diffalign.cli import main
from diffalign.config import save_yaml
from diffalign.runtime.progress import TimeLeft, estimate, evaluations_left, paused
from diffalign.runtime.tracking import MetricsLog
from tests.conftest import PROMPTS


@pytest.fixture(scope="module")
def output(tmp_path_factory, request):
    """What a run of two steps prints on standard output."""
    import contextlib
    import io

    from accelerate.state import AcceleratorState

    from diffalign import FlowGRPOConfig, LoraConfig
    from diffalign.diffusion.plan import PlanConfig
    from tests.conftest import PIPELINE

    folder = tmp_path_factory.mktemp("announced")
    (folder / "held_out.jsonl").write_text("".join((PROMPTS / "shapes_validation.jsonl").open().readlines()[:2]))
    args = FlowGRPOConfig(
        model=str(PIPELINE), max_sequence_length=16, train_prompts=PROMPTS / "shapes_train.jsonl",
        eval_prompts=folder / "held_out.jsonl", output_dir=folder / "run", rewards={"shapes": 1.0, "brightness": 0.5},
        lora=LoraConfig(rank=4), plan=PlanConfig(preset="first_steps", num_steps=2, window_size=1), num_groups=1,
        group_size=4, rollout_batch_size=4, train_batch_size=4, max_train_steps=2,
    )  # fmt: skip
    save_yaml(args, folder / "run.yaml")
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        assert main(["train", "flow_grpo", "--config", str(folder / "run.yaml")]) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    return text.getvalue(), folder / "run"


def test_it_opens_with_what_it_will_do(output):
    text, folder = output
    opening = text.split("about ")[0]
    for part in ("shapes-sd3, LoRA of rank 4", "shapes_train.jsonl", "shapes, 0.5 brightness", "2 optimizer steps",
                 "2, of 4 images each (2 prompts), by shapes, brightness", str(folder)):  # fmt: skip
        assert part in opening


def test_it_closes_with_what_was_measured_and_where_it_is(output):
    text, folder = output
    base, *_, tuned = [row for row in MetricsLog.read(folder / "metrics.jsonl") if "eval/accuracy" in row]
    for name in ("shapes", "brightness"):
        assert f"{name} {base[f'eval/{name}']:.3f} -> {tuned[f'eval/{name}']:.3f}" in text
    closing = text[text.index("achieved") :]
    assert "(base -> tuned, over all 4 images, after 2 steps)" in closing
    for file in ("pytorch_lora_weights.safetensors", "README.md", "compare.png"):
        assert str(folder / file) in closing
        assert (folder / file).is_file()
    assert f"diffalign compare {folder}" in closing


def test_the_time_that_is_left_is_estimated_once(output):
    text, _ = output
    (line,) = [line for line in text.splitlines() if "to go:" in line]
    assert "1 step at" in line
    assert "1 evaluation at" in line


def test_an_estimate_counts_evaluations_apart():
    assert estimate(98, 4.0, 3, 30.0) == "about 8 min 2 s to go: 98 steps at 4 s, 3 evaluations at 30 s"
    assert estimate(10, 1000.0, 0, 0.0) == "about 2 h 46 min to go: 10 steps at 16 min 40 s"
    left = TimeLeft()
    left.evaluation = 30.0
    args = SimpleNamespace(max_train_steps=100, eval_steps=40)
    assert left.line(args, 0, 2, 8.0) == estimate(98, 4.0, 3, 30.0)
    assert left.line(args, 2, 4, 8.0) is None


LEFT = [(0, 100, 0, 1), (0, 100, 40, 3), (40, 100, 40, 2), (0, 100, 50, 2), (100, 100, 10, 0)]


@pytest.mark.parametrize(("step", "total", "every", "count"), LEFT)
def test_evaluations_that_follow(step, total, every, count):
    assert evaluations_left(step, total, every) == count


def test_a_pause_is_not_in_the_rate_of_the_bar():
    with open("/dev/null", "w") as sink, tqdm(total=10, file=sink, mininterval=0) as bar:
        with paused(bar):
            time.sleep(0.3)
        time.sleep(0.02)
        bar.update()
        assert bar.format_dict["elapsed"] < 0.2
        assert bar.format_dict["rate"] > 5
    with tqdm(disable=True) as bar, paused(bar):
        pass
