"""What the pages in docs/ name exists: tests, files, links, formulas that parse."""

import ast
import re
from pathlib import Path

import pytest
from matplotlib.mathtext import MathTextParser

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
THEORY = (ROOT / "docs" / "theory.md").read_text()
TESTS = {
    node.name: file.name
    for file in sorted((ROOT / "tests").rglob("test_*.py"))
    for node in ast.parse(file.read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
}


def cited_tests(text: str) -> set[str]:
    return set(re.findall(r"`(test_\w+)`", text))


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_tests_files_and_links_exist(page: Path) -> None:
    text = page.read_text()
    assert cited_tests(text) - set(TESTS) == set()
    files = re.findall(r"`((?:am_diffusers|tests|docs|configs|scripts|eval)/[\w./]+)`", text)
    links = re.findall(r"\]\((?!https?://)([^)#]+)", text)
    assert [name for name in files if not (ROOT / name).exists()] == []
    assert [name for name in links if not (page.parent / name).exists()] == []


def test_every_section_of_the_theory_names_its_tests_and_every_test_of_it_is_named() -> None:
    _, symbols, *sections = re.split(r"^## ", THEORY, flags=re.MULTILINE)
    assert symbols.startswith("Symbols")
    assert [section.splitlines()[0] for section in sections if not cited_tests(section)] == []
    assert len(sections) == 12
    of_the_theory = {name for name, file in TESTS.items() if file.startswith("test_theory")}
    assert len(of_the_theory) > 20
    assert of_the_theory - cited_tests(THEORY) == set()


def test_formulas_parse() -> None:
    """By matplotlib, which knows a part of what GitHub does."""
    blocks = re.findall(r"^```math\n(.*?)\n```$", THEORY, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == THEORY.count("```math") > 20
    assert THEORY.count("```") == 2 * len(blocks)
    parser = MathTextParser("path")
    for block in blocks:
        assert "\n" not in block  # a new line in the source would not be one on the page
        parser.parse(f"${block}$")


def test_every_row_of_the_papers_names_a_paper_a_file_deviations_and_a_test() -> None:
    rows = [line for line in (ROOT / "docs" / "papers.md").read_text().splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.startswith("| paper")]
    assert len(rows) >= 12
    for row in rows:
        paper, where, deviations, tests = row.strip("| ").split(" | ")
        assert re.search(r"\[(\d{4}\.\d{5})\]\(https://arxiv.org/abs/\1\)", paper), row
        assert re.search(r"`(am_diffusers|eval)/[\w/]+\.py`", where), row
        assert deviations, row
        assert cited_tests(tests), row


# Where docstrings are in plain English, as glob patterns.
PLAIN = ("am_diffusers/**/*.py", "eval/**/*.py", "scripts/*.py", "scripts/docs/**/*.py")
CLAUSE = re.compile(r"(What|Where|Whether|How|Which|Everything)\b")
NOUN = re.compile(r"(The|A|An|All|Of|By|As|With)\b")
GENITIVE = re.compile(r"^ *\w+: (of|its|their|theirs|that of|those of)\b", re.MULTILINE)


def unclear(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> list[str]:
    """Name what isn't plain in a docstring: a clause or, of a function, no verb first; bare genitives."""
    text = ast.get_docstring(node) or ""
    decorators = [ast.unparse(each) for each in getattr(node, "decorator_list", [])]
    is_function = isinstance(node, ast.FunctionDef) and not {"property", "cached_property"} & set(decorators)
    clause = CLAUSE.match(text) or (is_function and NOUN.match(text))
    first = [text.splitlines()[0]] if clause else []
    return first + [found[0].strip() for found in GENITIVE.finditer(text)]


def test_docstrings_are_plain_english() -> None:
    """A function's begins with a verb, no clause is the name of a thing, an attribute names its thing."""
    files = sorted({file for pattern in PLAIN for file in ROOT.glob(pattern)})
    found = [
        f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}: {line}"
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        for line in unclear(node)
    ]
    assert len(files) > 90
    assert found == [], "\n".join(found)
