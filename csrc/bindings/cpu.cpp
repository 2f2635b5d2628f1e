// ssah_fast._C: the CPU kernels by raw pointers. Thin on purpose: every argument was checked in ssah_fast/ops.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <vector>

#include "cpu/column_norms.h"
#include "cpu/isa.h"
#include "cpu/masked_adamw.h"
#include "cpu/moments.h"
#include "cpu/stream_read.h"

namespace py = pybind11;
using namespace ssah;

namespace {

template <class T>
T* ptr(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

MomentState state(uintptr_t count, uintptr_t mean, uintptr_t m2) {
    return {ptr<int64_t>(count), ptr<double>(mean), ptr<double>(m2)};
}

// kernels/cpp.py passes a column per field: for hundreds of tensors that costs less than objects would.
using Columns = std::array<std::vector<int64_t>, 19>;

AdamWTensor adamw_tensor(const Columns& c, size_t i) {
    AdamWTensor t{};
    t.weight = ptr<void>(c[0][i]), t.grad = ptr<void>(c[1][i]), t.m = ptr<void>(c[2][i]), t.v = ptr<void>(c[3][i]);
    t.v_max = ptr<void>(c[4][i]), t.extra = ptr<void>(c[5][i]), t.copy = ptr<void>(c[6][i]), t.step = ptr<float>(c[7][i]);
    t.index = ptr<int64_t>(c[8][i]), t.outer = c[9][i], t.size = c[10][i], t.count = c[11][i], t.inner = c[12][i];
    t.weight_type = DType(c[13][i]), t.grad_type = DType(c[14][i]), t.copy_type = DType(c[15][i]), t.compact_grad = c[16][i] != 0;
    t.id = c[17][i], t.offset = c[18][i];
    return t;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    const auto no_gil = py::call_guard<py::gil_scoped_release>();

    py::enum_<DType>(m, "DType").value("f32", DType::f32).value("bf16", DType::bf16).value("f16", DType::f16).value("f64", DType::f64);
    py::enum_<Activation>(m, "Activation")
        .value("silu", Activation::silu)
        .value("gelu", Activation::gelu)
        .value("gelu_tanh", Activation::gelu_tanh)
        .value("relu", Activation::relu);
    m.def("isa", [] { return isa_name(active_isa()); });

    m.def(
        "channel_moments",
        [](DType dtype, uintptr_t x, int64_t stride, uintptr_t group, int64_t rows, int64_t channels, uintptr_t count, uintptr_t mean,
           uintptr_t m2, int threads) {
            channel_moments(dtype, ptr<void>(x), stride, ptr<int8_t>(group), rows, channels, state(count, mean, m2), threads);
        },
        no_gil);
    m.def(
        "gated_moments",
        [](DType dtype, Activation activation, uintptr_t gate, int64_t gate_stride, uintptr_t up, int64_t up_stride, uintptr_t h,
           int64_t h_stride, uintptr_t group, int64_t rows, int64_t channels, uintptr_t count, uintptr_t mean, uintptr_t m2, int threads) {
            gated_moments(dtype, activation, ptr<void>(gate), gate_stride, ptr<void>(up), up_stride, ptr<void>(h), h_stride,
                          ptr<int8_t>(group), rows, channels, state(count, mean, m2), threads);
        },
        no_gil);
    m.def(
        "column_norms",
        [](DType dtype, uintptr_t weight, int64_t stride, int64_t rows, int64_t columns, int axis, uintptr_t norms, int threads) {
            column_norms(dtype, ptr<void>(weight), stride, rows, columns, axis, ptr<double>(norms), threads);
        },
        no_gil);
    py::enum_<Rounding>(m, "Rounding")
        .value("stochastic", Rounding::stochastic)
        .value("kahan", Rounding::kahan)
        .value("master", Rounding::master)
        .value("nearest", Rounding::nearest);
    m.def(
        "masked_adamw",
        [](const Columns& columns, double lr, double beta1, double beta2, double eps, double weight_decay, Rounding rounding, uint64_t seed,
           double divisor, int threads) {
            std::vector<AdamWTensor> tensors;
            for (size_t i = 0; i < columns[0].size(); ++i) tensors.push_back(adamw_tensor(columns, i));
            masked_adamw(std::move(tensors), {lr, beta1, beta2, eps, weight_decay, rounding, seed, divisor}, threads);
        },
        no_gil);
    m.def("stream_read", [](uintptr_t data, int64_t bytes, int threads) { return stream_read(ptr<void>(data), bytes, threads); }, no_gil);
}
