// Merge of stacked partials that are all here already: for a transport that gathers them by other means.
#pragma once

#include <cstdint>

#include "merge.cuh"

namespace dcp {

struct StackedMergeParams {
  const uint8_t* outputs;  // bf16 [num_partials, num_rows, num_heads, v_head_dim]
  const float* lses;       // [num_partials, num_rows, num_heads]
  uint8_t* merged;         // bf16 [num_rows, num_heads, v_head_dim]
  float* merged_lse;       // [num_rows, num_heads] or null
  int32_t num_partials;
  int32_t num_rows;
  int32_t num_heads;
  int32_t v_head_bytes;
  int32_t heads_per_piece;
  int32_t pieces_per_row;
};

constexpr int kStackedBatch = 8;

// One block per piece, one vector per thread.
__global__ void __launch_bounds__(kPieceThreads, 2) stacked_merge_kernel(const __grid_constant__ StackedMergeParams params) {
  const int row = blockIdx.x / params.pieces_per_row, first_head = (blockIdx.x - row * params.pieces_per_row) * params.heads_per_piece;
  const int64_t head_index = int64_t{row} * params.num_heads + first_head, partial_stride = int64_t{params.num_rows} * params.num_heads;
  const int vectors_per_head = params.v_head_bytes / kVectorBytes;
  const int num_heads = min(params.heads_per_piece, params.num_heads - first_head);
  const ThreadVectors<1> own(threadIdx.x, kPieceThreads, num_heads * vectors_per_head, vectors_per_head);
  const auto locate = [&](int partial) {
    const int64_t heads = partial * partial_stride + head_index;
    return PartialSpan{params.outputs + heads * params.v_head_bytes, params.lses + heads};
  };
  merge_span<1, kStackedBatch>(params.num_partials, locate, own, vectors_per_head, params.merged + head_index * params.v_head_bytes,
                               params.merged_lse == nullptr ? nullptr : params.merged_lse + head_index);
}

}  // namespace dcp
