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
  int32_t num_partial_rows;  // of `partial`; the tables say how many of them are the step's
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

// Pieces that one section of the block has read and not yet sent: unit first + u * stride each.
struct PartialBatch {
  uint4 values[kReturnUnroll];
  float lse[kReturnUnroll];
  int32_t targets[kReturnUnroll];
};

// kBlind: requests the data together with the targets, own rows included; otherwise only what has a peer to go to.
template <bool kBlind>
__device__ __forceinline__ void load_pieces(const ReturnParams& params, PartialBatch& batch, int first, int num_units) {
  const int stride = gridDim.x * kSections, thread = threadIdx.x % kPieceThreads;
  const int vectors_per_head = params.shape.v_head_bytes / kVectorBytes;
#pragma unroll
  for (int u = 0; u < kReturnUnroll; ++u) {
    batch.targets[u] = -1;
    if (first + u * stride >= num_units) continue;
    const RowPiece piece(params, first + u * stride);
    batch.targets[u] = params.tables[params.table.return_target + piece.row];
    if (!kBlind && batch.targets[u] < 0) continue;
    if (thread < piece.num_heads * vectors_per_head) {
      batch.values[u] = load_vector(params.partial + piece.first_head * params.shape.v_head_bytes + thread * kVectorBytes);
    }
    if (thread < piece.num_heads) batch.lse[u] = params.partial_lse[piece.first_head + thread];
  }
}

__device__ __forceinline__ void store_pieces(const ReturnParams& params, const PartialBatch& batch, int first, uint32_t silent) {
  const int stride = gridDim.x * kSections, thread = threadIdx.x % kPieceThreads;
  const int vectors_per_head = params.shape.v_head_bytes / kVectorBytes;
  const int64_t lse_offset = int64_t{params.exchange.heads_per_piece} * params.shape.v_head_bytes;
#pragma unroll
  for (int u = 0; u < kReturnUnroll; ++u) {
    if (!is_peer(batch.targets[u], silent)) continue;
    const RowPiece piece(params, first + u * stride);
    uint8_t* peer = params.peers.base[target_instance(batch.targets[u])];
    uint8_t* message = peer + message_offset(params, target_slot(batch.targets[u]), piece.piece);
    if (thread < piece.num_heads * vectors_per_head) store_vector(message + thread * kVectorBytes, batch.values[u]);
    if (thread < piece.num_heads) reinterpret_cast<float*>(message + lse_offset)[thread] = batch.lse[u];
  }
}

// Return target of one of this block's units.
__device__ __forceinline__ int32_t unit_target(const ReturnParams& params, int item, int num_units) {
  const int unit = blockIdx.x + item * gridDim.x;
  return unit < num_units ? params.tables[params.table.return_target + unit / params.exchange.num_output_pieces] : -1;
}

// The first batch is requested before the header is there: rows beyond the step's have target -1.
__device__ __forceinline__ void send_partials(const ReturnParams& params, uint64_t epoch, int num_units, uint32_t silent) {
  const int num_loadable = params.num_partial_rows * params.exchange.num_output_pieces;
  const int stride = gridDim.x * kSections * kReturnUnroll;
  int first = blockIdx.x + threadIdx.x / kPieceThreads * gridDim.x;
  PartialBatch batch;
  load_pieces<true>(params, batch, first, num_loadable);
  int32_t target = unit_target(params, threadIdx.x, num_loadable);
  while (first < num_units) {
    store_pieces(params, batch, first, silent);
    first += stride;
    load_pieces<false>(params, batch, first, num_units);
  }
  __syncthreads();  // the block's stores come before every flag below
  for (int item = threadIdx.x; blockIdx.x + item * gridDim.x < num_units; item += kThreads) {
    if (item != threadIdx.x) target = unit_target(params, item, num_units);
    if (!is_peer(target, silent)) continue;
    const int piece = (blockIdx.x + item * gridDim.x) % params.exchange.num_output_pieces;
    auto* flags = reinterpret_cast<uint64_t*>(params.peers.base[target_instance(target)] + params.exchange.return_flag);
    store_release_system(flags + int64_t{target_slot(target)} * params.exchange.num_output_pieces + piece, epoch);
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
  const int lane = threadIdx.x & 31, num_warps = gridDim.x * (kThreads / 32);
  const uint64_t epoch = params.state->return_epoch;
  const int num_home_units = params.tables[params.table.header + kNumHomeRows] * params.exchange.num_output_pieces * kSpansPerPiece;
  const int num_sent_units = params.tables[params.table.header + kNumAttentionRows] * params.exchange.num_output_pieces;
  int unit = blockIdx.x + (threadIdx.x >> 5) * gridDim.x;
  SpanSource span = load_source(params, unit, num_home_units, lane);  // while the partials travel
  if (params.phases & kSend) {
    const uint32_t silent = load_silent_mask(params.state);
    acknowledge(params, epoch, silent);
    send_partials(params, epoch, num_sent_units, silent);
  }
  if (params.phases & kReceive) {
    for (; unit < num_home_units; unit += num_warps) {
      const SpanSource next = load_source(params, unit + num_warps, num_home_units, lane);
      merge_home_span(params, span, unit, epoch, lane);
      span = next;
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) params.state->dispatch_epoch = epoch + 1;
  }
  __syncthreads();  // as in dispatch_rows
  let_successor_start();
}

struct ReturnGroup {
  ReturnParams members[kMaxGrouped];
};

__global__ void __launch_bounds__(kThreads, 1) return_merge_kernel(const __grid_constant__ ReturnParams params) { return_and_merge(params); }

__global__ void __launch_bounds__(kThreads, 1) grouped_return_merge_kernel(const __grid_constant__ ReturnGroup group) {
  return_and_merge(group.members[blockIdx.y]);
}

}  // namespace dcp
