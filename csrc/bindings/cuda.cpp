// ssah_fast._cuda: the CUDA kernels by raw pointers, on the stream given. Thin on purpose: every argument was checked in ssah_fast/ops.py.
// Errors of the runtime become exceptions.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

#include "bindings/adamw_tensors.h"
#include "bindings/ptr.h"
#include "common/dtype.h"
#include "cuda/launch.h"
#include "cuda/masked_adamw.h"
#include "cuda/moments.h"

namespace py = pybind11;
using namespace ssah;

namespace {

int device_count() {
    int count = 0;
    const cudaError_t status = cudaGetDeviceCount(&count);
    if (status == cudaErrorNoDevice || status == cudaErrorInsufficientDriver) {
        cudaGetLastError();
        return 0;
    }
    check(status);
    return count;
}

py::dict device_properties(int device) {
    cudaDeviceProp p;
    check(cudaGetDeviceProperties(&p, device));
    py::dict d;
    d["name"] = p.name;
    d["capability"] = py::make_tuple(p.major, p.minor);
    d["multiprocessors"] = p.multiProcessorCount;
    d["memory_bytes"] = p.totalGlobalMem;
    d["l2_bytes"] = p.l2CacheSize;
    return d;
}

MomentsJob moments_job(uintptr_t group, int64_t rows, int64_t channels, uintptr_t count, uintptr_t mean, uintptr_t m2, int groups,
                       uintptr_t workspace, uintptr_t stream) {
    const MomentState state{ptr<int64_t>(count), ptr<double>(mean), ptr<double>(m2)};
    return {ptr<int8_t>(group), rows, channels, state, groups, ptr<void>(workspace), ptr<CUstream_st>(stream)};
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    const auto no_gil = py::call_guard<py::gil_scoped_release>();

    m.attr("compiled_with") = CUDART_VERSION;
#ifdef CUDA_ON_CPU  // tests/cuda_on_cpu
    m.attr("EMULATED") = true;
#else
    m.attr("EMULATED") = false;
#endif
    m.def("device_count", &device_count);
    m.def("device_properties", &device_properties, py::arg("device"));

    // module_local: ssah_fast._C has the same types.
    py::enum_<DType>(m, "DType", py::module_local())
        .value("f32", DType::f32)
        .value("bf16", DType::bf16)
        .value("f16", DType::f16)
        .value("f64", DType::f64);

    py::enum_<Activation>(m, "Activation", py::module_local())
        .value("silu", Activation::silu)
        .value("gelu", Activation::gelu)
        .value("gelu_tanh", Activation::gelu_tanh)
        .value("relu", Activation::relu);
    py::class_<MomentsJob>(m, "MomentsJob").def(py::init(&moments_job));
    m.def("moments_workspace", &moments_workspace);
    m.def(
        "channel_moments",
        [](DType dtype, uintptr_t x, int64_t stride, const MomentsJob& job) { channel_moments(dtype, ptr<void>(x), stride, job); }, no_gil);
    m.def(
        "gated_moments",
        [](DType dtype, Activation activation, uintptr_t gate, int64_t gate_stride, uintptr_t up, int64_t up_stride, uintptr_t h,
           int64_t h_stride, const MomentsJob& job) {
            gated_moments(dtype, activation, ptr<void>(gate), gate_stride, ptr<void>(up), up_stride, ptr<void>(h), h_stride, job);
        },
        no_gil);

    py::enum_<Rounding>(m, "Rounding", py::module_local())
        .value("stochastic", Rounding::stochastic)
        .value("kahan", Rounding::kahan)
        .value("master", Rounding::master)
        .value("nearest", Rounding::nearest);
    py::class_<AdamWTable>(m, "AdamWTable")
        .def(py::init([](const AdamWColumns& columns) { return AdamWTable(adamw_tensors(columns)); }))
        .def("bytes",
             [](const AdamWTable& table) {
                 const std::vector<char> bytes = table.bytes();
                 return py::bytes(bytes.data(), bytes.size());
             })
        .def(
            "launch",
            [](const AdamWTable& table, uintptr_t on_device, const std::vector<uintptr_t>& grads, double lr, double beta1, double beta2,
               double eps, double weight_decay, Rounding rounding, uint64_t seed, double divisor, uintptr_t lr_on_device,
               uintptr_t grad_scale, uintptr_t found_inf, uintptr_t stream) {
                table.launch(ptr<char>(on_device), grads, {lr, beta1, beta2, eps, weight_decay, rounding, seed, divisor},
                             ptr<double>(lr_on_device), ptr<float>(grad_scale), ptr<float>(found_inf), ptr<CUstream_st>(stream));
            },
            no_gil);
}
