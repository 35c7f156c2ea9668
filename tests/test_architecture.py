"""The house stays as it is drawn: who imports whom, what library code may do, what the README says is there."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from graft.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]
RUN_FOLDERS = ("launch", "shards")
BASES = ("command", "differences", "lengths", "ranks", "recipe", "run_dir", "tracker")
BASE = {f"graft.{name}" for name in BASES}
# A room may import itself, its row here, and the base modules.
ALLOWED = {
    "graft.train": {"graft.data", "graft.model"},
    "graft.evaluation": {"graft.data", "graft.model"},
    "graft.data": set(),
    "graft.model": set(),
    "graft.sources": {"graft.data", "graft.model"},  # where the two meet; only run files import it
}
MAX_BODY_LINES = 40  # of a function, without its signature and docstring
MAX_FILE_LINES = 500
# Heavy or optional packages have one owner: the module that needs them.
OWNERS = {
    "deepspeed": {"graft/train/engine.py"},
    "peft": {"graft/model/lora.py", "graft/model/assemble.py"},
    "soundfile": {"graft/data/audio.py"},
    "soxr": {"graft/data/audio.py"},
    "jiwer": {"graft/evaluation/wer.py"},
    "tensorboard": {"graft/tracker.py"},
}


@cache
def tracked_files() -> tuple[str, ...]:
    """What git holds or would add, as paths from the repository's root."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert listed.returncode == 0, f"git must tell which files belong to the repository: {listed.stderr}"
    return tuple(sorted(name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()))


def python_files(*folders: str) -> list[str]:
    """Tracked ``.py`` files below ``folders``."""
    found = [name for name in tracked_files() if name.endswith(".py") and name.split("/")[0] in folders]
    assert found, f"no Python file below {folders}"
    return found


@cache
def syntax(name: str) -> ast.Module:
    """The parsed file."""
    return ast.parse((ROOT / name).read_text(encoding="utf-8"), filename=name)


