"""A model that nobody trained: ``attach_memory(model)`` and ``configs/training_free.yaml`` say the same."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
import yaml

from lightning_fot import MemoryConfig, attach_memory
from lightning_fot.errors import SettingError
from lightning_fot.request.request import SHIPPED
from tests.support.decoder_types import tiny
from tests.support.models import tiny_llama, tokens


def test_the_configuration_is_what_attaching_takes():
    content = yaml.safe_load((SHIPPED / "training_free.yaml").read_text(encoding="utf-8"))
    with attach_memory(tiny_llama()) as lm:
        assert lm.memory_layers == (0, 1, 2, 3)
        assert asdict(lm.config) == asdict(MemoryConfig(**content["model"]["memory"]))


def test_a_window_is_the_plain_model_and_more_text_is_remembered():
    """What was read changes what is said, beyond the positions that the model knows."""
    model, ids = tiny_llama(), tokens(1, 1200)
    with torch.no_grad():
        expected = model(ids[:, :200]).logits
        with attach_memory(model) as lm:
            assert float((lm(ids[:, :200]).logits - expected).abs().max()) < 1e-4
            memory = lm.ingest(ids, lm.new_memory())
            beside, alone = (lm(ids[:, :20], memory=known).logits for known in (memory, None))
    assert len(memory) == 1200
    assert float((beside - alone).abs().max()) > 1e-2


def test_a_change_leaves_the_rest():
    assert asdict(MemoryConfig.training_free(window=256)) == {**asdict(MemoryConfig.training_free()), "window": 256}


def test_a_model_without_a_rotation_is_told_what_to_set():
    with pytest.raises(SettingError, match=r"does not rotate.*Set positions=first"):
        attach_memory(tiny("gpt2", max_position_embeddings=1024))
