// Return and merge: partial outputs and their LSE go home; home merges each vector of its rows as soon as it has arrived from every
// shard. The data are their own signal: an LSE carries the number of its exchange, and a return slot holds kNothing until a vector has
// come, so no flag and no fence stands between a store and its reader. The reader puts kNothing back.
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

constexpr int kReturnRegisters = 80;  // kBlocksPerMultiprocessor blocks fit
constexpr int kMergeBatch = 4;        // partials in flight together; one vector of the tables names as many

__device__ __forceinline__ int64_t row_bytes(const ReturnParams& params) {
  return int64_t{params.shape.num_heads} * params.shape.v_head_bytes;
}

__device__ __forceinline__ int vectors_per_row(const ReturnParams& params) {
  return params.shape.num_heads * (params.shape.v_head_bytes / kVectorBytes);
}

// A word that says "nothing" is two NaNs; another pair of NaNs says the same of the numbers.
__device__ __forceinline__ uint32_t something(uint32_t word) { return word == kNothing ? 0x7fffffffu : word; }

__device__ __forceinline__ bool has_come(const uint4& value) {
  return value.x != kNothing && value.y != kNothing && value.z != kNothing && value.w != kNothing;
}

// A piece of an attention row on its way home, as one lane sees it. No piece, own row or padding: target is -1.
struct ReturnPiece {
  int member;
  int piece;
  int row;
  int32_t target;
  const uint8_t* source;  // this lane's first vector
};

template <int kMaxMembers>
__device__ __forceinline__ ReturnPiece find_return(const Group<ReturnParams, kMaxMembers>& group, const WorkList<kMaxMembers>& pieces,
                                                   int item, int lane) {
  ReturnPiece result{0, 0, 0, -1, nullptr};
  if (item >= pieces.size()) return result;
  result.member = pieces.member_of(item);
  const ReturnParams& params = group.members[result.member];
  result.row = item / params.exchange.num_return_pieces;
  result.piece = item - result.row * params.exchange.num_return_pieces;
  result.target = load_table(params.tables + params.table.return_target + result.row);
  result.source = params.partial + result.row * row_bytes(params) + (int64_t{result.piece} * kReturnPieceVectors + lane) * kVectorBytes;
  compute_now(result.source);
  return result;
}

// Heads that begin within a piece: their LSEs travel with it.
struct PieceHeads {
  int first;
  int last;

  __device__ __forceinline__ PieceHeads(const ReturnParams& params, int piece) {
    const int vectors_per_head = params.shape.v_head_bytes / kVectorBytes;
    first = divide_up(piece * kReturnPieceVectors, vectors_per_head);
    last = min(params.shape.num_heads, divide_up((piece + 1) * kReturnPieceVectors, vectors_per_head));
  }
};

__device__ __forceinline__ void send_return(const ReturnParams& params, const ReturnPiece& piece, int lane) {
  if (piece.target < 0) return;
  const int num_left = vectors_per_row(params) - piece.piece * kReturnPieceVectors - lane;
  uint4 values[kReturnVectors];
#pragma unroll
  for (int v = 0; v < kReturnVectors; ++v) {
    if (v * 32 < num_left) values[v] = load_vector(piece.source + v * 32 * kVectorBytes);
  }
  const PieceHeads heads(params, piece.piece);
  const float* own_lses = params.partial_lse + int64_t{piece.row} * params.shape.num_heads;
  float lse = 0.0f;
  if (heads.first + lane < heads.last) lse = __ldcg(own_lses + heads.first + lane);
  const uint64_t epoch = load_epoch(&params.state->return_epoch);
  if (load_silent_mask(params.state) >> target_instance(piece.target) & 1u) return;
  uint8_t* peer = params.peers.base[target_instance(piece.target)];
  const int64_t slot = target_slot(piece.target);
  uint8_t* place = peer + params.exchange.return_slots + slot * row_bytes(params) +
                   (int64_t{piece.piece} * kReturnPieceVectors + lane) * kVectorBytes;
#pragma unroll
  for (int v = 0; v < kReturnVectors; ++v) {
    const uint4& value = values[v];
    if (v * 32 >= num_left) continue;
    store_relaxed_vector(place + v * 32 * kVectorBytes,
                         make_uint4(something(value.x), something(value.y), something(value.z), something(value.w)));
  }
  auto* lses = reinterpret_cast<uint64_t*>(peer + params.exchange.return_lse) + slot * params.shape.num_heads;
#pragma unroll 1
  for (int head = heads.first + lane; head < heads.last; head += 32) {
    if (head >= heads.first + 32) lse = __ldcg(own_lses + head);
    store_relaxed_system(lses + head, epoch << 32 | __float_as_uint(lse));
  }
}

