"""Every trainer on a device that refuses mixed devices: runs, evaluations, resume, and wrong devices that it finds."""

import math
import shutil
from contextlib import contextmanager

import pytest
from torch.nn import functional as F

from diffalign.trainers.registry import algorithm_names
from tests.conftest import PROMPTS
from tests.device import strict
from tests.device.runs import VARIANTS, make, on, train, weights
from tests.phases import collect

# The default tests train with one of them, the slow ones with all.
QUICK = [pytest.param(name, marks=() if name == "flow_grpo" else pytest.mark.slow) for name in algorithm_names()]

RUNS = [(name, variant) for name in algorithm_names() for variant in VARIANTS.get(name, {"trial": {}})]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Run folders of every trainer after a step on the device, with a checkpoint."""
    folders = {}

    def folder(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("finished") / name
            train(name, folders[name], **LONG, max_train_steps=1, **first_variant(name))
        return folders[name]

    return folder


LONG = {"checkpointing_steps": 1, "resume_from_checkpoint": "latest"}


def first_variant(name):
    """Return the variant of a trainer that reaches the most tensors."""
    return next(iter(VARIANTS.get(name, {"trial": {}}).values()))


@pytest.mark.parametrize(("name", "variant"), RUNS)
@pytest.mark.filterwarnings("ignore")
def test_an_update_is_that_of_the_cpu(name, variant, tmp_path, monkeypatch):
    changes, found = VARIANTS.get(name, {"trial": {}})[variant], {}
    for device in (strict.NAME, "cpu"):
        with on(device, monkeypatch):
            trainer = make(name, tmp_path / device, **changes)
            batch = collect(trainer)
            trainer.algorithm.on_first_batch(batch)
            (minibatch, *_) = trainer.algorithm.minibatches(batch, 0)
            metrics = trainer.loop._update(batch, minibatch)
            trainer.algorithm.on_step(batch, metrics)
            found[device] = metrics
    tolerance = 0.05 if changes.get("mixed_precision") == "bf16" else 1e-3
    for key in ("loss", "grad_norm"):
        assert math.isfinite(found[strict.NAME][key])
        assert found[strict.NAME][key] == pytest.approx(found["cpu"][key], rel=tolerance, abs=1e-6)
    assert found[strict.NAME].get("ratio_mean", 1.0) == 1.0, "on policy, to the last bit"


@pytest.mark.parametrize("name", QUICK)
def test_it_trains_without_float64(name, tmp_path):
    strict.set_float64(False)
    try:
        (row,) = train(name, tmp_path / "run", max_train_steps=1, **first_variant(name))
    finally:
        strict.set_float64(True)
    assert math.isfinite(row["loss"])
    assert row.get("ratio_mean", 1.0) == 1.0


@pytest.mark.parametrize("name", QUICK)
def test_a_checkpoint_of_the_device_goes_on_on_the_cpu(name, finished, tmp_path, monkeypatch):
    shutil.copytree(finished(name), tmp_path / "moved")
    with on("cpu", monkeypatch):
        rows = train(name, tmp_path / "moved", max_train_steps=2, **LONG, **first_variant(name))
    assert rows[-1]["step"] == 2
    assert math.isfinite(rows[-1]["loss"])


@pytest.mark.slow
@pytest.mark.parametrize("name", algorithm_names())
def test_a_run_that_changes_devices_ends_where_one_that_stays_does(name, finished, tmp_path, monkeypatch):
    shutil.copytree(finished(name), tmp_path / "moved")
    with on("cpu", monkeypatch):
        train(name, tmp_path / "stays", max_train_steps=3, **LONG, **first_variant(name))
    for steps, device in ((2, "cpu"), (3, strict.NAME)):
        with on(device, monkeypatch):
            train(name, tmp_path / "moved", max_train_steps=steps, **LONG, **first_variant(name))
    stays, moved = weights(tmp_path / "stays"), weights(tmp_path / "moved")
    assert (stays - moved).norm() < 0.05 * stays.norm()


# Wrong devices --------------------------------------------------------------------------------------------------------


@contextmanager
def first_product_on_the_cpu(monkeypatch):
    """In which the first result of a linear or convolution layer is left on the CPU; yields whether there was one."""
    planted = []

    def plant(function):
        def call(*args, **kwargs):
            found = function(*args, **kwargs)
            if planted:
                return found
            planted.append(True)
            return found.cpu()

        return call

    with monkeypatch.context() as patch:
        for name in ("linear", "conv2d"):
            patch.setattr(F, name, plant(getattr(F, name)))
        yield planted


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", algorithm_names())
def test_a_wrong_device_in_any_phase_is_an_error(name, tmp_path, monkeypatch):
    held_out, lines = tmp_path / "two.jsonl", (PROMPTS / "shapes_validation.jsonl").read_text().splitlines()
    held_out.write_text("\n".join(lines[:2]) + "\n")
    trainer = make(name, tmp_path / "run", eval_prompts=str(held_out), eval_rewards=["shapes"])
    algorithm, state = trainer.algorithm, trainer.loop.state

    def phase(title, call):
        """Run a phase with a tensor on the wrong device, then as it is."""
        with first_product_on_the_cpu(monkeypatch) as planted:
            try:
                call()
            except RuntimeError as error:
                assert "same device" in str(error), error  # noqa: PT017
            else:
                pytest.fail(f"{title}: " + ("a tensor on the wrong device was taken" if planted else "not reached"))
        return call()

    phase("evaluate", lambda: trainer.outputs.evaluate(0))
    batch = phase("collect", lambda: collect(trainer))
    phase("probe", lambda: algorithm.probe(batch))
    (minibatch, *_) = algorithm.minibatches(batch, 0)
    (micro, *_) = minibatch.micros
    loss, _ = phase("loss", lambda: algorithm.loss(micro))
    trainer.run.accelerator.backward(loss)
    state.step(None, 1.0)
    trainer.run.accelerator.backward(algorithm.loss(micro)[0])
    moments = state.optimizer.optimizer.state[state.parameters[0]]
    moments["exp_avg"] = moments["exp_avg"].cpu()
    with pytest.raises(RuntimeError, match="same device"):
        state.step(None, 1.0)
