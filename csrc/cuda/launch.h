// What every launch needs: the device that owns the memory made current, and CUDA's own words when something is refused.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace vitok {

inline void check(const char* op, cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // a refused launch must not be reported again by an unrelated later call
    throw std::runtime_error(std::string(op) + ": " + what + ": " + cudaGetErrorString(error));
}

inline void check_launch(const char* op) { check(op, cudaGetLastError(), "launch failed"); }

// Makes the device that owns a pointer current; several devices may be in use and the stream may be a default one.
class DeviceGuard {
   public:
    DeviceGuard(const char* op, const void* pointer) {
        check(op, cudaGetDevice(&before_), "no CUDA device");
        cudaPointerAttributes attributes;
        check(op, cudaPointerGetAttributes(&attributes, pointer), "the output is not a CUDA pointer");
        if (attributes.type != cudaMemoryTypeDevice && attributes.type != cudaMemoryTypeManaged)
            throw std::runtime_error(std::string(op) + ": the output is not in device memory");
        changed_ = attributes.device != before_;
        if (changed_) check(op, cudaSetDevice(attributes.device), "cannot select the device");
    }
    ~DeviceGuard() {
        if (changed_) cudaSetDevice(before_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

   private:
    int before_ = 0;
    bool changed_ = false;
};

}  // namespace vitok
