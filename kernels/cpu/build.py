"""Builds C++ kernels with the system's compiler at first use, and loads them.

A library is one source file compiled with a set of macros (its parameters), such as the dtype of the logits. It is kept
on disk in the folder that the environment variable FASTSEG_CACHE names, else in ~/.cache/fastseg, under a key of the
source with its headers, the parameters, the compiler, its flags, the processor and torch's version. A second process
compiles nothing.

The kernels do not include torch's headers. What they need from torch is its thread pool, `torch_parallel_for`, a C
function of torch's stable ABI (torch/csrc/stable/c/shim.h); its address is handed to each library when it is loaded.
Compared with registered operators of the stable ABI's C++ headers, measured on one machine: 0.07 s of compile time
instead of 1.8 s for a small kernel, and 2.8 us a call instead of 4.6.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
COMPILERS = ("g++", "clang++", "c++")  # tried in this order where $CXX is not set
FLAGS = (
    "-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fno-exceptions", "-fno-rtti",
    "-fvisibility=hidden", "-fPIC", "-shared",
)  # fmt: skip
NATIVE = ("-march=native", "-mcpu=native", "")  # how a compiler is told to use all instructions: the first it accepts
TYPES = {
    torch.float32: "float", torch.float64: "double", torch.float16: "float16", torch.bfloat16: "bfloat16",
    torch.uint8: "uint8_t", torch.int16: "int16_t", torch.int32: "int32_t", torch.int64: "int64_t",
}  # fmt: skip
LOGGER = logging.getLogger("fastseg")
if os.environ.get("FASTSEG_LOG") == "compile":  # read once: shows what the logger says at level INFO on stderr
    LOGGER.addHandler(logging.StreamHandler())
    LOGGER.setLevel(logging.INFO)
elif os.environ.get("FASTSEG_LOG"):
    LOGGER.warning("FASTSEG_LOG must be 'compile', but is %r: nothing more is logged", os.environ["FASTSEG_LOG"])

Parameter = torch.dtype | bool | int | str


class BuildError(RuntimeError):
    """No kernel could be built or loaded; the message says why."""


def cache_folder() -> Path:
    """The folder of the compiled libraries."""
    return Path(os.environ.get("FASTSEG_CACHE") or Path.home() / ".cache" / "fastseg") / "cpu"


@functools.cache
def source(name: str) -> str:
    """The text of <name>.cpp with its quoted includes in place."""
    return _expanded(FOLDER / f"{name}.cpp", set())


def _expanded(path: Path, included: set[Path]) -> str:
    parts = []
    for line in path.read_text(encoding="utf-8").splitlines():
        header = re.match(r'\s*#include "([^"]+)"', line)
        if header is None:
            parts.append("" if line.strip() == "#pragma once" else line)
            continue
        other = (path.parent / header[1]).resolve()
        if other not in included:
            included.add(other)
            parts.append(_expanded(other, included))
    return "\n".join(parts)


def compiler() -> tuple[str, ...] | None:
    """The command of the C++ compiler, $CXX or the first of COMPILERS that is installed, or None."""
    for command in [os.environ["CXX"]] if os.environ.get("CXX") else COMPILERS:
        path, *options = shlex.split(command)
        if (found := shutil.which(path)) is not None:
            return found, *options
    return None


def processor() -> str:
    """The processor's model and instruction sets in words: code for one may not run on another."""
    with contextlib.suppress(OSError):
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
        varying = ("mhz", "bogomips", "processor", "apicid", "core id", "physical id", "microcode")
        kept = [line for line in first.splitlines() if not any(word in line.lower() for word in varying)]
        return "\n".join(kept)
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
    return platform.processor()


@functools.cache
def _machine(command: tuple[str, ...]) -> str:
    """All that a library depends on besides its source, parameters and flags, built with this compiler."""
    programs = [Path(found).resolve() for part in command if (found := shutil.which(part)) is not None]
    # A new version of the compiler has another size or time.
    stamps = [f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in programs]
    return "\n".join((*command, *stamps, platform.machine(), processor(), torch.__version__))


def _macros(parameters: Mapping[str, Parameter]) -> list[str]:
    """The compiler's options that define the parameters."""

    def spelled(value: Parameter) -> str:
        if isinstance(value, torch.dtype):
            return TYPES[value]
        return str(int(value)) if isinstance(value, bool) else str(value)

    return [f"-D{name}={spelled(value)}" for name, value in sorted(parameters.items())]


def _compile(compiler: tuple[str, ...], text: str, options: list[str], target: Path) -> None:
    """Compile to a temporary file and move it to `target`, so that a reader finds all of it or nothing."""
    unique = f"~{os.getpid()}-{threading.get_ident()}-{target.stem}"
    code, library = target.with_name(f"{unique}.cpp"), target.with_name(f"{unique}{target.suffix}")
    try:
        code.write_text(text, encoding="utf-8")
        linking = ["-Wl,--as-needed"] if sys.platform == "linux" else []
        command = [*compiler, *options, str(code), "-o", str(library), *linking]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode != 0:
            raise BuildError(f"{' '.join(command)} failed: {done.stderr.strip()[-2000:]}")
        os.replace(library, target)
    finally:
        for file in (code, library):
            file.unlink(missing_ok=True)