// A piece of a home row to merge, as one lane sees it.
struct MergePiece {
  int member;
  int row;
  int vector;    // this lane's, within the row
  int count;     // partials
  int4 sources;  // of the first ones
};

__device__ __forceinline__ const int32_t* source_table(const ReturnParams& params, int row) {
  return params.tables + params.table.merge_source + row * kMaxPartials;
}

template <int kMaxMembers>
__device__ __forceinline__ MergePiece find_merge(const Group<ReturnParams, kMaxMembers>& group, const WorkList<kMaxMembers>& pieces,
                                                 int item, int lane) {
  MergePiece result{};
  if (item >= pieces.size()) return result;
  result.member = pieces.member_of(item);
  const ReturnParams& params = group.members[result.member];
  result.row = item / params.exchange.num_merge_pieces;
  result.vector = (item - result.row * params.exchange.num_merge_pieces) * kMergePieceVectors + lane;
  result.count = load_table(params.tables + params.table.target_count + result.row);
  result.sources = load_table_vector(source_table(params, result.row));
  return result;
}

// Where a partial of a home row lies: an own one where attention left it, others in the return slots.
__device__ __forceinline__ const uint8_t* partial_place(const ReturnParams& params, int32_t source, int vector) {
  const bool own = target_instance(source) == params.rank;
  const uint8_t* rows = own ? params.partial : params.peers.base[params.rank] + params.exchange.return_slots;
  return rows + uint64_t{static_cast<uint32_t>(target_slot(source) * vectors_per_row(params) + vector)} * kVectorBytes;
}

__device__ __forceinline__ const uint64_t* lse_place(const ReturnParams& params, int32_t source, int head) {
  const auto* lses = reinterpret_cast<const uint64_t*>(params.peers.base[params.rank] + params.exchange.return_lse);
  return lses + static_cast<uint32_t>(target_slot(source) * params.shape.num_heads + head);
}

__device__ __forceinline__ bool is_of(uint64_t lse_word, uint32_t epoch) { return static_cast<uint32_t>(lse_word >> 32) == epoch; }

// Waits for one partial of one vector. Out of line: most have come by the first look.
__device__ __noinline__ bool await_partial(const uint64_t* lse, const uint8_t* data, uint64_t epoch, int source, InstanceState* state,
                                           uint64_t limit_ns) {
  const auto arrived = [=] { return is_of(load_relaxed_system(lse), static_cast<uint32_t>(epoch)) && has_come(load_relaxed_vector(data)); };
  return wait_until(arrived, epoch, source, state, limit_ns);
}

// Adds partials `first` to `first + kMergeBatch - 1` of this lane's vector.
__device__ __forceinline__ void merge_batch(const ReturnParams& params, const MergePiece& piece, int first, int head, uint64_t epoch,
                                            RunningMerge& merge) {
  const int4 batch = first == 0 ? piece.sources : load_table_vector(source_table(params, piece.row) + first);
  const int32_t sources[kMergeBatch] = {batch.x, batch.y, batch.z, batch.w};
  uint4 values[kMergeBatch];
  float lses[kMergeBatch];
  uint32_t pending = 0;  // partials of peers that are still to be taken
#pragma unroll
  for (int b = 0; b < kMergeBatch; ++b) {
    lses[b] = -INFINITY;
    if (first + b >= piece.count) continue;
    if (target_instance(sources[b]) != params.rank) {
      pending |= 1u << b;
      continue;
    }
    values[b] = load_vector(partial_place(params, sources[b], piece.vector));
    lses[b] = __ldcg(params.partial_lse + static_cast<uint32_t>(target_slot(sources[b]) * params.shape.num_heads + head));
  }
  while (pending != 0) {
    uint64_t words[kMergeBatch];
    uint32_t missing = 0;
#pragma unroll
    for (int b = 0; b < kMergeBatch; ++b) {  // these loads travel together
      if (!(pending >> b & 1u)) continue;
      words[b] = load_relaxed_system(lse_place(params, sources[b], head));
      values[b] = load_relaxed_vector(partial_place(params, sources[b], piece.vector));
    }
#pragma unroll
    for (int b = 0; b < kMergeBatch; ++b) {
      if (!(pending >> b & 1u)) continue;
      if (!is_of(words[b], static_cast<uint32_t>(epoch)) || !has_come(values[b])) {
        missing |= 1u << b;
        continue;
      }
      lses[b] = __uint_as_float(static_cast<uint32_t>(words[b]));
      store_vector(const_cast<uint8_t*>(partial_place(params, sources[b], piece.vector)),
                   make_uint4(kNothing, kNothing, kNothing, kNothing));
      pending &= ~(1u << b);
    }
#pragma unroll 1
    for (; missing != 0; missing &= missing - 1) {
      const int b = __ffs(missing) - 1;
      const int32_t source = load_table(source_table(params, piece.row) + first + b);
      if (!await_partial(lse_place(params, source, head), partial_place(params, source, piece.vector), epoch, target_instance(source),
                         params.state, params.wait_limit_ns)) {
        pending &= ~(1u << b);  // silent
      }
    }
  }
  merge.add(values, lses);
}

