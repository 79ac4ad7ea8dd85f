#!/usr/bin/env bash
# The CPU collectives of jaxlib write a line to standard output.
#
# Expected: a library leaves standard output to the program: what it has to say goes to standard error or a log.
# Seen with jax 0.12.0.1 on 2026-11-29: with several processes on CPUs, whose collectives are Gloo's, the first one that
# crosses processes writes "[Gloo] Rank 0 is connected to 1 peer ranks. ..." to file descriptor 1 of each process, past
# sys.stdout. A program whose output is one JSON document, or a protocol over a pipe, is broken by it; no logging option
# turns it off.
# jfa: commands that run in several processes write their results to a file, and nothing that is parsed to stdout.
set -euo pipefail
cd "$(mktemp -d)"
cat > program.py <<'PYTHON'
import json
import sys

import jax

port, process = sys.argv[1:]
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(process))
mesh = jax.make_mesh((2,), ("x",))
summed = jax.jit(
    jax.shard_map(lambda x: jax.lax.psum(x, "x"), mesh=mesh, in_specs=jax.P(), out_specs=jax.P(), check_vma=False)
)
print(json.dumps({"process": int(process), "sum": float(summed(1.0))}))
PYTHON
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
run() { JAX_PLATFORMS=cpu uv run --quiet --isolated --no-project --python 3.12 --with "jax==0.12.0.1" python program.py "$port" "$1" 2>/dev/null; }
run 1 > 1.txt &
run 0 > 0.txt
wait
echo "standard output of process 0:"
cat 0.txt
grep -q '^{"process": 0, "sum": 2.0}$' 0.txt
grep -q '^\[Gloo\] Rank 0 is connected to 1 peer ranks' 0.txt || { echo "changed: standard output is the program's own"; exit 1; }
