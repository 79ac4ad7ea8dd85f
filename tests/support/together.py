"""Processes of one machine that are joined, each with some virtual devices."""

import os
import socket
import subprocess
import sys

COMMAND = "from jfa_models.cli import main; main()"
_JOIN = (
    "import sys; from jfa_models import processes; processes.join(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))\n"
)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def started(program, folder, arguments, devices=1):
    """The processes of a Python program in a folder, one for each list of arguments."""
    flags = f"--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={devices}"
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    how = dict(env=env, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return [subprocess.Popen([sys.executable, "-c", program, *map(str, own)], **how) for own in arguments]


def started_together(program, folder, count, devices=1):
    """The processes of a program that begins when they are joined."""
    where = f"127.0.0.1:{free_port()}"
    return started(_JOIN + program, folder, [(where, count, i) for i in range(count)], devices)


def ended(running):
    """(stdout, stderr, exit status) of each process."""
    return [(*process.communicate(timeout=300), process.returncode) for process in running]
