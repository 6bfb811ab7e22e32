"""Building and calling C++ kernels: cache, compilers, processes, threads, forks and half-precision numbers."""

import ctypes
import logging
import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from fastseg.kernels.cpu import build
from fastseg.kernels.cpu.launch import launch

pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable()))
ROOT = Path(__file__).parents[2]
PROBE = "from fastseg.kernels.cpu.launch import launch; print(launch('probe', 'probe', {}, 1000))"


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A process that has loaded nothing, with a cache folder of its own."""
    monkeypatch.setenv("FASTSEG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "_libraries", build._Libraries())
    monkeypatch.setattr("fastseg.kernels.cpu.launch._functions", {})
    return tmp_path / "cache" / "cpu"


def python(code, **environment):
    env = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def output(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err.decode()
    return out.decode().strip()


def test_a_kernel_is_compiled_once_and_logged(fresh, caplog, monkeypatch):
    with caplog.at_level(logging.INFO, "fastseg"):
        assert launch("probe", "probe", {}, 1000) == 499500
    assert [record.name for record in caplog.records] == ["fastseg"]
    assert "compiled kernels/cpu/probe.cpp" in caplog.text and " s: " in caplog.text
    assert len(list(fresh.iterdir())) == 1, "no temporary file is left"
    caplog.clear()
    monkeypatch.setattr(build, "_libraries", build._Libraries())
    monkeypatch.setattr("fastseg.kernels.cpu.launch._functions", {})
    with caplog.at_level(logging.INFO, "fastseg"):
        assert launch("probe", "probe", {}, 10) == 45
    assert not caplog.records


def test_a_second_process_compiles_nothing(fresh):
    cache = str(fresh.parent)
    assert output(python(PROBE, FASTSEG_CACHE=cache)) == "499500"
    (library,) = fresh.iterdir()
    written = library.stat().st_mtime_ns
    refusing = "import subprocess; subprocess.run = None; " + PROBE
    assert output(python(refusing, FASTSEG_CACHE=cache)) == "499500"
    assert [file.stat().st_mtime_ns for file in fresh.iterdir()] == [written]


def test_two_processes_compile_at_once(fresh):
    processes = [python(PROBE, FASTSEG_CACHE=str(fresh.parent)) for _ in range(2)]
    assert [output(process) for process in processes] == ["499500"] * 2
    assert len(list(fresh.iterdir())) == 1


def test_a_folder_that_cannot_be_written_is_replaced_by_a_private_one(tmp_path):
    file = tmp_path / "file"
    file.write_text("a folder cannot be made below a file, not even by root")
    assert output(python(PROBE, FASTSEG_CACHE=str(file / "below"))) == "499500"


def test_a_damaged_library_is_compiled_again(fresh):
    assert launch("probe", "probe", {}, 1000) == 499500
    (library,) = fresh.iterdir()
    library.unlink()  # a loaded file must not be written to
    library.write_bytes(b"damaged")
    assert output(python(PROBE, FASTSEG_CACHE=str(fresh.parent))) == "499500"
    assert library.stat().st_size > 1000


def test_a_changed_source_or_header_is_compiled_again(fresh, tmp_path, monkeypatch):
    copy = tmp_path / "sources"
    copy.mkdir()
    for name in ("probe.cpp", "common.h"):
        (copy / name).write_text((build.FOLDER / name).read_text())
    monkeypatch.setattr(build, "FOLDER", copy)

    def run():
        build.source.cache_clear()
        monkeypatch.setattr(build, "_libraries", build._Libraries())
        monkeypatch.setattr("fastseg.kernels.cpu.launch._functions", {})
        return launch("probe", "convert_bfloat16", {}, *(torch.zeros(1) for _ in range(4)), 1)

    assert run() == 0 and len(list(fresh.iterdir())) == 1
    assert run() == 0 and len(list(fresh.iterdir())) == 1
    for name in ("probe.cpp", "common.h"):
        with (copy / name).open("a") as file:
            file.write("// changed\n")
        before = len(list(fresh.iterdir()))
        assert run() == 0 and len(list(fresh.iterdir())) == before + 1
    build.source.cache_clear()


def test_parameters_are_compiled_apart(fresh):
    build.unavailable()
    before = len(list(fresh.iterdir()))
    for parameters in ({"DTYPE": torch.float32}, {"DTYPE": torch.bfloat16}, {"DTYPE": torch.float32}):
        build.library("probe", parameters)
    assert len(list(fresh.iterdir())) == before + 2


@pytest.mark.parametrize("name", ["missing", "false"])
def test_where_no_compiler_works_the_reason_is_given(fresh, monkeypatch, name):
    monkeypatch.setenv("CXX", name)
    reason = build.unavailable()
    assert reason is not None and ("CXX=missing" in reason if name == "missing" else "cannot be built" in reason)
    with pytest.raises(build.BuildError, match="compiler" if name == "missing" else "built"):
        launch("probe", "probe", {}, 10)


def test_a_compiler_command_without_march_native_is_used_without_it(fresh, tmp_path, monkeypatch):
    wrapper = tmp_path / "old-compiler"
    wrapper.write_text(
        f'#!/bin/sh\nfor a in "$@"; do case $a in -m*native) exit 1;; esac; done\nexec {build.compiler()[0]} "$@"\n'
    )
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", f"env {wrapper} -DUNUSED")
    assert build.unavailable() is None and launch("probe", "probe", {}, 1000) == 499500


def test_several_python_threads_build_and_call(fresh):
    torch.set_num_threads(2)
    results = []

    def work():
        results.extend(launch("probe", "probe", {}, 1000) for _ in range(50))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == [499500] * 200 and torch.get_num_threads() == 2


def _in_child(queue):
    queue.put((launch("probe", "probe", {}, 1000), launch("probe", "probe", {"DTYPE": torch.float32}, 1000)))


def test_a_forked_child_runs_on_one_thread():
    torch.set_num_threads(2)
    assert launch("probe", "probe", {}, 1000) == 499500
    torch.randn(2**20).exp().sum()  # torch's own pool is up too
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue,))
    child.start()
    assert queue.get(timeout=60) == (499500, 499500)
    child.join(60)
    assert child.exitcode == 0


def test_arguments_are_checked_against_the_declaration():
    with pytest.raises(ctypes.ArgumentError):
        launch("probe", "probe", {}, 1.5)
    with pytest.raises(TypeError):
        launch("probe", "probe", {})
    with pytest.raises(KeyError):
        launch("probe", "fastseg_set_pool", {}, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_conversions_are_torchs_for_every_pattern(dtype):
    halves = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    near = torch.cat([halves.float(), halves.float().nextafter(torch.tensor(3e38)), torch.randn(2**15)])
    middle = (halves.float()[1:] + halves.float()[:-1]) / 2  # ties
    bits = torch.randint(-(2**31), 2**31 - 1, (2**16,)).to(torch.int32).view(torch.float32)
    values = torch.cat([near, middle, bits])
    halves = halves.repeat(-(-len(values) // len(halves)))[: len(values)]
    wide, back = torch.empty(len(values)), torch.empty(len(values), dtype=dtype)
    function = f"convert_{str(dtype).removeprefix('torch.')}"
    launch("probe", function, {}, halves, wide, back, values, len(values))
    torch.testing.assert_close(wide, halves.float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(back, values.to(dtype), rtol=0, atol=0, equal_nan=True)
