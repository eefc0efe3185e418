"""The layout of CONTRIBUTING: which folder may import which, and how long things may be."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from am_diffusers.methods import METHODS
from am_diffusers.models import FAMILIES

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "am_diffusers"
FILES = sorted(p for p in PACKAGE.rglob("*.py") if "assets" not in p.relative_to(PACKAGE).parts)
EVAL_FILES = sorted((ROOT / "eval").rglob("*.py"))

# Floors from the bottom up; a folder or a file of the mathematics imports its own floor and those below.
FLOORS = [
    {"system", "prompts"},
    {"velocity", "parametrization", "transitions", "noise", "divergences", "adjoint_tables"},
    {"rollout", "adjoint", "matching", "terminal_cost", "input_gradients", "reciprocal"},
    {"methods"},
    {"config", "training", "models", "rewards", "samplers"},
    {"evaluation"},
    {"run"},
    {"estimate", "steering"},
]
MATHEMATICS = set().union(*FLOORS[1:4])
# Leaves see the mathematics and system alone.
LEAVES = {"models", "rewards", "samplers"}
NEVER = {
    "training": {"config", "models", "rewards", "samplers"},
    "config": {"training", "models", "rewards", "samplers"},
}
HEAVY = {"diffusers", "transformers", "peft", "accelerate", "open_clip", "datasets", "jsonargparse"}
SEE_CONFIG = {"config", "run", "estimate", "steering"}


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


def offences(file: Path) -> set[str]:
    """Name the imports of a file that the layout forbids."""
    module, imports = module_of(file), imports_of(file)
    found: set[str] = set()
    for level, floor in enumerate(FLOORS):
        if module in floor:
            found |= own(file) - set().union(*FLOORS[: level + 1])
    if module in MATHEMATICS:
        found |= imports & HEAVY
    if module in LEAVES:
        found |= own(file) - {module, "system", *MATHEMATICS - {"methods"}}
    found |= own(file) & NEVER.get(module, set())
    if module != "models":
        found |= imports & {"peft"}
    if module not in SEE_CONFIG:
        found |= own(file) & {"config", "run"}
    return found


def test_imports_point_down() -> None:
    assert {str(file.relative_to(PACKAGE)): found for file in FILES if (found := offences(file))} == {}


def test_every_file_is_checked() -> None:
    assert len(FILES) > 20
    assert {"transitions", "models", "methods", "rewards"} <= {module_of(f) for f in FILES}


def too_long(file: Path) -> list[str]:
    """Name what passes the size guides in a file."""
    source = file.read_text()
    found = [f"{source.count(chr(10))} lines"] if source.count("\n") > 250 else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            arguments = [a.arg for a in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]]
            assert node.end_lineno is not None
            if node.end_lineno - node.lineno >= 60:
                found.append(f"{node.name} is too long")
            if len(set(arguments) - {"self", "cls"}) > 8:
                found.append(f"{node.name} has too many parameters")
            if node.args.kwarg is not None:
                found.append(f"{node.name} takes **kwargs")
    return found


COLLECTIVES = {
    "gather",
    "gather_object",
    "gather_for_metrics",
    "reduce",
    "broadcast",
    "broadcast_object_list",
    "pad_across_processes",
    "wait_for_everyone",
}
# FSDP's own exchanges are inside the passes of a sharded model.
NO_EXCHANGE = {"device_mesh", "fsdp"}


def exchanges(file: Path) -> list[str]:
    """Name what a file exchanges with other processes by itself, not through `Processes`."""
    found: list[str] = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names, parts = {alias.name for alias in node.names}, node.module.split(".")
            if parts[0] == "accelerate":
                found += sorted(names & COLLECTIVES)
            if (parts[:2] == ["torch", "distributed"] and not NO_EXCHANGE & {*parts, *names}) or (
                parts == ["torch"] and "distributed" in names
            ):
                found.append(node.module)
        elif isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.startswith("torch.distributed")]
        elif isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value)
            if owner == "torch" and node.attr == "distributed":
                found.append("torch.distributed")
            if (
                owner.split(".")[-1] in ("accelerator", "state", "PartialState()")
                and node.attr in COLLECTIVES
            ):
                found.append(ast.unparse(node))
    return found


def test_processes_exchange_through_processes_alone() -> None:
    files = [*FILES, *EVAL_FILES, *sorted((ROOT / "scripts").rglob("*.py"))]
    offenders = {str(f.relative_to(ROOT)): found for f in files if (found := exchanges(f))}
    assert offenders.keys() == {"am_diffusers/system/processes.py"}, offenders


ONE_PLACE = {
    # A checkpoint's folder is renamed as a whole.
    "os.replace": {"am_diffusers/system/files.py", "am_diffusers/training/checkpoint_folder.py"},
    # Seeds of noise; the base64 digest of a page's script.
    "hashlib.": {"am_diffusers/system/files.py", "am_diffusers/noise.py", "eval/evaluating/report/page.py"},
    # Several names alike, not the nearest.
    "difflib.": {"am_diffusers/system/text.py", "am_diffusers/rewards/imagenet_class.py"},
}


ONE_WAY = re.compile(r"""\bAccelerator\((?!cpu=True)|["']cuda["'] if """)


def test_programs_take_their_device_and_processes_by_one_way() -> None:
    """Those that are for the CPU alone say so."""
    files = [*FILES, *EVAL_FILES, *sorted((ROOT / "scripts").rglob("*.py"))]
    found = {str(f.relative_to(ROOT)) for f in files if re.search(ONE_WAY, f.read_text())}
    assert found == {"am_diffusers/system/joining.py"}


def test_whole_files_fingerprints_and_nearest_names_are_made_in_one_place() -> None:
    for words, allowed in ONE_PLACE.items():
        found = {str(f.relative_to(ROOT)) for f in [*FILES, *EVAL_FILES] if words in f.read_text()}
        assert found <= allowed, words


def test_size_guides() -> None:
    files = [*FILES, *EVAL_FILES]
    assert {str(file.relative_to(ROOT)): found for file in files if (found := too_long(file))} == {}


# These make an SD3 pipeline.
MAKE_PIPELINES = "scripts/assets"
FAMILY_FILES = {
    file.stem
    for file in (PACKAGE / "models").glob("*.py")
    if re.search(r"\bFamily\($", file.read_text(), re.M)
}
OF_A_FAMILY = re.compile(
    "|".join([r"SD3\w*", r"\w*StableDiffusion\w*", r"(?!Diffusion)\w+Pipeline", *FAMILIES])
)


def words(file: Path) -> Iterator[str]:
    """Yield the names in a file's code and in its strings; docstrings and comments are free."""
    nodes = list(ast.walk(ast.parse(file.read_text())))
    docs = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield from re.findall(r"\w+", node.value)
        for part in ("id", "attr", "name", "module"):
            yield from re.findall(r"\w+", getattr(node, part, None) or "")


def test_only_its_own_file_names_a_family_or_a_pipeline_class() -> None:
    assert "sd3" in FAMILY_FILES
    own_files = {PACKAGE / "models" / f"{name}.py" for name in ("__init__", *FAMILY_FILES)}
    files = [*FILES, *EVAL_FILES, *(ROOT / "scripts").rglob("*.py")]
    found = {
        name: named
        for file in files
        if not (name := str(file.relative_to(ROOT))).startswith(MAKE_PIPELINES) and file not in own_files
        if (named := {word for word in words(file) if OF_A_FAMILY.fullmatch(word) or word in FAMILY_FILES})
    }
    assert found == {}


def test_a_method_is_named_in_its_own_file_and_in_one_other() -> None:
    """METHODS is the one; titles and keys, in code, comments and docstrings."""
    words = "|".join([*METHODS, *(re.escape(method.title) for method in METHODS.values())])
    own_files = {PACKAGE / "methods" / f"{name}.py" for name in METHODS}
    named = {
        str(file.relative_to(PACKAGE)): found
        for file in FILES
        if file not in own_files and (found := set(re.findall(rf"\b(?:{words})\b", file.read_text())))
    }
    adjoint_matching = {"Adjoint Matching"}  # the package is about it
    named = {file: found for file, found in named.items() if found - adjoint_matching}
    assert list(named) == ["methods/__init__.py"]


def test_no_import_circle() -> None:
    graph = {str(file.relative_to(ROOT).with_suffix("")).replace("/", "."): file for file in FILES}
    graph = {name.removesuffix(".__init__"): modules_of(file) for name, file in graph.items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path, name])
        if name not in done:
            for imported in sorted(graph[name] & graph.keys()):
                visit(imported, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def modules_of(file: Path) -> set[str]:
    """Modules of the package that a file imports when it is imported, those for typing alone left out."""
    found: set[str] = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_the_listing_is_short() -> None:
    """The flat files are the mathematics."""
    entries = [path for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    files, folders = [p for p in entries if p.is_file()], [p for p in entries if p.is_dir()]
    assert {file.stem for file in files} == {"__init__", *set().union(*FLOORS[1:3])}
    assert len(folders) <= 14
