"""`ssah-fast env`: what this machine has, which backend runs each op here, and why another is missing."""

import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from ssah_fast import __version__
from ssah_fast.cli.common import Command, echo_json, json_option
from ssah_fast.errors import SsahError

PACKAGES = (
    *("torch", "triton", "transformers", "numpy", "safetensors", "tokenizers", "huggingface_hub", "datasets"),
    *("accelerate", "trl", "peft", "lm-eval"),
    *("bitsandbytes", "liger-kernel", "apex", "plotly"),
)
VARIABLES = re.compile(
    r"(SSAH_FAST|HF|TRITON|TORCHINDUCTOR)_.*|CUDA_(VISIBLE_DEVICES|HOME|LAUNCH_BLOCKING)|(PYTORCH_)?(CUDA_)?ALLOC_CONF|"
    r"OMP_NUM_THREADS|TRANSFORMERS_OFFLINE"
)
# HF_TOKEN and its kin, and what looks like a token or a password wherever it stands.
SECRET_NAME = re.compile(r"TOKEN|KEY|SECRET|PASSWORD|CREDENTIAL")
SECRET_VALUE = re.compile(r"hf_\w+|(?<=://)[^/@\s]+(?=@)")
NVIDIA_SMI_SECONDS = 10


@click.command(cls=Command)
@json_option
def env(as_json: bool) -> None:
    """Show devices, versions, the backends and why one is missing, and what the environment sets; made for pasting."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch warns of (a driver too old) is in the reason
        document = describe()
    if as_json:
        echo_json(document)
        return
    for name, value in _lines(document):
        click.echo(f"{name:<20}{value}")


def describe() -> dict[str, Any]:
    """What the command shows, as plain data."""
    torch = _torch()
    return {
        "ssah_fast": __version__,
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": platform.platform(),
        "cpu": _cpu(torch),
        "nvidia_driver": _driver(),
        "cuda": _cuda(torch),
        "packages": {name: _version(name) for name in PACKAGES} | _torch_version(torch),
        "backends": _backends(torch),
        "ops": _ops(torch),
        "environment": _environment(os.environ),
    }


def _torch() -> Any:
    """The module, or the reason why it cannot be imported."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: one of its libraries is missing
        return f"torch cannot be imported: {_one_line(error)}"
    return torch


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch_version(torch: Any) -> dict[str, str]:
    """With the build's name, which the package's metadata lack: 2.11.0+cu130."""
    return {} if isinstance(torch, str) else {"torch": torch.__version__}


def _cpu(torch: Any) -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {"name": _cpu_name(), "cores": cores, "kernels": _kernel_isa(), "torch": None, "torch_threads": None}
    if not isinstance(torch, str):
        found |= {"torch": torch.backends.cpu.get_cpu_capability(), "torch_threads": torch.get_num_threads()}
    return found


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def _kernel_isa() -> str:
    """The instruction set that the C++ kernels use, or why they do not run."""
    try:
        from ssah_fast import _C

        return _C.isa()
    except (ImportError, RuntimeError) as error:  # RuntimeError: SSAH_FAST_CPU_ISA is wrong
        return _one_line(error)


def _driver() -> dict[str, Any]:
    """What nvidia-smi says; it needs neither torch nor a working CUDA runtime."""
    query = ["nvidia-smi", "--query-gpu=driver_version,name,memory.total,compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=NVIDIA_SMI_SECONDS)
    except FileNotFoundError:
        return {"version": None, "gpus": [], "reason": "nvidia-smi was not found: no NVIDIA driver is installed"}
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"version": None, "gpus": [], "reason": f"nvidia-smi does not run: {_one_line(error)}"}
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    rows = [row for row in rows if len(row) == 4]
    if done.returncode or not rows:
        said = _one_line(done.stdout + done.stderr) or f"exit code {done.returncode}"
        return {"version": None, "gpus": [], "reason": f"nvidia-smi failed: {said}"}
    gpus = [{"name": name, "memory": memory, "capability": capability} for _, name, memory, capability in rows]
    return {"version": rows[0][0], "gpus": gpus, "reason": None}


