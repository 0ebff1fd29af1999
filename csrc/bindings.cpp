// The Python face of the library. It knows pointers, sizes and strides, and no tensor library: the caller answers for the
// memory, this file for the arguments.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/ops.h"
#include "cpu/dispatch.h"
#if defined(VITOK_WITH_CUDA)
#include "cuda/ops.h"
#endif

namespace py = pybind11;

namespace {

// Fills the fields of an argument struct from a Python call, by position and then by name.
class Reader {
   public:
    Reader(const char* op, const py::args& args, const py::kwargs& kwargs) : op_(op), args_(args), kwargs_(kwargs) {}

    template <class Field>
    void operator()(const char* name, Field& field) {
        const bool positional = position_ < args_.size();
        if (!positional && !kwargs_.contains(name)) throw py::type_error(std::string(op_) + ": " + name + " is missing");
        const py::object value = positional ? py::object(args_[position_++]) : py::object(kwargs_[name]);
        named_ += !positional;
        read(value, field, name);
    }

    void finish() const {
        if (position_ < args_.size() || named_ < kwargs_.size())
            throw py::type_error(std::string(op_) + ": more arguments than it takes");
    }

   private:
    [[noreturn]] void refuse(const char* name, const char* wanted) const {
        PyErr_Clear();
        throw py::type_error(std::string(op_) + ": " + name + " must be " + wanted);
    }

    void read(py::handle value, int64_t& field, const char* name) const {
        field = PyLong_AsLongLong(value.ptr());
        if (field == -1 && PyErr_Occurred()) refuse(name, "an integer of 64 bits");
    }
    void read(py::handle value, uint64_t& field, const char* name) const {
        field = PyLong_AsUnsignedLongLong(value.ptr());
        if (field == static_cast<uint64_t>(-1) && PyErr_Occurred()) refuse(name, "an unsigned integer of 64 bits");
    }
    void read(py::handle value, bool& field, const char* name) const {
        if (!PyBool_Check(value.ptr())) refuse(name, "a bool");
        field = value.ptr() == Py_True;
    }
    void read(py::handle value, double& field, const char* name) const {
        field = PyFloat_AsDouble(value.ptr());
        if (field == -1.0 && PyErr_Occurred()) refuse(name, "a number");
    }
    void read(py::handle value, vitok::DType& field, const char* name) const {
        const char* text = PyUnicode_Check(value.ptr()) ? PyUnicode_AsUTF8(value.ptr()) : nullptr;
        const std::string dtype = text ? text : "";
        if (dtype == "uint8") field = vitok::DType::uint8;
        else if (dtype == "float16") field = vitok::DType::float16;
        else if (dtype == "bfloat16") field = vitok::DType::bfloat16;
        else if (dtype == "float32") field = vitok::DType::float32;
        else if (dtype == "float64") field = vitok::DType::float64;
        else
            throw std::invalid_argument(std::string(op_) + ": " + name + " is '" + dtype +
                                        "'; it must be uint8, float16, bfloat16, float32 or float64");
    }
    void read(py::handle value, vitok::PackedType& field, const char* name) const {
        const char* text = PyUnicode_Check(value.ptr()) ? PyUnicode_AsUTF8(value.ptr()) : nullptr;
        const std::string type = text ? text : "";
        if (type == "float32") field = vitok::PackedType::float32;
        else if (type == "bfloat16") field = vitok::PackedType::bfloat16;
        else if (type == "int8") field = vitok::PackedType::int8;
        else
            throw std::invalid_argument(std::string(op_) + ": " + name + " is '" + type +
                                        "'; it must be float32, bfloat16 or int8");
    }
    // Addresses; 0 is the null pointer and means that the tensor is absent.
    template <class T>
    void read(py::handle value, T*& field, const char* name) const {
        uint64_t address;
        read(value, address, name);
        field = reinterpret_cast<T*>(address);
    }
    template <size_t N>
    void read(py::handle value, int64_t (&field)[N], const char* name) const {
        if (!PyTuple_Check(value.ptr()) || PyTuple_GET_SIZE(value.ptr()) != static_cast<Py_ssize_t>(N))
            refuse(name, "a tuple of as many integers as the op's documentation says");
        for (size_t i = 0; i < N; ++i) read(PyTuple_GET_ITEM(value.ptr(), i), field[i], name);
    }

    const char* op_;
    const py::args& args_;
    const py::kwargs& kwargs_;
    size_t position_ = 0, named_ = 0;
};

template <class Args>
Args parse(const char* op, const py::args& args, const py::kwargs& kwargs, uint64_t* stream = nullptr) {
    Reader reader(op, args, kwargs);
    Args parsed{};
    parsed.fields(reader);
    if (stream) reader("stream", *stream);
    reader.finish();
    if (const char* problem = parsed.problem()) throw std::invalid_argument(std::string(op) + ": " + problem);
    return parsed;
}

template <class Args>
void bind_cpu(py::module_& m, const char* op, void (*vitok::CpuLevel::*kernel)(const Args&)) {
    m.def((std::string(op) + "_cpu").c_str(), [op, kernel](const py::args& args, const py::kwargs& kwargs) {
        const Args parsed = parse<Args>(op, args, kwargs);
        if (parsed.empty()) return;
        py::gil_scoped_release release;
        (vitok::active_cpu_level().*kernel)(parsed);
    });
}

#if defined(VITOK_WITH_CUDA)
template <class Args>
void bind_cuda(py::module_& m, const char* op, void (*kernel)(const Args&, void*)) {
    m.def((std::string(op) + "_cuda").c_str(), [op, kernel](const py::args& args, const py::kwargs& kwargs) {
        uint64_t stream = 0;
        const Args parsed = parse<Args>(op, args, kwargs, &stream);
        if (parsed.empty()) return;
        py::gil_scoped_release release;
        kernel(parsed, reinterpret_cast<void*>(stream));
    });
}
#endif

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

#define VITOK_BIND(op, Args) bind_cpu<vitok::Args>(m, #op, &vitok::CpuLevel::op);
    VITOK_OPS(VITOK_BIND)
    VITOK_CPU_OPS(VITOK_BIND)
#undef VITOK_BIND
#if defined(VITOK_WITH_CUDA)
#define VITOK_BIND(op, Args) bind_cuda<vitok::Args>(m, #op, vitok::op##_cuda);
    VITOK_OPS(VITOK_BIND)
#undef VITOK_BIND
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
