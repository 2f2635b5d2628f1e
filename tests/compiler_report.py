"""What the compiler says of a GPU kernel, read from its machine code: no GPU is needed."""

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

_RESOURCES = re.compile(r"REG:(?P<registers>\d+) STACK:(?P<stack>\d+) SHARED:(?P<shared>\d+) LOCAL:(?P<local>\d+)")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][\w.]+)")
_WIDTHS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}


@dataclass(frozen=True)
class Kernel:
    """One function of one architecture.

    Attributes:
        name: As the object file spells it.
        arch: "sm_90".
        registers: Per thread.
        stack: Bytes per thread; arrays and spilled registers live there.
        local: Bytes of local memory per thread beside the stack.
        shared: Bytes per block known when it was compiled.
        opcodes: Every instruction in its order, "LDG.E.128".
    """

    name: str
    arch: str
    registers: int
    stack: int
    local: int
    shared: int
    opcodes: tuple[str, ...]

    def widths(self, instruction: str) -> Counter[int]:
        """Count an instruction ("LDG", "STG") by the bits that a thread moves."""
        found: Counter[int] = Counter()
        for opcode in self.opcodes:
            head, *parts = opcode.split(".")
            if head == instruction:
                found[next((_WIDTHS[part] for part in parts if part in _WIDTHS), 32)] += 1
        return found

    def problems(self, wide: tuple[str, ...] = ()) -> list[str]:
        """What a fast kernel does not do: keep anything in local memory; lack 16-byte forms of the `wide` ones."""
        spills = sum(opcode.split(".")[0] in ("LDL", "STL") for opcode in self.opcodes)
        found = []
        if self.stack or self.local or spills:
            found.append(f"uses local memory: stack {self.stack} bytes, local {self.local} bytes, {spills} LDL and STL")
        for instruction in wide:
            # LDGSTS: a load that goes to shared memory at once.
            if not (widths := self.widths(instruction) + self.widths(f"{instruction}STS"))[128]:
                found.append(f"has no {instruction} of 128 bits, only {dict(widths)}")
        return [f"{self.name} ({self.arch}, {self.registers} registers) {problem}" for problem in found]


def read(path: Path) -> list[Kernel]:
    """Read all kernels of a cubin, or of an object file or library with cubins in it; PTX is left out."""
    text = _cuobjdump(path)
    resources, code = dict(_resources(text)), dict(_code(text))
    # A lone cubin's resource report does not name its architecture.
    named = {(arch or next(a for a, other in code if other == name), name): v for (arch, name), v in resources.items()}
    return [Kernel(name, arch, **named[arch, name], opcodes=opcodes) for (arch, name), opcodes in code.items()]


@cache
def cuobjdump() -> str | None:
    """The tool, from PATH or from triton's wheel; None where there is neither."""
    triton = find_spec("triton")
    places = (
        [str(Path(folder, "backends/nvidia/bin")) for folder in triton.submodule_search_locations or ()]
        if triton
        else []
    )
    return shutil.which("cuobjdump") or next(filter(None, (shutil.which("cuobjdump", path=p) for p in places)), None)


def _cuobjdump(path: Path) -> str:
    command = [str(cuobjdump()), "--dump-resource-usage", "--dump-sass", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
    return done.stdout


def _resources(text: str) -> Iterator[tuple[tuple[str, str], dict[str, int]]]:
    arch = name = ""
    for line in text.splitlines():
        if line.startswith("arch = "):
            arch = line.split()[-1]
        elif line.startswith(" Function "):
            name = line.split()[1].rstrip(":")
        elif found := _RESOURCES.search(line):
            yield (arch, name), {key: int(value) for key, value in found.groupdict().items()}


def _code(text: str) -> Iterator[tuple[tuple[str, str], tuple[str, ...]]]:
    for part in text.split("code for ")[1:]:
        arch = part.split(maxsplit=1)[0]
        for function in part.split("Function : ")[1:]:
            yield (arch, function.split(maxsplit=1)[0]), tuple(_INSTRUCTION.findall(function))
