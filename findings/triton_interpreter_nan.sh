#!/usr/bin/env bash
# Which of two numbers tl.maximum returns beside a NaN depends on the version of Triton's interpreter.
#
# Expected: TRITON_INTERPRET=1 computes what the compiled kernel computes, and goes on to do so between minor versions.
# Happens:  up to 3.7 the interpreter's tl.maximum(NaN, 1) is NaN, where the documentation, and compiled kernels, return
#           1 unless propagate_nan=tl.PropagateNan.ALL is given. From 3.8 on it is 1. tl.argmax of a block that holds
#           nothing but NaN returned a place up to 3.7 and raises ValueError from 3.8 on.
# Versions: triton 3.7.1 and 3.8.0 with torch 2.13.0 (CPU).
# Source:   triton.language.maximum: "propagate_nan"; triton/runtime/interpreter.py, create_maxnumf and ReduceOps.
# Means:    a max-pooling whose NaN handling was tested in the interpreter alone may drop every NaN on the GPU. Ask for
#           the propagation, and test with and without NaN on both versions.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/kernels.py" <<'PY'
import os

os.environ["TRITON_INTERPRET"] = "1"
import torch
import triton
import triton.language as tl


@triton.jit
def maximum_kernel(x, y, out, propagated, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    a, b = tl.load(x + at), tl.load(y + at)
    tl.store(out + at, tl.maximum(a, b))
    tl.store(propagated + at, tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def argmax_kernel(x, out, BLOCK: tl.constexpr):
    tl.store(out, tl.argmax(tl.load(x + tl.arange(0, BLOCK)), axis=0))


nan = float("nan")
x, y = torch.tensor([nan, 1.0, 2.0, 3.0]), torch.tensor([1.0, nan, 5.0, 1.0])
out, propagated = torch.zeros(4), torch.zeros(4)
maximum_kernel[(1,)](x, y, out, propagated, BLOCK=4)
place = torch.full((1,), -1, dtype=torch.int32)
try:
    argmax_kernel[(1,)](torch.full((4,), nan), place, BLOCK=4)
    found = place.item()
except Exception as error:
    found = "raises" if "ValueError" in repr(error) else repr(error)
version = triton.__version__
print(f"triton {version}: maximum {out.tolist()}, with propagate_nan {propagated.tolist()}, argmax of NaN alone: {found}")
assert propagated.isnan().tolist() == [True, True, False, False] and out[2:].tolist() == [5.0, 3.0]  # the control
if version == "3.7.1":
    assert out[:2].isnan().all() and isinstance(found, int), (out, found)
else:
    assert out[:2].tolist() == [1.0, 1.0] and found == "raises", (out, found)
PY
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.4.6
for version in 3.7.1 3.8.0; do
    "$work/venv/bin/pip" install --quiet --no-compile "triton==$version"
    "$work/venv/bin/python" "$work/kernels.py"
done
