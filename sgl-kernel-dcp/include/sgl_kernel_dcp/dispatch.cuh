// Dispatch: query rows, and K/V rows whose tail is elsewhere, go straight into the peers' buffers; the receiving half waits for
// its rows and puts arriving K/V into the local pool, so that attention may start when the kernel ends.
#pragma once

#include <cstdint>

#include "memory.cuh"

namespace dcp {

constexpr int kWarps = kThreads / 32;
constexpr int kUnroll = 3;  // pieces that a section of a block keeps in flight

constexpr int kMaxGrouped = 8;  // instances in one launch

enum ExchangePhase : int { kSend = 1, kReceive = 2 };

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

__device__ __forceinline__ const uint8_t* vector_address(const RowSource& source, int row, int index) {
  const int per_head = source.num_vectors[0] + source.num_vectors[1];
  const int head = index / per_head, within = index - head * per_head;
  const int part = within < source.num_vectors[0] ? 0 : 1;
  const int offset = part == 0 ? within : within - source.num_vectors[0];
  return source.base[part] + row * source.row_stride[part] + head * source.head_stride[part] + offset * kVectorBytes;
}

// Peers that this exchange writes to. A peer's buffer is free once it has acknowledged the exchange before this one.
__device__ __forceinline__ uint32_t writable_peers(const DispatchParams& params, uint64_t epoch, uint32_t send_peers) {
  __shared__ uint32_t writable;
  if (threadIdx.x < 32) {
    const int peer = threadIdx.x;
    bool free = peer == params.rank;
    if (peer < params.shape.num_instances && (send_peers >> peer & 1u) && !(load_silent_mask(params.state) >> peer & 1u)) {
      const auto* acknowledgement = reinterpret_cast<const uint64_t*>(params.peers.base[params.rank] + params.exchange.acknowledgement);
      free = wait_for_flag(acknowledgement + peer, epoch - 1, peer, params.state, params.wait_limit_ns);
    }
    const uint32_t mask = __ballot_sync(0xffffffffu, free);
    if (peer == 0) writable = mask;
  }
  __syncthreads();
  return writable;
}

__device__ __forceinline__ void send_key_values(const DispatchParams& params, uint64_t epoch, int num_rows, uint32_t writable) {
  const int lane = threadIdx.x & 31, warp = blockIdx.x * kWarps + (threadIdx.x >> 5);
  const int num_vectors = params.shape.kv_row_bytes / kVectorBytes;
  for (int row = warp; row < num_rows; row += gridDim.x * kWarps) {
    const int32_t target = params.tables[params.table.kv_target + row];
    if (target < 0 || !(writable >> target_instance(target) & 1u)) continue;
    uint8_t* peer = params.peers.base[target_instance(target)];
    uint8_t* slot = peer + params.exchange.kv_rows + int64_t{target_slot(target)} * params.shape.kv_row_bytes;
    for (int index = lane; index < num_vectors; index += 32) {
      store_vector(slot + index * kVectorBytes, load_vector(vector_address(params.key_value, row, index)));
    }
    __syncwarp();
    if (lane == 0) store_release_system(reinterpret_cast<uint64_t*>(peer + params.exchange.kv_flag) + target_slot(target), epoch);
  }
}

template <bool kTwoParts>
__device__ __forceinline__ uint4 load_query(const DispatchParams& params, int row, int index) {
  if constexpr (kTwoParts) return load_vector(vector_address(params.query, row, index));
  return load_vector(params.query.base[0] + row * params.query.row_stride[0] + int64_t{index} * kVectorBytes);
}

// Pieces that one section of the block has read and not yet stored: unit first + u * stride each.
struct QueryBatch {
  uint4 values[kUnroll];
  int count[kUnroll];     // targets of the row
  int4 targets[kUnroll];  // the first four, requested together with the data
};

template <bool kTwoParts>
__device__ __forceinline__ void load_queries(const DispatchParams& params, QueryBatch& batch, int first, int num_units) {
  const int pieces = params.exchange.num_query_pieces, stride = gridDim.x * kSections;
  const int num_vectors = params.shape.query_row_bytes / kVectorBytes;
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int unit = first + u * stride, row = unit / pieces, index = (unit - row * pieces) * kPieceThreads + threadIdx.x % kPieceThreads;
    batch.count[u] = 0;
    if (unit >= num_units || index >= num_vectors) continue;
    batch.values[u] = load_query<kTwoParts>(params, row, index);
    batch.count[u] = params.tables[params.table.target_count + row];
    batch.targets[u] = *reinterpret_cast<const int4*>(params.tables + params.table.send_target + row * kMaxPartials);
  }
}

