// Dispatch: query rows, and K/V rows whose tail is elsewhere, go straight into the peers' buffers; the receiving half waits for
// its rows and puts arriving K/V into the local pool, so that attention may start when the kernel ends.
// Warps work alone: each moves a piece of a row and raises the piece's flag at every shard of the row.
#pragma once

#include <cstdint>

#include "memory.cuh"

namespace dcp {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kMaxGrouped = 8;  // instances in one launch
constexpr int kDispatchRegisters = 64;  // kBlocksPerMultiprocessor blocks fit

// kAnnounce is no phase: the kernel lets its successor start early. It must not where a successor may be launched early without waiting.
enum ExchangePhase : int { kSend = 1, kReceive = 2, kAnnounce = 4 };

// A row as heads of up to two parts that lie in different tensors (MLA: latent and rotary), all in units of 16 bytes.
// One part: num_vectors[1] is 0. Strides in bytes.
struct RowSource {
  const uint8_t* base[2];
  int64_t row_stride[2];
  int64_t head_stride[2];
  int32_t num_vectors[2];  // of one head
};

// Where arriving K/V go: part i of slot n at base[i] + n * stride[i].
struct PoolTarget {
  uint8_t* base[2];
  int64_t stride[2];
};

struct DispatchParams {
  PeerPointers peers;
  InstanceState* state;
  const int32_t* tables;
  ExchangeShape shape;
  ExchangeLayout exchange;
  TableLayout table;
  RowSource query;
  RowSource key_value;  // one "head" per row; base[0] null: no K/V in this exchange
  PoolTarget pool;
  uint64_t wait_limit_ns;
  int32_t rank;
  int32_t phases;
};

__device__ __forceinline__ int32_t table_header(const int32_t* tables, const TableLayout& table, HeaderField field) {
  return load_table(tables + table.header + field);
}

__device__ __forceinline__ const uint8_t* vector_address(const RowSource& source, int row, int index) {
  const int per_head = source.num_vectors[0] + source.num_vectors[1];
  const int head = index / per_head, within = index - head * per_head;
  const int part = within < source.num_vectors[0] ? 0 : 1;
  const int offset = part == 0 ? within : within - source.num_vectors[0];
  return source.base[part] + row * source.row_stride[part] + head * source.head_stride[part] + offset * kVectorBytes;
}

template <bool kTwoParts>
__device__ __forceinline__ const uint8_t* query_address(const DispatchParams& params, int row, int index) {
  if constexpr (kTwoParts) return vector_address(params.query, row, index);
  return params.query.base[0] + row * params.query.row_stride[0] + int64_t{index} * kVectorBytes;
}

// A piece of a query row as one lane sees it.
struct QueryPiece {
  int member;
  int piece;
  int count;                           // shards of the row
  int32_t target;                      // of the row's shard number `lane`
  const uint8_t* source[kQueryVectors];  // null beyond the row
};

template <bool kTwoParts, int kMaxMembers>
__device__ __forceinline__ QueryPiece find_piece(const Group<DispatchParams, kMaxMembers>& group, const WorkList<kMaxMembers>& pieces,
                                                 int item, int lane) {
  QueryPiece result{};
  if (item >= pieces.size()) return result;
  result.member = pieces.member_of(item);
  const DispatchParams& params = group.members[result.member];
  const int row = item / params.exchange.num_query_pieces, num_vectors = params.shape.query_row_bytes / kVectorBytes;
  result.piece = item - row * params.exchange.num_query_pieces;
  result.count = load_table(params.tables + params.table.target_count + row);
  if (lane < kMaxPartials) result.target = load_table(params.tables + params.table.send_target + row * kMaxPartials + lane);
#pragma unroll
  for (int v = 0; v < kQueryVectors; ++v) {
    const int index = result.piece * kQueryPieceVectors + v * 32 + lane;
    result.source[v] = index < num_vectors ? query_address<kTwoParts>(params, row, index) : nullptr;
    compute_now(result.source[v]);
  }
  return result;
}

// Whether this instance may write to `instance` in exchange `epoch`: a peer's buffer is free once it has acknowledged the exchange
// before. Nothing is read behind an acknowledgement, so the first look needs no acquire.
__device__ __forceinline__ bool is_writable(const DispatchParams& params, int instance, uint64_t epoch) {
  const auto* flag = reinterpret_cast<const uint64_t*>(params.peers.base[params.rank] + params.exchange.acknowledgement) + instance;
  const uint64_t acknowledged = load_relaxed_system(flag);
  const uint32_t silent = load_silent_mask(params.state);
  if (instance == params.rank) return true;
  if (silent >> instance & 1u) return false;
  return acknowledged >= epoch - 1 || wait_for_flag(flag, epoch - 1, instance, params.state, params.wait_limit_ns);
}

__device__ __forceinline__ void send_piece(const DispatchParams& params, const QueryPiece& piece, int lane) {
  const bool has_target = lane < piece.count;
  const int instance = has_target ? target_instance(piece.target) : params.rank;
  // All of these travel together.
  uint4 values[kQueryVectors];
#pragma unroll
  for (int v = 0; v < kQueryVectors; ++v) {
    if (piece.source[v] != nullptr) values[v] = load_vector(piece.source[v]);
  }
  const uint64_t epoch = load_epoch(&params.state->dispatch_epoch);
  const bool writable = has_target && is_writable(params, instance, epoch);
  const int32_t usable_target = writable ? piece.target : -1;
  const int64_t offset = params.exchange.query_rows + (int64_t{piece.piece} * kQueryPieceVectors + lane) * kVectorBytes;
  for (int j = 0; j < piece.count; ++j) {
    const int32_t target = __shfl_sync(kAllLanes, usable_target, j);
    if (target < 0) continue;
    uint8_t* place = params.peers.base[target_instance(target)] + int64_t{target_slot(target)} * params.shape.query_row_bytes + offset;
#pragma unroll
    for (int v = 0; v < kQueryVectors; ++v) {
      if (piece.source[v] != nullptr) store_vector(place + v * 32 * kVectorBytes, values[v]);
    }
  }
  __syncwarp();  // the warp's stores come before each lane's flag
  if (writable && instance != params.rank) {
    auto* flags = reinterpret_cast<uint64_t*>(params.peers.base[instance] + params.exchange.query_flag);
    store_release_system(flags + int64_t{target_slot(piece.target)} * params.exchange.num_query_pieces + piece.piece, epoch);
  }
}

__device__ __forceinline__ void send_key_value(const DispatchParams& params, int row, int lane) {
  const int32_t target = load_table(params.tables + params.table.kv_target + row);
  if (target < 0) return;
  const int num_vectors = params.shape.kv_row_bytes / kVectorBytes, instance = target_instance(target);
  const uint64_t epoch = load_epoch(&params.state->dispatch_epoch);
  if (!__all_sync(kAllLanes, is_writable(params, instance, epoch))) return;
  uint8_t* peer = params.peers.base[instance];
  uint8_t* slot = peer + params.exchange.kv_rows + int64_t{target_slot(target)} * params.shape.kv_row_bytes;
  for (int index = lane; index < num_vectors; index += 32) {
    store_vector(slot + index * kVectorBytes, load_vector(vector_address(params.key_value, row, index)));
  }
  __syncwarp();
  if (lane == 0) store_release_system(reinterpret_cast<uint64_t*>(peer + params.exchange.kv_flag) + target_slot(target), epoch);
}

__device__ __forceinline__ void receive_key_value(const DispatchParams& params, int row, int lane) {
  const uint8_t* own = params.peers.base[params.rank];
  const int num_vectors = params.shape.kv_row_bytes / kVectorBytes, first_part = params.key_value.num_vectors[0];
  const auto* flag = reinterpret_cast<const uint64_t*>(own + params.exchange.kv_flag) + row;
  const int source_instance = load_table(params.tables + params.table.kv_source + row);
  const int64_t slot = load_table(params.tables + params.table.kv_slot + row);
  const uint64_t epoch = load_epoch(&params.state->dispatch_epoch);
  bool arrived = false;
  if (lane == 0) arrived = wait_for_flag(flag, epoch, source_instance, params.state, params.wait_limit_ns);
  if (!__shfl_sync(kAllLanes, arrived, 0)) return;
  __syncwarp();
  const uint8_t* source = own + params.exchange.kv_rows + int64_t{row} * params.shape.kv_row_bytes;
  for (int index = lane; index < num_vectors; index += 32) {
    const int part = index < first_part ? 0 : 1, within = part == 0 ? index : index - first_part;
    store_vector(params.pool.base[part] + slot * params.pool.stride[part] + within * kVectorBytes,
                 load_vector(source + index * kVectorBytes));
  }
}

// One lane's flag among those that this instance waits for, and who raises it (-1: an own row, or no row).
struct QueryFlag {
  int member;
  int index;
  int32_t source;
};

template <int kMaxMembers>
__device__ __forceinline__ QueryFlag find_flag(const Group<DispatchParams, kMaxMembers>& group, const WorkList<kMaxMembers>& flags,
                                               int item, int lane) {
  QueryFlag result{0, 0, -1};
  if (item >= flags.size()) return result;
  result.member = flags.member_of(item);
  const DispatchParams& params = group.members[result.member];
  result.index = item * 32 + lane;
  const int row = result.index / params.exchange.num_query_pieces;
  if (row < params.shape.max_attention_rows) result.source = load_table(params.tables + params.table.return_target + row);
  return result;
}

__device__ __forceinline__ void receive_query(const DispatchParams& params, const QueryFlag& flag) {
  if (flag.source < 0) return;
  const auto* flags = reinterpret_cast<const uint64_t*>(params.peers.base[params.rank] + params.exchange.query_flag);
  const uint64_t epoch = load_epoch(&params.state->dispatch_epoch);
  wait_for_flag(flags + flag.index, epoch, target_instance(flag.source), params.state, params.wait_limit_ns);
}

template <bool kTwoParts, int kMaxMembers>
__device__ __forceinline__ void dispatch_rows(const Group<DispatchParams, kMaxMembers>& group) {
  const int lane = threadIdx.x & 31, num_warps = gridDim.x * (blockDim.x >> 5);
  const int warp = (threadIdx.x >> 5) * gridDim.x + blockIdx.x, from_end = num_warps - 1 - warp;  // spread over blocks first
  // Work is dealt from the tables alone, ahead of the predecessor's end: pieces from the first warp on, the rest from the last.
  int num_pieces = 0, num_flags = 0, num_kv_sends = 0, num_kv_receives = 0;
  if (lane < (kMaxMembers == 1 ? 1 : group.size)) {
    const DispatchParams& params = group.members[kMaxMembers == 1 ? 0 : lane];
    const int home_rows = table_header(params.tables, params.table, kNumHomeRows);
    const int attention_rows = table_header(params.tables, params.table, kNumAttentionRows);
    const int kv_rows = table_header(params.tables, params.table, kNumKvRows);
    const bool sends = params.phases & kSend, receives = params.phases & kReceive, moves_kv = params.key_value.base[0] != nullptr;
    num_pieces = sends ? home_rows * params.exchange.num_query_pieces : 0;
    num_kv_sends = sends && moves_kv ? home_rows : 0;
    num_flags = receives ? divide_up(attention_rows * params.exchange.num_query_pieces, 32) : 0;
    num_kv_receives = receives && moves_kv ? kv_rows : 0;
  }
  const WorkList<kMaxMembers> pieces(num_pieces), flags(num_flags), kv_sends(num_kv_sends), kv_receives(num_kv_receives);
  QueryPiece piece = find_piece<kTwoParts>(group, pieces, warp, lane);
  QueryFlag flag = find_flag(group, flags, from_end, lane);
  wait_for_predecessor();
  // Takes effect once every block runs, so a successor never takes the place of a block that is waited for.
  if (group.members[0].phases & kAnnounce) let_successor_start();
  for (int item = from_end; item < kv_sends.size(); item += num_warps) {
    int row = item;
    const int member = kv_sends.member_of(row);
    send_key_value(group.members[member], row, lane);
  }
  for (int item = warp; item < pieces.size(); item += num_warps) {
    send_piece(group.members[piece.member], piece, lane);
    piece = find_piece<kTwoParts>(group, pieces, item + num_warps, lane);
  }
  for (int item = from_end; item < kv_receives.size(); item += num_warps) {
    int row = item;
    const int member = kv_receives.member_of(row);
    receive_key_value(group.members[member], row, lane);
  }
  for (int item = from_end; item < flags.size(); item += num_warps) {
    receive_query(group.members[flag.member], flag);
    flag = find_flag(group, flags, item + num_warps, lane);
  }
  if (blockIdx.x == 0 && threadIdx.x < (kMaxMembers == 1 ? 1 : group.size)) {
    const DispatchParams& params = group.members[kMaxMembers == 1 ? 0 : threadIdx.x];
    if (params.phases & kReceive) params.state->return_epoch = load_epoch(&params.state->dispatch_epoch);
  }
}

template <bool kTwoParts, int kMaxMembers>
__global__ void __maxnreg__(kDispatchRegisters) dispatch_kernel(const __grid_constant__ Group<DispatchParams, kMaxMembers> group) {
  dispatch_rows<kTwoParts>(group);
}

}  // namespace dcp
