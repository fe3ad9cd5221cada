"""Two processes on CPUs train weights in shards (torch's FSDP2) as one process trains them whole."""

import os
import subprocess

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file

from diffalign.models.lora import WEIGHTS_NAME
from diffalign.runtime.state import indexed
from tests.conftest import ROOT
from tests.trainers.short_shards import KINDS, SAVED, STEPS, flat_group, run, seen
from tests.trainers.test_flow_grpo_processes import BIN, free_port

pytestmark = pytest.mark.slow  # three trainings of several processes; tests/models/test_sharding.py is the fast part


def assert_near(found, expected, *parts):
    """Weights to 1e-5; outputs, which are sums of many and larger than 1, to 1e-5 of their size too."""
    names = [name for name in expected if name.startswith(parts)]
    assert names
    for name in names:
        near = {"rtol": 1e-5 if name.startswith("output/") else 0, "atol": 1e-5}
        torch.testing.assert_close(found[name], expected[name], **near, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Folder and outcome of each kind of training in this process."""
    folder = tmp_path_factory.mktemp("one")
    return folder, {kind: seen(run(folder / kind, kind)) for kind in KINDS}


@pytest.fixture(scope="module")
def two(tmp_path_factory, one):
    """The folder that two processes wrote."""
    return launched(tmp_path_factory.mktemp("two"), "both", one[0])


def launched(folder, name, other, config="fsdp2"):
    """The folder, once two processes have written into it."""
    launcher = [BIN / "accelerate", "launch", "--config_file", ROOT / f"configs/accelerate/{config}.yaml"]
    options = ["--num_processes", 2, "--main_process_port", free_port()]
    script = ["tests/trainers/short_shards.py", name, folder, other]
    command = [*map(str, [*launcher, *options, *script])]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


def of(folder, name):
    return [load_file(folder / f"{name}-{rank}.safetensors") for rank in (0, 1)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_in_shards_is_that_of_one_process(one, two, kind):
    first, second = of(two, f"fresh/{kind}")
    assert first["local"] + second["local"] == first["all"]
    assert 0.4 < first["local"] / first["all"] < 0.6
    for found in (first, second):
        assert_near(found, one[1][kind], "weight/", "ema/", "output/")
    assert not torch.equal(first["output/policy"], first["output/reference"])
    assert not torch.equal(first["output/policy"], first["output/ema"])


@pytest.mark.parametrize("kind", KINDS)
def test_it_goes_on_with_the_checkpoint_of_one_process(one, two, kind):
    for found in of(two, f"resumed/{kind}"):
        assert_near(found, one[1][kind], "weight/", "ema/", "output/")


@pytest.mark.parametrize("kind", KINDS)
def test_one_process_goes_on_with_a_checkpoint_of_two(one, two, kind, tmp_path):
    path = two / "fresh" / kind / f"checkpoint-{SAVED}"
    for group in ("weights", "optimizer", "ema"):
        whole = load_file(one[0] / kind / f"checkpoint-{SAVED}" / f"{group}.safetensors")
        assert_near(load_file(path / f"{group}.safetensors"), whole, "")
    trainer = run(tmp_path, kind, str(path))
    assert trainer.loop.progress.step == STEPS
    assert_near(seen(trainer), one[1][kind], "weight/", "ema/", "output/")


def test_the_lora_is_the_averaged_one_beside_the_raw_one(one, two):
    for file in (WEIGHTS_NAME, f"raw/{WEIGHTS_NAME}", f"checkpoint-{SAVED}/{WEIGHTS_NAME}"):
        assert_near(load_file(two / "fresh/lora" / file), load_file(one[0] / "lora" / file), "")


def test_full_weights_load_as_the_class_that_they_are_of(one, two):
    for folder in ("transformer", "raw/transformer"):
        found, expected = (
            SD3Transformer2DModel.from_pretrained(f / folder) for f in (two / "fresh/full", one[0] / "full")
        )
        assert_near(found.state_dict(), expected.state_dict(), "")
    assert (
        "from diffusers import DiffusionPipeline, SD3Transformer2DModel" in (two / "fresh/full/README.md").read_text()
    )


def test_it_goes_on_with_its_own_checkpoint_bit_for_bit_and_whole_weights_change_nothing(two, tmp_path):
    folder = launched(tmp_path, "resumed", two / "fresh", "zero2")
    for kind in KINDS:
        for fresh, again in zip(of(two / "fresh", kind), of(folder, kind), strict=True):
            assert all(torch.equal(fresh[name], again[name]) for name in fresh)


def test_processes_whose_data_differ_make_the_same_passes(tmp_path):
    folder = launched(tmp_path, "others", tmp_path)
    first, second = of(folder, "flat_group")
    assert [first["passes"], second["passes"]] == [1, 1]
    trainer = flat_group(tmp_path / "one")
    expected = {f"weight/{name}": t.detach() for name, t in indexed(trainer.loop.state.parameters).items()}
    for found in (first, second):
        assert_near(found, expected, "weight/")
    first, second = of(folder, "courses")
    assert len(first["courses"].unique()) > 1, "the courses are no test"
    assert all(torch.equal(first[name], second[name]) for name in first if name != "local")
