"""What is installed is what is developed: one top-level name, run folders inside it, pins within the ranges."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, Command, run_command
from packaging.requirements import Requirement

SOURCES = ("graft", "launch", "shards", "ds_configs", "setup.py", "pyproject.toml", "README.md", "LICENSE")


def requirements(extra: str) -> list[Requirement]:
    """What setup.py asks for, told by setuptools itself."""
    code = (
        "import setuptools, runpy, json; told = {};"
        "setuptools.setup = lambda **options: told.update(options);"
        "runpy.run_path('setup.py');"
        "print(json.dumps([told['install_requires'], told['extras_require']]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    needed, extras = __import__("json").loads(done.stdout)
    return [Requirement(line) for line in (extras[extra] if extra else needed)]


def pins() -> dict[str, str]:
    """Package -> exact version of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonical(name): version for name, version in pairs}


def canonical(name: str) -> str:
    """One spelling for one package."""
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("extra", ["", "dev", "bench"])
def test_pins_lie_within_the_ranges(extra: str) -> None:
    pinned = pins()
    for requirement in requirements(extra):
        version = pinned.get(canonical(requirement.name))
        assert version, f"constraints.txt has no {requirement.name}"
        assert requirement.specifier.contains(version), f"{requirement} excludes the pinned {version}"


def test_pins_name_no_local_build() -> None:
    """``torch==2.13.0`` takes a CPU build where there is one and CUDA wheels elsewhere; ``+cpu`` would not."""
    assert not [version for version in pins().values() if "+" in version]


def test_every_imported_package_is_required() -> None:
    """A library that happens to be there because another one needs it may be gone tomorrow."""
    code = "import importlib.metadata, json; print(json.dumps(importlib.metadata.packages_distributions()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    owners = {module: {canonical(n) for n in names} for module, names in __import__("json").loads(done.stdout).items()}
    required = {canonical(requirement.name) for requirement in requirements("")}
    own = {"graft", "launch", "shards"} | set(sys.stdlib_module_names)
    from test_architecture import imported, python_files

    used = {
        (name, module.split(".")[0]) for name in python_files("graft", "launch", "shards") for module in imported(name)
    }
    wrong = [
        f"{name}: {module}"
        for name, module in sorted(used)
        if module not in own and not owners.get(module, set()) & required
    ]
    assert not wrong, "\n".join(wrong)


@pytest.fixture(scope="module")
def unpacked_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built without network from a copy of the sources, unpacked; no clone is near it."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "source"
    copy.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("sets", "__pycache__"))
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, copy / name)
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-build-isolation",
        "--no-deps",
        "--wheel-dir",
        str(folder),
        str(copy),
    ]
    run_command(build)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def test_the_only_top_level_name_is_graft(unpacked_wheel: Path) -> None:
    names = {path.name for path in unpacked_wheel.iterdir() if not path.name.endswith(".dist-info")}
    assert names == {"graft"}


def test_the_wheel_holds_every_source(unpacked_wheel: Path) -> None:
    from test_architecture import tracked_files

    sources = [
        name for name in tracked_files() if re.fullmatch(r"(graft|launch|shards)/.*\.py|ds_configs/.*\.json", name)
    ]
    inside = [name if name.startswith("graft/") else f"graft/{name}" for name in sources]
    assert inside
    assert [name for name in inside if not (unpacked_wheel / name).is_file()] == []


def run_files() -> list[str]:
    """Everything in the run folders that can be started."""
    return sorted(f"{folder}.{path.stem}" for folder in ("launch", "shards") for path in (ROOT / folder).glob("*.py"))


@pytest.mark.parametrize("module", run_files())
def test_run_files_start_from_the_wheel(module: str, unpacked_wheel: Path, tmp_path: Path) -> None:
    """``python -m graft.launch.train --help``, in a folder of its own and with nothing but the wheel on the path."""
    path = os.pathsep.join([str(unpacked_wheel)])
    outcome = run_command([sys.executable, "-m", f"graft.{module}", "--help"], cwd=tmp_path, env={"PYTHONPATH": path})
    assert "usage:" in outcome.stdout


@pytest.mark.parametrize("module", run_files())
def test_run_files_start_from_a_bare_clone(module: str, run_python: Command, tmp_path: Path) -> None:
    """... and as a file, from another folder."""
    outcome = run_python(ROOT / (module.replace(".", "/") + ".py"), "--help", cwd=tmp_path)
    assert "usage:" in outcome.stdout


def test_there_are_run_files() -> None:
    if not (ROOT / "launch" / "train.py").exists():
        pytest.skip("launch/train.py is not written yet")
    expected = {
        "launch.train",
        "launch.evaluate",
        "launch.transcribe",
        "shards.make_manifest",
        "shards.precompute",
        "shards.verify",
    }
    assert expected <= set(run_files())
