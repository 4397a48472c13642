// Checks shared by the launchers: every refusal names what was given and what it must be.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>

namespace dcp {

using tvm::ffi::TensorView;

inline void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess) TVM_FFI_THROW(RuntimeError) << what << ": " << cudaGetErrorString(status);
}

inline void check_limit(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high) TVM_FFI_THROW(ValueError) << name << " is " << value << ", must be " << low << " to " << high;
}

inline void check_multiple(const char* name, int64_t value, int64_t step) {
  if (value <= 0 || value % step != 0) TVM_FFI_THROW(ValueError) << name << " is " << value << ", must be a positive multiple of " << step;
}

// `extents` of -1 accept any size. Contiguous CUDA tensor of `bits`-bit elements (code: kDLFloat, kDLBfloat, kDLInt ...).
inline void check_tensor(const char* name, const TensorView& tensor, int code, int bits, std::initializer_list<int64_t> extents) {
  if (tensor.device().device_type != kDLCUDA) TVM_FFI_THROW(ValueError) << name << " must be a CUDA tensor";
  if (tensor.dtype().code != code || tensor.dtype().bits != bits) {
    TVM_FFI_THROW(ValueError) << name << " has dtype code " << int{tensor.dtype().code} << " with " << int{tensor.dtype().bits}
                              << " bits, must be code " << code << " with " << bits << " bits";
  }
  if (tensor.ndim() != static_cast<int>(extents.size())) {
    TVM_FFI_THROW(ValueError) << name << " has " << tensor.ndim() << " dimensions, must have " << extents.size();
  }
  int i = 0;
  for (int64_t extent : extents) {
    if (extent >= 0 && tensor.size(i) != extent) {
      TVM_FFI_THROW(ValueError) << name << " has size " << tensor.size(i) << " in dimension " << i << ", must be " << extent;
    }
    ++i;
  }
  if (tensor.numel() > 0 && !tensor.IsContiguous()) TVM_FFI_THROW(ValueError) << name << " must be contiguous";
}

inline cudaStream_t current_stream(const TensorView& tensor) {
  return static_cast<cudaStream_t>(TVMFFIEnvGetStream(tensor.device().device_type, tensor.device().device_id));
}

inline int multiprocessor_count(int device) {
  int count = 0;
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  return count;
}

// The current device while it lives; the one before comes back.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check_cuda(cudaGetDevice(&previous_), "cudaGetDevice");
    changed_ = device != previous_;
    if (changed_) check_cuda(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

}  // namespace dcp
