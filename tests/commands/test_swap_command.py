"""`fastseg swap`: its inputs, its results, and that it finds differences."""

import json

import pytest
import torch
from torch import nn

from fastseg import nn as fused
from fastseg.commands import cli, model_spec
from fastseg.verification import swapped_model

MODEL = '''
import random
from dataclasses import dataclass
import torch
from torch import nn

@dataclass
class Output:
    logits: torch.Tensor
    more: dict

class Net(nn.Module):
    def __init__(self, classes, width=4, drop=0.0):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2))
        self.drop = nn.Dropout2d(drop)
        self.up = nn.ConvTranspose2d(width, classes, 2, 2)
    def forward(self, image, scale=None, labels=None):
        hidden = self.drop(self.body(image))
        logits = self.up(hidden if scale is None else hidden * scale)
        found = {"hidden": (hidden,)}
        if labels is not None:
            found["loss"] = nn.functional.cross_entropy(logits, labels)
        return Output(logits, found)

class Nothing(nn.Module):
    def forward(self, x):
        return "no tensor"

class Single(nn.Module):
    """Runs in float32 only."""
    def __init__(self):
        super().__init__()
        self.pool = nn.MaxPool2d(2)
    def forward(self, x):
        assert x.dtype == torch.float32
        return self.pool(x)

class Odd(nn.Module):
    """A pool whose forward has a side effect or an oddity."""
    def __init__(self, does):
        super().__init__()
        self.does, self.calls = does, 0
        self.pool, self.generator = nn.MaxPool2d(2), torch.Generator()
    def forward(self, x):
        if self.does == "prints":
            print("here")
        if self.does == "draws":
            return self.pool(x) * random.random()
        if self.does == "counts":
            self.calls += 1
            return self.pool(x) * self.calls + torch.rand(1, generator=self.generator)
        if self.does == "writes":
            x.mul_(2)
        if self.does == "trains only":
            assert self.training, "no evaluation"
        if self.does == "a bit of something else in float64":
            return self.pool(x) * (1.1 if x.dtype == torch.float64 else 1)
        return self.pool(x)

def number():
    return 3

net = Net(3)
'''


