"""The flow of a training, as a reader of the code sees it."""

import contextlib
import inspect
import sys
from pathlib import Path

from diffalign.cli import main
from diffalign.losses import flow_grpo
from diffalign.runtime import loop
from tests.conftest import ROOT

PACKAGE = str(ROOT / "diffalign")
CALLS = 8


class Reached(BaseException):
    """The loss is computed; nothing of the rest is needed."""


def test_from_the_script_to_the_loss_it_is_a_few_calls(tmp_path, monkeypatch):
    """Frames of the package, from ``main`` to the objective, which computes the loss; none is a closure or a lambda."""
    stack: list[str] = []

    def reached(*arguments):
        frame = sys._getframe(1)
        while frame is not None:
            code = frame.f_code
            if code.co_filename.startswith(PACKAGE):
                stack.insert(0, f"{Path(code.co_filename).relative_to(PACKAGE)}:{code.co_qualname}")
            frame = frame.f_back
        raise Reached

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(flow_grpo, "surrogate", reached)
    small = {"num_groups": 1, "group_size": 4, "max_train_steps": 1, "eval_prompts": "null", "output_dir": tmp_path}
    options = [word for name, value in small.items() for word in (f"--{name}", str(value))]
    with contextlib.suppress(Reached):
        main(["train", "flow_grpo", "--config", "configs/flow_grpo/shapes.yaml", *options])
    assert stack[0] == "cli.py:main"
    assert stack[-1].startswith("losses/flow_grpo.py:")
    assert not [name for name in stack if "<" in name], stack
    assert len(stack) <= CALLS, stack


def test_an_iteration_reads_as_sample_score_advantage_update():
    lines = [line.strip() for line in inspect.getsource(loop.Loop._iterate).splitlines()]
    phases = ("algorithm.sample(", "algorithm.score(", "algorithm.advantage(", "self._update(")
    places = [[number for number, line in enumerate(lines) if phase in line] for phase in phases]
    assert all(len(found) == 1 for found in places), places
    sample, score, advantage, update = (found[0] for found in places)
    assert (score, advantage) == (sample + 1, sample + 2)
    between = [line for line in lines[advantage + 1 : update] if "algorithm." in line]
    assert update > advantage
    assert not between, "no other phase comes between"
