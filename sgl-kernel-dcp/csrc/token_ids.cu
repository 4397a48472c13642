// Token ids of a decode step in which some rows begin a page, in one launch: a step waits for the host that asks for them.
#include "checks.h"

#include <algorithm>

#include <tvm/ffi/container/shape.h>

namespace dcp {
namespace {

using tvm::ffi::Shape;

constexpr int kBeginsPerLaunch = 256;  // launch parameters stay below the 4 KB that every driver passes

struct PageBegins {
  int32_t rows[kBeginsPerLaunch];
  int64_t ids[kBeginsPerLaunch];  // or -1 - n: the first token of free_pages[n]
};

__global__ void __launch_bounds__(1024, 1)
    token_ids_kernel(int64_t* out, const int32_t* last, int num_rows, const int64_t* free_pages, int64_t page_size, int num_begins,
                     const __grid_constant__ PageBegins begins) {
  for (int row = threadIdx.x; row < num_rows; row += blockDim.x) out[row] = int64_t{last[row]} + 1;
  __syncthreads();
  if (static_cast<int>(threadIdx.x) >= num_begins) return;
  const int64_t id = begins.ids[threadIdx.x];
  out[begins.rows[threadIdx.x]] = id >= 0 ? id : free_pages[-1 - id] * page_size;
}

void decode_token_ids(TensorView last, TensorView free_pages, int64_t page_size, Shape rows, Shape ids, TensorView out) {
  check_tensor("last", last, kDLInt, 32, {-1});
  check_tensor("free_pages", free_pages, kDLInt, 64, {-1});
  check_tensor("out", out, kDLInt, 64, {last.size(0)});
  check_limit("page_size", page_size, 1, 1 << 20);
  check_limit("the number of ids", ids.size(), rows.size(), rows.size());
  check_limit("rows", last.size(0), 0, INT32_MAX);
  const DeviceGuard guard(out.device().device_id);
  const cudaStream_t stream = current_stream(out);
  int64_t num_taken = 0;
  for (int64_t done = 0; done == 0 || done < static_cast<int64_t>(rows.size()); done += kBeginsPerLaunch) {
    const int count = static_cast<int>(std::min<int64_t>(rows.size() - done, kBeginsPerLaunch));
    PageBegins begins;
    for (int i = 0; i < count; ++i) {
      check_limit("a row that begins a page", rows[done + i], 0, last.size(0) - 1);
      begins.rows[i] = static_cast<int32_t>(rows[done + i]);
      begins.ids[i] = ids[done + i] >= 0 ? ids[done + i] : -1 - num_taken++;
    }
    check_limit("pages taken", num_taken, 0, free_pages.size(0));
    token_ids_kernel<<<1, 1024, 0, stream>>>(static_cast<int64_t*>(out.data_ptr()), static_cast<const int32_t*>(last.data_ptr()),
                                             done == 0 ? static_cast<int>(last.size(0)) : 0,
                                             static_cast<const int64_t*>(free_pages.data_ptr()), page_size, count, begins);
    check_cuda(cudaGetLastError(), "token_ids_kernel");
  }
}

}  // namespace
}  // namespace dcp

TVM_FFI_DLL_EXPORT_TYPED_FUNC(decode_token_ids, dcp::decode_token_ids);
