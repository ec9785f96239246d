"""Shared by all tests."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

# A busy machine is slow, not wrong: no test judges by time.
settings.register_profile("ckptd", deadline=None)
settings.load_profile("ckptd")


@pytest.fixture(autouse=True)
def _own_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the CKPTD_ variables of whoever runs it."""
    for name in [name for name in os.environ if name.startswith("CKPTD_")]:
        monkeypatch.delenv(name)
