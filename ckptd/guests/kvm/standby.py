"""KvmStandby: the side that takes a kvm guest over."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ckptd.errors import CkptdError
from ckptd.guests.base import Still
from ckptd.guests.kvm.gate import KvmGate, gate_bytes
from ckptd.guests.kvm.host import cpuid_of, features_of, open_kvm
from ckptd.guests.kvm.state import decode, unfit
from ckptd.guests.process.shared import make_file, map_file
from ckptd.guests.process.standby import ProcessStandby, refuse_other_geometry, refuse_other_outputs
from ckptd.memory.regions import Geometry

__all__ = ["KvmStandby"]

_GATE_CAPACITY = 1 << 20


class KvmStandby(ProcessStandby):
    kind = "kvm"
    module = "ckptd.guests.kvm.process"

    async def prepare(self) -> None:
        """Raises TrackerUnavailable where this host has no KVM: now, and not when it is needed."""
        if self._link is None:
            os.close(open_kvm())
        await super().prepare()

    async def fit(self, geometry: Geometry, images: Sequence[int], state: bytes, still: Still) -> str:
        try:
            kvm = open_kvm()
            try:
                return unfit(decode(state), cpuid_of(kvm), features_of(kvm).xsave_bytes)
            finally:
                os.close(kvm)
        except CkptdError as error:
            return str(error)

    def _open_gate(self, geometry: Geometry, state: bytes, held: bytes, released: int) -> int:
        found = decode(state)
        refuse_other_geometry(found.spec.geometry, geometry, self.name)
        gate_fd = make_file("ckptd-gate", gate_bytes(max(_GATE_CAPACITY, len(held))))
        try:
            gate = KvmGate(map_file(gate_fd), self._output)
            gate.fill(held, released)
            refuse_other_outputs(found.written, gate.written, self.name)
            gate.release(gate.written)
        except BaseException:
            os.close(gate_fd)
            raise
        return gate_fd
