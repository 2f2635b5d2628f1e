"""Compiles the COMPILED lists of Triton modules to cubins: python compile_triton.py FOLDER MODULE...; no GPU is needed.

A process of its own, because the tests' process interprets Triton's kernels. For each cubin it prints one JSON line.
"""

import importlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CAPABILITIES = (80, 90)


def compile_entry(
    kernel: Any, signature: Mapping[str, str], constants: Mapping[str, Any], options: Mapping[str, Any], capability: int
) -> bytes:
    """Machine code of a kernel; "*bf16:16" and "i64:16" in the signature stand for multiples of 16."""
    types = {name: kind.partition(":")[0] for name, kind in signature.items()} | dict.fromkeys(constants, "constexpr")
    attributes = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
        for name, kind in signature.items()
        if kind.endswith(":16")
    }
    ordered = {name: types[name] for name in kernel.arg_names}
    source = ASTSource(kernel, ordered, dict(constants), attributes)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=dict(options)).asm["cubin"]


def main(folder: Path, modules: list[str]) -> None:
    for module in modules:
        for number, entry in enumerate(importlib.import_module(module).COMPILED):
            kernel, signature, constants, options = entry
            for capability in CAPABILITIES:
                file = folder / f"{module}-{number}-{capability}.cubin"
                file.write_bytes(compile_entry(*entry, capability))
                described = {"signature": signature, "constants": constants, "options": options}
                line = {"file": str(file), "kernel": kernel.__name__, **described}
                print(json.dumps(line, default=str))  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
