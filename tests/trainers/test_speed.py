"""Options that make a run faster or smaller: they reach the model, and say no in time."""

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch

from diffalign import FlowGRPOConfig, FlowGRPOTrainer
from diffalign.config import parse
from diffalign.models import LoraConfig, load_model, performance, quantise
from diffalign.models.attention import Dispatched
from diffalign.models.quantise import quantisation
from diffalign.runtime.optimizers import make_optimizer
from tests.conftest import PIPELINE
from tests.phases import collect


def test_a_run_with_another_attention_is_on_policy(small, train_prompts, monkeypatch):
    trainer = FlowGRPOTrainer(args=small(attention="_native_math", max_train_steps=1), train_dataset=train_prompts)
    layers = [layer for layer in trainer.model.raw_denoiser.modules() if hasattr(layer, "processor")]
    assert all(isinstance(layer.processor, Dispatched) for layer in layers)
    batch = collect(trainer, 0)
    trainer.loop._before_first_update(batch)
    (output,) = trainer.loop.first_outputs
    samples = torch.arange(len(output))
    assert torch.equal(output, batch.buffer.log_prob[batch.buffer.nodes(samples, 1)])


def test_attention_that_does_not_run_is_refused_before_training(small, train_prompts):
    with pytest.raises(ValueError, match="attention '_native_cudnn' does not run here"):
        FlowGRPOTrainer(args=small(attention="_native_cudnn"), train_dataset=train_prompts)


def test_compile_reaches_the_denoiser(small, monkeypatch):
    compiled = []
    monkeypatch.setattr(performance, "compile_blocks", compiled.append)
    model = SimpleNamespace(raw_denoiser="denoiser", device=torch.device("cpu"), dtype=torch.float32)
    performance.set_performance(model, "native", "no", compile=False)
    assert not compiled
    performance.set_performance(model, "native", "no", compile=True)
    assert compiled == ["denoiser"]


def test_quantisation_without_its_package_or_a_gpu_says_what_to_do(monkeypatch):
    monkeypatch.setattr(quantise, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs bitsandbytes: pip install diffalign\[quantise\]"):
        load_model(PIPELINE, quantise="4bit")
    monkeypatch.setattr(quantise, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="needs a CUDA device"):
        quantisation("8bit", "transformer")
    with pytest.raises(ValueError, match="unknown quantisation '2bit'"):
        quantisation("2bit", "transformer")


def test_a_quantised_base_needs_a_lora(small):
    with pytest.raises(ValueError, match=r"quantise 4bit freezes the base: give lora\.rank"):
        small(quantise="4bit", lora=LoraConfig(rank=0)).validate()


def test_a_base_in_half_precision_carries_a_lora_in_float32(small, train_prompts):
    args = small(base_precision="bf16", max_train_steps=1)
    trainer = FlowGRPOTrainer(args=args, train_dataset=train_prompts)
    trainer.train()
    denoiser, parts = trainer.model.raw_denoiser, trainer.model.pipeline.components
    kinds = {"lora": torch.float32, "base": torch.bfloat16}
    for name, weight in denoiser.named_parameters():
        assert weight.dtype == kinds["lora" if "lora_" in name else "base"], name
    assert parts["text_encoder_3"].dtype == torch.bfloat16
    assert parts["vae"].dtype == torch.float32
    assert any(p.abs().max() > 0 for n, p in denoiser.named_parameters() if "lora_B" in n)
    with pytest.raises(ValueError, match="base_precision bf16 freezes the base"):
        small(base_precision="bf16", lora=LoraConfig(rank=0)).validate()


def test_settings_of_parts_that_leave_and_of_the_cache_say_no_in_time(small, tmp_path):
    with pytest.raises(ValueError, match=r"cache_dir .*, and nothing is kept: set cache: true"):
        small(cache_dir=tmp_path).validate()
    args = small(cache=True, cache_dir=str(tmp_path))
    args.validate()
    assert args.cache_folder == tmp_path
    assert (small().cache_folder, small(cache=True).cache_folder) == (None, small().output_dir / "cache")
    assert parse(FlowGRPOConfig, ["--offload", "[vae]"]).offload == ("vae",)
    with pytest.raises(ValueError, match=r"offload.*text_encoders\|vae"):
        parse(FlowGRPOConfig, ["--offload", "[text]"])


def test_the_optimizer_is_adamw_or_the_one_in_8_bits(small, monkeypatch):
    parameters = [torch.nn.Parameter(torch.ones(2))]
    args = small(adam_beta1=0.8, adam_weight_decay=0.02, learning_rate=0.5)
    assert type(make_optimizer(parameters, args)) is torch.optim.AdamW
    monkeypatch.delitem(sys.modules, "bitsandbytes.optim", raising=False)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"adamw_8bit needs bitsandbytes .*or set optimizer: adamw"):
        make_optimizer(parameters, small(optimizer="adamw_8bit"))

    with pytest.raises(ValueError, match=r"optimizer: expected adamw\|adamw_8bit, got 'sgd'"):
        small(optimizer="sgd")

    class Eight(torch.optim.AdamW):
        pass

    monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace(AdamW8bit=Eight))
    args.optimizer = "adamw_8bit"
    found = make_optimizer(parameters, args)
    assert type(found) is Eight
    group = found.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"], group["eps"]) == (0.5, (0.8, 0.999), 0.02, 1e-8)
