// The Python face of the library. It knows pointers, sizes and strides, and no tensor library: the caller answers for the
// memory, this file for the arguments.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/tubelet_gather.h"
#include "cpu/dispatch.h"
#if defined(VITOK_WITH_CUDA)
#include "cuda/tubelet_gather.h"
#endif

namespace py = pybind11;

namespace {

vitok::DType parse_dtype(const std::string& name, const char* argument) {
    if (name == "uint8") return vitok::DType::uint8;
    if (name == "float16") return vitok::DType::float16;
    if (name == "bfloat16") return vitok::DType::bfloat16;
    if (name == "float32") return vitok::DType::float32;
    if (name == "float64") return vitok::DType::float64;
    throw std::invalid_argument(std::string(argument) + " is '" + name +
                                "'; it must be uint8, float16, bfloat16, float32 or float64");
}

// Checks what can be checked without the memory itself. An empty batch is valid and leaves nothing to do.
vitok::TubeletGather make_gather(uintptr_t source, const std::string& source_dtype, const std::array<int64_t, 4>& sizes,
                                 const std::array<int64_t, 5>& strides, int64_t q, int64_t p, bool pad_zero,
                                 uintptr_t target, const std::string& target_dtype, double scale, double shift) {
    const vitok::DType from = parse_dtype(source_dtype, "src_dtype"), to = parse_dtype(target_dtype, "dst_dtype");
    if (to == vitok::DType::uint8) throw std::invalid_argument("dst_dtype is 'uint8'; it must be a float type");
    if ((from == vitok::DType::float64) != (to == vitok::DType::float64))
        throw std::invalid_argument("float64 is supported from float64 to float64 only; got '" + source_dtype + "' to '" +
                                    target_dtype + "'");
    if (sizes[0] < 0 || sizes[1] < 1 || sizes[2] < 1 || sizes[3] < 1)
        throw std::invalid_argument("sizes must be (B >= 0, T >= 1, H >= 1, W >= 1)");
    for (const int64_t stride : strides)
        if (stride < 0) throw std::invalid_argument("strides must not be negative");
    if (q < 1) throw std::invalid_argument("q is " + std::to_string(q) + "; it must be at least 1");
    if (p < 1 || p > vitok::kMaxPatch)
        throw std::invalid_argument("p is " + std::to_string(p) + "; it must be from 1 to " + std::to_string(vitok::kMaxPatch));
    if (sizes[0] > 0 && (source == 0 || target == 0)) throw std::invalid_argument("src and dst must not be null");
    return {reinterpret_cast<const void*>(source), reinterpret_cast<void*>(target), from, to,
            sizes[0], sizes[1], sizes[2], sizes[3],
            strides[0], strides[1], strides[2], strides[3], strides[4],
            q, p, pad_zero, scale, shift};
}

std::string usable_levels() {
    std::string names;
    for (int i = 0; i < vitok::cpu_level_count(); ++i) {
        if (!vitok::cpu_level(i).supported()) continue;
        if (!names.empty()) names += ", ";
        names += vitok::cpu_level(i).name;
    }
    return names;
}

void set_cpu_isa(const std::string& level, const char* argument) {
    if (!vitok::select_cpu_level(level.c_str()))
        throw std::invalid_argument(std::string(argument) + " is '" + level +
                                    "'; this build on this machine offers: " + usable_levels());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Native kernels of vitok; use the functions of vitok.ops instead.";

    m.def(
        "tubelet_gather_cpu",
        [](uintptr_t src, const std::string& src_dtype, const std::array<int64_t, 4>& sizes,
           const std::array<int64_t, 5>& strides, int64_t q, int64_t p, bool pad_zero, uintptr_t dst,
           const std::string& dst_dtype, double scale, double shift) {
            const auto gather = make_gather(src, src_dtype, sizes, strides, q, p, pad_zero, dst, dst_dtype, scale, shift);
            if (gather.batch == 0) return;
            py::gil_scoped_release release;
            vitok::active_cpu_level().tubelet_gather(gather);
        },
        py::arg("src"), py::arg("src_dtype"), py::arg("sizes"), py::arg("strides"), py::arg("q"), py::arg("p"),
        py::arg("pad_zero"), py::arg("dst"), py::arg("dst_dtype"), py::arg("scale"), py::arg("shift"),
        "Patch rows of the pixels at src, written to dst; sizes (B, T, H, W), strides (b, t, y, x, c) in elements.");

#if defined(VITOK_WITH_CUDA)
    m.def(
        "tubelet_gather_cuda",
        [](uintptr_t src, const std::string& src_dtype, const std::array<int64_t, 4>& sizes,
           const std::array<int64_t, 5>& strides, int64_t q, int64_t p, bool pad_zero, uintptr_t dst,
           const std::string& dst_dtype, double scale, double shift, uintptr_t stream) {
            const auto gather = make_gather(src, src_dtype, sizes, strides, q, p, pad_zero, dst, dst_dtype, scale, shift);
            if (gather.batch == 0) return;
            py::gil_scoped_release release;
            vitok::tubelet_gather_cuda(gather, reinterpret_cast<void*>(stream));
        },
        py::arg("src"), py::arg("src_dtype"), py::arg("sizes"), py::arg("strides"), py::arg("q"), py::arg("p"),
        py::arg("pad_zero"), py::arg("dst"), py::arg("dst_dtype"), py::arg("scale"), py::arg("shift"), py::arg("stream"),
        "tubelet_gather_cpu on device memory, ordered by a CUDA stream handle.");
#endif

    m.def("cpu_isa", [] { return std::string(vitok::active_cpu_level().name); }, "The instruction set level in use.");
    m.def(
        "cpu_isas",
        [] {
            std::vector<std::string> names;
            for (int i = 0; i < vitok::cpu_level_count(); ++i) names.emplace_back(vitok::cpu_level(i).name);
            return names;
        },
        "The compiled instruction set levels, lowest first; the machine may lack the higher ones.");
    m.def("set_cpu_isa", [](const std::string& level) { set_cpu_isa(level, "level"); }, py::arg("level"),
          "Use this level; ValueError when the build or the machine lacks it.");
    m.def(
        "cuda_archs",
        [] {
            std::vector<std::string> archs;
#if defined(VITOK_WITH_CUDA)
            const std::string all = VITOK_WITH_CUDA;  // "80,90a,100"
            for (size_t begin = 0; begin < all.size();) {
                const size_t end = std::min(all.find(',', begin), all.size());
                archs.push_back(all.substr(begin, end - begin));
                begin = end + 1;
            }
#endif
            return archs;
        },
        "The CUDA architectures compiled in; empty for a build without CUDA.");

    if (const char* level = std::getenv("VITOK_CPU_ISA")) set_cpu_isa(level, "VITOK_CPU_ISA");
}
