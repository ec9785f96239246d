"""SimStandby: the side that takes a sim guest over."""

from __future__ import annotations

import os

from ckptd.guests.process.shared import make_file, map_file
from ckptd.guests.process.standby import ProcessStandby, refuse_other_geometry, refuse_other_outputs
from ckptd.guests.sim.gate import RECORD_SIZE, SimGate, gate_bytes
from ckptd.guests.sim.machine import header_of
from ckptd.memory.regions import Geometry

__all__ = ["SimStandby"]

_GATE_CAPACITY = 1 << 20


class SimStandby(ProcessStandby):
    kind = "sim"
    module = "ckptd.guests.sim.process"

    def _open_gate(self, geometry: Geometry, state: bytes, held: bytes, released: int) -> int:
        params, _, outputs = header_of(state)
        refuse_other_geometry(params.geometry, geometry, self.name)
        gate_fd = make_file("ckptd-gate", gate_bytes(max(_GATE_CAPACITY, len(held) + RECORD_SIZE)))
        try:
            gate = SimGate(map_file(gate_fd), self._output)
            gate.fill(held, released)
            refuse_other_outputs(outputs, gate.written, self.name)
            gate.release(gate.written)
        except BaseException:
            os.close(gate_fd)
            raise
        return gate_fd