__device__ __forceinline__ void store_queries(const DispatchParams& params, const QueryBatch& batch, int first, uint32_t writable) {
  const int pieces = params.exchange.num_query_pieces, stride = gridDim.x * kSections;
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int unit = first + u * stride, row = unit / pieces, index = (unit - row * pieces) * kPieceThreads + threadIdx.x % kPieceThreads;
    for (int j = 0; j < batch.count[u]; ++j) {
      const int32_t target = j == 0   ? batch.targets[u].x
                             : j == 1 ? batch.targets[u].y
                             : j == 2 ? batch.targets[u].z
                             : j == 3 ? batch.targets[u].w
                                      : params.tables[params.table.send_target + row * kMaxPartials + j];
      if (!(writable >> target_instance(target) & 1u)) continue;
      uint8_t* rows = params.peers.base[target_instance(target)] + params.exchange.query_rows;
      store_vector(rows + int64_t{target_slot(target)} * params.shape.query_row_bytes + int64_t{index} * kVectorBytes, batch.values[u]);
    }
  }
}

// Flag of one (unit of this block, target of its row); item counts both. Negative: nothing to flag.
__device__ __forceinline__ int32_t flag_target(const DispatchParams& params, int item, int num_units) {
  const int unit = blockIdx.x + item / kMaxPartials * gridDim.x, row = unit / params.exchange.num_query_pieces, j = item % kMaxPartials;
  if (unit >= num_units) return -1;
  const int32_t target = params.tables[params.table.send_target + row * kMaxPartials + j];
  return j < params.tables[params.table.target_count + row] && target_instance(target) != params.rank ? target : -1;
}

// `first_target` is the flag of item threadIdx.x, loaded ahead.
__device__ __forceinline__ void flag_queries(const DispatchParams& params, uint64_t epoch, int num_units, uint32_t writable,
                                             int32_t first_target) {
  const int pieces = params.exchange.num_query_pieces;
  int32_t target = first_target;
  for (int item = threadIdx.x; blockIdx.x + item / kMaxPartials * gridDim.x < num_units; item += kThreads) {
    if (item != threadIdx.x) target = flag_target(params, item, num_units);
    if (target < 0 || !(writable >> target_instance(target) & 1u)) continue;
    auto* flags = reinterpret_cast<uint64_t*>(params.peers.base[target_instance(target)] + params.exchange.query_flag);
    const int piece = (blockIdx.x + item / kMaxPartials * gridDim.x) % pieces;
    store_release_system(flags + int64_t{target_slot(target)} * pieces + piece, epoch);
  }
}

template <bool kTwoParts>
__device__ __forceinline__ void send_rows(const DispatchParams& params, uint64_t epoch) {
  const int num_rows = params.tables[params.table.header + kNumHomeRows];
  const uint32_t send_peers = static_cast<uint32_t>(params.tables[params.table.header + kSendPeers]);
  const int num_units = num_rows * params.exchange.num_query_pieces;
  int first = blockIdx.x + threadIdx.x / kPieceThreads * gridDim.x;
  QueryBatch batch;
  load_queries<kTwoParts>(params, batch, first, num_units);  // needs no credit, so it runs ahead of the wait
  const int32_t first_target = flag_target(params, threadIdx.x, num_units);
  const uint32_t writable = writable_peers(params, epoch, send_peers);
  if (params.key_value.base[0] != nullptr) send_key_values(params, epoch, num_rows, writable);
  while (first < num_units) {
    store_queries(params, batch, first, writable);
    first += gridDim.x * kSections * kUnroll;
    load_queries<kTwoParts>(params, batch, first, num_units);
  }
  __syncthreads();  // the block's stores come before every flag
  flag_queries(params, epoch, num_units, writable, first_target);
}

