// One kernel per step: from the host's message (route words of the group, one line per attention row) to every table the layers
// read. Block 0 builds the routes; the other blocks build the page lists, each from its own scan, so no block waits for another.
#pragma once

#include <cstdint>

#include "layout.cuh"

namespace dcp {

constexpr int kTableThreads = 1024;
constexpr int kTableWarps = kTableThreads / 32;
constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kFromTokenTable = -2;  // new_page = kFromTokenTable - line of the token table

struct TablesParams {
  int32_t* tables;          // TableLayout
  int32_t* resident_pages;  // [num_entries, max_pages_per_row], kept over steps
  const int32_t* token_table;  // [token_lines, token_width]: token ids of the requests whose pages the host does not know
  int32_t token_lines;
  int64_t token_width;
  int32_t pool_pages;  // pages below this one exist
  TableShape shape;
  TableLayout layout;
  int32_t rank;
};

// Lanes 0-15 return how many rows of this warp's 32 words have shard `lane`; lanes 16-31 how many have tail `lane - 16`.
__device__ __forceinline__ int count_by_instance(uint32_t word, int num_instances, int lane) {
  const uint32_t tail = word >> kRouteTailShift & kRouteTailMask;
  int mine = 0;
  for (int instance = 0; instance < num_instances; ++instance) {
    const int shards = __popc(__ballot_sync(kFullWarp, word >> instance & 1u));
    const int tails = __popc(__ballot_sync(kFullWarp, tail == instance + 1u));
    if (lane == instance) mine = shards;
    if (lane == instance + 16) mine = tails;
  }
  return mine;
}

// Exclusive prefix of `value` over the block; `total` gets the sum. `warp_sums` holds kTableWarps + 1 words.
__device__ __forceinline__ int block_exclusive_scan(int value, int* warp_sums, int& total) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  int inclusive = value;
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(kFullWarp, inclusive, step);
    if (lane >= step) inclusive += other;
  }
  if (lane == 31) warp_sums[warp] = inclusive;
  __syncthreads();
  if (warp == 0) {
    const int own = warp_sums[lane];
    int sums = own;
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(kFullWarp, sums, step);
      if (lane >= step) sums += other;
    }
    warp_sums[lane] = sums - own;
    if (lane == 31) warp_sums[kTableWarps] = sums;
  }
  __syncthreads();
  const int result = warp_sums[warp] + inclusive - value;
  total = warp_sums[kTableWarps];
  __syncthreads();
  return result;
}

struct RouteScratch {
  int count[kMaxInstances][32];             // [home][shard, or 16 + tail]
  int chunk_slot[kMaxHomeRows / 32][32];    // own rows: first slot of a chunk of 32 rows on each shard, or 16 + tail
  int send_base[32];                        // slot of this home's first row on each shard
  int return_base[kMaxInstances];           // slot here of the first partial from each shard
  int receive_base[kMaxInstances + 1];      // first attention row of each remote home; the last one: of this home's own rows, behind all others
  int return_base_at_home[kMaxInstances];   // slot at each home of the first partial from here
  int warp_sums[kTableWarps + 1];
};

__device__ __forceinline__ void count_routes(const TablesParams& params, RouteScratch& scratch) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int num_instances = params.shape.num_instances;
  const int32_t* counts = params.tables + params.layout.input_counts;
  const int32_t* routes = params.tables + params.layout.input_routes;
  if (threadIdx.x < kMaxInstances * 32) (&scratch.count[0][0])[threadIdx.x] = 0;
  __syncthreads();
  const int num_chunks = static_cast<int>(divide_up(params.shape.max_home_rows, 32));
  for (int item = warp; item < num_instances * num_chunks; item += kTableWarps) {
    const int home = item / num_chunks, chunk = item % num_chunks, row = chunk * 32 + lane;
    const int num_rows = counts[home];
    if (chunk * 32 >= num_rows) continue;
    const uint32_t word = row < num_rows ? routes[home * params.shape.max_home_rows + row] : 0;
    const int mine = count_by_instance(word, num_instances, lane);
    if (mine != 0) atomicAdd(&scratch.count[home][lane], mine);
    if (home == params.rank) scratch.chunk_slot[chunk][lane] = mine;
  }
  __syncthreads();
}

