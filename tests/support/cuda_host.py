"""Runs the CUDA C++ kernels without a GPU: compiled by the host's C++ compiler, one thread after another."""

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import fastseg
from fastseg.kernels.cuda import launch

HEADER = Path(__file__).with_name("cuda_host.h")
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
OPTIONS = ("-std=c++17", "-O1", "-fno-strict-aliasing", "-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas")
OPTIONS += ("-Wno-maybe-uninitialized", "-Wno-unused-function", "-Werror", "-shared", "-fPIC")
HALVES = """
inline float widen(half x) { _Float16 y; memcpy(&y, &x.bits, 2); return float(y); }
inline void narrow(half& narrowed, float x) { _Float16 y = _Float16(x); memcpy(&narrowed.bits, &y, 2); }
"""


class Library:
    """Compiled template instances: one shared library per source file and set of instances, built when missing."""

    def __init__(self, folder, options=()):
        self.folder, self.options = Path(folder), (*OPTIONS, *options)
        self.instances, self.compiled = {}, {}

    def add(self, requests):
        """Compile the instances that these launches need and that are missing: one compiler run per source file."""
        new = {}
        for request in requests:
            if (request.file, request.instance) not in self.compiled:
                new.setdefault(request.file, set()).add(request.instance)
        for file, instances in new.items():
            names = {instance: f"entry_{number}" for number, instance in enumerate(sorted(instances))}
            entries = "".join(
                f'extern "C" const char* {name}(unsigned blocks, unsigned threads, void** args, bool reversed)'
                f" {{ return walk(&{instance}, blocks, threads, args, reversed); }}\n"
                for instance, name in names.items()
            )
            text = HEADER.read_text() + launch.source(file) + HALVES + entries
            built = self._built(text)
            for instance, name in names.items():
                function = getattr(built, name)
                function.restype = ctypes.c_char_p
                function.argtypes = [ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p, ctypes.c_bool]
                self.compiled[file, instance] = function

    def _built(self, text):
        stem = hashlib.sha256((text + str(self.options)).encode()).hexdigest()[:24]
        target = self.folder / f"{stem}.so"
        if not target.exists():
            source = self.folder / f"{stem}.{os.getpid()}.cpp"
            source.write_text(text)
            made = source.with_suffix(".so")
            run = subprocess.run([COMPILER, *self.options, source, "-o", made], capture_output=True, text=True)
            assert run.returncode == 0, run.stderr
            os.replace(made, target)
        return ctypes.CDLL(str(target))

    def run(self, request, reverse=False):
        """Run a launch. Raises RuntimeError if a kernel's assertion fails.

        reverse: run the threads from the last to the first.
        """
        self.add([request])
        held = []
        for a in request.args:
            if a is None or hasattr(a, "data_ptr"):
                held.append(ctypes.c_void_p(0 if a is None else a.data_ptr()))
            else:
                held.append(ctypes.create_string_buffer(a.tobytes(), a.itemsize))
        pointers = (ctypes.c_void_p * len(held))(*(ctypes.addressof(x) for x in held))
        failure = self.compiled[request.file, request.instance](request.blocks, launch.THREADS, pointers, reverse)
        if failure:
            raise RuntimeError(f"device-side assertion: {failure.decode()}")

    @contextlib.contextmanager
    def backend(self, reverse=False):
        """The backend "cuda", whose kernels run here. reverse: run the threads from the last to the first."""
        with fastseg.backend("cuda"), launch.recording(functools.partial(self.run, reverse=reverse)):
            yield


@functools.cache
def library():
    """The library of this process. Compiled code is shared with other processes that test the same sources."""
    folder = Path(tempfile.gettempdir()) / f"fastseg-cuda-host-{os.getuid()}"
    folder.mkdir(exist_ok=True, mode=0o700)
    return Library(folder)
