// Merge of partial attention results: out = sum(exp(lse_i - max) * out_i) / sum(exp(lse_i - max)), fp32 accumulation, one pass.
// A neutral partial (lse -inf) or an absent one weighs nothing, whatever its output holds; with none left the row is neutral.
#pragma once

#include <cstdint>

#include <cuda_bf16.h>

#include "memory.cuh"

namespace dcp {

// One partial result at the first head of a span; an absent one has a null output.
struct PartialSpan {
  const uint8_t* output;
  const float* lse;
};

// The vectors of a span of heads that one thread merges: `index[v]` within the span, in head `head[v]` of the span.
template <int kVectors>
struct ThreadVectors {
  int index[kVectors];
  int head[kVectors];
  bool active[kVectors];

  __device__ __forceinline__ ThreadVectors(int first, int step, int num_vectors, int vectors_per_head) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      index[v] = first + v * step;
      head[v] = index[v] / vectors_per_head;
      active[v] = index[v] < num_vectors;
    }
  }
};

__device__ __forceinline__ void accumulate_vector(float (&sum)[8], const uint4& value, float weight) {
  const uint32_t words[4] = {value.x, value.y, value.z, value.w};
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

// Merges `count` partials of a span into `destination` (and `lse_destination`, unless null). `locate(i)` returns partial i; the
// threads of a warp call it together. Every thread weighs for itself: its head's LSEs are broadcast loads that travel with the data,
// so nothing is exchanged and no barrier is needed. kBatch partials are in flight together.
template <int kVectors, int kBatch, typename Locate>
__device__ __forceinline__ void merge_span(int count, Locate locate, const ThreadVectors<kVectors>& own, int vectors_per_head,
                                           uint8_t* destination, float* lse_destination) {
  float sum[kVectors][8] = {};
  float peak[kVectors], total[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) peak[v] = -INFINITY, total[v] = 0.0f;
  for (int first = 0; first < count; first += kBatch) {
    uint4 values[kBatch][kVectors];
    float lse[kBatch][kVectors];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const PartialSpan partial = first + b < count ? locate(first + b) : PartialSpan{nullptr, nullptr};
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        lse[b][v] = -INFINITY;
        if (partial.output == nullptr || !own.active[v]) continue;
        values[b][v] = load_vector(partial.output + own.index[v] * kVectorBytes);
        lse[b][v] = partial.lse[own.head[v]];
      }
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      float new_peak = peak[v];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) new_peak = fmaxf(new_peak, lse[b][v]);
      if (new_peak == -INFINITY) continue;
      const float rescale = __expf(peak[v] - new_peak);
      peak[v] = new_peak;
      total[v] *= rescale;
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[v][i] *= rescale;
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const float weight = __expf(lse[b][v] - new_peak);
        total[v] += weight;
        if (weight != 0.0f) accumulate_vector(sum[v], values[b][v], weight);
      }
    }
  }
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (!own.active[v]) continue;
    store_vector(destination + own.index[v] * kVectorBytes, pack_scaled(sum[v], total[v] == 0.0f ? 0.0f : 1.0f / total[v]));
    if (lse_destination != nullptr && own.index[v] == own.head[v] * vectors_per_head) {
      lse_destination[own.head[v]] = total[v] == 0.0f ? -INFINITY : peak[v] + __logf(total[v]);
    }
  }
}

}  // namespace dcp
