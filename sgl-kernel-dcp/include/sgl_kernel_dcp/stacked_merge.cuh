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

// One block per piece.
__global__ void __launch_bounds__(kThreads, 2) stacked_merge_kernel(const __grid_constant__ StackedMergeParams params) {
  __shared__ MergeScratch scratch;
  const int row = blockIdx.x / params.pieces_per_row, first_head = (blockIdx.x - row * params.pieces_per_row) * params.heads_per_piece;
  const int64_t head_index = int64_t{row} * params.num_heads + first_head;
  if (threadIdx.x < params.num_partials) {
    const int64_t heads = threadIdx.x * (int64_t{params.num_rows} * params.num_heads) + head_index;
    scratch.output[threadIdx.x] = params.outputs + heads * params.v_head_bytes;
    scratch.lse[threadIdx.x] = params.lses + heads;
  }
  __syncthreads();
  MergePiece piece;
  piece.count = params.num_partials;
  piece.num_heads = min(params.heads_per_piece, params.num_heads - first_head);
  piece.num_vectors = piece.num_heads * params.v_head_bytes / kVectorBytes;
  piece.destination = params.merged + head_index * params.v_head_bytes;
  piece.lse_destination = params.merged_lse == nullptr ? nullptr : params.merged_lse + head_index;
  merge_piece(scratch, piece, params.v_head_bytes / kVectorBytes);
}

}  // namespace dcp