def _cuda(torch: Any) -> dict[str, Any]:
    """What torch and our own extension can do with the GPUs."""
    found: dict[str, Any] = {"torch_built_with": None, "extension": _extension(), "devices": [], "reason": None}
    if isinstance(torch, str):
        return found | {"reason": torch}
    found["torch_built_with"] = torch.version.cuda
    if torch.version.cuda is None:
        return found | {"reason": "this torch is built without CUDA; install one that is from https://pytorch.org"}
    try:
        torch.cuda.init()
        found["devices"] = [_device(torch, index) for index in range(torch.cuda.device_count())]
    except (RuntimeError, AssertionError) as error:
        found["reason"] = f"torch finds no CUDA device: {_one_line(error)}"
    return found


def _device(torch: Any, index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "memory_bytes": total,
        "free_bytes": free,
    }


def _extension() -> str:
    try:
        from ssah_fast import _cuda
    except ImportError as error:
        missing = importlib.util.find_spec("ssah_fast._cuda") is None
        return "not built (no nvcc when ssah_fast was installed)" if missing else _one_line(error)
    return f"built with CUDA {_cuda.compiled_with // 1000}.{_cuda.compiled_with % 1000 // 10}"


def _backends(torch: Any) -> dict[str, str | None]:
    """None for a backend that is present, or the reason why it is missing."""
    if isinstance(torch, str):
        return {"all": torch}
    from ssah_fast.kernels import registry

    return registry.missing()


def _ops(torch: Any) -> dict[str, dict[str, str]]:
    """The backend that runs each op on each kind of device; or why none does."""
    if isinstance(torch, str):
        return {}
    from ssah_fast.kernels import reference

    kinds = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return {op: {kind: _runner(op, torch.device(kind)) for kind in kinds} for op in reference.OPS}


def _runner(op: str, device: Any) -> str:
    from ssah_fast.kernels import registry

    try:
        kernel = registry.select(op, device)
    except SsahError as error:
        return str(error)
    return next(backend.name for backend in registry.BACKENDS if registry.load(backend).ops.get(op) is kernel)


def _environment(variables: Mapping[str, str]) -> dict[str, str]:
    """What is set of the variables that matter here, secrets hidden."""
    shown = {}
    for name, value in sorted(variables.items()):
        if VARIABLES.fullmatch(name):
            shown[name] = "(set, not shown)" if SECRET_NAME.search(name) else SECRET_VALUE.sub("***", value)
    return shown


def _one_line(error: object, limit: int = 300) -> str:
    return " ".join(str(error).split())[:limit]


def _lines(document: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    cpu, driver, cuda = (document[name] for name in ("cpu", "nvidia_driver", "cuda"))
    for name in ("ssah_fast", "python", "platform"):
        yield name, document[name]
    yield "cpu", f"{cpu['name']}, {cpu['cores']} cores; kernels: {cpu['kernels']}"
    if cpu["torch"]:
        yield "", f"torch: {cpu['torch']}, {cpu['torch_threads']} threads"
    yield "nvidia driver", driver["version"] or f"none: {driver['reason']}"
    for gpu in driver["gpus"]:
        yield "", ", ".join((gpu["name"], gpu["memory"], f"compute capability {gpu['capability']}"))
    yield "torch's CUDA", cuda["torch_built_with"] or "none"
    yield "ssah_fast._cuda", cuda["extension"]
    if cuda["reason"]:
        yield "cuda devices", f"none: {cuda['reason']}"
    for index, device in enumerate(cuda["devices"]):
        sizes = f"{device['free_bytes'] / 2**30:.1f} of {device['memory_bytes'] / 2**30:.1f} GiB free"
        chip = f"sm_{device['capability'].replace('.', '')}, {device['multiprocessors']} multiprocessors"
        yield f"cuda:{index}", f"{device['name']}, {chip}, {sizes}"
    versions = document["packages"]
    yield from ((name, version) for name, version in versions.items() if version)
    yield "not installed", ", ".join(name for name, version in versions.items() if not version) or "nothing"
    for name, reason in document["backends"].items():
        yield f"backend {name}", "present" if reason is None else f"missing: {reason}"
    for op, runners in document["ops"].items():
        yield f"op {op}", ", ".join(f"{kind}: {backend}" for kind, backend in runners.items())
    for name, value in document["environment"].items():
        yield "environment", f"{name}={value}"
