"""The house keeps its shape: floors, thin rooms, the name `kernels`, and what a wheel holds."""

import ast
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {
    "__init__": 0,
    "errors": 0,
    "reporter": 0,
    "files": 0,
    "published": 0,
    "settings": 1,
    "workspace": 1,
    "device": 1,
    "world": 1,
    "data": 2,
    "features": 2,
    "sample_shop": 2,
    "models": 3,
    "evaluation": 4,
    "runs": 4,
    "training": 5,
    "report": 6,
    "doctor": 6,
    "console": 6,
    "commands": 6,
    "app": 6,
    "__main__": 6,
}
"""Rooms and single modules of mmm4rec_cli; a lower one never imports a higher one."""


def modules(package: Path) -> list[Path]:
    return sorted(package.rglob("*.py"))


def imports(source: str) -> Iterator[str]:
    """Every module that a file names in an import, wherever in the file; relative imports are not in use here."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "write imports in full"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def climbs(room: str, source: str) -> list[str]:
    """The imports of a file in `room` that lie on a higher floor than the room."""
    found = []
    for name in imports(source):
        package, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if package == "mmm4rec_cli" and FLOORS.get(target, 0) > FLOORS[room]:
            found.append(name)
    return found


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "mmm4rec_cli").parts[0].removesuffix(".py")


def test_every_room_has_a_floor():
    rooms = {room_of(path) for path in modules(ROOT / "mmm4rec_cli")}
    assert rooms <= set(FLOORS), "enter new rooms in FLOORS"


@pytest.mark.parametrize("path", modules(ROOT / "mmm4rec_cli"), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_room_imports_a_higher_floor(path):
    assert climbs(room_of(path), path.read_text(encoding="utf-8")) == []


def test_a_climbing_import_is_found():
    assert climbs("data", "def f():\n    from mmm4rec_cli.training.loop import fit") != []
    assert climbs("settings", "from mmm4rec_cli import data") == ["mmm4rec_cli.data"]
    assert climbs("training", "from mmm4rec_cli.models.registry import build_model") == []


def test_kernels_know_nothing_of_the_command_line():
    for path in modules(ROOT / "kernels" / "mmm4rec_kernels"):
        assert not [name for name in imports(path.read_text(encoding="utf-8")) if name.startswith("mmm4rec_cli")]


def test_polars_stays_with_the_raw_files():
    """From the sequences onward Parquet is read with pyarrow alone."""
    allowed = {"data", "sample_shop"}
    without = {"tables.py", "dataset.py", "sequences.py"}
    for path in modules(ROOT / "mmm4rec_cli"):
        if room_of(path) not in allowed or path.name in without:
            assert not [name for name in imports(path.read_text(encoding="utf-8")) if name.startswith("polars")], path


def test_encoders_is_the_only_importer_of_transformers():
    importers = [
        str(path.relative_to(ROOT))
        for package in ("mmm4rec_cli", "kernels/mmm4rec_kernels")
        for path in modules(ROOT / package)
        if any(name.partition(".")[0] == "transformers" for name in imports(path.read_text(encoding="utf-8")))
    ]
    assert importers == ["mmm4rec_cli/features/encoders.py"]


def test_no_room_is_a_drawer():
    drawers = {"utils", "helpers", "common", "misc"}
    names = {part for path in ROOT.rglob("*.py") if ".venv" not in path.parts for part in (*path.parts, path.stem)}
    assert not names & drawers


def test_kernels_is_a_bare_folder():
    """An importable package called `kernels` breaks transformers, which probes for the one on PyPI."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tests" / "kernels").exists()


@pytest.mark.slow
def test_transformers_loads_with_the_repository_on_the_path():
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom transformers import SiglipModel as S; print(S.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "SiglipModel\n"), done.stderr


@pytest.mark.slow
def test_the_wheel_holds_both_packages_and_their_data(tmp_path):
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        expected = {
            name.removeprefix("kernels/")
            for name in listed.stdout.split("\0")
            if name.startswith(("mmm4rec_cli/", "kernels/mmm4rec_kernels/")) and (ROOT / name).exists()
        }
        assert expected <= held
    assert {"mmm4rec_cli/py.typed", "mmm4rec_kernels/py.typed", "mmm4rec_cli/app.py"} <= held
    top = {name.partition("/")[0] for name in held}
    assert {name for name in top if not name.endswith(".dist-info")} == {"mmm4rec_cli", "mmm4rec_kernels"}


def test_constraints_pin_everything_that_is_asked_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    names = {
        one.partition(";")[0].partition(">")[0].partition("=")[0].partition("[")[0].strip().lower() for one in asked
    }
    assert names - {name.lower() for name in pinned} == set()
    assert not [line for line in lines if "+" in line], "a local version would tie the pins to one machine"


def test_the_version_is_written_once_in_each_place_and_agrees():
    from mmm4rec_cli import __version__

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == __version__
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"version: {__version__}" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
