"""What `pip install .` puts on a machine."""

import ast
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import ssah_fast

ROOT = Path(__file__).parents[1]
LOOKS_AT_INCLUDES = """#!/bin/sh
for output; do :; done  # the last word of setup.py's commands
case " $* " in *" -c "*) g++ "$@" -E >/dev/null || exit ;; esac
: >"$output"
"""


@pytest.mark.slow
def test_wheel_has_one_top_level_package_and_builds_from_sources_alone(tmp_path: Path) -> None:
    # From an unpacked copy of what a source distribution holds, so that a missing header in MANIFEST.in shows.
    # This install has compiled the same sources already: here the compiler only looks for what they include.
    compiler = tmp_path / "g++"
    compiler.write_text(LOOKS_AT_INCLUDES)
    compiler.chmod(0o755)
    environment = os.environ | {"SSAH_FAST_CUDA": "0", "CXX": str(compiler)}
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run([*build], check=True, env=environment, capture_output=True, cwd=tmp_path)  # sdist, then its wheel
    (sources,) = tmp_path.glob("*.tar.gz")
    held = {name.partition("/")[2] for name in tarfile.open(sources).getnames()}
    assert held >= {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")}
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {t for t in top if not t.endswith(".dist-info")} == {"ssah_fast"}
    assert any(name.startswith("ssah_fast/_C.") for name in names)
    assert not any(name.startswith("ssah_fast/_cuda.") for name in names)  # not even one left over in build/
    modules = ("kernels/registry.py", "kernels/reference.py", "cli/main.py", "cli/score.py", "ops.py")
    for module in (*modules, "evaluation/generation.py", "report/page.html.jinja", "recipes/embedded.yaml"):
        assert f"ssah_fast/{module}" in names
    assert not any(name.endswith((".cpp", ".inl", ".h")) for name in names)
    (entry,) = [name for name in names if name.endswith("entry_points.txt")]
    assert "ssah-fast = ssah_fast.cli.main:main" in zipfile.ZipFile(wheel).read(entry).decode()


def test_setup_refuses_an_unknown_cuda_mode() -> None:
    environment = os.environ | {"SSAH_FAST_CUDA": "yes"}
    done = subprocess.run(
        [sys.executable, "setup.py", "--name"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "SSAH_FAST_CUDA=yes is not one of auto, 0, 1" in done.stderr


def test_cuda_required_without_nvcc_is_an_error(tmp_path: Path) -> None:
    environment = os.environ | {"SSAH_FAST_CUDA": "1", "CUDA_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "setup.py", "--name"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "nvcc was found neither in $CUDA_HOME/bin nor on PATH" in done.stderr


def test_source_folder_without_install_says_what_to_do(tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import ssah_fast"  # -S: without site-packages
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "imported from its source folder" in done.stderr


def test_cuda_module_imports_without_a_driver(tmp_path: Path) -> None:
    """In a process of its own: in the tests' the emulation stands in its place."""
    if not list(Path(ssah_fast.__file__).parent.glob("_cuda.*")):
        pytest.skip("built without nvcc")
    code = "from ssah_fast import _cuda; print(_cuda.compiled_with, _cuda.device_count())"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    version, devices = map(int, done.stdout.split())
    assert version >= 12000
    assert devices >= 0


def test_modules_import_only_from_floors_below_their_own():
    """The table in docs/architecture.md is the plan; imports in functions or for types alone do not count."""
    table = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (\d+) \| `([\w/]+)\.py` \|", table, re.MULTILINE)
    floors = {name.replace("/", "."): int(floor) for floor, name in rows}
    package = ROOT / "ssah_fast"
    files = [path for path in package.rglob("*.py") if path.stem != "__init__"]
    modules = {".".join(path.relative_to(package).with_suffix("").parts): ast.parse(path.read_text()) for path in files}
    assert floors.keys() == modules.keys()
    for name, tree in modules.items():
        imports = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module]
        used = set()
        for node in imports:
            inside = (
                f"{node.module}.".removeprefix("ssah_fast.") if f"{node.module}.".startswith("ssah_fast.") else None
            )
            if inside is not None:
                used |= {inside.rstrip("."), *(f"{inside}{alias.name}" for alias in node.names)}
        for other in used & floors.keys():
            assert floors[other] < floors[name], f"{name} imports {other}"
