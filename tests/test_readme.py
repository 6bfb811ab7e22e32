import ast
import re
from pathlib import Path

import pytest
from support import packages

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
SNIPPETS = [(page.name, code) for page in PAGES for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.S)]


@pytest.mark.parametrize("page, code", SNIPPETS, ids=[f"{page}-{n}" for n, (page, _) in enumerate(SNIPPETS)])
def test_the_python_in_the_docs_runs(page, code, capsys):
    for package in NEEDED & imported(code):
        packages.need(package)
    exec(compile(code, page, "exec"), {"__name__": "__main__"})


NEEDED = {"accelerate", "lightning", "monai", "segmentation_models_pytorch", "timm", "torchvision", "transformers"}


def imported(code):
    """The packages that a snippet imports."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in getattr(node, "names", [])]
        found |= {name.partition(".")[0] for name in names if name}
    return found


SHOWN = [
    (page.name, code, output)
    for page in GUIDES
    for code, output in re.findall(r"```python\n((?:(?!```).)*?)```\n\n```\n(.*?)```", page.read_text(), re.S)
]


@pytest.mark.parametrize("page, code, output", SHOWN, ids=[f"{page}-{n}" for n, (page, _, _) in enumerate(SHOWN)])
def test_a_guide_shows_what_its_snippet_prints(page, code, output, capsys):
    test_the_python_in_the_docs_runs(page, code, capsys)
    assert capsys.readouterr().out == output


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_nothing_is_left_to_fill_in(page):
    assert not re.search(r"^[A-Z]+(_[A-Z]+)+$|\bTODO\b", page.read_text(), re.M)
