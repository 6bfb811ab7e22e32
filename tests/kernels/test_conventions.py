"""The rules for kernels in CONTRIBUTING.md that can be read from their source: names of masks and offsets, headings."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

from fastseg import kernels

# Indices that are offsets as they are, in a vector or along a row with one element for each: channels and classes,
# rows and columns of a matrix product, pixels, taps, lanes, programs.
INDICES = {"c", "c0", "k", "n", "r", "s", "p", "pixel", "tap", "lane", "label", "program"}
ROOT = Path(kernels.__file__).parent
TRITON = sorted(path for path in ROOT.rglob("*.py") if "@triton.jit" in path.read_text())
HEADING = re.compile(r"# (\d+)\. [A-Z].*[^.]")


def device_functions(source):
    """The functions of a module that Triton compiles."""
    return [
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and any(ast.unparse(d) == "triton.jit" for d in node.decorator_list)
    ]


def misnamed_masks(value):
    """The parts of a mask that are neither comparisons nor named m_*."""
    if isinstance(value, ast.BinOp) and isinstance(value.op, (ast.BitAnd, ast.BitOr)):
        return misnamed_masks(value.left) + misnamed_masks(value.right)
    if isinstance(value, ast.UnaryOp):
        return misnamed_masks(value.operand)
    if isinstance(value, ast.Subscript):
        return misnamed_masks(value.value)
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "tl.max_constancy":
        return misnamed_masks(value.args[0])
    named = isinstance(value, ast.Name) and value.id.startswith("m_")
    return [] if named or isinstance(value, ast.Compare) else [f"{ast.unparse(value)} is a mask, but not named m_*"]


def misnamed_offsets(value):
    """The variables among the terms of an offset that are neither named o or o_*, nor sizes, nor indices."""
    if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add):
        return misnamed_offsets(value.left) + misnamed_offsets(value.right)
    if isinstance(value, ast.IfExp):
        return misnamed_offsets(value.body) + misnamed_offsets(value.orelse)
    if isinstance(value, ast.Subscript):
        return misnamed_offsets(value.value)
    name = value.id if isinstance(value, ast.Name) else "o"
    right = name == "o" or name.startswith("o_") or name.isupper() or name in INDICES
    return [] if right else [f"{name} is an offset, but not named o_*"]


def without_pointer(address):
    """The terms of an address after the first one, the pointer."""
    if isinstance(address, ast.BinOp) and isinstance(address.op, ast.Add):
        return [*without_pointer(address.left), address.right]
    return []


def misnamed(source, parameters):
    """What breaks the rule in a module. parameters: those of all device functions, by the function's name."""
    found = []
    for function in device_functions(source):
        for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
            wrong, name = [], ast.unparse(call.func)
            if name in ("tl.load", "tl.store") or name.startswith("tl.atomic_"):
                for term in without_pointer(call.args[0]):
                    wrong += misnamed_offsets(term)
            for keyword in call.keywords:
                if keyword.arg == "mask":
                    wrong += misnamed_masks(keyword.value)
            for parameter, value in zip(parameters.get(name, ()), call.args, strict=False):
                if parameter.startswith("m_"):
                    wrong += misnamed_masks(value)
                elif parameter.startswith("o_"):
                    wrong += misnamed_offsets(value)
                elif isinstance(value, ast.Name) and value.id.startswith(("m_", "o_")) and parameter != "o":
                    wrong.append(f"{value.id} is the argument {parameter}, which has another prefix")
            found += [f"{function.name}, line {call.lineno}: {words}" for words in wrong]
    return found


def misnumbered(source):
    """The kernels whose comments are not headings numbered from 1 to at least 2, in order and of one line each."""
    comments = {
        token.start[0]: token.string
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#")
    }
    found = []
    for function in device_functions(source):
        lines = range(function.lineno, function.end_lineno + 1)
        headings = [(line, re.match(r"# (\w)\.", comments[line])) for line in lines if line in comments]
        headings = [line for line, match in headings if match]
        numbers = [match and int(match[1]) for match in (HEADING.fullmatch(comments[line]) for line in headings)]
        in_order = len(numbers) >= 2 and numbers == list(range(1, len(numbers) + 1))
        continued = any(line + 1 in comments for line in headings)
        if function.name.endswith("_kernel") and (not in_order or continued):
            found.append(f"{function.name}: headings {numbers}{', one of several lines' if continued else ''}")
    return found


@pytest.fixture(scope="module")
def parameters():
    functions = [function for path in TRITON for function in device_functions(path.read_text())]
    return {function.name: [argument.arg for argument in function.args.args] for function in functions}


@pytest.mark.parametrize("path", TRITON, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_masks_and_offsets_carry_their_prefixes(path, parameters):
    assert misnamed(path.read_text(), parameters) == []


@pytest.mark.parametrize("path", TRITON, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_steps_of_each_kernel_have_numbered_headings(path):
    assert misnumbered(path.read_text()) == []


BAD = """
@triton.jit
def load(x, o_x, m_x):
    return tl.load(x + o_x, mask=m_x, other=0.0)


@triton.jit
def bad_kernel(x, y, N, W, BLOCK: tl.constexpr):
    # 1. Which elements
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_live = o < N
    o_x = o // W * (2 * W) + o % W

    # 2. Load, and store
    value = load(x, o_x, m_live)
    tl.store(y + o, value, mask=m_live & (value > 0))
"""


def broken(*replacements):
    """(words of the names' check, of the headings' check) for the kernel above after these replacements."""
    source = BAD
    for old, new in replacements:
        assert old in source
        source = source.replace(old, new)
    parameters = {function.name: [a.arg for a in function.args.args] for function in device_functions(source)}
    return misnamed(source, parameters), misnumbered(source)


def test_a_kernel_that_follows_the_rules_passes():
    assert broken() == ([], [])


@pytest.mark.parametrize(
    "replacements, words",
    [
        ([("m_live", "live")], ["live is a mask, but not named m_*"] * 2),
        ([("mask=m_x", "mask=tl.max_constancy(keep[:, None], 4)")], ["keep is a mask, but not named m_*"]),
        ([("mask=m_live &", "mask=~other &")], ["other is a mask, but not named m_*"]),
        ([("y + o,", "y + (N + place[:, None]),")], ["place is an offset, but not named o_*"]),
        ([("o_x = ", "at = "), ("value = load(x, o_x", "value = load(x, at")], ["at is an offset, but not named o_*"]),
        (
            [("o_x, m_x", "o_x, live"), ("mask=m_x", "mask=live > 0")],
            ["m_live is the argument live, which has another prefix"],
        ),
    ],
)
def test_wrong_names_are_found(replacements, words):
    names, headings = broken(*replacements)
    assert [line.partition(": ")[2] for line in names] == words and headings == []


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("    # 1. Which elements\n", "", "headings [2]"),
        ("# 2.", "# 3.", "headings [1, 3]"),
        ("# 2. Load, and store", "# b. Load, and store", "headings [1, None]"),
        ("# 1. Which elements", "# 1. Which elements.", "headings [None, 2]"),
        ("# 2. Load, and store", "# 2. Load\n    # and store", "headings [1, 2], one of several lines"),
    ],
)
def test_wrong_headings_are_found(old, new, words):
    assert broken((old, new)) == ([], [f"bad_kernel: {words}"])
