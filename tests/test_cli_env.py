"""`ssah-fast env` on machines with and without a GPU, a driver, CUDA in torch, our extensions, and torch itself."""

import json
import os
import stat
import subprocess
import sys

import forks
import pytest
import torch

from ssah_fast.cli.env import _environment
from ssah_fast.cli.main import main
from ssah_fast.kernels import reference, registry

H100 = "580.159.04, NVIDIA H100 80GB HBM3, 81559 MiB, 9.0"


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """Make `nvidia-smi` a shell script; without a call there is none."""
    monkeypatch.setenv("PATH", str(tmp_path))

    def write(script: str) -> None:
        file = tmp_path / "nvidia-smi"
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)

    return write


def document(capfd) -> dict:
    assert main(["env", "--json"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    return json.loads(out)


def text(capfd) -> str:
    assert main(["env"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert max(map(len, out.splitlines())) < 500
    return out


def test_versions_backends_and_ops(capfd):
    found = document(capfd)
    assert found["packages"]["torch"] == torch.__version__
    assert found["backends"] == registry.missing()
    assert found["ops"].keys() == reference.OPS.keys()
    assert found["ops"]["column_norms"]["cpu"] == "cpp"
    assert ("cuda" in found["ops"]["column_norms"]) == torch.cuda.is_available()


def test_text_is_one_fact_per_line(capfd, smi):
    out = text(capfd)
    for backend, reason in registry.missing().items():
        assert f"backend {backend:<12}{'present' if reason is None else f'missing: {reason}'}" in out.splitlines()
    for op in reference.OPS:
        assert f"\nop {op}" in out
    assert f"torch               {torch.__version__}\n" in out


def test_the_backend_asked_for(capfd, monkeypatch):
    monkeypatch.setenv(registry.VARIABLE, "torch")
    assert {runners["cpu"] for runners in document(capfd)["ops"].values()} == {"torch"}
    monkeypatch.setenv(registry.VARIABLE, "nonsense")
    out = text(capfd)
    assert "cpu: SSAH_FAST_BACKEND=nonsense is unknown" in out
    assert "SSAH_FAST_BACKEND=nonsense\n" in out


def test_no_driver(capfd, smi):
    driver = document(capfd)["nvidia_driver"]
    assert driver == {
        "version": None,
        "gpus": [],
        "reason": "nvidia-smi was not found: no NVIDIA driver is installed",
    }


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'NVIDIA-SMI has failed because'; echo 'it could not talk'; exit 9", "NVIDIA-SMI has failed because it"),
        ("exit 3", "exit code 3"),
        ("echo 'No devices were found'", "No devices were found"),
        ("exec /nowhere/at/all", "/nowhere/at/all"),
    ],
    ids=["failed", "silent", "no devices", "broken"],
)
def test_a_broken_driver_is_a_reason(capfd, smi, script, reason):
    smi(script)
    driver = document(capfd)["nvidia_driver"]
    assert driver["version"] is None
    assert driver["reason"].startswith("nvidia-smi failed: ")
    assert reason in driver["reason"]


def test_a_driver_that_hangs(capfd, smi, monkeypatch):
    monkeypatch.setattr("ssah_fast.cli.env.NVIDIA_SMI_SECONDS", 0.2)
    smi("exec /bin/sleep 30")
    assert "nvidia-smi does not run" in document(capfd)["nvidia_driver"]["reason"]


def test_a_driver(capfd, smi):
    smi(f"echo '{H100}'")
    driver = document(capfd)["nvidia_driver"]
    gpu = {"name": "NVIDIA H100 80GB HBM3", "memory": "81559 MiB", "capability": "9.0"}
    assert driver == {"version": "580.159.04", "gpus": [gpu], "reason": None}
    out = text(capfd)
    assert "nvidia driver       580.159.04\n" in out
    assert "NVIDIA H100 80GB HBM3, 81559 MiB, compute capability 9.0\n" in out


def test_torch_with_cuda_but_without_a_driver(capfd, monkeypatch):
    def init():
        raise RuntimeError("Found no NVIDIA driver\non your system.")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    found = document(capfd)["cuda"]
    assert found["torch_built_with"] == "13.0"
    assert found["reason"] == "torch finds no CUDA device: Found no NVIDIA driver on your system."


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built with CUDA")
def test_torch_without_cuda(capfd):
    assert document(capfd)["cuda"]["reason"].startswith("this torch is built without CUDA")


HIDDEN = """
import sys
for name in {hidden!r}:
    sys.modules[name] = None
{code}
from ssah_fast.cli.main import main
sys.exit(main(["env"]))
"""


def run_without(*hidden: str, code: str = "", **variables: str) -> str:
    code = HIDDEN.format(hidden=hidden, code=code)
    environment = os.environ | variables
    if "torch" in hidden:
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    else:
        done = forks.run(code, environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_without_torch():
    out = run_without("torch")
    assert "backend all         missing: torch cannot be imported: " in out
    assert "nvidia driver" in out


def test_without_extensions():
    out = run_without("ssah_fast._C", "ssah_fast._cuda")
    for backend in ("cpp", "cuda"):
        assert f"backend {backend:<12}missing: " in out
    assert "op column_norms     cpu: torch" in out


def test_an_instruction_set_that_is_none():
    out = run_without(SSAH_FAST_CPU_ISA="sse9")
    line = "backend cpp         missing: SSAH_FAST_CPU_ISA=sse9 is not one of avx512, avx2, baseline"
    assert line in out.splitlines()


def test_an_extension_of_older_sources():
    code = "from types import ModuleType; old = sys.modules['ssah_fast._C'] = ModuleType('ssah_fast._C'); old.isa = str"
    out = run_without(code=code)
    assert "backend cpp         missing: backend cpp: module 'ssah_fast._C' has no attribute" in out
    assert "install ssah_fast again" in out


def test_secrets_are_never_shown():
    shown = _environment(
        {
            "HF_TOKEN": "hf_secret",
            "HF_HUB_TOKEN_X": "",
            "HF_ENDPOINT": "https://me:hf_secret@hub.example/hf_secret",
            "HF_HOME": "/data/hf",
            "SSAH_FAST_BACKEND": "cpp",
            "CUDA_VISIBLE_DEVICES": "1",
            "HOME": "/root",
            "AWS_SECRET": "x",
        }
    )
    assert "secret" not in str(shown)
    assert shown == {
        "CUDA_VISIBLE_DEVICES": "1",
        "HF_ENDPOINT": "https://***@hub.example/***",
        "HF_HOME": "/data/hf",
        "HF_HUB_TOKEN_X": "(set, not shown)",
        "HF_TOKEN": "(set, not shown)",
        "SSAH_FAST_BACKEND": "cpp",
    }


def test_transformers_is_not_imported():
    code = "import sys; from ssah_fast.cli.main import main; main(['env']); assert 'transformers' not in sys.modules"
    done = forks.run(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
def test_a_gpu_is_described(capfd):
    found = document(capfd)
    (device, *_) = found["cuda"]["devices"]
    assert device["name"] == torch.cuda.get_device_name(0)
    assert found["nvidia_driver"]["version"]
    assert found["backends"]["cuda"] is None and found["backends"]["triton"] is None
    assert {runners["cuda"] for runners in found["ops"].values()} <= {"cuda", "triton"}
