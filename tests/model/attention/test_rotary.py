"""Rotation taken off again, through the rotary functions of real model classes."""

import inspect

import pytest
import torch

from lightning_fot.model.attention.rotary import find_rotary, rotate, unrotate
from tests.support.families import CASES, family


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(CASES))
def test_unrotated_keys_are_what_was_rotated(name, dtype):
    model = family(*CASES[name]).to(dtype)
    decoder = model.get_decoder()
    rotary = find_rotary(next(m for m in decoder.modules() if type(m).__name__.endswith("Attention")))
    emb = next(m for m in decoder.modules() if "RotaryEmbedding" in type(m).__name__)
    kinds = {"layer_type": "full_attention"} if "layer_type" in inspect.signature(emb.forward).parameters else {}
    places = torch.tensor([[0, 1, 2, 7, 100], [3, 4, 5, 6, 250]])
    embeddings = emb(torch.zeros(2, 5, 64, dtype=dtype), places, **kinds)
    query, key = torch.randn(2, 4, 5, 16, dtype=dtype), torch.randn(2, 2, 5, 16, dtype=dtype)
    _, rotated = rotate(rotary, query, key, embeddings)
    plain = unrotate(rotary, rotated, embeddings)
    assert plain.dtype == torch.float32
    assert not torch.allclose(rotated[0, :, 1:].float(), key[0, :, 1:].float(), atol=1e-2)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(plain, key.float(), atol=tolerance, rtol=tolerance)
