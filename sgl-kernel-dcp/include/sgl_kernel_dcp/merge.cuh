// Merge of partial attention results: out = sum(exp(lse_i - max) * out_i) / sum(exp(lse_i - max)), fp32 accumulation, one pass.
// A neutral partial weighs nothing, whatever its output holds; with none left the row is neutral (zeros, lse -inf). Neutral are -inf
// and +inf, which is how FlashMLA marks an empty shard.
#pragma once

#include <cstdint>

#include <cuda_bf16.h>

#include "memory.cuh"

namespace dcp {

// A value of no weight may be NaN.
__device__ __forceinline__ void accumulate_vector(float (&sum)[8], const uint4& value, float weight) {
  const bool counts = weight != 0.0f;
  const uint32_t words[4] = {counts ? value.x : 0, counts ? value.y : 0, counts ? value.z : 0, counts ? value.w : 0};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sum[2 * i] = fmaf(weight, __uint_as_float(words[i] << 16), sum[2 * i]);
    sum[2 * i + 1] = fmaf(weight, __uint_as_float(words[i] & 0xffff0000u), sum[2 * i + 1]);
  }
}

__device__ __forceinline__ uint4 pack_scaled(const float (&sum)[8], float scale) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(sum[2 * i] * scale, sum[2 * i + 1] * scale);
    words[i] = *reinterpret_cast<const uint32_t*>(&pair);
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// One thread's vector (eight elements of one head) of the merged row so far. Every thread weighs for itself: its head's LSEs are
// broadcast loads that travel with the data, so nothing is exchanged and no barrier is needed.
struct RunningMerge {
  float sum[8] = {};
  float peak = -INFINITY;
  float total = 0.0f;

  // A partial with a neutral LSE may have any value.
  template <int kBatch>
  __device__ __forceinline__ void add(const uint4 (&values)[kBatch], const float (&lses)[kBatch]) {
    float lse[kBatch], new_peak = peak;
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      lse[b] = lses[b] == INFINITY ? -INFINITY : lses[b];
      new_peak = fmaxf(new_peak, lse[b]);
    }
    if (new_peak == -INFINITY) return;
    const float rescale = __expf(peak - new_peak);
    peak = new_peak;
    total *= rescale;
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[i] *= rescale;
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const float weight = __expf(lse[b] - new_peak);
      total += weight;
      accumulate_vector(sum, values[b], weight);
    }
  }

  __device__ __forceinline__ uint4 output() const { return pack_scaled(sum, total == 0.0f ? 0.0f : __fdividef(1.0f, total)); }
  __device__ __forceinline__ float lse() const { return total == 0.0f ? -INFINITY : peak + __logf(total); }
};

}  // namespace dcp