@contextlib.contextmanager
def _writable(folder: Path) -> Iterator[Path]:
    """`folder` where a file can be written there, else a private temporary folder that is removed afterwards."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError:
        with tempfile.TemporaryDirectory(prefix="fastseg-") as private:
            yield Path(private)
    else:
        yield folder


def _opened(file: Path) -> ctypes.CDLL | None:
    """The library in `file`, or None where there is none or it is damaged."""
    if not file.exists():
        return None
    with contextlib.suppress(OSError):
        return ctypes.CDLL(str(file))
    return None


def _build(
    compiler: tuple[str, ...], name: str, parameters: Mapping[str, Parameter], native: str
) -> tuple[ctypes.CDLL, float | None]:
    """The library, and the seconds that compiling it took, or None if it was on the disk."""
    text, options = source(name), [*FLAGS, *filter(None, [native]), *_macros(parameters)]
    key = hashlib.sha256("\n".join((text, *options, _machine(compiler))).encode()).hexdigest()[:24]
    file = f"{name.replace('/', '-')}-{key}.so"
    found = _opened(cache_folder() / file)
    if found is not None:
        return found, None
    with _writable(cache_folder()) as folder:
        start = time.perf_counter()
        _compile(compiler, text, options, folder / file)
        took = time.perf_counter() - start
        spelled = " ".join(_macros(parameters))
        LOGGER.info("compiled kernels/cpu/%s.cpp %s in %.2f s: %s", name, spelled, took, folder / file)
        try:
            return ctypes.CDLL(str(folder / file)), took
        except OSError as error:
            raise BuildError(f"{folder / file} cannot be loaded: {error}") from error


class _Libraries:
    """The loaded libraries of this process, and how they were built."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.loaded: dict[tuple[str, tuple[tuple[str, Parameter], ...]], ctypes.CDLL] = {}
        self.forked = False
        self.native: str | None = None  # the element of NATIVE that the compiler accepts, once known
        self.reason: str | None = None
        self.checked = False


_libraries = _Libraries()


def _after_fork() -> None:
    """A forked child has no threads of torch's pool, which would wait for them forever: kernels run on one thread."""
    _libraries.lock = threading.RLock()  # another thread of the parent may have held it
    _libraries.forked = True
    for library in _libraries.loaded.values():
        library.fastseg_set_pool(None)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@functools.cache
def _pool() -> ctypes.c_void_p:
    """The address of torch's parallel loop, found through the libraries that torch's extension module is linked to."""
    return ctypes.cast(ctypes.CDLL(torch._C.__file__).torch_parallel_for, ctypes.c_void_p)


def _checked() -> str | None:
    """Build and run the smallest kernel; why that fails, or None."""
    if os.name != "posix":
        return f"the CPU kernels are not built on {sys.platform}"
    command = compiler()
    if command is None:
        wanted = os.environ.get("CXX")
        return f"no C++ compiler is found ({f'CXX={wanted}' if wanted else ', '.join(COMPILERS)})"
    try:
        _pool()
    except (OSError, AttributeError):
        return f"torch {torch.__version__} does not export torch_parallel_for"
    failure = "the C++ compiler accepts no flags"
    for native in NATIVE:
        try:
            library, _ = _build(command, "probe", {}, native)
        except (BuildError, OSError) as error:
            failure = str(error)
            continue
        library.fastseg_set_pool(None if _libraries.forked else _pool())
        library.probe.restype = ctypes.c_int64
        if library.probe(ctypes.c_int64(1000)) != 499500:
            return f"a kernel built by {command[0]} returns a wrong result"
        _libraries.native = native
        return None
    return f"a C++ kernel cannot be built: {failure}"


def unavailable() -> str | None:
    """Why no CPU kernel can be built on this machine, in words, or None. Found once per process."""
    if not _libraries.checked:
        with _libraries.lock:
            if not _libraries.checked:
                _libraries.reason = _checked()
                _libraries.checked = True
    return _libraries.reason


def library(name: str, parameters: Mapping[str, Parameter]) -> ctypes.CDLL:
    """The library of <name>.cpp with these macros defined, compiled or loaded at the first call.

    Raises BuildError where it cannot be built.
    """
    key = (name, tuple(sorted(parameters.items())))
    found = _libraries.loaded.get(key)
    if found is not None:
        return found
    with _libraries.lock:
        found = _libraries.loaded.get(key)
        if found is None:
            command = compiler()
            if (reason := unavailable()) is not None or command is None:
                raise BuildError(reason or "no C++ compiler is found")
            found, _ = _build(command, name, parameters, _libraries.native or "")
            found.fastseg_set_pool(None if _libraries.forked else _pool())
            _libraries.loaded[key] = found
    return found


def compile_ahead(name: str, parameters: Mapping[str, Parameter]) -> float | None:
    """The seconds that compiling this library took, or None if it was on the disk. Several threads may compile at once.

    Raises BuildError where it cannot be built.
    """
    command = compiler()
    if (reason := unavailable()) is not None or command is None:
        raise BuildError(reason or "no C++ compiler is found")
    return _build(command, name, parameters, _libraries.native or "")[1]
