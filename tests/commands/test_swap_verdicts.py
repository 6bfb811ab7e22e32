"""`fastseg swap` on models and files that are hard to check: the right verdict, or a sentence that blames the cause."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastseg
from fastseg.commands import cli, terminal

NET = "from torch import nn\nclass Net(nn.Sequential):\n    def __init__(self): super().__init__(nn.MaxPool2d(2))\n"
QUICK = ("--input", "1x3x8x8", "--no-time")

MODELS = """
import sys, threading
import torch
from torch import nn

def lazy():
    return nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.MaxPool2d(2), nn.LazyConv2d(2, 1))

def quantized():
    import torch.ao.quantization as q
    model = nn.Sequential(q.QuantStub(), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), q.DeQuantStub()).eval()
    model.qconfig = q.get_default_qconfig(torch.backends.quantized.engine)
    q.prepare(model, inplace=True)
    model(torch.randn(1, 3, 8, 8))
    return q.convert(model)

class Locked(nn.MaxPool2d):
    def __init__(self):
        super().__init__(2)
        self.lock = threading.Lock()

class NonLeaf(nn.MaxPool2d):
    def __init__(self):
        super().__init__(2)
        self.scale = nn.Parameter(torch.ones(1)) * 2

class Exits(nn.Module):
    def forward(self, x):
        sys.exit(0)

def exits():
    sys.exit(0)
"""


@pytest.fixture
def swap(tmp_path, capsys, monkeypatch):
    """swap(NAME, CODE, arguments...) writes a file and runs `fastseg swap` on its Net; returns exit code, out, err."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    modules = set(sys.modules)

    def call(spec, code, *arguments):
        name, _, thing = spec.partition(":")
        (tmp_path / name).write_text(code)
        exit_code = cli.main(["swap", f"{tmp_path / name}:{thing or 'Net'}", *QUICK, *arguments])
        return exit_code, *capsys.readouterr()

    yield call
    for name in set(sys.modules) - modules:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in sys.modules[name].__file__:
            del sys.modules[name]


@pytest.mark.parametrize("layout", [(), ("--channels-last",)])
def test_lazy_modules_get_their_parameters_first(swap, layout):
    code, out, err = swap("mine.py:lazy", MODELS, "--json", *layout)
    result = json.loads(out)
    assert code == 0 and result["passed"], err
    assert {layer["op"]: layer["swapped"] for layer in result["swap"]["layers"]} == {
        "batch_norm_relu": True, "max_pool2d": True,
    }  # fmt: skip
    assert "0.weight" in {c["tensor"] for c in result["checked"]["training"]["gradients"]}


@pytest.mark.filterwarnings("ignore")
def test_a_statically_quantized_model_is_checked(swap):
    code, out, err = swap("mine.py:quantized", MODELS, "--json", "--eval")
    result = json.loads(out)
    assert code == 0 and result["passed"], err
    assert result["checked"]["evaluation"]["against"] == "plain torch"


SENTENCES = {
    "Locked": "the model cannot be copied, .* copy.deepcopy raises TypeError: cannot pickle '_thread.lock' object",
    "NonLeaf": "the model cannot be copied, .* copy.deepcopy raises RuntimeError: Only Tensors created explicitly",
    "Exits": "the model without fastseg fails on these inputs in training: SystemExit: 0",
    "exits": "mine.py:exits called with no arguments raises SystemExit: 0",
}


@pytest.mark.parametrize("name, sentence", SENTENCES.items(), ids=SENTENCES)
def test_the_cause_is_blamed(swap, name, sentence):
    code, out, err = swap(f"mine.py:{name}", MODELS)
    assert code == 2 and out == "" and len(err.splitlines()) == 1

    assert re.search(sentence, err), err


