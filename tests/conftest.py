"""Shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import structlog
from hypothesis import settings

# A busy machine is slow, not wrong: no test judges by time.
settings.register_profile("ckptd", deadline=None)
settings.load_profile("ckptd")


@pytest.fixture(autouse=True)
def _own_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the CKPTD_ variables of whoever runs it."""
    for name in [name for name in os.environ if name.startswith("CKPTD_")]:
        monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _own_log() -> Iterator[None]:
    """What a test has set up logs into that test's own streams, which are closed when the next one runs."""
    yield
    structlog.reset_defaults()