__device__ __forceinline__ void place_routes(const TablesParams& params, RouteScratch& scratch, int num_own_chunks) {
  const int thread = threadIdx.x, rank = params.rank, num_instances = params.shape.num_instances;
  if (thread < 32) {
    // A shard attends its own rows behind all others: rows that a home attends alone move no slot elsewhere.
    const int end = thread == rank ? num_instances : rank;
    int slot = 0;
    for (int home = 0; home < end; ++home) slot += home == thread ? 0 : scratch.count[home][thread];
    scratch.send_base[thread] = slot;
    for (int chunk = 0; chunk < num_own_chunks; ++chunk) {
      const int rows = scratch.chunk_slot[chunk][thread];
      scratch.chunk_slot[chunk][thread] = slot;
      slot += rows;
    }
  } else if (thread < 32 + num_instances) {
    int slot = 0;
    for (int shard = 0; shard < thread - 32; ++shard) slot += shard == rank ? 0 : scratch.count[rank][shard];
    scratch.return_base[thread - 32] = slot;
  } else if (thread >= 64 && thread <= 64 + num_instances) {
    int row = 0;
    for (int home = 0; home < thread - 64; ++home) row += home == rank ? 0 : scratch.count[home][rank];
    scratch.receive_base[thread - 64] = row;
  } else if (thread >= 96 && thread < 96 + num_instances) {
    const int home = thread - 96;
    int slot = 0;
    for (int shard = 0; shard < rank; ++shard) slot += shard == home ? 0 : scratch.count[home][shard];
    scratch.return_base_at_home[home] = slot;
  }
  __syncthreads();
}

__device__ __forceinline__ void write_home_rows(const TablesParams& params, const RouteScratch& scratch, int num_rows) {
  const int lane = threadIdx.x & 31, chunk = threadIdx.x >> 5, row = chunk * 32 + lane, rank = params.rank;
  if (chunk * 32 >= num_rows) return;
  const uint32_t word = row < num_rows ? params.tables[params.layout.input_routes + int64_t{rank} * params.shape.max_home_rows + row] : 0;
  const uint32_t tail = word >> kRouteTailShift & kRouteTailMask, below = (1u << lane) - 1;
  int32_t* send_target = params.tables + params.layout.send_target + row * kMaxPartials;
  int32_t* merge_source = params.tables + params.layout.merge_source + row * kMaxPartials;
  int num_targets = 0, kv_target = -1;
  for (int shard = 0; shard < params.shape.num_instances; ++shard) {
    const unsigned with_shard = __ballot_sync(kFullWarp, word >> shard & 1u);
    const unsigned with_tail = __ballot_sync(kFullWarp, tail == shard + 1u);
    if (word >> shard & 1u) {
      const int slot = scratch.chunk_slot[chunk][shard] + __popc(with_shard & below);
      const int source = shard == rank ? slot : scratch.return_base[shard] + slot - scratch.send_base[shard];
      send_target[num_targets] = shard << kTargetSlotBits | slot;
      merge_source[num_targets] = shard << kTargetSlotBits | source;
      ++num_targets;
    }
    if (tail == shard + 1u) kv_target = shard << kTargetSlotBits | (scratch.chunk_slot[chunk][shard + 16] + __popc(with_tail & below));
  }
  if (row < num_rows) {
    params.tables[params.layout.target_count + row] = num_targets;
    params.tables[params.layout.kv_target + row] = kv_target;
  }
}

// Returns the number of K/V rows that arrive: those of remote homes whose line names a slot, in the order of the rows.
__device__ __forceinline__ int write_attention_rows(const TablesParams& params, RouteScratch& scratch, int num_rows) {
  const int num_guests = scratch.receive_base[params.shape.num_instances];
  int num_kv_rows = 0;
  for (int first = 0; first < params.shape.max_attention_rows; first += kTableThreads) {
    const int row = first + threadIdx.x;
    int home = 0, slot = -1;
    if (row < num_rows) {
      const bool own = row >= num_guests;
      while (home + 1 < params.shape.num_instances && row >= scratch.receive_base[home + 1]) ++home;  // this home's range is empty
      const int position = row - scratch.receive_base[home];
      params.tables[params.layout.return_target + row] =
          own ? -1 : home << kTargetSlotBits | (scratch.return_base_at_home[home] + position);
      if (!own) slot = params.tables[params.layout.input_rows + row * 4 + 3];
    } else if (row < params.shape.max_attention_rows) {
      params.tables[params.layout.return_target + row] = -1;
    }
    if (first >= num_rows) continue;
    int total = 0;
    const int index = num_kv_rows + block_exclusive_scan(slot >= 0 ? 1 : 0, scratch.warp_sums, total);
    if (slot >= 0 && index < params.shape.max_kv_rows) {
      params.tables[params.layout.kv_source + index] = home;
      params.tables[params.layout.kv_slot + index] = slot;
    }
    num_kv_rows += total;
  }
  return min(num_kv_rows, params.shape.max_kv_rows);
}

