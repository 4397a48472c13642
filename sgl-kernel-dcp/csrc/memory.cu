// Exchange buffers: plain cudaMalloc memory, because an IPC handle names a whole allocation.
#include "checks.h"

#include <cstring>

#include <tvm/ffi/container/shape.h>
#include <tvm/ffi/string.h>

namespace dcp {
namespace {

using tvm::ffi::Bytes;
using tvm::ffi::Shape;
using tvm::ffi::Tensor;

struct DeviceAllocation {
  void AllocData(DLTensor* tensor) {
    const DeviceGuard guard(tensor->device.device_id);
    const size_t bytes = static_cast<size_t>(tensor->shape[0]);
    check_cuda(cudaMalloc(&tensor->data, bytes), "cudaMalloc of the exchange buffer");
    check_cuda(cudaMemset(tensor->data, 0, bytes), "cudaMemset");
    check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  }
  void FreeData(DLTensor* tensor) { cudaFree(tensor->data); }
};

Tensor allocate_buffer(int64_t bytes, int64_t device) {
  check_limit("exchange buffer bytes", bytes, 1, int64_t{1} << 40);
  return Tensor::FromNDAlloc(DeviceAllocation(), Shape({bytes}), DLDataType{kDLUInt, 8, 1},
                             DLDevice{kDLCUDA, static_cast<int32_t>(device)});
}

Bytes ipc_handle(TensorView buffer) {
  cudaIpcMemHandle_t handle;
  check_cuda(cudaIpcGetMemHandle(&handle, buffer.data_ptr()), "cudaIpcGetMemHandle");
  return Bytes(reinterpret_cast<const char*>(&handle), sizeof(handle));
}

int64_t open_ipc_handle(Bytes bytes, int64_t device) {
  cudaIpcMemHandle_t handle;
  check_limit("IPC handle bytes", bytes.size(), sizeof(handle), sizeof(handle));
  std::memcpy(&handle, bytes.data(), sizeof(handle));
  const DeviceGuard guard(static_cast<int>(device));
  void* address = nullptr;
  check_cuda(cudaIpcOpenMemHandle(&address, handle, cudaIpcMemLazyEnablePeerAccess), "cudaIpcOpenMemHandle");
  return reinterpret_cast<int64_t>(address);
}

void close_ipc_handle(int64_t address) { check_cuda(cudaIpcCloseMemHandle(reinterpret_cast<void*>(address)), "cudaIpcCloseMemHandle"); }

}  // namespace
}  // namespace dcp

TVM_FFI_DLL_EXPORT_TYPED_FUNC(allocate_buffer, dcp::allocate_buffer);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(ipc_handle, dcp::ipc_handle);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(open_ipc_handle, dcp::open_ipc_handle);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(close_ipc_handle, dcp::close_ipc_handle);
