// Instruction sets of the CPU kernels: each kernel is compiled once per set, and one of them is chosen when the module is loaded.
//
// A kernel file `x.inl` is included through for_each_isa.h, which repeats it with
//   SSAH_ISA     the namespace (baseline, avx2, avx512)
//   SSAH_TARGET  the function attribute that lets the compiler use that set in that function only
//   SSAH_WIDTH   floats per vector
// No file is compiled with -m flags: code outside the chosen functions runs on any CPU of the architecture.
#pragma once

namespace ssah {

enum class Isa { baseline, avx2, avx512 };

// The best set this CPU has, or the one that the environment variable SSAH_FAST_CPU_ISA names (std::runtime_error when it cannot run here).
Isa active_isa();
const char* isa_name(Isa isa);

}  // namespace ssah