__device__ __forceinline__ void receive_key_values(const DispatchParams& params, uint64_t epoch) {
  const int lane = threadIdx.x & 31, warp = blockIdx.x * kWarps + (threadIdx.x >> 5);
  const int num_rows = params.tables[params.table.header + kNumKvRows];
  const int num_vectors = params.shape.kv_row_bytes / kVectorBytes, first_part = params.key_value.num_vectors[0];
  const uint8_t* own = params.peers.base[params.rank];
  for (int row = warp; row < num_rows; row += gridDim.x * kWarps) {
    const auto* flag = reinterpret_cast<const uint64_t*>(own + params.exchange.kv_flag) + row;
    bool arrived = false;
    if (lane == 0) arrived = wait_for_flag(flag, epoch, params.tables[params.table.kv_source + row], params.state, params.wait_limit_ns);
    if (!__shfl_sync(0xffffffffu, arrived, 0)) continue;
    __syncwarp();
    const int64_t slot = params.tables[params.table.kv_slot + row];
    const uint8_t* source = own + params.exchange.kv_rows + int64_t{row} * params.shape.kv_row_bytes;
    for (int index = lane; index < num_vectors; index += 32) {
      const int part = index < first_part ? 0 : 1, within = part == 0 ? index : index - first_part;
      store_vector(params.pool.base[part] + slot * params.pool.stride[part] + within * kVectorBytes,
                   load_vector(source + index * kVectorBytes));
    }
  }
}

__device__ __forceinline__ void receive_queries(const DispatchParams& params, uint64_t epoch) {
  const int pieces = params.exchange.num_query_pieces;
  const int num_flags = params.tables[params.table.header + kNumAttentionRows] * pieces;
  const auto* flags = reinterpret_cast<const uint64_t*>(params.peers.base[params.rank] + params.exchange.query_flag);
  for (int index = blockIdx.x * kThreads + threadIdx.x; index < num_flags; index += gridDim.x * kThreads) {
    const int32_t target = params.tables[params.table.return_target + index / pieces];
    if (target < 0) continue;  // an own row: this kernel wrote it
    wait_for_flag(flags + index, epoch, target_instance(target), params.state, params.wait_limit_ns);
  }
}

template <bool kTwoParts>
__device__ __forceinline__ void dispatch_rows(const DispatchParams& params) {
  wait_for_predecessor();
  let_successor_start();  // takes effect once every block runs, so a successor never takes the place of a block that is waited for
  const uint64_t epoch = params.state->dispatch_epoch;
  if (params.phases & kSend) send_rows<kTwoParts>(params, epoch);
  if (params.phases & kReceive) {
    if (params.key_value.base[0] != nullptr) receive_key_values(params, epoch);
    receive_queries(params, epoch);
    if (blockIdx.x == 0 && threadIdx.x == 0) params.state->return_epoch = epoch;
  }
}

// Instances of one process on one GPU may share a launch: blockIdx.y is the instance.
struct DispatchGroup {
  DispatchParams members[kMaxGrouped];
};

template <bool kTwoParts>
__global__ void __launch_bounds__(kThreads, 1) dispatch_kernel(const __grid_constant__ DispatchParams params) {
  dispatch_rows<kTwoParts>(params);
}

__global__ void __launch_bounds__(kThreads, 1) grouped_dispatch_kernel(const __grid_constant__ DispatchGroup group) {
  dispatch_rows<true>(group.members[blockIdx.y]);
}

}  // namespace dcp
