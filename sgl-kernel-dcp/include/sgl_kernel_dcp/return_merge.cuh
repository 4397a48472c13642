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

constexpr int kReturnUnroll = 2;                 // pieces that a section of a block keeps in flight
constexpr int kMergeVectors = 1;                 // vectors that a thread merges at once
constexpr int kMergeBatch = 4;                   // partials in flight together
constexpr int kSpanVectors = 32 * kMergeVectors; // a warp merges a span of a piece
constexpr int kSpansPerPiece = kPieceThreads / kSpanVectors;

// A piece of one row: some of its heads.
struct RowPiece {
  int row;
  int piece;
  int num_heads;
  int64_t first_head;  // counted over all rows

  __device__ __forceinline__ RowPiece(const ReturnParams& params, int unit) {
    row = unit / params.exchange.num_output_pieces;
    piece = unit - row * params.exchange.num_output_pieces;
    const int head = piece * params.exchange.heads_per_piece;
    num_heads = min(params.exchange.heads_per_piece, params.shape.num_heads - head);
    first_head = int64_t{row} * params.shape.num_heads + head;
  }
};

__device__ __forceinline__ int64_t message_offset(const ReturnParams& params, int slot, int piece) {
  return params.exchange.return_slots +
         (int64_t{slot} * params.exchange.num_output_pieces + piece) * params.exchange.output_piece_stride;
}

__device__ __forceinline__ bool is_peer(int32_t target, uint32_t silent) { return target >= 0 && !(silent >> target_instance(target) & 1u); }

// Return target of one of this block's units; -1 beyond the step's rows, so it may be read before their number is known.
__device__ __forceinline__ int32_t unit_target(const ReturnParams& params, int unit) {
  const int row = unit / params.exchange.num_output_pieces;
  return row < params.shape.max_attention_rows ? params.tables[params.table.return_target + row] : -1;
}

// One section of the block moves kReturnUnroll pieces: unit first + u * stride each.
__device__ __forceinline__ void send_pieces(const ReturnParams& params, int first, const int32_t (&targets)[kReturnUnroll], uint32_t silent) {
  const int stride = gridDim.x * kSections, thread = threadIdx.x % kPieceThreads;
  const int vectors_per_head = params.shape.v_head_bytes / kVectorBytes;
  const int64_t lse_offset = int64_t{params.exchange.heads_per_piece} * params.shape.v_head_bytes;
  uint4 values[kReturnUnroll];
  float lse[kReturnUnroll];
#pragma unroll
  for (int u = 0; u < kReturnUnroll; ++u) {
    if (!is_peer(targets[u], silent)) continue;
    const RowPiece piece(params, first + u * stride);
    if (thread < piece.num_heads * vectors_per_head) {
      values[u] = load_vector(params.partial + piece.first_head * params.shape.v_head_bytes + thread * kVectorBytes);
    }
    if (thread < piece.num_heads) lse[u] = params.partial_lse[piece.first_head + thread];
  }
#pragma unroll
  for (int u = 0; u < kReturnUnroll; ++u) {
    if (!is_peer(targets[u], silent)) continue;
    const RowPiece piece(params, first + u * stride);
    uint8_t* message = params.peers.base[target_instance(targets[u])] + message_offset(params, target_slot(targets[u]), piece.piece);
    if (thread < piece.num_heads * vectors_per_head) store_vector(message + thread * kVectorBytes, values[u]);
    if (thread < piece.num_heads) reinterpret_cast<float*>(message + lse_offset)[thread] = lse[u];
  }
}

__device__ __forceinline__ void load_targets(const ReturnParams& params, int first, int32_t (&targets)[kReturnUnroll]) {
#pragma unroll
  for (int u = 0; u < kReturnUnroll; ++u) targets[u] = unit_target(params, first + u * gridDim.x * kSections);
}

// `targets` and `flag_target`: of the first pieces and of the first flag, read ahead.
__device__ __forceinline__ void send_partials(const ReturnParams& params, uint64_t epoch, int num_units, uint32_t silent,
                                              int32_t (&targets)[kReturnUnroll], int32_t flag_target) {
  const int stride = gridDim.x * kSections * kReturnUnroll;
  for (int first = blockIdx.x + threadIdx.x / kPieceThreads * gridDim.x; first < num_units; first += stride) {
    send_pieces(params, first, targets, silent);
    load_targets(params, first + stride, targets);
  }
  __syncthreads();  // the block's stores come before every flag below
  for (int item = threadIdx.x; blockIdx.x + item * gridDim.x < num_units; item += kThreads) {
    const int unit = blockIdx.x + item * gridDim.x;
    if (item != threadIdx.x) flag_target = unit_target(params, unit);
    if (!is_peer(flag_target, silent)) continue;
    auto* flags = reinterpret_cast<uint64_t*>(params.peers.base[target_instance(flag_target)] + params.exchange.return_flag);
    const int piece = unit % params.exchange.num_output_pieces;
    store_release_system(flags + int64_t{target_slot(flag_target)} * params.exchange.num_output_pieces + piece, epoch);
  }
}

// What a lane knows of its warp's next span: where partial `lane` of the row comes from.
struct SpanSource {
  int count;
  int32_t source;
};

__device__ __forceinline__ SpanSource load_source(const ReturnParams& params, int unit, int num_units, int lane) {
  SpanSource result{0, 0};
  if (unit >= num_units) return result;
  const int row = unit / (params.exchange.num_output_pieces * kSpansPerPiece);
  result.count = params.tables[params.table.target_count + row];
  if (lane < kMaxPartials) result.source = params.tables[params.table.merge_source + row * kMaxPartials + lane];
  return result;
}

