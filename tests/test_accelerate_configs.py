"""The launch configurations mean what they say to accelerate."""

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import FullyShardedDataParallelPlugin

from tests.conftest import ROOT

FOLDER = ROOT / "configs/accelerate"


# Name -> accelerate's word for it, machines, processes over all of them.
CONFIGS = {
    "cpu": ("NO", 1, 1),
    "one_gpu": ("NO", 1, 1),
    "ddp": ("MULTI_GPU", 1, 8),
    "nodes": ("MULTI_GPU", 2, 16),
    "fsdp2": ("FSDP", 1, 8),
    "deepspeed_zero2": ("DEEPSPEED", 1, 8),
}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_each_starts_the_processes_that_its_comment_names(path):
    config = load_config_from_file(str(path))
    assert (config.distributed_type, config.num_machines, config.num_processes) == CONFIGS[path.stem]
    assert config.mixed_precision == "no", "the trainer's own option decides"


def test_fsdp2_shards_the_blocks_of_a_denoiser(frozen, monkeypatch):
    config = load_config_from_file(str(FOLDER / "fsdp2.yaml")).fsdp_config
    for key, value in config.items():
        monkeypatch.setenv(key.upper(), str(value).lower() if isinstance(value, bool) else str(value))
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward, plugin.activation_checkpointing) == (2, True, False)
    assert plugin.cpu_ram_efficient_loading is False
    plugin.set_auto_wrap_policy(frozen.raw_denoiser)
    (blocks,) = plugin.auto_wrap_policy.keywords["transformer_layer_cls"]
    assert blocks is type(frozen.raw_denoiser.transformer_blocks[0])


def test_zero_2_leaves_accumulation_and_clipping_to_the_trainer():
    config = load_config_from_file(str(FOLDER / "deepspeed_zero2.yaml")).deepspeed_config
    assert (config["zero_stage"], config["gradient_accumulation_steps"]) == (2, 1)
