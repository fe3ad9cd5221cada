"""Compiled blocks: one graph for sampling and training, so that a replayed step is the sampled one."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from diffalign.models import LoraConfig, compiling
from diffalign.models.attention import set_attention
from diffalign.models.compiling import OneGraph, compile_blocks, compile_refusal


def probe(model):
    x = torch.randn(2, *model.latent_shape(), generator=torch.Generator().manual_seed(0))
    conditioning, level = model.encode(["a red circle", "a blue square"]), model.levels(4)[1]
    return lambda: model.predict(x, level, conditioning)


@pytest.fixture
def trained(model):
    """With a LoRA that changes the output."""
    model.train(LoraConfig(rank=4))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.weights.trainable:
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def gradients(model, predict):
    predict().square().mean().backward()
    found = [p.grad.clone() for p in model.weights.trainable]
    model.raw_denoiser.zero_grad()
    return found


def test_sampling_and_training_run_the_same_graphs(trained):
    predict = probe(trained)
    with torch.no_grad():
        plain = predict()
    expected = gradients(trained, predict)
    names = list(trained.raw_denoiser.state_dict())
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compile_blocks(trained.raw_denoiser, backend=counter)
    with torch.no_grad():
        sampled = predict()
    graphs = counter.frame_count
    replayed = predict()
    assert torch.equal(sampled, replayed.detach())
    assert (sampled - plain).abs().max() < 1e-5
    assert not sampled.requires_grad
    assert replayed.requires_grad
    # The last block gives no text on; all others share a graph.
    assert counter.frame_count == graphs == 2
    found = gradients(trained, predict)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(found, expected, strict=True))
    assert list(trained.raw_denoiser.state_dict()) == names


@pytest.mark.slow
def test_another_attention_can_be_compiled_too(trained):
    predict = probe(trained)
    set_attention(trained.raw_denoiser, "_native_math")
    plain = predict().detach()
    torch._dynamo.reset()
    compile_blocks(trained.raw_denoiser, backend="aot_eager")
    with torch.no_grad():
        sampled = predict()
    assert torch.equal(sampled, predict().detach())
    assert (sampled - plain).abs().max() < 1e-5


def test_a_block_gets_inputs_that_need_gradients_and_keeps_none_of_them_while_sampling():
    seen = []

    def block(x, *, text, step):
        seen.append((torch.is_grad_enabled(), x.requires_grad, text.requires_grad, step.requires_grad))
        return x * 2, {"text": text + 1}, None

    call, step = OneGraph(block), torch.tensor(3)
    with torch.no_grad():
        image, named, nothing = call(torch.ones(2), text=torch.ones(2), step=step)
    assert (image.requires_grad, named["text"].requires_grad, nothing) == (False, False, None)
    given = torch.ones(2, requires_grad=True)
    call(given, text=torch.ones(2), step=step)[0].sum().backward()
    assert given.grad.tolist() == [2, 2]
    assert seen == [(True, True, True, False)] * 2


def test_a_model_without_named_blocks_is_refused():
    with pytest.raises(ValueError, match="what a Linear repeats; set compile: false"):
        compile_blocks(torch.nn.Linear(2, 2))


def test_a_machine_that_cannot_compile_says_why(monkeypatch):
    def fail(function):
        raise RuntimeError("Failed to find C++ compiler\nand so on")

    monkeypatch.setattr(compiling.torch, "compile", fail)
    assert compile_refusal("cpu") == "Failed to find C++ compiler"
    monkeypatch.setattr(compiling.torch, "compile", lambda function: lambda x: x.sum())
    assert compile_refusal("cpu") == "its gradient is wrong"


@pytest.mark.slow
def test_compiled_by_inductor_a_replay_is_still_the_sample(trained):
    assert compile_refusal("cpu") is None
    predict = probe(trained)
    plain = predict().detach()
    compile_blocks(trained.raw_denoiser)
    with torch.no_grad():
        sampled = predict()
    assert torch.equal(sampled, predict().detach())
    assert (sampled - plain).abs().max() < 1e-4
