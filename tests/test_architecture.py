"""The layout of DESIGN: which module may import which, and how long things may be."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "am_diffusers"
FILES = sorted(p for p in PACKAGE.rglob("*.py") if "assets" not in p.parts)
EVAL_FILES = sorted((PACKAGE.parent / "eval").rglob("*.py"))

# Layers from the bottom up; a module may import its own layer's packages and everything below it.
LAYERS = [
    {"velocity", "transitions", "parametrization", "divergences", "scaling", "out_of_memory"},
    {"rollout", "solver", "adjoint", "matching", "terminal"},
    {"methods"},
]
MATHEMATICS = set().union(*LAYERS)
# Leaves, and which others each may import: features share the preprocessing and weight files of rewards.
LEAVES = {"models": set[str](), "rewards": set[str](), "features": {"rewards"}}
HEAVY = {"diffusers", "transformers", "peft", "accelerate", "open_clip", "datasets", "jsonargparse"}


def module_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(file: Path) -> set[str]:
    """Top-level packages imported anywhere in a file, our own as `am_diffusers.<module>`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{file}: relative import"
            names = [node.module]
            if node.module == "am_diffusers":
                names = [f"am_diffusers.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            found.add(".".join(parts[:2]) if parts[0] == "am_diffusers" else parts[0])
    return found


def own(file: Path) -> set[str]:
    return {name.split(".")[1] for name in imports_of(file) if name.startswith("am_diffusers.")}


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_point_down(file: Path) -> None:
    module = module_of(file)
    if module in MATHEMATICS:
        level = next(i for i, layer in enumerate(LAYERS) if module in layer)
        allowed = set().union(*LAYERS[: level + 1])
        assert own(file) <= allowed
        assert not imports_of(file) & HEAVY
    elif module in LEAVES:
        assert own(file) <= {module, *LEAVES[module], *MATHEMATICS}
    if module != "models":
        assert not imports_of(file) & {"peft"}
    if module not in {
        "config",
        "command_line",
        "plan",
        "network_calls",
        "buffer_size",
        "build",
        "load",
        "estimate",
    }:
        assert not own(file) & {"config", "build"}, "configuration stops at build"


def test_every_file_is_checked() -> None:
    assert len(FILES) > 20
    assert {"transitions", "models", "methods", "rewards", "features"} <= {module_of(f) for f in FILES}


@pytest.mark.parametrize("file", [*FILES, *EVAL_FILES], ids=lambda f: str(f.relative_to(PACKAGE.parent)))
def test_size_guides(file: Path) -> None:
    source = file.read_text()
    assert source.count("\n") <= 250
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            arguments = [a.arg for a in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]]
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 60, f"{node.name} is too long"
            assert len(set(arguments) - {"self", "cls"}) <= 8, f"{node.name} has too many parameters"
            assert node.args.kwarg is None, f"{node.name} takes **kwargs"
