"""An emulator that executes AMD GPU assembly on the CPU, in NumPy: it computes what a kernel would, without the GPU.

`run` executes the assembly that Triton emits for gfx942 and gfx950 (waves of 64 lanes), gfx1100 and gfx1201 (32). Every
access is checked against the bounds of its buffer, races in the LDS are reported, and unsupported instructions are
rejected by name. The files are the parts of the emulator:

  machine.py   binds and runs a program       program.py      parses assembly text
  gang.py      waves, registers, active lanes storage.py      global memory, LDS and its races
  operands.py  registers as NumPy views       scalar.py       s_*: one value per wave, and control flow
  vector.py    v_*: one value per lane        vector_table.py table of most v_* instructions
  lanes.py     data movement between lanes    narrow.py       8-bit elements
  memory.py    loads and stores, scratch      lds.py          ds_*: loads and stores in the LDS
  matrix.py    mfma and wmma                  arithmetic.py   functions that the tables use

The semantics are those of AMD's public ISA manuals: "AMD Instinct MI300" (CDNA3), "CDNA4", "RDNA3" and "RDNA4"
Instruction Set Architecture reference guides; each file names the chapters it is based on.
"""

from .errors import Deadlock as Deadlock
from .errors import MachineError as MachineError
from .errors import MemoryFault as MemoryFault
from .errors import UnsupportedInstruction as UnsupportedInstruction
from .machine import Run as Run
from .machine import run as run
from .program import TARGETS as TARGETS
from .program import parse as parse
from .storage import Memory as Memory
