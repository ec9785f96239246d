"""Pairs of real daemons that end with the test; what they logged is shown when it fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.pair import Pair

FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report: Any = yield
    item.stash[FAILED] = item.stash.get(FAILED, False) or report.failed
    return report


@pytest.fixture
def make_pair(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., Pair]]:
    """Make pairs; see Pair for the parameters."""
    made: list[Pair] = []

    def make(**options: Any) -> Pair:
        made.append(Pair(tmp_path / f"pair{len(made)}", **options))
        return made[-1]

    yield make
    for pair in made:
        defects = [line for line in pair.logs().splitlines() if "Traceback" in line or "a defect of ckptd" in line]
        if defects or request.node.stash.get(FAILED, False):
            print(pair.logs())
        pair.close()
        assert not defects
