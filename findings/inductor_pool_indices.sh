#!/usr/bin/env bash
# torch.compile makes max-pooling return negative indices.
#
# Expected: the indices of F.max_pool2d(x, 3, 2, 1, return_indices=True) are positions in the picture, compiled or not:
#           F.max_unpool2d takes them.
# Happens:  where all pixels of a window that reaches into the padding are -inf, Inductor picks the padding itself: -6
#           is one row and one pixel outside of a 5x5 picture, and 4 belongs to a pixel at the far end of the row above.
#           max_unpool2d then raises "Found an invalid max index". Eager code picks the first pixel inside.
#           Of several NaN Inductor picks the first, eager code the last; values are equal in both cases.
# Versions: torch 2.13.0 (CPU, Inductor's C++ code).
# Source:   _max_pool_with_offsets in torch/_inductor/lowering.py loads the padding as -inf and reduces all of the
#           window with argmax; the offset becomes an index in _low_memory_max_pool_offsets_to_indices.
# Means:    pictures masked with -inf before a pooling can be unpooled after eager code, and raise after compiled code.
#           Use a finite mask value, torch.finfo(dtype).min, which beats the padding.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.4.6

TORCHINDUCTOR_CACHE_DIR="$work/cache" "$work/venv/bin/python" - <<'PY'
import torch
from torch.nn import functional as F


def pool(picture):
    return F.max_pool2d(picture, 3, 2, 1, return_indices=True)


compiled = torch.compile(pool)
found = {}
for name, fill in (("-inf", -torch.inf), ("lowest", torch.finfo(torch.float32).min), ("nan", torch.nan)):
    picture = torch.full((1, 1, 5, 5), fill)
    picture[..., 4, 4] = 1
    (values, indices), (values_compiled, indices_compiled) = pool(picture), compiled(picture)
    assert torch.equal(values.nan_to_num(7), values_compiled.nan_to_num(7))
    found[name] = indices.flatten().tolist(), indices_compiled.flatten().tolist()
    print(f"{name:7} eager {found[name][0]}\n        compiled {found[name][1]}")

try:
    F.max_unpool2d(*compiled(torch.full((1, 1, 5, 5), -torch.inf)), 3, 2, 1, output_size=(5, 5))
    raised = ""
except RuntimeError as error:
    raised = str(error)
print(raised)

assert found["lowest"][0] == found["lowest"][1] == found["-inf"][0]  # the control
assert found["-inf"][0][:4] == [0, 1, 3, 5] and found["-inf"][1][:4] == [-6, -4, -2, 4], found["-inf"]  # the surprise
assert found["nan"][0] != found["nan"][1]
assert "invalid max index" in raised, raised
PY
