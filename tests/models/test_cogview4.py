"""CogView4's attention: padding is masked as keys only, so that no query is without a key."""

import pytest
import torch
from diffusers import CogView4Transformer2DModel
from diffusers.models.transformers.transformer_cogview4 import CogView4TrainingAttnProcessor

from diffalign.models import cogview4
from diffalign.models.cogview4 import MaskedKeys

SIZE = torch.tensor([[32.0, 32.0]] * 2)


@pytest.fixture
def transformer():
    torch.manual_seed(0)
    small = {"in_channels": 4, "out_channels": 4, "num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2}
    small |= {"text_embed_dim": 16, "time_embed_dim": 16, "condition_dim": 8, "sample_size": 16}
    return CogView4Transformer2DModel(**small, rope_axes_dim=(16, 16)).eval()


def output(transformer, processor, mask=((1,) * 16, (1,) * 5 + (0,) * 11)):
    """The result for a prompt that fills its tokens and a shorter one."""
    for block in transformer.transformer_blocks:
        block.attn1.set_processor(processor)
    generator = torch.Generator().manual_seed(1)
    return transformer(
        hidden_states=torch.randn(2, 4, 8, 8, generator=generator),
        encoder_hidden_states=torch.randn(2, 16, 16, generator=generator),
        timestep=torch.tensor([500.0, 900.0]),
        original_size=SIZE,
        target_size=SIZE,
        crop_coords=torch.zeros(2, 2),
        attention_kwargs={"text_attn_mask": torch.tensor(mask, dtype=torch.int32)},
        return_dict=False,
    )[0]


@torch.no_grad()
def test_images_are_those_of_diffusers_processor_for_training(transformer):
    found = output(transformer, MaskedKeys())
    assert torch.equal(found, output(transformer, CogView4TrainingAttnProcessor()))
    assert not torch.equal(found, output(transformer, MaskedKeys(), mask=((1,) * 16,) * 2))


def naive(query, key, value, attn_mask):
    """Attention as some kernels compute it: NaN for a query that no key is left to."""
    scores = query @ key.mT / query.shape[-1] ** 0.5
    return scores.masked_fill(~attn_mask, -torch.inf).softmax(-1) @ value


def test_a_kernel_that_gives_nan_for_queries_without_keys_gives_none(transformer, monkeypatch):
    expected = output(transformer, MaskedKeys())
    monkeypatch.setattr(cogview4, "scaled_dot_product_attention", naive)
    found = output(transformer, MaskedKeys())
    torch.testing.assert_close(found, expected)
    found.mean().backward()
    assert all(p.grad.isfinite().all() for p in transformer.parameters() if p.grad is not None)
