"""The addresses that one program of a kernel computes in Triton's interpreter, for tensors too large to allocate."""

from __future__ import annotations

import contextlib
from unittest import mock

import numpy as np
import torch
import triton.language as tl

from fastseg.kernels import triton_internals
from fastseg.kernels.launch import recording

InterpreterBuilder = triton_internals.interpreter().InterpreterBuilder
TensorHandle = triton_internals.interpreter().TensorHandle

DTYPES = {
    8: (torch.uint8, np.uint8),
    16: (torch.float16, np.float16),
    32: (torch.float32, np.float32),
    64: (torch.int64, np.int64),
}


def recorded(function):
    """(kernel, programs, args, meta) of each launch of a function on meta tensors."""
    launches = []
    with recording(lambda *call: launches.append(call)):
        function()
    return launches


def addresses(launch, program):
    """{("load" or "store", dtype): elements that one program accesses}. Nothing is read or written.

    For kernels that load from the first tensor of each dtype and store to the last one.
    """
    kernel, programs, args, meta = launch
    assert program < programs
    tensors = {id(a): torch.empty(1, dtype=a.dtype) for a in args if isinstance(a, torch.Tensor)}
    ends = {}
    for tensor in tensors.values():
        first, _ = ends.get(tensor.dtype, (tensor.data_ptr(), None))
        ends[tensor.dtype] = first, tensor.data_ptr()
    found = {}

    def note(access, pointers, mask):
        live = pointers.data[np.broadcast_to(mask.data.astype(bool), pointers.data.shape)].astype(np.int64)
        bits = pointers.get_element_ty().primitive_bitwidth
        dtype = DTYPES[bits][0]
        elements = (live - ends[dtype][access == "store"]) // (bits // 8)
        found.setdefault((access, dtype), set()).update(elements.tolist())

    def load(self, pointers, mask, *rest, **named):
        note("load", pointers, mask)
        kind = pointers.get_element_ty()
        return TensorHandle(np.zeros(pointers.data.shape, DTYPES[kind.primitive_bitwidth][1]), kind)

    def store(self, pointers, value, mask, *rest, **named):
        note("store", pointers, mask)

    def program_id(self, axis):
        return TensorHandle(np.array([program], np.int32), tl.int32)

    replacements = {"create_masked_load": load, "create_masked_store": store, "create_get_program_id": program_id}
    with contextlib.ExitStack() as stack:
        for name, replacement in replacements.items():
            stack.enter_context(mock.patch.object(InterpreterBuilder, name, replacement))
        kernel[(1,)](*(tensors.get(id(a), a) for a in args), **meta)
    return found
