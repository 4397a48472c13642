// Launcher of the stacked merge.
#include <sgl_kernel_dcp/stacked_merge.cuh>

#include "checks.h"

#include <algorithm>

#include <tvm/ffi/optional.h>

namespace dcp {
namespace {

void merge_stacked(TensorView outputs, TensorView lses, TensorView merged, tvm::ffi::Optional<TensorView> merged_lse) {
  check_tensor("outputs", outputs, kDLBfloat, 16, {-1, -1, -1, -1});
  const int64_t partials = outputs.size(0), rows = outputs.size(1), heads = outputs.size(2), head_bytes = outputs.size(3) * 2;
  check_limit("outputs.shape[0] (partials)", partials, 0, kMaxPartials);
  check_limit("outputs.shape[2] (heads)", heads, 1, 1024);
  check_multiple("outputs.shape[3] (head dim) in bytes", head_bytes, kVectorBytes);
  check_limit("outputs.shape[3] (head dim) in bytes", head_bytes, kVectorBytes, kMaxHeadBytes);
  check_tensor("lses", lses, kDLFloat, 32, {partials, rows, heads});
  check_tensor("merged", merged, kDLBfloat, 16, {rows, heads, outputs.size(3)});
  StackedMergeParams params{};
  if (merged_lse.has_value()) {
    check_tensor("merged_lse", merged_lse.value(), kDLFloat, 32, {rows, heads});
    params.merged_lse = static_cast<float*>(merged_lse.value().data_ptr());
  }
  params.outputs = static_cast<const uint8_t*>(outputs.data_ptr());
  params.lses = static_cast<const float*>(lses.data_ptr());
  params.merged = static_cast<uint8_t*>(merged.data_ptr());
  params.num_partials = static_cast<int32_t>(partials);
  params.num_rows = static_cast<int32_t>(rows);
  params.num_heads = static_cast<int32_t>(heads);
  params.v_head_bytes = static_cast<int32_t>(head_bytes);
  const int64_t heads_that_fit = kStackedThreads * kVectorBytes / head_bytes;
  params.heads_per_block = static_cast<int32_t>(std::min({heads_that_fit, int64_t{kMaxHeadsPerBlock}, heads}));
  params.blocks_per_row = static_cast<int32_t>(divide_up(heads, int64_t{params.heads_per_block}));
  const int64_t blocks = rows * params.blocks_per_row;
  check_limit("merge blocks (rows x pieces)", blocks, 0, INT32_MAX);
  if (blocks == 0) return;
  const DeviceGuard guard(outputs.device().device_id);
  stacked_merge_kernel<<<static_cast<unsigned>(blocks), kStackedThreads, 0, current_stream(outputs)>>>(params);
  check_cuda(cudaGetLastError(), "stacked_merge_kernel");
}

}  // namespace
}  // namespace dcp

TVM_FFI_DLL_EXPORT_TYPED_FUNC(merge_stacked, dcp::merge_stacked);
