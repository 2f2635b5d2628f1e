// Addresses come from Python as integers.
#pragma once

#include <cstdint>

template <class T>
T* ptr(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}
