"""Attention back ends: tried by a call, refused with a reason, and really used once chosen."""

import sys

import pytest
import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName
from torch.nn import functional as F

from diffalign.models import attention
from diffalign.models.attention import choose_attention, refusal, set_attention

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchs_own_attention_trains_on_a_cpu(dtype):
    assert refusal("native", CPU, dtype) is None
    assert refusal("_native_math", CPU, dtype) is None


def test_kernels_for_other_devices_are_refused_in_one_line():
    reason = refusal("_native_cudnn", CPU, torch.float32)
    assert reason
    assert "\n" not in reason


def test_a_package_that_is_missing_or_does_not_fit_is_said_plainly(monkeypatch):
    monkeypatch.delitem(sys.modules, "xformers", raising=False)
    monkeypatch.setattr(sys, "path", [])
    assert refusal("xformers", CPU, torch.float32) == "xformers is not installed"

    def built_for_another(name):
        raise OSError("libtorch_cuda.so: undefined symbol\nand much more")

    monkeypatch.setattr(attention.importlib, "import_module", built_for_another)
    expected = "xformers cannot be imported: libtorch_cuda.so: undefined symbol"
    assert refusal("xformers", CPU, torch.float32) == expected
    with pytest.raises(ValueError, match=r"'xformers' does not run here .*: write attention: auto"):
        choose_attention("xformers", CPU, torch.float32)


def test_unknown_names_list_the_known():
    with pytest.raises(ValueError, match=r"unknown attention back end 'flush'; known: auto, .*flash"):
        choose_attention("flush", CPU, torch.float32)


def heads_last(q, k, v):
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (lambda q, k, v: heads_last(q, k, v) + 0.1, "wrong by 1.0e-01"),
        (lambda q, k, v: heads_last(q, k, v).detach() + 0 * q, "wrong by"),
        (lambda q, k, v: heads_last(q.detach(), k, v), "no backward"),
    ],
)
def test_a_kernel_that_computes_something_else_is_refused(kernel, reason, monkeypatch):
    monkeypatch.setattr(attention, "dispatch_attention_fn", kernel)
    assert reason in refusal("native", CPU, torch.float32)


def test_auto_takes_the_first_that_can_train_and_never_xformers(monkeypatch):
    assert "xformers" not in attention.AUTO
    assert choose_attention("auto", CPU, torch.float32) == "native"
    monkeypatch.setattr(attention, "refusal", lambda name, device, dtype: None if name == "flash" else "no")
    assert choose_attention("auto", CPU, torch.float32) == "flash"
    monkeypatch.setattr(attention, "refusal", lambda name, device, dtype: "no")
    assert choose_attention("auto", CPU, torch.float32) == "native"


@pytest.fixture
def counted(monkeypatch):
    """Calls of a back end of the dispatcher, by its name."""
    calls = []
    name, registry = AttentionBackendName._NATIVE_MATH, attention_dispatch._AttentionBackendRegistry
    original = registry._backends[name]

    def call(query, **rest):
        calls.append(query.dtype)
        return original(query, **rest)

    monkeypatch.setitem(registry._backends, name, call)
    return calls


def probe(model):
    x = torch.randn(2, *model.latent_shape(), generator=torch.Generator().manual_seed(0))
    conditioning = model.encode(["a red circle", "a blue square"])
    return lambda: model.predict(x, model.levels(4)[1], conditioning)


def test_every_attention_layer_uses_the_chosen_back_end(model, counted):
    predict = probe(model)
    before = predict()
    assert not counted
    layers = [layer for layer in model.raw_denoiser.modules() if hasattr(layer, "processor")]
    set_attention(model.raw_denoiser, "_native_math")
    set_attention(model.raw_denoiser, "_native_math")
    assert (predict() - before).abs().max() < 1e-4
    assert len(counted) == len(layers) > 0
    active, _ = attention_dispatch._AttentionBackendRegistry.get_active_backend()
    assert active == AttentionBackendName.NATIVE, "other models of the process would change too"
    set_attention(model.raw_denoiser, "native")
    assert torch.equal(predict(), before)
    assert len(counted) == len(layers)


def test_checkpointed_blocks_are_computed_again_with_the_same_back_end(model, counted):
    predict = probe(model)
    model.raw_denoiser.proj_out.requires_grad_(True)
    first = next(p for p in model.raw_denoiser.transformer_blocks[0].parameters())
    first.requires_grad_(True)
    set_attention(model.raw_denoiser, "_native_math")
    model.raw_denoiser.train().enable_gradient_checkpointing()
    loss = predict().square().mean()
    forward = len(counted)
    loss.backward()
    assert len(counted) == 2 * forward
    assert first.grad.abs().sum() > 0


def test_other_kernels_get_the_dtype_of_autocast(model, counted):
    predict = probe(model)
    set_attention(model.raw_denoiser, "_native_math")
    with torch.autocast("cpu", torch.bfloat16):
        predict()
    assert set(counted) == {torch.bfloat16}


def test_a_unet_is_given_one_too(counted):
    from tests.models import tiny_unet_pipelines as tiny

    network = tiny.unet()
    set_attention(network, "_native_math")
    network(torch.randn(1, 4, 8, 8), torch.tensor([3.0]), torch.randn(1, 5, 24))
    assert counted


def test_a_reason_without_words_is_the_errors_name():
    assert attention.first_line(NotImplementedError()) == "NotImplementedError"
    assert attention.first_line(ValueError("a\nb")) == "a"
