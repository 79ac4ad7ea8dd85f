"""The state of a gang, the workgroups whose waves execute together: registers, active waves and lanes."""

import re
from collections.abc import Callable, Sequence

import numpy as np

from .errors import Deadlock
from .program import Program
from .storage import LDS, SIZES, Memory

# Indices of named scalar registers; TRAP_TEMPORARIES is that of ttmp0.
VCC, M0, NULL, EXEC = 106, 125, 124, 126
NUM_SCALARS = 128
TRAP_TEMPORARIES = 108
_UNSET = 0xFFEDFFED  # value of registers that were not written: NaN as float32, float16 and bfloat16

Step = Callable[[], None]  # an instruction bound to a gang


class Gang:
    """The state of waves that run in lockstep."""

    def __init__(
        self, program: Program, num_workgroups: int, num_warps: int, store: Memory, lds_bytes: int, threads: int
    ):
        """threads: of a workgroup; its last wave may have fewer than a whole wave."""
        self.program, self.wave_size = program, program.wave_size
        self.num_workgroups, self.num_warps = num_workgroups, num_warps
        self.num_waves = num_workgroups * num_warps
        shape = (self.num_waves, self.wave_size)
        self.v = np.empty((512 if program.is_cdna else 256, *shape), np.uint32)
        self.flat_v = self.v.reshape(len(self.v), -1)
        self.s = np.empty((self.num_waves, NUM_SCALARS), np.uint32)
        self.scc = np.zeros((self.num_waves, 1), bool)
        self.scratch = np.empty((self.num_waves * self.wave_size, program.scratch_bytes), np.uint8)
        self.memory = store
        self.workgroup = np.repeat(np.arange(num_workgroups), num_warps)  # of each wave
        self.wave_of_lane = np.repeat(np.arange(self.num_waves), self.wave_size)
        moved = [re.split(r"_", i.name)[-1] for block in program.blocks for i in block.instructions]
        self.lds = LDS(
            lds_bytes,
            num_workgroups=num_workgroups,
            num_warps=num_warps,
            wave_size=self.wave_size,
            unit=min([4, *(SIZES[kind] for kind in moved if kind in SIZES)]),
        )
        self._exec_at_start = self._full_lanes(threads)
        # active waves[wave, 1] and lanes mask[wave, lane]; both are just True if all are active
        self.exec = np.ones(shape, bool)
        self.waves: np.ndarray | bool = True
        self.mask: np.ndarray | bool = True
        self._all_lanes = np.arange(self.num_waves * self.wave_size)
        self._lanes: np.ndarray | None = None
        self.end = len(program.blocks)
        self.next_block = np.zeros((self.num_waves, 1), np.int64)
        self.waiting = np.zeros((self.num_waves, 1), bool)  # at a barrier
        self.signalled = np.zeros((self.num_waves, 1), bool)  # gfx12: has signalled the barrier
        self.executed = 0

    def start(self, workgroups: np.ndarray, user_registers: Sequence[int]) -> None:
        """Initializes the waves of these workgroups (x, y, z each) at the kernel's entry.

        Initial registers: "User Guide for AMDGPU Backend", section "Initial Kernel Execution State".
        """
        self.v.fill(_UNSET)
        self.s.fill(_UNSET)
        self.scratch.fill(0xFF)
        self.s[:, NULL] = 0
        self.s[:, : len(user_registers)] = user_registers
        x, y, z = np.repeat(workgroups, self.num_warps, axis=0).T
        warp = np.arange(self.num_waves) % self.num_warps
        self.v[0] = warp[:, None] * self.wave_size + np.arange(self.wave_size)
        descriptor = self.program.descriptor
        if self.program.target.startswith("gfx12"):
            for temporary, value in ((7, y | z << 16), (8, warp << 25), (9, x)):
                self.s[:, TRAP_TEMPORARIES + temporary] = value
        else:
            at = descriptor.get("user_sgpr_count", len(user_registers))
            for axis, index in (("x", x), ("y", y), ("z", z)):
                if descriptor.get(f"system_sgpr_workgroup_id_{axis}", 0):
                    self.s[:, at] = index
                    at += 1
        self.s[:, EXEC : EXEC + 2] = self._exec_at_start
        self.next_block.fill(0)
        self.waiting.fill(False)
        self.signalled.fill(False)
        self.waves = True
        self.exec_changed()
        self.lds.start()
        self.executed = 0

    def _full_lanes(self, threads: int) -> np.ndarray:
        """u32[waves, 2]: the lanes of each wave that have a thread."""
        lanes = np.arange(64) + self.wave_size * np.arange(self.num_warps)[:, None]
        has_thread = (lanes < threads) & (np.arange(64) < self.wave_size)
        return np.tile(np.packbits(has_thread, axis=1, bitorder="little").view(np.uint32), (self.num_workgroups, 1))

    def exec_changed(self) -> None:
        """Updates the active lanes after a write to EXEC."""
        self.exec = self._read_exec()
        self._refresh()

    def active_lanes(self) -> np.ndarray:
        """Flat indices (wave * wave_size + lane) of the active lanes."""
        if self.mask is True:
            return self._all_lanes
        if self._lanes is None:
            self._lanes = np.flatnonzero(self.mask)
        return self._lanes

    def _read_exec(self) -> np.ndarray:
        bits = np.ascontiguousarray(self.s[:, EXEC : EXEC + self.wave_size // 32])
        return np.unpackbits(bits.view(np.uint8), axis=1, bitorder="little").view(bool)

    def select(self, waves: np.ndarray) -> None:
        """Sets the active waves: bool[wave, 1]."""
        everyone = bool(waves.all())
        if everyone and self.waves is True:
            return
        self.waves = True if everyone else waves
        self._refresh()

    def _refresh(self) -> None:
        mask = self.exec & self.waves
        self.mask = True if mask.all() else mask
        self._lanes = None

    def pass_barrier(self) -> None:
        """Releases the waves that wait at a barrier.

        Raises:
          Deadlock: other waves of their workgroup finished without reaching it.
        """
        waiting = self.waiting.reshape(self.num_workgroups, self.num_warps)
        whole = waiting.all(1)
        if (waiting.any(1) & ~whole).any():
            raise Deadlock("waves wait at a barrier, but other waves of their workgroup finished without reaching it")
        self.waiting.fill(False)
        self.lds.next_epoch(whole)
