"""Two processes on CPUs shard a model by torch's own FSDP2; its LoRA is that of an unsharded training."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffalign.models.lora import WEIGHTS_NAME
from tests.conftest import ROOT

TORCHRUN = Path(sys.executable).parent / "torchrun"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("fsdp2")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    script = str(ROOT / "tests/models/short_fsdp2.py")
    command = [str(TORCHRUN), "--nproc_per_node", "2", "--master_port", str(port), script, str(found)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    return found


def test_each_process_holds_half_and_the_main_one_gathers_the_whole(folder):
    first, second, whole = (load_file(folder / f"{name}.safetensors") for name in ("0", "1", "whole"))
    assert (first["world"], second["world"]) == (2, 2)
    names = [name for name in whole if name.startswith("before/")]
    assert sum(whole[name].numel() for name in names) == first["local"] + second["local"]
    assert first["local"] < 0.6 * (first["local"] + second["local"])
    assert set(second) == {"world", "local"}, "others than the main process hold whole weights"
    assert {name for name in first if "/" in name} == set(whole)
    assert all(torch.equal(first[name], whole[name]) for name in names)


def test_a_sharded_training_is_the_unsharded_one(folder):
    sharded, whole = (load_file(folder / f"{name}.safetensors") for name in ("0", "whole"))
    names = [name for name in whole if name.startswith("after/")]
    assert all((sharded[name] - whole[name]).abs().max() < 1e-4 for name in names)
    # What the last block says of the text goes nowhere.
    still = [name for name in names if torch.equal(whole[name], whole[name.replace("after", "before")])]
    assert all(".add_q_proj.lora_B" in name for name in still)
    assert len(still) <= 1


def test_the_gathered_lora_is_in_diffusers_layout(folder):
    sharded, whole = (load_file(folder / f"lora-{name}" / WEIGHTS_NAME) for name in ("0", "whole"))
    assert list(sharded) == list(whole)
    assert all((sharded[name] - whole[name]).abs().max() < 1e-4 for name in whole)
