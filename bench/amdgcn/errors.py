"""What can go wrong with a program, as exceptions."""


class MachineError(Exception):
    """A kernel that the machine cannot run, or that ran into something it must not do."""


class UnsupportedInstruction(MachineError):
    """An instruction, or a form of one, whose meaning is not built in. Raised before anything runs."""


class MemoryFault(MachineError):
    """An access outside the buffer, the LDS or the scratch memory it was meant for."""


class Deadlock(MachineError):
    """Waves that wait for what never comes."""