def module_name(name: str) -> str:
    """``graft/data/text.py`` -> ``graft.data.text``."""
    return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imported(name: str) -> Iterator[str]:
    """Full names of all modules that a file imports, anywhere in it, relative ones resolved."""
    package = module_name(name).split(".") if name.endswith("__init__.py") else module_name(name).split(".")[:-1]
    for node in ast.walk(syntax(name)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def room(module: str) -> str:
    """``graft.data.text`` -> ``graft.data``; ``graft.lengths`` -> itself."""
    return ".".join(module.split(".")[:2])


def test_imports_run_one_way() -> None:
    wrong = []
    for name in python_files("graft"):
        here = room(module_name(name))
        allowed = BASE | {here, "graft"} | ALLOWED.get(here, set())
        wrong += [
            f"{name} imports {module}"
            for module in imported(name)
            if module.split(".")[0] == "graft" and room(module) not in allowed
        ]
    assert not wrong, "\n".join(wrong)


def test_every_room_has_its_row() -> None:
    """A new file or folder of the library has to say where it stands."""
    known = BASE | set(ALLOWED) | {"graft"}
    assert {room(module_name(name)) for name in python_files("graft")} <= known


def test_base_modules_form_no_cycle() -> None:
    edges = {
        module_name(name): {room(module) for module in imported(name)} & BASE - {module_name(name)}
        for name in python_files("graft")
        if module_name(name) in BASE
    }
    placed: set[str] = set()
    while free := {module for module, needs in edges.items() if module not in placed and needs <= placed}:
        placed |= free
    assert placed == set(edges), f"these import each other: {sorted(set(edges) - placed)}"


def test_nothing_imports_a_run_folder() -> None:
    runnable = {module_name(name) for name in tracked_files() if name.split("/")[0] in RUN_FOLDERS}
    wrong = [
        f"{name} imports {module}"
        for name in tracked_files()
        if name.endswith(".py") and not name.startswith("tests/")
        for module in imported(name)
        if module.split(".")[0] in RUN_FOLDERS or module in runnable or module.removeprefix("graft.") in runnable
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", OWNERS)
def test_heavy_packages_have_one_owner(package: str) -> None:
    users = {
        name for name in python_files("graft", *RUN_FOLDERS) if package in {m.split(".")[0] for m in imported(name)}
    }
    assert users <= OWNERS[package]


def test_init_files_are_empty() -> None:
    wrong = [
        name for name in python_files("graft") if name.endswith("__init__.py") and (ROOT / name).read_text().strip()
    ]
    assert not wrong


def test_library_code_never_prints() -> None:
    """graft/command.py speaks for the run files: it turns a user's fault into one line on stderr."""
    wrong = [
        f"{name}:{node.lineno}"
        for name in python_files("graft")
        if name != "graft/command.py"
        for node in ast.walk(syntax(name))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not wrong


REGISTRATIONS = {"register", "add_implicit_resolver"}  # a class made known to its own framework


def has_effect(node: ast.stmt) -> bool:
    """Whether a statement at module level does something instead of defining something."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        called = node.value.func
        return not (isinstance(called, ast.Attribute) and called.attr in REGISTRATIONS)
    return isinstance(node, ast.For | ast.While | ast.With | ast.Try)


def test_imports_have_no_effect() -> None:
    wrong = [
        f"{name}:{node.lineno}" for name in python_files("graft") for node in syntax(name).body if has_effect(node)
    ]
    assert not wrong


Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def public_definitions(node: ast.AST) -> Iterator[Definition]:
    """Public functions and classes of a module, public methods of public classes; a class may speak for ``forward``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition) and not child.name.startswith("_"):
            if not (isinstance(node, ast.ClassDef) and child.name == "forward"):
                yield child
            if isinstance(child, ast.ClassDef):
                yield from public_definitions(child)


def test_public_names_have_docstrings() -> None:
    wrong = []
    for name in python_files("graft", *RUN_FOLDERS):
        if name.endswith("__init__.py"):
            continue
        if not ast.get_docstring(syntax(name)):
            wrong.append(f"{name}: the module")
        if name.startswith("graft/"):
            found = public_definitions(syntax(name))
            wrong += [f"{name}:{d.lineno}: {d.name}" for d in found if not ast.get_docstring(d)]
    assert not wrong, "\n".join(wrong)


def body_length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function from the first statement after its docstring."""
    first, *rest = function.body
    is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    start = rest[0] if is_docstring and rest else first
    return (function.end_lineno or 0) - start.lineno + 1


def test_functions_and_files_stay_short() -> None:
    names = [name for name in tracked_files() if name.endswith(".py")]
    wrong = [
        f"{name}:{node.lineno}: the body of {node.name} has {body_length(node)} lines"
        for name in names
        for node in ast.walk(syntax(name))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and body_length(node) > MAX_BODY_LINES
    ]
    lengths = {name: len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in names}
    wrong += [f"{name} has {length} lines" for name, length in lengths.items() if length > MAX_FILE_LINES]
    assert not wrong, "\n".join(wrong)


def text_files() -> Iterator[tuple[str, str]]:
    """Tracked files that are UTF-8 text, with their text; data files of the examples apart."""
    for name in tracked_files():
        if name.startswith("examples/") and Path(name).suffix in {".json", ".jsonl", ".txt"}:
            continue
        try:
            yield name, (ROOT / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


# Written in pieces, or this file would name what it forbids.
FORBIDDEN = {
    "a path of somebody's machine": r"(?<![\w.$}/-])/(work|root|home)" + r"/\w",
    "a pickle": r"\bimport\s+pickle\b|\bpickle\." + r"(load|dump)",
    "code from a checkpoint": r"trust_remote_code\s*=\s*" + r"True",
    "torch.load of arbitrary objects": r"weights_only\s*=\s*" + r"False",
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_holds(what: str) -> None:
    pattern = re.compile(FORBIDDEN[what])
    wrong = [
        f"{name}:{number}: {line.strip()}"
        for name, text in text_files()
        for number, line in enumerate(text.splitlines(), start=1)
        if pattern.search(line)
    ]
    assert not wrong, "\n".join(wrong)


def test_torch_load_is_not_used() -> None:
    """Weights, checkpoints and features are safetensors: nothing of ours opens a pickle, however guarded."""
    wrong = [
        f"{name}:{node.lineno}"
        for name in python_files("graft", *RUN_FOLDERS)
        for node in ast.walk(syntax(name))
        if isinstance(node, ast.Attribute)
        and node.attr in {"load", "save"}
        and isinstance(node.value, ast.Name)
        and node.value.id == "torch"
    ]
    assert not wrong


RECIPES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "recipes").rglob("*.yaml"))


def test_there_are_recipes() -> None:
    if not RECIPES:
        pytest.skip("recipes/ is still empty")
    assert {"recipes/tiny.yaml", "recipes/digits.yaml"} <= set(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_parses(recipe: str) -> None:
    assert load_recipe(ROOT / recipe).name


def file_map() -> list[str]:
    """First words of the README's file map: the fenced block under the heading that says so."""
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("README.md is not written yet")
    block = re.search(r"^#+ .*file map.*?^```\w*\n(.*?)^```", readme.read_text(encoding="utf-8"), re.S | re.M | re.I)
    assert block, "README.md has no heading with 'file map' followed by a fenced block"
    return [line.split()[0] for line in block[1].splitlines() if line.strip()]


def test_readme_maps_every_file() -> None:
    """One line per file, path first; ``folder/`` stands for all below it; the empty __init__ files are left out."""
    listed = file_map()
    assert len(listed) == len(set(listed)), "a path stands twice in the file map"
    folders = tuple(path for path in listed if path.endswith("/"))
    real = [name for name in tracked_files() if not name.endswith("__init__.py")]
    missing = [name for name in real if name not in listed and not name.startswith(folders)]
    absent = [path for path in listed if not (ROOT / path).exists()]
    assert not missing and not absent, f"not in the map: {missing}; in the map, but not there: {absent}"


def test_readme_folders_hide_no_library_file() -> None:
    code = ("graft/", "launch/", "shards/", "ds_configs/", "recipes/", "benchmarks/")
    assert not [path for path in file_map() if path.endswith("/") and path.startswith(code)]


def test_importing_the_library_is_light() -> None:
    """Settings and lengths are read by tools that have no need of torch's friends."""
    code = "import sys, graft.lengths, graft.recipe; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "deepspeed", "transformers", "peft"} & set(done.stdout.split())


def test_the_documents_name_tests_that_are_there() -> None:
    """``tests/file.py::test_name`` in a document, or ``tests/file.py`` alone."""
    documents = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    named = {name for path in documents for name in re.findall(r"tests/\w+\.py(?:::\w+)?", path.read_text("utf-8"))}
    assert any("::" in name for name in named)
    for name in sorted(named):
        file, _, function = name.partition("::")
        text = (ROOT / file).read_text("utf-8") if (ROOT / file).is_file() else None
        assert text is not None, f"{name}: no such file"
        assert not function or f"def {function}(" in text, f"{name}: no such test"
