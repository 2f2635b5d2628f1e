"""The CUDA kernels compiled by the host's compiler against an emulation of CUDA (cuda_runtime.h): no GPU is needed.

``install()`` makes the emulated ``ssah_fast._cuda``, which works on CPU tensors, the one that
``ssah_fast.kernels.cuda`` imports.
"""

import fcntl
import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import ninja
import pybind11

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
# -O1: compiling takes longer than running. No contraction, as the CPU kernels and (with -fmad=false) nvcc.
FLAGS = ("-x", "c++", "-O1", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-strict-aliasing")
# In tests/sanitize.sh: a kernel that leaves its tensors is seen. The address sanitizer alone: with UBSan's checks in
# every inlined copy gated_moments.cu takes 100 seconds instead of 20.
SANITIZE = ("-g1", "-fsanitize=address") if os.environ.get("SSAH_FAST_SANITIZE") else ()
WARNINGS = ("-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-unused-function", "-Wno-clobbered")


def install() -> None:
    """Build the emulated module where a source has changed, and put it in the place of ``ssah_fast._cuda``."""
    import ssah_fast

    module = load("_cuda", [CSRC / "bindings" / "cuda.cpp", *sorted((CSRC / "cuda").glob("*.cu"))], "ssah_fast._cuda")
    sys.modules["ssah_fast._cuda"] = module
    ssah_fast._cuda = module  # type: ignore[attr-defined]


def load(name: str, sources: Iterable[Path], imported_as: str | None = None) -> ModuleType:
    """Build the extension module ``name`` from C++ and CUDA sources and import it.

    Raises:
        RuntimeError: The compiler refused; the message is its own.
    """
    path = build(name, sources)
    spec = importlib.util.spec_from_file_location(imported_as or name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(name: str, sources: Iterable[Path]) -> Path:
    """Compile with ninja, which looks at the headers' times too; several processes may ask at once."""
    compiler = os.environ.get("CXX", "g++")
    headers = (HERE, CSRC, pybind11.get_include(), sysconfig.get_paths()["include"])
    compile = " ".join([compiler, *FLAGS, *WARNINGS, *SANITIZE, *(f"-I'{header}'" for header in headers)])
    lines = [
        "rule compile",
        f"  command = {compile} -MD -MF $out.d -c '$in' -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {compiler} -shared {' '.join(SANITIZE)} $in -o $out",
    ]
    objects = {f"{source.name}.o": _escaped(source) for source in sources}
    target = name + sysconfig.get_config_var("EXT_SUFFIX")
    lines += [f"build {out}: compile {source}" for out, source in objects.items()]
    lines += [f"build {target}: link {' '.join(objects)}"]
    text = "\n".join(lines) + "\n"
    folder = Path(tempfile.gettempdir(), f"ssah_fast_{os.getuid()}", hashlib.sha256(text.encode()).hexdigest()[:16])
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "build.ninja").write_text(text)
        command = [os.path.join(ninja.BIN_DIR, "ninja"), "-C", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"The emulated CUDA module does not compile:\n{done.stdout}{done.stderr}")
    return folder / target


def _escaped(path: Path) -> str:
    """A path in a build line."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
