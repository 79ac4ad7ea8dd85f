"""The exceptions of the emulator."""


class MachineError(Exception):
    """A kernel that the emulator cannot run, or that did something invalid."""


class UnsupportedInstruction(MachineError):
    """An instruction, or a form of one, that is not implemented. Raised before anything runs."""


class MemoryFault(MachineError):
    """An access outside the bounds of its buffer, the LDS or scratch memory."""


class Deadlock(MachineError):
    """Waves that wait forever or never finish."""
