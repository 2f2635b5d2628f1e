// ssah_fast._C: the CPU kernels by raw pointers. Thin on purpose: every argument was checked in ssah_fast/ops.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <vector>

#include "bindings/adamw_tensors.h"
#include "bindings/ptr.h"
#include "cpu/column_norms.h"
#include "cpu/isa.h"
#include "cpu/masked_adamw.h"
#include "cpu/moments.h"
#include "cpu/perturb.h"
#include "cpu/stream_read.h"

PYBIND11_MAKE_OPAQUE(std::vector<ssah::AdamWTensor>)

namespace py = pybind11;
using namespace ssah;

namespace {

MomentState state(uintptr_t count, uintptr_t mean, uintptr_t m2) {
    return {ptr<int64_t>(count), ptr<double>(mean), ptr<double>(m2)};
}

// All but the gradients' addresses is the same at every step, and is kept.
using AdamWTensors = std::vector<AdamWTensor>;

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
    py::class_<AdamWTensors>(m, "AdamWTensors").def(py::init(&adamw_tensors));
    m.def(
        "masked_adamw",
        [](AdamWTensors tensors, const std::vector<uintptr_t>& grads, double lr, double beta1, double beta2, double eps,
           double weight_decay, Rounding rounding, uint64_t seed, double divisor, int threads) {
            for (size_t i = 0; i < tensors.size(); ++i) tensors[i].grad = ptr<void>(grads[i]);
            masked_adamw(tensors, {lr, beta1, beta2, eps, weight_decay, rounding, seed, divisor}, threads);
        },
        no_gil);
    m.def(
        "perturb",
        [](DType dtype, uintptr_t out, uintptr_t base, int64_t count, const std::vector<uint64_t>& seeds,
           const std::vector<double>& factors, uint64_t id, uint64_t offset,
           int threads) { perturb(dtype, ptr<void>(out), ptr<void>(base), count, seeds, factors, {id, offset}, threads); },
        no_gil);
    m.def(
        "direction_scales",
        [](DType dtype, uintptr_t base, int64_t count, const std::vector<uint64_t>& seeds, uint64_t id, uint64_t offset, int threads) {
            return direction_scales(dtype, ptr<void>(base), count, seeds, {id, offset}, threads);
        },
        no_gil);
    m.def("stream_read", [](uintptr_t data, int64_t bytes, int threads) { return stream_read(ptr<void>(data), bytes, threads); }, no_gil);
}