@pytest.fixture
def run(tmp_path, capsys):
    """run(NAME, arguments...) runs `fastseg swap` on MODEL's NAME; returns exit code, stdout and stderr."""
    path = tmp_path / "mine.py"
    path.write_text(MODEL)

    def call(name, *arguments):
        code = cli.main(["swap", f"{path}:{name}", *arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


QUICK = ("--input", "1x3x8x12", "--no-time")
INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")


def test_a_model_is_swapped_checked_and_timed(run):
    code, out, _ = run("Net", "--args", "classes=5", "--input", "1x3x8x12", "--seconds", "0.01")
    assert code == 0, out
    for word in (
        "Net: 3 of 3 layers swapped",
        "yes: 0 + 1 + 2 + 3",
        "training",
        "gradients",
        "ok",
        "training: plain ",
        " ms (",
        " times as fast",
        "training: the outputs of plain and swapped ",
    ):
        assert word in out
    assert "FAILED" not in out


def test_the_result_as_json(run):
    code, out, _ = run("Net", "--args", '{"classes": 5}', "--input", "1x3x8x12", "--seconds", "0.01", "--json")
    result = json.loads(out)
    assert code == 0 and result["passed"] and result["failures"] == []
    assert [layer["swapped"] for layer in result["swap"]["layers"]] == [True] * 3
    assert set(result["checked"]) == set(result["times"]) == {"training", "evaluation"}
    checked = result["checked"]["training"]
    assert {c["tensor"] for c in checked["outputs"]} == {"logits", "more.hidden.0"}
    assert {c["tensor"] for c in checked["gradients"]} >= {"input 0", "up.weight", "body.1.bias"}
    assert {c["tensor"] for c in checked["buffers"]} >= {"body.1.running_mean"}
    assert 0 <= checked["from_plain"] < 1e-4
    assert checked["against"] == "float64" and all(c["passed"] for c in checked["outputs"])
    assert all(form["ms"] > 0 for mode in result["times"].values() for form in mode.values())
    assert {call["operator"] for call in result["ran"]} >= {"conv_transpose2d"}


def test_json_has_no_infinity(run, monkeypatch):
    monkeypatch.setattr(fused.ConvTranspose2d, "forward", broken(lambda self, y: y / 0))
    code, out, _ = run("Net", "--args", "5", "--input", "1x3x8x12", "--no-time", "--json")
    assert code == 1 and not json.loads(out, parse_constant=pytest.fail)["passed"]


@INTERPRETED
def test_the_kernels_are_checked_if_the_backend_is_triton(run):
    code, out, _ = run("Net", "--args", "5", "drop=0.5", "--input", "1x3x8x12", "--backend", "triton", "--json")
    result = json.loads(out)
    assert code == 0, result["failures"]
    assert {call["backend"] for call in result["ran"]} == {"triton"}
    assert "batch_norm_relu_max_pool2d" in {call["operator"] for call in result["ran"]}
    assert result["times"] == {} and "interpreted" in result["not_timed"]
    errors = [c["error"] for mode in result["checked"].values() for c in mode["outputs"]]
    assert max(errors) > 0


def test_a_loss_is_swapped_with_the_model(run):
    code, out, _ = run("Net", "--args", "5", *QUICK, "--loss", "cross_entropy", "--json")
    result = json.loads(out)
    assert code == 0 and "cross_entropy" in {layer["op"] for layer in result["swap"]["layers"]}
    assert "1" in {c["tensor"] for c in result["checked"]["training"]["outputs"]}
    target = ("--loss", "torch.nn:MSELoss", "--target", "1x5x8x12")
    assert run("Net", "--args", "5", *QUICK, *target)[0] == 0


def test_inputs_are_passed_by_name(run):
    named = ("--input", "image=2x3x8x12", "--input", "labels=2x8x12:int64:5", "--input", "scale=1")
    code, out, _ = run("Net", "--args", "5", *named, "--no-time", "--json")
    checked = json.loads(out)["checked"]["training"]
    assert code == 0 and "more.loss" in {c["tensor"] for c in checked["outputs"]}
    assert {"input image", "input scale"} <= {c["tensor"] for c in checked["gradients"]}


def test_the_swap_and_the_mode_can_be_limited(run):
    code, out, _ = run(
        "net", *QUICK, "--eval", "--ops", "max_pool2d", "--channels-last", "--dtype", "float64", "--json"
    )
    result = json.loads(out)
    assert code == 0 and list(result["checked"]) == ["evaluation"] and result["not_timed"] == "not requested"
    assert {layer["op"]: layer["swapped"] for layer in result["swap"]["layers"]} == {
        "batch_norm_relu": False, "max_pool2d": True, "conv_transpose2d": False,
    }  # fmt: skip


def test_the_same_seed_gives_the_same_results(run):
    def errors(*seed):
        return json.loads(run("Net", "--args", "5", *QUICK, "--json", *seed)[1])["checked"]

    assert errors("--seed", "1") == errors("--seed", "1") != errors("--seed", "2")


def test_a_model_that_fails_in_float64_is_compared_with_plain_torch(run):
    code, out, _ = run("Single", "--input", "1x3x8x12", "--no-time", "--json")
    checked = json.loads(out)["checked"]["training"]
    assert code == 0 and checked["against"] == "plain torch" and "float64" in checked["reason"]
    assert "the model fails in float64" in run("Single", "--input", "1x3x8x12", "--no-time")[1]


@pytest.mark.parametrize("does", ["writes", "counts"])
def test_a_forward_with_side_effects_is_compared(run, does):
    code, out, _ = run("Odd", "--args", does, "--input", "1x2x4x4", "--no-time", "--json")
    assert code == 0 and json.loads(out)["checked"]["training"]["against"] == "float64"


def test_output_of_the_model_is_not_mixed_with_the_json(run):
    code, out, err = run("Odd", "--args", "prints", "--input", "1x2x4x4", "--seconds", "0.01", "--json")
    assert code == 0 and json.loads(out)["passed"] and "here" in err
    assert "here" in run("Odd", "--args", "prints", "--input", "1x2x4x4", "--no-time")[1]


def test_a_model_that_runs_in_one_mode_only(run):
    given = ("Odd", "--args", "trains only", "--input", "1x2x4x4", "--no-time")
    assert run(*given, "--train")[0] == 0
    code, out, err = run(*given)
    assert (code, out) == (2, "") and "fails on these inputs in evaluation: AssertionError: no evaluation" in err
    assert run("Net", "--args", "5", "--input", "1x3x2x2", "--no-time", "--eval", "--ops", "max_pool2d")[0] == 0


def test_a_model_without_a_layer_to_swap_is_reported(run):
    code, out, _ = run("Single", *QUICK, "--ops", "cross_entropy, max_unpool2d")
    assert code == 0 and "0 of 1 layers swapped" in out and "fastseg.swap_functions" in out


# --- differences -----------------------------------------------------------------------------------------------------


def broken(how):
    """A forward of ConvTranspose2d with a changed output."""

    def forward(self, input, output_size=None):
        return how(self, nn.ConvTranspose2d.forward(self, input, output_size))

    return forward


class Scaled(torch.autograd.Function):
    """Returns its input, with a wrong gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.1


def raises(self, y):
    raise RuntimeError("out of everything")


@pytest.mark.parametrize(
    "how, message",
    [
        (lambda self, y: y * 1.001, "logits (outputs) is off"),
        (lambda self, y: Scaled.apply(y), "(gradients) is off"),
        (lambda self, y: y.detach(), "(gradients) is off"),
        (raises, "the swapped model fails: RuntimeError: out of everything"),
    ],
)
def test_a_difference_is_found(run, monkeypatch, how, message):
    monkeypatch.setattr(fused.ConvTranspose2d, "forward", broken(how))
    code, out, _ = run("Net", "--args", "5", "--input", "1x3x8x12")
    assert code == 1 and "FAILED" in out and message in out
    assert "not timed: results differ" in out


def test_a_difference_is_found_without_float64(run, monkeypatch):
    monkeypatch.setattr(fused.MaxPool2d, "forward", lambda self, x: nn.MaxPool2d.forward(self, x) * 1.01)
    code, out, _ = run("Single", *QUICK)
    assert code == 1 and "output (outputs) is off" in out


def test_a_difference_is_found_in_a_model_that_computes_something_else_in_float64(run, monkeypatch):
    monkeypatch.setattr(fused.MaxPool2d, "forward", lambda self, x: nn.MaxPool2d.forward(self, x) * 1.01)
    code, out, _ = run("Odd", "--args", "a bit of something else in float64", "--input", "1x2x4x4", "--no-time")
    assert code == 1 and "output (outputs) is off" in out and "computes something else" in out


def test_a_model_with_different_results_each_time_is_bad_input(run):
    code, out, err = run("Odd", "--args", "draws", "--input", "1x2x4x4", "--no-time")
    assert (code, out) == (2, "") and "gives different results each time" in err


def test_an_undo_that_fails_is_found(run, monkeypatch):
    from fastseg.swapping import report

    monkeypatch.setattr(report, "exchange", lambda *arguments: None)
    code, out, _ = run("Net", "--args", "5", *QUICK)
    assert code == 1 and "undo does not restore the model" in out


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("Missing", QUICK, "has no Missing"),
        ("number", QUICK, "must return a torch.nn.Module, but returns a int"),
        ("MODEL", QUICK, "has no MODEL"),
        ("Net", QUICK, "called with no arguments raises TypeError"),
        ("Net", ("--args", "5", "colour=red", *QUICK), "unexpected keyword argument 'colour'"),
        ("Net", ("--args", "{classes: 5}", *QUICK), "is not valid JSON"),
        ("net", ("--args", "5", *QUICK), "takes no arguments"),
        ("Net", ("--args", "5", "--input", "3by8"), "'3by8' must be [NAME=]SHAPE"),
        ("Net", ("--args", "5", "--input", "1x3x8x8:float17"), "must be [NAME=]SHAPE"),
        ("Net", ("--args", "5", "--input", "1x3x8x8:int64:0"), "must be [NAME=]SHAPE"),
        ("Net", ("--args", "5", "--input", "1x4x8x8"), "fails on these inputs in training: RuntimeError"),
        ("Nothing", QUICK, "returns a str without tensors"),
        ("Net", ("--args", "5", *QUICK, "--target", "1x8x8:int64"), "--target needs --loss"),
        ("Net", ("--args", "5", *QUICK, "--loss", "torch.nn:Missing"), "torch.nn has no Missing"),
        ("Net", ("--args", "5", *QUICK, "--loss", "torch.nn:CTCLoss"), "the model without fastseg fails"),
        ("Net", ("--args", "5", *QUICK, "--ops", "max_pool3d"), "but has 'max_pool3d'"),
        ("Net", ("--args", "5", *QUICK, "--seconds", "0"), "--seconds must be above 0"),
        ("Net", ("--args", "5", *QUICK, "--device", "abacus"), "device must be"),
    ],
)
def test_bad_input_is_reported_in_one_line(run, name, arguments, message):
    code, out, err = run(name, *arguments)
    assert code == 2 and out == "" and message in err and len(err.splitlines()) == 1, err


@pytest.mark.parametrize(
    "spec, message",
    [
        ("segnet", "must be MODULE:NAME"),
        ("no_such_module_here:Net", "no_such_module_here cannot be imported: ModuleNotFoundError"),
        ("nowhere/mine.py:Net", "No such file or directory"),
        ("torch:pi", "must be a torch.nn.Module or make one, but is a float"),
    ],
)
def test_a_model_that_is_not_found_is_reported(spec, message, capsys):
    assert cli.main(["swap", spec, *QUICK]) == 2
    assert message in capsys.readouterr().err


def test_a_module_in_the_current_directory_is_found(tmp_path, monkeypatch, capsys):
    (tmp_path / "local_model_of_a_test.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [p for p in __import__("sys").path if p])
    assert cli.main(["swap", "local_model_of_a_test:Net", "--args", "5", *QUICK]) == 0


def test_arguments_are_read_as_json_python_and_text():
    given = ["5", "true", "True", "None", "(1, 2)", "resnet18", "a=1.5", "b=[1, 2]", "c=x=y", "d='5'", "1=2"]
    positional, named = model_spec.arguments(given)
    assert positional == [5, True, True, None, (1, 2), "resnet18", "1=2"]
    assert named == {"a": 1.5, "b": [1, 2], "c": "x=y", "d": "5"}
    assert model_spec.arguments(["[1, 2]"]) == ([1, 2], {})


def test_inputs_have_the_shape_dtype_and_limit_of_their_specification():
    name, x = model_spec.tensor("ids=4x5:int32:7", torch.float32)
    assert name == "ids" and x.shape == (4, 5) and x.dtype == torch.int32 and 2 < x.max() < 7 and x.min() >= 0
    name, x = model_spec.tensor("2x3", torch.bfloat16)
    assert name is None and x.shape == (2, 3) and x.dtype == torch.bfloat16
    assert model_spec.tensor("64:bool", torch.float32)[1].unique().tolist() == [False, True]


def test_a_model_that_computes_something_else_in_float64_is_compared_with_plain_torch():
    class Other(nn.Module):
        def forward(self, x):
            return x if x.dtype == torch.float32 else -x

    trial = swapped_model.Trial(Other(), [torch.randn(2, 3)], {}, 0)
    outcome = trial.plain_outcome()
    check = swapped_model.check_outcome(trial, outcome, outcome)
    assert check.without_truth == "the model computes something else in float64"
    assert all(c.passed for comparisons in check.compared.values() for c in comparisons)


def test_the_difference_of_the_losses_is_shown(run, monkeypatch):
    """Half of the loss is missing: more than rounding."""
    args = ("Net", "--args", "5", "--input", "1x3x8x12", "--loss", "cross_entropy", "--train", "--no-time")
    code, out, _ = run(*args, "--json")
    result = json.loads(out)
    assert code == 0 and result["has_loss"] and 0 <= result["checked"]["training"]["from_plain"] < 1e-5
    code, out, _ = run(*args)
    assert "training: the losses of plain and swapped " in out
    monkeypatch.setattr(fused.CrossEntropyLoss, "forward", lambda *args: nn.CrossEntropyLoss.forward(*args) / 2)
    code, out, _ = run(*args, "--json")
    assert code == 1 and json.loads(out)["checked"]["training"]["from_plain"] > 0.1