__device__ __forceinline__ void build_routes(const TablesParams& params) {
  __shared__ RouteScratch scratch;
  const int num_home_rows = params.tables[params.layout.input_counts + params.rank];
  count_routes(params, scratch);
  place_routes(params, scratch, static_cast<int>(divide_up(num_home_rows, 32)));
  write_home_rows(params, scratch, num_home_rows);
  const int num_rows = scratch.receive_base[params.shape.num_instances] + scratch.count[params.rank][params.rank];
  const int num_attention_rows = min(num_rows, params.shape.max_attention_rows);
  const int num_kv_rows = write_attention_rows(params, scratch, num_attention_rows);
  if (threadIdx.x == 0) {
    uint32_t peers = 0;
    for (int shard = 0; shard < params.shape.num_instances; ++shard) {
      if (shard != params.rank && scratch.count[params.rank][shard] > 0) peers |= 1u << shard;
    }
    int32_t* header = params.tables + params.layout.header;
    header[kNumHomeRows] = num_home_rows;
    header[kNumAttentionRows] = num_attention_rows;
    header[kNumKvRows] = num_kv_rows;
    header[kSendPeers] = static_cast<int32_t>(peers);
  }
}

// `indptr` (shared memory, max_attention_rows + 1 words) gets the first page of each row.
__device__ __forceinline__ int scan_pages(const TablesParams& params, int num_rows, int* indptr, int* warp_sums) {
  const int4* lines = reinterpret_cast<const int4*>(params.tables + params.layout.input_rows);
  const bool writer = blockIdx.x == 1;
  int num_pages = 0;
  for (int first = 0; first < params.shape.max_attention_rows; first += kTableThreads) {
    const int row = first + threadIdx.x;
    const int tokens = row < num_rows ? lines[row].y : 0;
    const int pages = (tokens + params.shape.page_size - 1) / params.shape.page_size;
    int total = 0;
    const int begin = num_pages + block_exclusive_scan(pages, warp_sums, total);
    num_pages += total;
    if (row >= params.shape.max_attention_rows) continue;
    indptr[row] = begin;
    if (writer) {
      params.tables[params.layout.kv_length + row] = tokens;
      params.tables[params.layout.page_indptr + row] = begin;
      params.tables[params.layout.last_page_length + row] = tokens == 0 ? 0 : tokens - (pages - 1) * params.shape.page_size;
    }
  }
  if (threadIdx.x == 0) {
    indptr[params.shape.max_attention_rows] = num_pages;
    if (writer) params.tables[params.layout.page_indptr + params.shape.max_attention_rows] = num_pages;
  }
  __syncthreads();
  return num_pages;
}

// The page that holds a row's last token: what its line of the message names, or where SGLang put the page's first token, or as before.
// SGLang keeps the writes of its next step behind this one's reads of the token table. Token ids of other pools stand there too, so what is
// read is held to pages that exist, should a line be another request's after all.
__device__ __forceinline__ int last_page(const TablesParams& params, int new_page, int index, int resident) {
  if (new_page >= -1) return new_page >= 0 ? new_page : resident;
  const int64_t line = kFromTokenTable - int64_t{new_page}, position = int64_t{index} * params.shape.page_size;
  if (line >= params.token_lines || position >= params.token_width) return resident;
  const int page = params.token_table[line * params.token_width + position] / params.shape.page_size;
  return page < params.pool_pages ? page : 0;
}

__device__ __forceinline__ void build_pages(const TablesParams& params) {
  extern __shared__ int indptr[];
  __shared__ int warp_sums[kTableWarps + 1];
  const int num_rows = min(params.tables[params.layout.input_counts + kMaxInstances], params.shape.max_attention_rows);
  const int num_pages = min(scan_pages(params, num_rows, indptr, warp_sums), params.shape.max_pages);
  const int4* lines = reinterpret_cast<const int4*>(params.tables + params.layout.input_rows);
  const int width = params.shape.max_pages_per_row, stride = (gridDim.x - 1) * kTableThreads;
  for (int page = (blockIdx.x - 1) * kTableThreads + threadIdx.x; page < num_pages; page += stride) {
    int low = 0, high = num_rows;  // last row that begins at or before `page`; empty rows begin where the next does
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (indptr[middle] <= page) low = middle; else high = middle;
    }
    const int index = page - indptr[low];
    if (index >= width) continue;
    const int4 line = lines[low];
    int32_t* resident = params.resident_pages + int64_t{line.x} * width + index;
    const int id = page + 1 == indptr[low + 1] ? last_page(params, line.z, index, *resident) : *resident;
    if (id != *resident) *resident = id;
    params.tables[params.layout.page_indices + page] = id;
    params.tables[params.layout.block_table + int64_t{low} * width + index] = id;
  }
}

__global__ void __launch_bounds__(kTableThreads, 1) step_tables_kernel(const __grid_constant__ TablesParams params) {
  if (blockIdx.x == 0) {
    build_routes(params);
  } else {
    build_pages(params);
  }
  __threadfence();  // dispatch and return read the tables ahead of their own wait for predecessors, see memory.cuh
}

}  // namespace dcp
