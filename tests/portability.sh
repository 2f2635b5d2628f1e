#!/usr/bin/env bash
# Builds the moment kernels, masked_adamw and perturb with every compiler at hand (g++, clang++, and a cross compiler for aarch64 run under qemu) and compares
# their results bit for bit. Debian: apt-get install clang g++-aarch64-linux-gnu qemu-user
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
sources="csrc/cpu/isa.cpp csrc/cpu/channel_moments.cpp csrc/cpu/gated_moments.cpp csrc/cpu/masked_adamw.cpp csrc/cpu/perturb.cpp tests/portability.cpp"
flags="-O3 -std=c++17 -ffp-contract=off -Icsrc -Wall -Wextra -Wno-psabi -Wno-unknown-pragmas"
failed=0

compare() { # compare NAME COMMAND...: run and compare with the first result
    local name=$1
    shift
    "$@" >"$out/$name" 2>"$out/isa"
    [ -f "$out/first" ] || cp "$out/$name" "$out/first"
    if cmp -s "$out/first" "$out/$name"; then
        echo "same bits: $name ($(cat "$out/isa"))"
    else
        echo "DIFFERENT: $name ($(cat "$out/isa"))"
        failed=1
    fi
}

g++ $flags -fopenmp $sources -o "$out/gcc"
compare "g++" "$out/gcc"
if [ "$(uname -m)" = x86_64 ] && grep -q avx512bw /proc/cpuinfo; then
    compare "g++, AVX2" env SSAH_FAST_CPU_ISA=avx2 "$out/gcc"
fi
if command -v clang++ >/dev/null; then
    clang++ $flags $sources -o "$out/clang"
    compare "clang++" "$out/clang"
else
    echo "not checked: clang++ (not installed)"
fi
if command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64 >/dev/null; then
    aarch64-linux-gnu-g++ $flags -static $sources -o "$out/arm"
    compare "aarch64 under qemu" qemu-aarch64 "$out/arm"
else
    echo "not checked: aarch64 (needs g++-aarch64-linux-gnu and qemu-user)"
fi
exit $failed
