"""Percentiles of the last values, and the largest ever."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ckptd.daemon.condition import Condition
from ckptd.daemon.figures import Recent


def test_nothing_was_added() -> None:
    assert Recent().summary() == {"p50": 0.0, "p99": 0.0, "max": 0.0}


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40), st.integers(1, 16))
def test_the_last_values_count_and_the_largest_stays(values: list[float], size: int) -> None:
    recent = Recent(size)
    for value in values:
        recent.add(value)
    found = recent.summary()
    assert recent.count == len(values)
    assert found["max"] == round(max(values), 3)
    assert found["p50"] == round(float(np.percentile(values[-size:], 50)), 3)


def test_a_condition_reports_each_change_once_and_keeps_since() -> None:
    said: list[tuple[str, str]] = []
    condition = Condition("unprotected", "not yet", lambda word, reason: said.append((word, reason)))
    since = condition.since = 5.0
    condition.become("unprotected", "not yet")
    condition.become("unprotected", "another reason")
    assert condition.since == since
    condition.become("protected", "fine")
    condition.become("protected", "fine")
    assert said == [("unprotected", "another reason"), ("protected", "fine")]
    assert condition.since > since and condition.as_dict()["condition"] == "protected"