// Waits for partial `lane` of the piece: own ones lie where attention left them, others in the return slots.
__device__ __forceinline__ PartialSpan locate_partial(const ReturnParams& params, const RowPiece& piece, const SpanSource& span,
                                                      uint64_t epoch, int lane) {
  if (lane >= span.count) return PartialSpan{nullptr, nullptr};
  const int instance = target_instance(span.source), slot = target_slot(span.source);
  if (instance == params.rank) {
    const int64_t head = int64_t{slot} * params.shape.num_heads + piece.piece * params.exchange.heads_per_piece;
    return PartialSpan{params.partial + head * params.shape.v_head_bytes, params.partial_lse + head};
  }
  const uint8_t* own = params.peers.base[params.rank];
  const auto* flag = reinterpret_cast<const uint64_t*>(own + params.exchange.return_flag) +
                     int64_t{slot} * params.exchange.num_output_pieces + piece.piece;
  if (!wait_for_flag(flag, epoch, instance, params.state, params.wait_limit_ns)) return PartialSpan{nullptr, nullptr};
  const uint8_t* message = own + message_offset(params, slot, piece.piece);
  return PartialSpan{message, reinterpret_cast<const float*>(message + int64_t{params.exchange.heads_per_piece} * params.shape.v_head_bytes)};
}

__device__ __forceinline__ void merge_home_span(const ReturnParams& params, const SpanSource& span, int unit, uint64_t epoch, int lane) {
  const RowPiece piece(params, unit / kSpansPerPiece);
  const int vectors_per_head = params.shape.v_head_bytes / kVectorBytes, num_vectors = piece.num_heads * vectors_per_head;
  const int first_vector = unit % kSpansPerPiece * kSpanVectors;
  if (first_vector >= num_vectors) return;  // the last piece of a row may be short
  const PartialSpan mine = locate_partial(params, piece, span, epoch, lane);
  __syncwarp();  // each lane's acquire covers what its warp reads next
  const ThreadVectors<kMergeVectors> own(first_vector + lane, 32, num_vectors, vectors_per_head);
  const auto locate = [&](int index) {
    const auto output = __shfl_sync(0xffffffffu, reinterpret_cast<unsigned long long>(mine.output), index);
    const auto lse = __shfl_sync(0xffffffffu, reinterpret_cast<unsigned long long>(mine.lse), index);
    return PartialSpan{reinterpret_cast<const uint8_t*>(output), reinterpret_cast<const float*>(lse)};
  };
  merge_span<kMergeVectors, kMergeBatch>(span.count, locate, own, vectors_per_head,
                                         params.merged + piece.first_head * params.shape.v_head_bytes,
                                         params.merged_lse == nullptr ? nullptr : params.merged_lse + piece.first_head);
}

__device__ __forceinline__ void acknowledge(const ReturnParams& params, uint64_t epoch, uint32_t silent) {
  const int peer = threadIdx.x;
  if (blockIdx.x != 0 || peer >= params.shape.num_instances || peer == params.rank || (silent >> peer & 1u)) return;
  // Attention has ended, so its query rows may be overwritten: the peer's credit for the next exchange. Stream order makes the
  // reads come first; no data is published.
  store_relaxed_system(reinterpret_cast<uint64_t*>(params.peers.base[peer] + params.exchange.acknowledgement) + params.rank, epoch);
}

__device__ __forceinline__ void return_and_merge(const ReturnParams& params) {
  wait_for_predecessor();
  let_successor_start();  // as in dispatch_rows
  const int lane = threadIdx.x & 31, num_warps = gridDim.x * (kThreads / 32);
  const uint64_t epoch = params.state->return_epoch;
  const int num_home_units = params.tables[params.table.header + kNumHomeRows] * params.exchange.num_output_pieces * kSpansPerPiece;
  const int num_sent_units = params.tables[params.table.header + kNumAttentionRows] * params.exchange.num_output_pieces;
  int32_t targets[kReturnUnroll];
  load_targets(params, blockIdx.x + threadIdx.x / kPieceThreads * gridDim.x, targets);
  const int32_t flag_target = unit_target(params, blockIdx.x + threadIdx.x * gridDim.x);
  int unit = blockIdx.x + (threadIdx.x >> 5) * gridDim.x;
  SpanSource span = load_source(params, unit, num_home_units, lane);  // while the partials travel
  if (params.phases & kSend) {
    const uint32_t silent = load_silent_mask(params.state);
    acknowledge(params, epoch, silent);
    send_partials(params, epoch, num_sent_units, silent, targets, flag_target);
  }
  if (params.phases & kReceive) {
    for (; unit < num_home_units; unit += num_warps) {
      const SpanSource next = load_source(params, unit + num_warps, num_home_units, lane);
      merge_home_span(params, span, unit, epoch, lane);
      span = next;
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) params.state->dispatch_epoch = epoch + 1;
  }
}

struct ReturnGroup {
  ReturnParams members[kMaxGrouped];
};

__global__ void __launch_bounds__(kThreads, 1) return_merge_kernel(const __grid_constant__ ReturnParams params) { return_and_merge(params); }

__global__ void __launch_bounds__(kThreads, 1) grouped_return_merge_kernel(const __grid_constant__ ReturnGroup group) {
  return_and_merge(group.members[blockIdx.y]);
}

}  // namespace dcp
