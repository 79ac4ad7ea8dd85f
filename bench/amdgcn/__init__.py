"""A machine that runs AMD GPU assembly on the CPU, in NumPy: what a kernel would compute, without the card.

`run` takes the assembly that Triton emits for gfx942 and gfx950 (waves of 64 lanes), gfx1100 and gfx1201 (32), and
executes it. Every access is checked against its buffer, races in the LDS are reported, an instruction whose meaning is
not built in is refused by name. The files are the parts of the machine:

  machine.py   binds a program, runs it       program.py      text to instructions
  gang.py      waves, registers, who runs     storage.py      global memory, LDS and its races
  operands.py  registers as NumPy views       scalar.py       s_*: one value per wave, and control flow
  vector.py    v_*: one value per lane        vector_table.py most of them, a line each
  lanes.py     data that crosses lanes        narrow.py       eight-bit elements
  memory.py    loads and stores, scratch      lds.py          ds_*: loads and stores in the LDS
  matrix.py    mfma and wmma                  arithmetic.py   what the tables compute

Meanings are those of AMD's public ISA manuals: "AMD Instinct MI300" (CDNA3), "CDNA4", "RDNA3" and "RDNA4" Instruction
Set Architecture reference guides; each file names its chapters.
"""

from .errors import Deadlock as Deadlock
from .errors import MachineError as MachineError
from .errors import MemoryFault as MemoryFault
from .errors import UnsupportedInstruction as UnsupportedInstruction
from .machine import Run as Run
from .machine import run as run
from .program import TARGETS as TARGETS
