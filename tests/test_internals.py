"""The private parts of PyTorch and Triton: each still exists, and no other file uses one."""

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton

from fastseg import functional, torch_internals
from fastseg.kernels import triton_internals

ROOT = Path(__file__).parents[1]
MODULES = {"torch": torch_internals, "triton": triton_internals}
HOMES = {Path(module.__file__).resolve() for module in MODULES.values()}
NAMES = [
    pytest.param(package, path, purpose, id=path)
    for package, module in MODULES.items()
    for path, purpose in module.PRIVATE_NAMES.items()
]


def exists(path):
    """Whether a dotted name exists. `Class()` in it stands for an instance that is made without arguments."""
    first, *rest = path.split(".")
    found, module = importlib.import_module(first), first
    for part in rest:
        name, module = part.removesuffix("()"), f"{module}.{part}"
        if not hasattr(found, name):
            try:
                found = importlib.import_module(module)
            except ImportError:
                return False
            continue
        found = getattr(found, name)
        found = found() if part.endswith("()") else found
    return True


@pytest.mark.every
@pytest.mark.parametrize("package, path, purpose", NAMES)
def test_the_private_name_exists(package, path, purpose):
    module = MODULES[package]
    seen = " and ".join(".".join(map(str, v)) if isinstance(v, tuple) else v for v in module.SEEN_IN)
    version = {"torch": torch, "triton": triton}[package].__version__
    assert exists(path), (
        f"{package} {version} has no {path}, which {package} {seen} have: it {purpose}. "
        f"Find what replaces it and change {Path(module.__file__).name}."
    )


def test_a_missing_name_is_found():
    assert not exists("torch.nn._no_such_module.name") and not exists("torch.Tensor._no_such_name")
    assert not exists("torch.nn.Module()._no_such_hooks")


def test_functions_are_marked_as_constant_as_torch_marks_them():
    ours = torch_internals.constant_when_compiled(lambda: None)
    assert vars(torch.compiler.assume_constant_result(lambda: None)) == vars(ours) != {}


def test_importing_fastseg_imports_neither_triton_nor_the_compiler():
    code = "import sys, fastseg; print([name for name in ('triton', 'torch._dynamo', 'sympy') if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout.strip() == "[]", run.stdout + run.stderr


def test_boxed_functions_are_marked_as_torch_marks_them():
    ours = torch_internals.boxed(lambda args: args)
    theirs = pkgutil.resolve_name("torch._functorch._aot_autograd.utils.make_boxed_func")(lambda *args: args)
    assert vars(ours).items() <= vars(theirs).items(), (
        "torch marks functions that take their arguments in one list in another way"
    )


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


MEMBERS = {part for path in torch_internals.PRIVATE_NAMES for part in path.split(".") if is_private(part)}
TRITON = {path.rpartition(".")[0] for path in triton_internals.PRIVATE_NAMES} - {"triton"}
ALLOWED = {
    "torch.ops.aten._log_softmax",  # the name of an operator
    # kernels/ needs these and may not import fastseg
    "torch._C.__file__",
    *(f"torch._C.{name}_tls" for name in ("_is_key_in", "_get_obj_in", "_stash_obj_in")),
}


def dotted(node):
    """The dotted name that a node reads, such as "torch.nn.Conv2d"; of other expressions the last attribute alone."""
    if isinstance(node, ast.Name):
        return node.id
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else "()"


def private(name, members):
    """Whether a dotted name is private to torch or triton. members: also where it is a member of any object."""
    parts = name.split(".")
    if any(allowed == name or allowed.startswith(f"{name}.") for allowed in ALLOWED):
        return False
    if parts[0] in ("torch", "triton") and any(map(is_private, parts)):
        return True
    if any(f"{name}.".startswith(f"{owner}.") for owner in TRITON):
        return True
    return members and parts[-1] in MEMBERS and parts[0] not in ("self", "cls")


def uses(path, members):
    """(line, name) of each private name of torch or triton in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [dotted(node)]
        for name in names:
            if private(name, members):
                yield node.lineno, name


# The witness must run before fastseg is imported, and with the versions that witness-requirements.txt pins.
PINNED = ROOT / "tests" / "support" / "witness.py"
SOURCES = sorted({
    path
    for folder in ("fastseg", "kernels", "tests", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
    if path.resolve() not in HOMES | {Path(__file__), PINNED} and not path.is_relative_to(ROOT / "fastseg" / "kernels")
})  # fmt: skip


def test_no_other_file_uses_a_private_name():
    """In tests, overriding or setting a private method of a module is allowed: that is what they test."""
    assert len(SOURCES) > 200
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in SOURCES
        for line, name in uses(path, members=not path.is_relative_to(ROOT / "tests"))
    ]
    assert not found, "private names belong in fastseg/torch_internals.py or kernels/triton_internals.py: " + str(found)


def test_without_the_check_for_transforms_results_are_the_same(monkeypatch):
    """The fallback: every call counts as inside a transform of torch.func."""
    logits, labels = torch.randn(1, 4, 3, 5), torch.randint(4, (1, 12, 20))
    features, weight = torch.randn(2, 16, 4, 5), torch.randn(3, 16)

    def results():
        leaves = [t.clone().requires_grad_() for t in (logits, features, weight)]
        outputs = [
            functional.upsample_cross_entropy(leaves[0], labels),
            functional.linear_cross_entropy(leaves[1], leaves[2], labels[:, :4, :5].expand(2, 4, 5) % 3),
            functional.max_pool2d(leaves[1], 2).square().sum(),
        ]
        return [*outputs, *torch.autograd.grad(sum(outputs), leaves)]

    expected = results()
    monkeypatch.setattr(torch_internals, "functorch_transforms_active", lambda: True)
    for found, want in zip(results(), expected, strict=True):
        torch.testing.assert_close(found, want)