__device__ __forceinline__ void merge_vector(const ReturnParams& params, const MergePiece& piece) {
  const int vectors_per_head = params.shape.v_head_bytes / kVectorBytes, head = piece.vector / vectors_per_head;
  if (head >= params.shape.num_heads) return;  // the last piece of a row may be short
  const uint64_t epoch = load_epoch(&params.state->return_epoch);
  RunningMerge merge;
  merge_batch(params, piece, 0, head, epoch, merge);
#pragma unroll 1
  for (int first = kMergeBatch; first < piece.count; first += kMergeBatch) merge_batch(params, piece, first, head, epoch, merge);
  store_vector(params.merged + piece.row * row_bytes(params) + int64_t{piece.vector} * kVectorBytes, merge.output());
  if (params.merged_lse != nullptr && piece.vector == head * vectors_per_head) {
    params.merged_lse[int64_t{piece.row} * params.shape.num_heads + head] = merge.lse();
  }
}

// Attention has ended, so its query rows may be overwritten: each peer's credit for the next exchange. Stream order makes the reads
// come first; no data is published.
__device__ __forceinline__ void acknowledge(const ReturnParams& params, int peer) {
  if (!(params.phases & kSend) || peer >= params.shape.num_instances || peer == params.rank) return;
  if (load_silent_mask(params.state) >> peer & 1u) return;
  store_relaxed_system(reinterpret_cast<uint64_t*>(params.peers.base[peer] + params.exchange.acknowledgement) + params.rank,
                       load_epoch(&params.state->return_epoch));
}

template <int kMaxMembers>
__device__ __forceinline__ void return_and_merge(const Group<ReturnParams, kMaxMembers>& group) {
  const int lane = threadIdx.x & 31, num_warps = gridDim.x * (blockDim.x >> 5), size = kMaxMembers == 1 ? 1 : group.size;
  const int warp = (threadIdx.x >> 5) * gridDim.x + blockIdx.x;
  int num_pieces = 0, num_merges = 0;
  if (lane < size) {
    const ReturnParams& params = group.members[kMaxMembers == 1 ? 0 : lane];
    const int home_rows = table_header(params.tables, params.table, kNumHomeRows);
    const int attention_rows = table_header(params.tables, params.table, kNumAttentionRows);
    num_pieces = params.phases & kSend ? attention_rows * params.exchange.num_return_pieces : 0;
    num_merges = params.phases & kReceive ? home_rows * params.exchange.num_merge_pieces : 0;
  }
  const WorkList<kMaxMembers> pieces(num_pieces), merges(num_merges);
  ReturnPiece sent = find_return(group, pieces, warp, lane);
  MergePiece merged = find_merge(group, merges, warp, lane);
  wait_for_predecessor();
  if (group.members[0].phases & kAnnounce) let_successor_start();  // as in dispatch_rows
  for (int member = num_warps - 1 - warp; member < size; member += num_warps) acknowledge(group.members[member], lane);
  for (int item = warp; item < pieces.size(); item += num_warps) {
    send_return(group.members[sent.member], sent, lane);
    sent = find_return(group, pieces, item + num_warps, lane);
  }
  for (int item = warp; item < merges.size(); item += num_warps) {
    merge_vector(group.members[merged.member], merged);
    merged = find_merge(group, merges, item + num_warps, lane);
  }
  if (blockIdx.x == 0 && threadIdx.x < size) {
    const ReturnParams& params = group.members[kMaxMembers == 1 ? 0 : threadIdx.x];
    if (params.phases & kReceive) params.state->dispatch_epoch = load_epoch(&params.state->return_epoch) + 1;
  }
}

template <int kMaxMembers>
__global__ void __maxnreg__(kReturnRegisters) return_merge_kernel(const __grid_constant__ Group<ReturnParams, kMaxMembers> group) {
  return_and_merge(group);
}

}  // namespace dcp
