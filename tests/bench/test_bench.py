"""The benches run, small, and say what they promise. What they measure is for `ckptd bench`, not for a test."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest


def bench(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "ckptd", "bench", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@pytest.mark.slow
def test_link_measures_both_pairs() -> None:
    result = bench("link", "--memory", "16MiB", "--rounds", "2", "--batch", "1MiB")
    assert {"first_image_gbps", "raw_loopback_gbps", "first_image_ratio", "conditions"} <= set(result)
    assert len(result["ratios"]) == 2 and all(ratio > 0 for ratio in result["ratios"])
    assert result["memory_bytes"] == 16 << 20 and result["conditions"]["cores"] > 0


@pytest.mark.slow
def test_epoch_measures_steady_protection() -> None:
    result = bench("epoch", "--memory", "16MiB", "--pages", "50", "--seconds", "1", "--no-sizes")
    keys = {"pause_ms_p50", "pause_ms_p99", "commit_ms_p50", "commit_ms_p99", "epochs_per_second"}
    assert keys | {"cpu_us_per_dirty_page", "rss_growth_mib", "conditions", "limits"} <= set(result)
    assert result["epochs_per_second"] > 0 and result["dirty_pages_per_epoch"] > 0
    assert result["commit_ms_p50"] > result["pause_ms_p50"] > 0
