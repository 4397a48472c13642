// Byte maps of the three memory areas, each with one owner: the exchange buffer that peers write into, the instance's private
// state, and the step's tables. Host and device ask these structs; nobody else computes an offset.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define DCP_HOST_DEVICE __host__ __device__
#else
#define DCP_HOST_DEVICE
#endif

namespace dcp {

constexpr int kMaxInstances = 16;      // one route word holds a bit per instance
constexpr int kMaxPartials = 16;       // partial results merged into one home row
constexpr int kMaxHomeRows = 1024;     // one warp of the table kernel per 32 rows
constexpr int kVectorBytes = 16;
constexpr uint32_t kNothing = 0xffffffffu;  // a word of a return slot to which nothing has come
constexpr int kThreads = 128;         // block size of the exchange kernels on a GPU of one's own, or with all its instances in one launch
constexpr int kBlocksPerMultiprocessor = 6;  // of that size; all of a grid run at once, for they wait for each other
constexpr int kSharedThreads = 512;   // block size where instances launch by themselves on one GPU, each on few multiprocessors
constexpr int kQueryVectors = 2;      // vectors of one lane in a piece of a query row; a warp moves a piece
constexpr int kReturnVectors = 4;     // the same for a partial result on its way home
constexpr int kQueryPieceVectors = 32 * kQueryVectors;
constexpr int kReturnPieceVectors = 32 * kReturnVectors;
constexpr int kMergePieceVectors = 32;  // a lane merges one vector at a time
constexpr int kMaxHeadBytes = 8192;
constexpr int kTargetSlotBits = 24;    // target = instance << 24 | slot
constexpr int kTargetSlotMask = (1 << kTargetSlotBits) - 1;
constexpr int kRouteTailShift = 16;    // route word: bits 0-15 shards, bits 16-20 tail instance + 1 when K/V must travel
constexpr int kRouteTailMask = 31;

DCP_HOST_DEVICE constexpr int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }
DCP_HOST_DEVICE constexpr int64_t divide_up(int64_t value, int64_t step) { return (value + step - 1) / step; }
DCP_HOST_DEVICE constexpr int divide_up(int value, int step) { return (value + step - 1) / step; }

struct ExchangeShape {
  int32_t num_instances;
  int32_t max_home_rows;       // rows of this instance's batch (M)
  int32_t max_attention_rows;  // query rows received, own ones included (S)
  int32_t max_kv_rows;         // K/V rows received in one exchange
  int32_t max_return_rows;     // partial results received from peers in one exchange
  int32_t num_heads;
  int32_t query_row_bytes;
  int32_t v_head_bytes;        // output of one head
  int32_t kv_row_bytes;        // new K and V of one token
};

// The buffer of one instance. Peers store into it; the owner reads. Nothing is counted and no header travels:
// - a flag holds the number of the exchange whose query piece or K/V row it announces, so it is never cleared;
// - an LSE word holds the LSE and the number of its exchange;
// - a return slot holds kNothing where nothing has arrived, and its reader puts kNothing back.
// One copy of each slot suffices: a sender waits for the acknowledgement of exchange e - 1 before it writes exchange e, and in a
// steady step it has already seen that return.
struct ExchangeLayout {
  int32_t num_query_pieces;   // [query row] in pieces of kQueryPieceVectors, the last may be short
  int32_t num_return_pieces;  // [partial result] in pieces of kReturnPieceVectors
  int32_t num_merge_pieces;   // [partial result] in pieces of kMergePieceVectors
  int64_t acknowledgement;    // uint64 [num_instances]
  int64_t query_flag;         // uint64 [max_attention_rows, num_query_pieces]
  int64_t kv_flag;            // uint64 [max_kv_rows]
  int64_t return_lse;         // uint64 [max_return_rows, num_heads]: exchange number << 32 | fp32 LSE
  int64_t query_rows;         // [max_attention_rows, query_row_bytes]
  int64_t kv_rows;            // [max_kv_rows, kv_row_bytes]
  int64_t return_slots;       // [max_return_rows, num_heads, v_head_bytes]
  int64_t total_bytes;

  DCP_HOST_DEVICE static ExchangeLayout make(const ExchangeShape& shape) {
    ExchangeLayout layout{};
    const int64_t return_bytes = int64_t{shape.num_heads} * shape.v_head_bytes, return_vectors = return_bytes / kVectorBytes;
    layout.num_query_pieces = static_cast<int32_t>(divide_up(shape.query_row_bytes / kVectorBytes, kQueryPieceVectors));
    layout.num_return_pieces = static_cast<int32_t>(divide_up(return_vectors, int64_t{kReturnPieceVectors}));
    layout.num_merge_pieces = static_cast<int32_t>(divide_up(return_vectors, int64_t{kMergePieceVectors}));
    int64_t end = 0;
    layout.acknowledgement = place(end, int64_t{8} * shape.num_instances);
    layout.query_flag = place(end, int64_t{8} * shape.max_attention_rows * layout.num_query_pieces);
    layout.kv_flag = place(end, int64_t{8} * shape.max_kv_rows);
    layout.return_lse = place(end, int64_t{8} * shape.max_return_rows * shape.num_heads);
    layout.query_rows = place(end, int64_t{shape.max_attention_rows} * shape.query_row_bytes);
    layout.kv_rows = place(end, int64_t{shape.max_kv_rows} * shape.kv_row_bytes);
    layout.return_slots = place(end, int64_t{shape.max_return_rows} * return_bytes);
    layout.total_bytes = end;
    return layout;
  }