def test_a_file_that_parses_arguments_gets_none(swap):
    parse = "import argparse\np = argparse.ArgumentParser()\np.add_argument('--width', default='4')\np.parse_args()\n"
    before = list(sys.argv)
    assert swap("mine.py", parse + NET)[0] == 0 and sys.argv == before
    code, _, err = swap("needs.py", parse.replace("--width", "data") + NET)
    assert code == 2 and "needs.py cannot be imported: it ends the program when it is imported (SystemExit: 2)" in err
    code, _, err = swap("ends.py", NET + "import sys\nsys.exit(0)\n")
    assert code == 2 and "ends.py cannot be imported: it ends the program" in err and "__main__" in err


def test_files_named_as_modules_hide_none(tmp_path):
    """In a process of its own, where most modules are not imported yet."""
    for name in ("random", "inspect", "types", "torch", "numpy", "json"):
        (tmp_path / f"{name}.py").write_text(NET)
    environment = os.environ | {"PYTHONPATH": str(Path(fastseg.__file__).parents[1])}
    command = [sys.executable, "-m", "fastseg", "swap", f"{tmp_path.name}/random.py:Net", *QUICK, "--json"]
    run = subprocess.run(command, env=environment, cwd=tmp_path.parent, capture_output=True, text=True)
    assert run.returncode == 0 and json.loads(run.stdout)["passed"], run.stderr


@pytest.mark.parametrize("name", ["torch", "inspect", "fastseg"])
def test_a_file_named_as_a_module_does_not_take_its_place(swap, name):
    before = sys.modules[name]
    assert swap(f"{name}.py", NET)[0] == 0 and sys.modules[name] is before


def test_a_module_of_the_same_name_is_told_from_the_file(tmp_path, monkeypatch, capsys):
    (tmp_path / "colorsys.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert cli.main(["swap", "colorsys:Net", *QUICK]) == 2
    assert "colorsys has no Net; did you mean the file colorsys.py:Net?" in capsys.readouterr().err


# --- a reader that has seen enough -----------------------------------------------------------------------------------


class Gone:
    """Standard output whose reader is gone."""

    encoding = "utf-8"

    def __init__(self, number):
        self.number = number

    def write(self, text=""):
        raise BrokenPipeError(32, "Broken pipe")

    flush = writelines = write

    def isatty(self):
        return False

    def fileno(self):
        return self.number


@pytest.fixture
def nobody_reads(capfd, monkeypatch, tmp_path):
    """A function to call in the test, because pytest sets standard output again after the fixtures."""
    with (tmp_path / "out").open("w") as file:
        yield lambda: monkeypatch.setattr(sys, "stdout", Gone(file.fileno()))


@pytest.mark.parametrize("more", [(), ("--json",)])
@pytest.mark.parametrize("passes", [True, False])
def test_the_exit_code_is_the_verdict_whoever_reads(passes, more, tmp_path, monkeypatch, nobody_reads, capfd):
    (tmp_path / "mine.py").write_text(NET)
    if not passes:
        forward = fastseg.nn.MaxPool2d.forward
        monkeypatch.setattr(fastseg.nn.MaxPool2d, "forward", lambda self, x: forward(self, x) * 1.1)
    nobody_reads()
    assert cli.main(["swap", f"{tmp_path / 'mine.py'}:Net", *QUICK, *more]) == (0 if passes else 1)
    assert "Broken pipe" not in capfd.readouterr().err


def test_a_pipe_that_breaks_in_the_middle_is_silent(monkeypatch, nobody_reads, capfd):
    from fastseg.commands import doctor

    def printing(args):
        print("much")
        return 0

    monkeypatch.setattr(doctor, "main", printing)
    nobody_reads()
    assert cli.main(["doctor"]) == 141 and capfd.readouterr().err == ""


def test_an_error_is_one_line_of_bounded_length(capsys, monkeypatch):
    from fastseg.commands import doctor

    def fails(args):
        raise RuntimeError("first\n" + "a backend " * 500)

    monkeypatch.setattr(doctor, "main", fails)
    assert cli.main(["doctor"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("fastseg doctor: error: first a backend") and len(err.splitlines()) == 1
    assert len(err) < 900 and "--debug shows all" in err
    assert cli.one_line("a\n  b") == "a b"
    assert terminal.PipeConsole is type(terminal.console())
