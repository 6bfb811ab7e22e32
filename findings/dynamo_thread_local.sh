#!/usr/bin/env bash
# torch.compile ignores a value that was set on a threading.local whose class gives it a default.
#
# Expected: compiled code reads what the thread has set, or is compiled again when it changes, as for a global variable.
#           A class attribute is how threading's own documentation gives every thread a default value.
# Happens:  Dynamo reads the class attribute as a constant and adds no guard. Once a function was compiled with the
#           default, it keeps the default for good, whatever the thread sets: eager code returns 2, compiled code 1.
#           The same value set in __init__ is read and guarded.
# Versions: torch 2.13.0 (CPU). torch 2.11, 2.14 and 2.15 did the same.
# Source:   found by running; threading.local keeps its values outside of the dictionary that Dynamo looks into.
# Means:    a library that keeps its backend or its precision in a threading.local, as one does with settings that a
#           "with" block changes, must set the default in __init__.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.4.6

"$work/venv/bin/python" - <<'PY'
import threading

import torch


class ByClass(threading.local):
    value = None


class ByInit(threading.local):
    def __init__(self):
        self.value = None


def before_and_after(scope):
    """What eager and compiled code return with the default, and after the value was set."""

    def add(x):
        return x + 1 if scope.value is None else x + 2

    compiled = torch.compile(add, backend="eager", fullgraph=True)
    first = add(torch.zeros(1)).item(), compiled(torch.zeros(1)).item()
    scope.value = "set"
    return [first, (add(torch.zeros(1)).item(), compiled(torch.zeros(1)).item())]


in_init, in_class = before_and_after(ByInit()), before_and_after(ByClass())
print("default in __init__:          (eager, compiled) before", in_init[0], "after", in_init[1])
print("default as a class attribute: (eager, compiled) before", in_class[0], "after", in_class[1])
assert in_init == [(1, 1), (2, 2)], in_init  # the control
assert in_class == [(1, 1), (2, 1)], in_class  # the surprise
PY
