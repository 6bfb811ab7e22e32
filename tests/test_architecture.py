"""docs/architecture.md and the rules of the house are true: files, imports, parameters, lengths."""

import ast
import gc
import re
import subprocess
from pathlib import Path

import pytest

from fastseg.ops.operator import Operator

ROOT = Path(__file__).parents[1]
COLUMNS = ("fastseg/ops", "kernels", "kernels/cuda", "tests")
LAYERS = [  # imports go down, or stay in their own layer
    {"version", "torch_internals", "atomic_write", "kernels"},
    {"dispatch"},
    {"autotune"},
    {"ops"},
    {"functional"},
    {"nn", "crf", "uncertainty"},
    {"models", "swapping"},
    {"compiler"},
    {"training", "verification"},
    {"bench", "inspect"},
    {"commands"},
]
SHARED = {"arguments", "operator", "geometry", "positions", "checks", "reference", "chunked_reference", "functions",
          "conv_transpose_norm", "common", "tiling", "gemm", "problem", "statistics", "gradient",
          "row_chunks", "resizing"}  # fmt: skip


def tracked(*patterns):
    found = subprocess.run(["git", "ls-files", *patterns], capture_output=True, text=True, cwd=ROOT).stdout.split()
    return [ROOT / name for name in found if (ROOT / name).is_file()]


def operator_map():
    """Rows of (operators, files of each column) of the table in docs/architecture.md."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = re.search(r"\| operators \|.*?\n\n", text, re.S)[0]
    for row in table.strip().splitlines()[2:]:
        cells = [re.findall(r"`([^`]+)`", cell) for cell in row.strip("|").split("|")]
        files = [[ROOT / column / name for name in names] for column, names in zip(COLUMNS, cells[1:5], strict=True)]
        yield cells[0], files


def test_the_operator_map_is_complete():
    registered = {o.name for o in gc.get_objects() if type(o) is Operator and not o.name.startswith("example_")}
    assert sorted(name for names, _ in operator_map() for name in names) == sorted(registered)


def test_the_files_of_the_operator_map_exist_and_none_is_missing():
    listed = {file for _, columns in operator_map() for files in columns for file in files}
    assert [file for file in listed if not file.exists()] == []
    for column in COLUMNS[:3]:
        for file in (ROOT / column).glob("*/*.py"):
            if file.parent.name in ("cuda", "cpu") or file.stem in SHARED or file.stem.startswith("_"):
                continue
            assert file in listed or file.stem.endswith("arguments") or file.stem == "options", file


def imported(file):
    """The top-level parts of fastseg that a file imports, type checking and functions included."""
    package = ("fastseg" / file.relative_to(ROOT / "fastseg")).parts
    base = package[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            names = (base[: len(base) - node.level + 1] if node.level else ()) + tuple((node.module or "").split("."))
            names = tuple(filter(None, names))
            if names == ("fastseg",):
                yield from (alias.name for alias in node.names)
            elif names[:1] == ("fastseg",):
                yield names[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("fastseg."))


@pytest.mark.parametrize("layer", range(len(LAYERS)), ids=lambda i: "-".join(sorted(LAYERS[i])))
def test_imports_run_one_way(layer):
    below = set().union(*LAYERS[: layer + 1])
    for part in LAYERS[layer] - {"kernels"}:
        where = ROOT / "fastseg" / part
        for file in where.rglob("*.py") if where.is_dir() else [where.with_suffix(".py")]:
            assert set(imported(file)) <= below, file


def test_kernels_import_nothing_of_fastseg():
    for file in (ROOT / "kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level <= len(file.relative_to(ROOT / "kernels").parts), (file, node.lineno)
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                assert not any(name.split(".")[0] == "fastseg" for name in names), (file, node.lineno)


def test_host_functions_take_at_most_eight_parameters():
    """Public functions and constructors that follow torch's signatures excepted, and kernels."""
    for file in tracked("fastseg/*.py", "kernels/*.py", "benchmarks/*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.FunctionDef) or any("jit" in ast.unparse(d) for d in node.decorator_list):
                continue
            arguments = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            count = len([name for name in arguments if name not in ("self", "cls")])
            public = file.parent.parent.name == "ops" and not node.name.startswith("_") and node.name in functions()
            constructor = file.parent.name == "nn" and node.name == "__init__"
            assert count <= 8 or public or constructor, f"{file.relative_to(ROOT)}: {node.name} takes {count}"


def functions():
    import fastseg.functional

    return fastseg.functional.__all__


def test_files_stay_short():
    long = {
        str(file.relative_to(ROOT)): lines for file in tracked("*.py") if (lines := len(file.open().readlines())) > 400
    }
    assert not long
