"""The three trackers over a real KVM keep the contract of all trackers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ckptd.guests.kvm.machine import TRACKERS
from ckptd.guests.kvm.spec import KvmSpec
from ckptd.memory.regions import Geometry
from tests.guests.kvm.machines import Puppet, needs_kvm, ring_here

from .contract import CHECKS, Bench, Check

pytestmark = [pytest.mark.kvm, needs_kvm]

GEOMETRY = Geometry.of(low=130, ram=1000, rom=1)


@pytest.mark.parametrize("tracker", TRACKERS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_keeps_the_contract(check: Check, tracker: str, tmp_path: Path) -> None:
    if tracker == "kvm-ring" and (why := ring_here()):
        pytest.skip(why)

    @contextmanager
    def make() -> Iterator[Bench]:
        with Puppet.made(KvmSpec(GEOMETRY, vcpus=3), tracker, tmp_path) as bench:
            yield bench

    check(make)
