"""A run reaches the hub with its card; a hub that refuses costs a clear error before the training, and no run after."""

import dataclasses
import shlex

import pytest
import yaml
from huggingface_hub.cli.hf import app as hf
from safetensors.torch import load

from diffalign import FlowGRPOTrainer, LoraConfig
from diffalign.trainers.hub import upload_command
from tests.hub_server import hub_server

NAME = "me/circles"


@pytest.fixture
def hub(monkeypatch):
    with hub_server(monkeypatch) as hub:
        yield hub


def train(small, train_prompts, **changes):
    args = small(push_to_hub=NAME, eval_rewards=("shapes_strict",), **changes)
    trainer = FlowGRPOTrainer(args=args, train_dataset=train_prompts[:2], eval_dataset=train_prompts[:2])
    return trainer, args


@pytest.mark.usefixtures("curves")
def test_a_run_is_uploaded_with_its_card(hub, small, train_prompts, capfd):
    trainer, args = train(small, train_prompts, hub_strategy="checkpoints", checkpointing_steps=1, cache=True)
    assert hub.private == {NAME: True}
    assert hub.repositories == {NAME: {}}
    private = ("earlier/checkpoint-9/optimizer.safetensors", "mine/faces.png", "notes.safetensors")
    for name in private:
        (args.output_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (args.output_dir / name).write_bytes(b"private")
    trainer.train()
    assert list((args.output_dir / "cache").rglob("*.safetensors"))
    files = hub.repositories[NAME]
    assert not [name for name in files if name in private or name.startswith(("cache", "samples/step"))]
    assert {"README.md", "config.yaml", "pytorch_lora_weights.safetensors", "compare.png", "curves.png"} <= set(files)
    assert files["README.md"] == (args.output_dir / "README.md").read_bytes()
    assert load(files["pytorch_lora_weights.safetensors"])
    assert "checkpoint-2/pytorch_lora_weights.safetensors" in files
    assert not [name for name in files if "optimizer" in name or name.startswith(("rollouts", "samples/base"))]
    assert hub.messages[-1] == "Step 2, end of training"

    card = yaml.safe_load(files["README.md"].decode().split("---")[1])
    assert card["library_name"] == "diffusers"
    assert card["pipeline_tag"] == "text-to-image"
    assert card["model-index"][0]["results"][0]["metrics"][0]["type"] == "shapes_strict"
    shown = [entry["output"]["url"] for entry in card["widget"]]
    assert shown == ["samples/example-0.png", "samples/example-1.png"]
    assert all(files[name].startswith(b"\x89PNG") for name in shown)

    assert set(hub.tokens) == {"Bearer hf_secret"}
    output = "".join(capfd.readouterr()) + (args.output_dir / "train.log").read_text()
    assert "hf_secret" not in output + "".join(map(str, files))
    assert not any(b"hf_secret" in content for content in files.values())


def test_a_hub_that_refuses_is_known_before_the_model_loads(hub, small, train_prompts, monkeypatch):
    monkeypatch.setattr("diffalign.trainers.base.load", lambda config: pytest.fail("the model was loaded"))
    hub.refuse = 403
    with pytest.raises(ValueError, match=f"push_to_hub {NAME}: the hub refuses: .*403.*hf auth login"):
        train(small, train_prompts)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nobody answers there
    with pytest.raises(ValueError, match=f"push_to_hub {NAME}: the hub refuses: .*leave push_to_hub out"):
        train(small, train_prompts)


def test_a_hub_that_fails_later_costs_no_run(hub, small, train_prompts):
    trainer, _ = train(small, train_prompts, hub_strategy="checkpoints", checkpointing_steps=1)
    hub.refuse = 400
    with pytest.warns(
        UserWarning, match=f"push_to_hub {NAME} failed: .*the run is complete: hf upload {NAME} "
    ) as warned:
        result = trainer.train()
    hub.refuse = 0
    command = upload_command(NAME, result.output_dir)
    assert any(command in str(warning.message) for warning in warned)
    hf(shlex.split(command)[1:], standalone_mode=False)
    files = set(hub.repositories[NAME])
    assert {"README.md", "config.yaml", "metrics.jsonl", "pytorch_lora_weights.safetensors"} <= files
    assert not [name for name in files if name.startswith(("checkpoint-", "samples/step", "rollouts", "cache"))]
    assert result.weights[0].is_file()
    assert not any("hf_secret" in str(warning.message) for warning in warned)


def test_checkpoints_without_a_lora_have_nothing_to_upload(small):
    config = small(push_to_hub=NAME, hub_strategy="checkpoints", lora=LoraConfig(rank=0))
    with pytest.raises(ValueError, match="hub_strategy checkpoints uploads LoRAs, and lora"):
        config.validate()


@pytest.mark.slow
def test_an_existing_repository_and_a_wrong_name(hub, small, train_prompts):
    hub.repositories[NAME] = {"other.txt": b"kept"}
    trainer, args = train(small, train_prompts, max_train_steps=1)
    trainer.train()
    assert hub.repositories[NAME]["other.txt"] == b"kept"
    assert "README.md" in hub.repositories[NAME]
    assert hub.messages == ["Step 1, end of training"]
    hub.repositories[NAME] = {}
    again = FlowGRPOTrainer(
        args=dataclasses.replace(args, resume_from_checkpoint="latest"), train_dataset=train_prompts[:2]
    )
    again.train()
    assert "README.md" in hub.repositories[NAME], "nothing to do but to upload"
    with pytest.raises(ValueError, match="push_to_hub 'circles' is no owner/name, such as me/my-lora"):
        small(push_to_hub="circles").validate()
