// Return and merge: partial outputs and their LSE go home in one message per piece; home merges each piece of its rows as soon as
// that piece has arrived from every shard. The LSE of a piece lies behind its outputs under the same flag.
#pragma once

#include <cstdint>

#include "dispatch.cuh"
#include "merge.cuh"

namespace dcp {

struct ReturnParams {
  PeerPointers peers;
  InstanceState* state;
  const int32_t* tables;
  ExchangeShape shape;
  ExchangeLayout exchange;
  TableLayout table;
  const uint8_t* partial;    // bf16 [max_attention_rows, num_heads, v_head_dim]
  const float* partial_lse;  // [max_attention_rows, num_heads], natural log
  uint8_t* merged;           // bf16 [max_home_rows, num_heads, v_head_dim]
  float* merged_lse;         // [max_home_rows, num_heads] or null
  uint64_t wait_limit_ns;
  int32_t rank;
  int32_t phases;
};

struct ReturnUnit {
  int row;
  int piece;
  int num_heads;    // heads of this piece
  int num_vectors;
};

__device__ __forceinline__ ReturnUnit return_unit(const ReturnParams& params, int unit) {
  ReturnUnit result;
  result.row = unit / params.exchange.num_output_pieces;
  result.piece = unit - result.row * params.exchange.num_output_pieces;
  result.num_heads = min(params.exchange.heads_per_piece, params.shape.num_heads - result.piece * params.exchange.heads_per_piece);
  result.num_vectors = result.num_heads * (params.shape.v_head_bytes / kVectorBytes);
  return result;
}

__device__ __forceinline__ int64_t message_offset(const ReturnParams& params, int slot, int piece) {
  return params.exchange.return_slots +
         (int64_t{slot} * params.exchange.num_output_pieces + piece) * params.exchange.output_piece_stride;
}

__device__ __forceinline__ bool is_peer(const ReturnParams& params, int32_t target, uint32_t silent) {
  return target >= 0 && !(silent >> target_instance(target) & 1u);
}

__device__ __forceinline__ void send_partials(const ReturnParams& params, uint64_t epoch, uint32_t silent) {
  const int num_units = params.tables[params.table.header + kNumAttentionRows] * params.exchange.num_output_pieces;
  const int stride = gridDim.x;
  const int32_t* return_target = params.tables + params.table.return_target;
  const int64_t lse_offset = int64_t{params.exchange.heads_per_piece} * params.shape.v_head_bytes;
  for (int first = blockIdx.x; first < num_units; first += stride * kUnroll) {
    uint4 values[kUnroll];
    float lse[kUnroll];
    int32_t targets[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int unit = first + u * stride;
      targets[u] = unit < num_units ? return_target[unit / params.exchange.num_output_pieces] : -1;
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (!is_peer(params, targets[u], silent)) continue;
      const ReturnUnit unit = return_unit(params, first + u * stride);
      const int64_t head = int64_t{unit.row} * params.shape.num_heads + unit.piece * params.exchange.heads_per_piece;
      if (threadIdx.x < unit.num_vectors) {
        values[u] = load_vector(params.partial + head * params.shape.v_head_bytes + threadIdx.x * kVectorBytes);
      }
      if (threadIdx.x < unit.num_heads) lse[u] = params.partial_lse[head + threadIdx.x];
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (!is_peer(params, targets[u], silent)) continue;
      const ReturnUnit unit = return_unit(params, first + u * stride);
      uint8_t* message = params.peers.base[target_instance(targets[u])] + message_offset(params, target_slot(targets[u]), unit.piece);
      if (threadIdx.x < unit.num_vectors) store_vector(message + threadIdx.x * kVectorBytes, values[u]);
      if (threadIdx.x < unit.num_heads) reinterpret_cast<float*>(message + lse_offset)[threadIdx.x] = lse[u];
    }
  }
  __syncthreads();  // the block's stores come before every flag below
  const int num_own_units = num_units > blockIdx.x ? (num_units - blockIdx.x + stride - 1) / stride : 0;
  for (int item = threadIdx.x; item < num_own_units; item += kThreads) {
    const ReturnUnit unit = return_unit(params, blockIdx.x + item * stride);
    const int32_t target = return_target[unit.row];
    if (!is_peer(params, target, silent)) continue;
    auto* flags = reinterpret_cast<uint64_t*>(params.peers.base[target_instance(target)] + params.exchange.return_flag);
    store_release_system(flags + int64_t{target_slot(target)} * params.exchange.num_output_pieces + unit.piece, epoch);
  }
}

// Thread `index` finds source `index` of the unit: own partials where attention left them, others in the return slots.
__device__ __forceinline__ void locate_source(const ReturnParams& params, MergeScratch& scratch, const ReturnUnit& unit, uint64_t epoch,
                                              int index) {
  const int32_t source = params.tables[params.table.merge_source + unit.row * kMaxPartials + index];
  const int instance = target_instance(source), slot = target_slot(source);
  if (instance == params.rank) {
    const int64_t head = int64_t{slot} * params.shape.num_heads + unit.piece * params.exchange.heads_per_piece;
    scratch.output[index] = params.partial + head * params.shape.v_head_bytes;
    scratch.lse[index] = params.partial_lse + head;
    return;
  }
  const uint8_t* own = params.peers.base[params.rank];
  const auto* flag = reinterpret_cast<const uint64_t*>(own + params.exchange.return_flag) +
                     int64_t{slot} * params.exchange.num_output_pieces + unit.piece;
  const bool arrived = wait_for_flag(flag, epoch, instance, params.state, params.wait_limit_ns);
  const uint8_t* message = own + message_offset(params, slot, unit.piece);
  scratch.output[index] = arrived ? message : nullptr;
  scratch.lse[index] = reinterpret_cast<const float*>(message + int64_t{params.exchange.heads_per_piece} * params.shape.v_head_bytes);
}

__device__ __forceinline__ void merge_home_rows(const ReturnParams& params, MergeScratch& scratch, uint64_t epoch) {
  const int num_units = params.tables[params.table.header + kNumHomeRows] * params.exchange.num_output_pieces;
  const int vectors_per_head = params.shape.v_head_bytes / kVectorBytes;
  for (int index = blockIdx.x; index < num_units; index += gridDim.x) {
    const ReturnUnit unit = return_unit(params, index);
    MergePiece piece;
    piece.count = params.tables[params.table.target_count + unit.row];
    piece.num_heads = unit.num_heads;
    piece.num_vectors = unit.num_vectors;
    const int64_t head = int64_t{unit.row} * params.shape.num_heads + unit.piece * params.exchange.heads_per_piece;
    piece.destination = params.merged + head * params.shape.v_head_bytes;
    piece.lse_destination = params.merged_lse == nullptr ? nullptr : params.merged_lse + head;
    if (threadIdx.x < piece.count) locate_source(params, scratch, unit, epoch, threadIdx.x);
    __syncthreads();
    merge_piece(scratch, piece, vectors_per_head);
    __syncthreads();  // scratch is reused
  }
}

__global__ void __launch_bounds__(kThreads, 2) return_merge_kernel(const __grid_constant__ ReturnParams params) {
  __shared__ MergeScratch scratch;
  const uint64_t epoch = params.state->return_epoch;
  if (params.phases & kSend) {
    const uint32_t silent = load_silent_mask(params.state);
    if (blockIdx.x == 0 && threadIdx.x < params.shape.num_instances && threadIdx.x != params.rank && !(silent >> threadIdx.x & 1u)) {
      // Attention has ended, so its query rows may be overwritten: the peer's credit for the next exchange. Stream order makes
      // the reads come first; no data is published.
      auto* acknowledgement = reinterpret_cast<uint64_t*>(params.peers.base[threadIdx.x] + params.exchange.acknowledgement);
      store_relaxed_system(acknowledgement + params.rank, epoch);
    }
    send_partials(params, epoch, silent);
  }
  if (params.phases & kReceive) {
    merge_home_rows(params, scratch, epoch);
    if (blockIdx.x == 0 && threadIdx.x == 0) params.state->dispatch_epoch = epoch + 1;
  }
}

}  // namespace dcp
