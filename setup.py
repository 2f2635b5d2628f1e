"""Build script: ssah_fast._C always (torch is not needed to build), ssah_fast._cuda where nvcc is found.

Environment:
    SSAH_FAST_CUDA        auto (default): build _cuda when nvcc is found; 0: never; 1: fail without nvcc.
    SSAH_FAST_CUDA_ARCHS  compute capabilities, default "80;90"; the last one is also kept as PTX for newer devices.
    SSAH_FAST_SANITIZE    for _C, e.g. "address,undefined" (see `make sanitize`).
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import ninja
import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

# kernels/, cli/ and bench/ lie beside ssah_fast/ in the repository and inside it once installed.
PACKAGE_DIR = {
    "ssah_fast": "ssah_fast",
    "ssah_fast.kernels": "kernels",
    "ssah_fast.cli": "cli",
    "ssah_fast.bench": "bench",
}
CUDA_MODE = os.environ.get("SSAH_FAST_CUDA", "auto")
CUDA_ARCHS = os.environ.get("SSAH_FAST_CUDA_ARCHS", "80;90").split(";")
SANITIZE = os.environ.get("SSAH_FAST_SANITIZE", "")


def list_packages():
    """Return every package; find_packages alone cannot see through PACKAGE_DIR."""
    names = []
    for name, folder in PACKAGE_DIR.items():
        names += [name, *(f"{name}.{sub}" for sub in find_packages(folder))]
    return names


def find_nvcc():
    """Return nvcc's path, or None where _cuda is not to be built."""
    if CUDA_MODE not in ("auto", "0", "1"):
        sys.exit(f"SSAH_FAST_CUDA={CUDA_MODE} is not one of auto, 0, 1.")
    if CUDA_MODE == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=os.path.join(home, "bin") if home else None)
    if nvcc is None and CUDA_MODE == "1":
        sys.exit("SSAH_FAST_CUDA=1 but nvcc was found neither in $CUDA_HOME/bin nor on PATH.")
    return nvcc


def sources(*folders):
    """Return the C++ and CUDA sources of csrc/<folder>, sorted."""
    return sorted(str(p) for f in folders for p in Path("csrc", f).glob("*.c*") if p.suffix in (".cpp", ".cu"))


class BuildExt(build_ext):
    """Compile each extension with ninja: in parallel, and again only where a source or a header it includes changed."""

    def run(self):
        """Drop a _cuda left over in build/ from an earlier build with nvcc: it would leak into this wheel."""
        if NVCC is None:
            for stale in Path(self.build_lib, "ssah_fast").glob("_cuda.*"):
                stale.unlink()
        super().run()

    def build_extension(self, ext):
        """Write build.ninja for one extension and run it."""
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp, ext.name).resolve()
        for needed in (target.parent, folder):
            needed.mkdir(parents=True, exist_ok=True)
        headers = (Path("csrc").resolve(), pybind11.get_include(), sysconfig.get_paths()["include"])
        includes = [f"-I{header}" for header in headers]
        if ext.name.endswith("_cuda"):
            # nvcc links too: it knows where its static cudart lies, even when nvcc on PATH is a wrapper script.
            compiler, link = NVCC, ["-shared"]
            # -fmad=false: the same bits as on the CPU; a multiply-add is fused only where the source says fma.
            # --threads=0: the architectures in parallel.
            flags = ["-O3", "-std=c++17", "-fmad=false", "--threads=0", *gencode(), *includes]
            flags += ["-Xcompiler=-fPIC,-fvisibility=hidden"]
        else:
            # No fast-math (loading such a library changes denormals for the whole process), no contraction (the same
            # bits on every CPU). psabi: vectors cross only inlined functions.
            compiler, link = os.environ.get("CXX", "g++"), ["-shared", "-fopenmp"]
            flags = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-ffp-contract=off"]
            flags += ["-Wall", "-Wextra", "-Wno-psabi", *includes]
            if SANITIZE:
                flags += [
                    "-O1",
                    "-g1",
                    "-fno-omit-frame-pointer",
                    f"-fsanitize={SANITIZE}",
                    "-fno-sanitize-recover=all",
                ]
                link += [f"-fsanitize={SANITIZE}"]
        objects = {
            str(folder / (source.replace("/", "_") + ".o")): str(Path(source).resolve()) for source in ext.sources
        }
        lines = [
            "rule compile",
            f"  command = {command(compiler, *flags)} $more -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {command(compiler, *link)} $in -o $out",
            *(
                f"build {ninja_path(out)}: compile {ninja_path(source)}{more(source)}"
                for out, source in objects.items()
            ),
            f"build {ninja_path(str(target))}: link {' '.join(map(ninja_path, objects))}",
        ]
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        jobs = os.environ.get("MAX_JOBS") or str(cores)
        subprocess.run([os.path.join(ninja.BIN_DIR, "ninja"), "-C", str(folder), "-j", jobs], check=True)


def gencode():
    """Machine code for every architecture asked for, and PTX of the newest for GPUs to come."""
    newest = CUDA_ARCHS[-1]
    codes = [(arch, f"sm_{arch}") for arch in CUDA_ARCHS] + [(newest, f"compute_{newest}")]
    return [f"-gencode=arch=compute_{arch},code={code}" for arch, code in codes]


def command(*words):
    """A command line for the shell that ninja starts; ninja's own escape is the dollar sign."""
    return shlex.join(words).replace("$", "$$")


def more(source):
    """For the sanitizers the bindings, which take longest to compile and hardly any time to run, are not optimised."""
    return "\n  more = -O0" if SANITIZE and "bindings" in Path(source).parts else ""


def ninja_path(path):
    """A path in a build line."""
    return path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


NVCC = find_nvcc()
extensions = [Extension("ssah_fast._C", ["csrc/bindings/cpu.cpp", *sources("cpu")])]
if NVCC:
    extensions.append(Extension("ssah_fast._cuda", ["csrc/bindings/cuda.cpp", *sources("cuda")]))
else:
    print("ssah_fast: no nvcc (or SSAH_FAST_CUDA=0), so ssah_fast._cuda is not built.", file=sys.stderr)

setup(packages=list_packages(), package_dir=PACKAGE_DIR, ext_modules=extensions, cmdclass={"build_ext": BuildExt})