  DCP_HOST_DEVICE static int64_t place(int64_t& end, int64_t bytes) {
    const int64_t begin = end;
    end = round_up(end + bytes, 256);
    return begin;
  }
};

// Private to one instance, zeroed at start except the epochs, which start at 1 (a flag of 0 announces nothing).
struct InstanceState {
  uint64_t dispatch_epoch;               // number of the next exchange; set by the return kernel of the one before
  uint64_t return_epoch;                 // number of the exchange being returned; set by its dispatch kernel
  uint32_t silent_mask;                  // bit per instance that missed a wait
  uint32_t reserved;
  uint64_t silent_epoch[kMaxInstances];  // exchange at which it went silent
};

struct TableShape {
  int32_t num_instances;
  int32_t max_home_rows;
  int32_t max_attention_rows;
  int32_t max_kv_rows;
  int32_t max_pages;          // page indices of all attention rows together
  int32_t max_pages_per_row;  // width of the padded block table and of the resident page table
  int32_t page_size;
};

// Offsets, in int32 words, into one static buffer of less than 2^31 words. The first `input_size` words are the step's message from
// the host (one copy).
struct TableLayout {
  int32_t input_counts;      // [32]: home rows of each instance, then at 16 this instance's attention rows
  int32_t input_routes;      // [num_instances, max_home_rows] route words
  int32_t input_rows;        // [max_attention_rows, 4]: resident entry, tokens, new page or -1, slot for the arriving K/V or -1
  int32_t input_size;
  int32_t header;            // [16], see HeaderField
  int32_t target_count;      // [max_home_rows] shards of the row
  int32_t send_target;       // [max_home_rows, kMaxPartials] shard << 24 | query slot there
  int32_t merge_source;      // [max_home_rows, kMaxPartials] shard << 24 | return slot here (own shard: attention row)
  int32_t kv_target;         // [max_home_rows] tail << 24 | K/V slot there, -1: none travels
  int32_t return_target;     // [max_attention_rows] home << 24 | return slot there, -1: own row or padding
  int32_t kv_source;         // [max_kv_rows] home of the arriving row
  int32_t kv_slot;           // [max_kv_rows] where it goes in this instance's pool
  int32_t kv_length;         // [max_attention_rows] tokens, 0 for padding
  int32_t page_indptr;       // [max_attention_rows + 1]
  int32_t last_page_length;  // [max_attention_rows]
  int32_t page_indices;      // [max_pages]
  int32_t block_table;       // [max_attention_rows, max_pages_per_row]
  int64_t total_size;

  DCP_HOST_DEVICE static TableLayout make(const TableShape& shape) {
    TableLayout layout{};
    const int64_t home = shape.max_home_rows;
    const int64_t attention = shape.max_attention_rows;
    int64_t end = 0;
    layout.input_counts = place(end, 32);
    layout.input_routes = place(end, int64_t{shape.num_instances} * home);
    layout.input_rows = place(end, attention * 4);
    layout.input_size = static_cast<int32_t>(end);
    layout.header = place(end, 16);
    layout.target_count = place(end, home);
    layout.send_target = place(end, home * kMaxPartials);
    layout.merge_source = place(end, home * kMaxPartials);
    layout.kv_target = place(end, home);
    layout.return_target = place(end, attention);
    layout.kv_source = place(end, shape.max_kv_rows);
    layout.kv_slot = place(end, shape.max_kv_rows);
    layout.kv_length = place(end, attention);
    layout.page_indptr = place(end, attention + 1);
    layout.last_page_length = place(end, attention);
    layout.page_indices = place(end, shape.max_pages);
    layout.block_table = place(end, attention * shape.max_pages_per_row);
    layout.total_size = end;
    return layout;
  }

  DCP_HOST_DEVICE static int32_t place(int64_t& end, int64_t words) {
    const auto begin = static_cast<int32_t>(end);
    end = round_up(end + words, 4);  // 16 bytes, so that rows of four words load as one vector
    return begin;
  }
};

enum HeaderField : int { kNumHomeRows = 0, kNumAttentionRows = 1, kNumKvRows = 2, kSendPeers = 3 };

}  // namespace dcp
