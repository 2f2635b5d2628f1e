#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace ssah {
namespace {

bool runs_here(Isa isa) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    // Every CPU with AVX2 has F16C; clang does not know its name here.
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    switch (isa) {
        case Isa::avx512:
            return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                   __builtin_cpu_supports("avx512vl");
        case Isa::avx2:
            return avx2;
        case Isa::baseline:
            return true;
    }
#endif
    return isa == Isa::baseline;
}

Isa choose() {
    const char* wanted = std::getenv("SSAH_FAST_CPU_ISA");
    for (Isa isa : {Isa::avx512, Isa::avx2, Isa::baseline}) {
        const bool named = wanted != nullptr && *wanted != '\0';
        if (named ? std::string(wanted) == isa_name(isa) : runs_here(isa)) {
            if (!runs_here(isa)) {
                throw std::runtime_error(std::string("SSAH_FAST_CPU_ISA=") + wanted + ": this CPU cannot run it; unset the variable");
            }
            return isa;
        }
    }
    throw std::runtime_error(std::string("SSAH_FAST_CPU_ISA=") + wanted + " is not one of avx512, avx2, baseline");
}

}  // namespace

const char* isa_name(Isa isa) {
    switch (isa) {
        case Isa::avx512:
            return "avx512";
        case Isa::avx2:
            return "avx2";
        case Isa::baseline:
            break;
    }
    return "baseline";
}

Isa active_isa() {
    static const Isa isa = choose();
    return isa;
}

}  // namespace ssah
