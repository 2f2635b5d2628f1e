// ssah_fast._cuda: what can be asked of the CUDA side. Errors of the runtime become exceptions.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

namespace py = pybind11;

namespace {

void check(cudaError_t status) {
    if (status != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status));
}

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

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.attr("compiled_with") = CUDART_VERSION;
    m.def("device_count", &device_count);
    m.def("device_properties", &device_properties, py::arg("device"));
}
