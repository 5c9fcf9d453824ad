"""Fixtures of this room's tests."""

import pytest

from helpers.chunked_mimic_cases import VOCABULARY
from llava_mod_hf.losses import chunked_mimic


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Two rows at a time within a chunk, so that blocks do not divide the chunks either."""
    monkeypatch.setattr(chunked_mimic, "BLOCK_LOGITS", 2 * VOCABULARY)
