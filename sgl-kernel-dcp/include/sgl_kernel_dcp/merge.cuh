// Merge of partial attention results: out = sum(exp(lse_i - max) * out_i) / sum(exp(lse_i - max)), fp32 accumulation, one pass.
// A neutral partial (lse -inf) or an absent one weighs nothing, whatever its output holds; with none left the row is neutral.
#pragma once

#include <cstdint>

#include <cuda_bf16.h>

#include "memory.cuh"

namespace dcp {

constexpr int kMergeBatch = 8;  // partials whose loads are in flight together

// Sources of one piece (up to kMaxHeadsPerPiece heads of one row); an absent source has a null output.
struct MergeScratch {
  const uint8_t* output[kMaxPartials];
  const float* lse[kMaxPartials];
  float weight[kMaxPartials][kMaxHeadsPerPiece];
};

struct MergePiece {
  int count;               // sources
  int num_heads;           // heads of this piece
  int num_vectors;         // vectors of this piece
  uint8_t* destination;
  float* lse_destination;  // null: not wanted
};

__device__ __forceinline__ void accumulate_vector(float (&sum)[8], const uint4& value, float weight) {
  const uint32_t words[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sum[2 * i] = fmaf(weight, __uint_as_float(words[i] << 16), sum[2 * i]);
    sum[2 * i + 1] = fmaf(weight, __uint_as_float(words[i] & 0xffff0000u), sum[2 * i + 1]);
  }
}

__device__ __forceinline__ uint4 pack_vector(const float (&sum)[8]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(sum[2 * i], sum[2 * i + 1]);
    words[i] = *reinterpret_cast<const uint32_t*>(&pair);
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// One thread per head turns its column of LSEs into normalised weights.
__device__ __forceinline__ void weigh_head(MergeScratch& scratch, const MergePiece& piece, int head) {
  float lse[kMaxPartials];
  float peak = -INFINITY;
#pragma unroll
  for (int i = 0; i < kMaxPartials; ++i) {
    lse[i] = i < piece.count && scratch.output[i] != nullptr ? *(scratch.lse[i] + head) : -INFINITY;
    peak = fmaxf(peak, lse[i]);
  }
  const float origin = peak == -INFINITY ? 0.0f : peak;
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kMaxPartials; ++i) {
    lse[i] = __expf(lse[i] - origin);
    total += lse[i];
  }
  const float scale = total == 0.0f ? 0.0f : 1.0f / total;
#pragma unroll
  for (int i = 0; i < kMaxPartials; ++i) {
    if (i < piece.count) scratch.weight[i][head] = lse[i] * scale;
  }
  if (piece.lse_destination != nullptr) piece.lse_destination[head] = total == 0.0f ? -INFINITY : origin + __logf(total);
}

// Called by the whole block after a barrier that made `scratch.output` and `scratch.lse` visible; the caller puts another one
// before it changes them. `vectors_per_head` vectors make up one head.
__device__ __forceinline__ void merge_piece(MergeScratch& scratch, const MergePiece& piece, int vectors_per_head) {
  const int thread = threadIdx.x;
  const bool active = thread < piece.num_vectors;
  uint4 values[kMergeBatch];
#pragma unroll
  for (int i = 0; i < kMergeBatch; ++i) {
    if (active && i < piece.count && scratch.output[i] != nullptr) values[i] = load_vector(scratch.output[i] + thread * kVectorBytes);
  }
  if (thread < piece.num_heads) weigh_head(scratch, piece, thread);
  __syncthreads();
  if (!active) return;
  const int head = thread / vectors_per_head;
  float sum[8] = {};
#pragma unroll
  for (int i = 0; i < kMergeBatch; ++i) {
    if (i < piece.count && scratch.weight[i][head] != 0.0f) accumulate_vector(sum, values[i], scratch.weight[i][head]);
  }
  for (int i = kMergeBatch; i < piece.count; ++i) {
    const float weight = scratch.weight[i][head];
    if (weight != 0.0f) accumulate_vector(sum, load_vector(scratch.output[i] + thread * kVectorBytes), weight);
  }
  store_vector(piece.destination + thread * kVectorBytes, pack_vector(sum));
}

}  // namespace dcp
