#!/usr/bin/env bash
# Triton for AMD: inline assembly over four packed bytes compiles without an exception, to a kernel without it.
#
# Expected: tl.inline_asm_elementwise over int8 with pack=4 gives the assembly one 32-bit register with four elements, as
# documented; the kernel's machine code has its v_xor_b32, or triton.compile raises.
# Seen with triton 3.9.0 for gfx942 (no GPU needed) on 2026-11-28: LLVM prints "error: could not allocate output register
# for constraint 'v'" for each group of four, triton.compile returns all the same, and the kernel stores registers that
# nothing has set. A vector of four bytes has no AMD register class. With 32-bit elements and pack=1 all is well. XLA's
# own compiler (jax-rocm7-pjrt 0.12.0) does the same to Pallas' elementwise_inline_asm.
# jfa: stored bytes are cast by plain operations (jfa/kernels/triton/paged.py); proofs execute the machine code.
set -euo pipefail
cd "$(mktemp -d)"
cat >probe.py <<'PYTHON'
import os
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def flip(source, target, PACK: tl.constexpr):
    at = tl.arange(0, 512)
    x = tl.load(source + at)
    y = tl.inline_asm_elementwise("v_xor_b32 $0, 7, $1", "=v,v", [x], dtype=x.dtype, is_pure=True, pack=PACK)
    tl.store(target + at, y)


kind, pack = sys.argv[1], int(sys.argv[2])
signature = {"source": f"*{kind}", "target": f"*{kind}", "PACK": "constexpr"}
kernel = ASTSource(flip, signature=signature, constexprs={(2,): pack})
built = triton.compile(kernel, target=GPUTarget("hip", "gfx942", 64), options={"num_warps": 1})
print(built.asm["amdgcn"].count("v_xor_b32 v"))
PYTHON
run() {
  TRITON_CACHE_DIR="$PWD/$1" uv run --quiet --isolated --no-project --python 3.12 --with "triton==3.9.0" \
    python probe.py "$@" 2>"$1.err"
}
whole=$(run i32 1)
packed=$(run i8 4)
errors=$(grep -c "error: could not allocate" i8.err || true)
echo "32-bit elements: $whole v_xor_b32; packed bytes: $packed v_xor_b32, and $errors errors on stderr"
[ "$whole" -ge 8 ] && [ "$packed" -eq 0 ] && [ "$errors" -gt 0 ] || { echo "changed"; exit 1; }
