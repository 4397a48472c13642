// Merge of stacked partials that are all here already: for a transport that gathers them by other means.
#pragma once

#include <cstdint>

#include "merge.cuh"

namespace dcp {

constexpr int kStackedThreads = 512;
constexpr int kStackedBatch = 8;
constexpr int kMaxHeadsPerBlock = 64;

struct StackedMergeParams {
  const uint8_t* outputs;  // bf16 [num_partials, num_rows, num_heads, v_head_dim]
  const float* lses;       // [num_partials, num_rows, num_heads]
  uint8_t* merged;         // bf16 [num_rows, num_heads, v_head_dim]
  float* merged_lse;       // [num_rows, num_heads] or null
  int32_t num_partials;
  int32_t num_rows;
  int32_t num_heads;
  int32_t v_head_bytes;
  int32_t heads_per_block;
  int32_t blocks_per_row;
};

// One block per heads_per_block heads of a row, one vector per thread.
__global__ void __launch_bounds__(kStackedThreads, 2) stacked_merge_kernel(const __grid_constant__ StackedMergeParams params) {
  const int row = blockIdx.x / params.blocks_per_row, first_head = (blockIdx.x - row * params.blocks_per_row) * params.heads_per_block;
  const int64_t first = int64_t{row} * params.num_heads + first_head, partial_stride = int64_t{params.num_rows} * params.num_heads;
  const int vectors_per_head = params.v_head_bytes / kVectorBytes, head = threadIdx.x / vectors_per_head;
  if (head >= min(params.heads_per_block, params.num_heads - first_head)) return;
  const uint8_t* output = params.outputs + first * params.v_head_bytes + threadIdx.x * kVectorBytes;
  const float* lse = params.lses + first + head;
  RunningMerge merge;
  for (int begin = 0; begin < params.num_partials; begin += kStackedBatch) {
    uint4 values[kStackedBatch];
    float lses[kStackedBatch];
#pragma unroll
    for (int b = 0; b < kStackedBatch; ++b) {
      lses[b] = -INFINITY;
      if (begin + b >= params.num_partials) continue;
      const int64_t heads = (begin + b) * partial_stride;
      values[b] = load_vector(output + heads * params.v_head_bytes);
      lses[b] = lse[heads];
    }
    merge.add(values, lses);
  }
  store_vector(params.merged + first * params.v_head_bytes + threadIdx.x * kVectorBytes, merge.output());
  if (params.merged_lse != nullptr && threadIdx.x == head * vectors_per_head) params.merged_lse[first + head] = merge.lse();
}

}  // namespace dcp
