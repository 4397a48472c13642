// One instance's end of the exchange: checks, addresses and launches. No launch allocates or synchronises.
#include <sgl_kernel_dcp/return_merge.cuh>

#include "checks.h"
#include "records.h"

#include <algorithm>
#include <utility>

#include <tvm/ffi/container/map.h>
#include <tvm/ffi/container/shape.h>
#include <tvm/ffi/optional.h>
#include <tvm/ffi/string.h>

namespace dcp {
namespace {

using tvm::ffi::Bytes;
using tvm::ffi::Map;
using tvm::ffi::Optional;
using tvm::ffi::Shape;
using tvm::ffi::String;

struct Exchange {
  ExchangeShape shape;
  ExchangeLayout layout;
  TableShape table_shape;
  TableLayout table;
  PeerPointers peers;
  int32_t rank;
  int32_t device;
  int32_t num_multiprocessors;
  int32_t num_sharing;  // instances on this GPU; with more than one only grouped launches may be early: a waiting successor would
                        // take the place of a peer's kernel
  bool early_launch;
  uint64_t wait_limit_ns;
};

// Launches on hold between begin_group and end_group of this thread.
struct PendingGroup {
  bool open = false;
  bool two_parts = false;
  const Exchange* exchange = nullptr;
  Group<DispatchParams, kMaxGrouped> dispatches{};
  Group<ReturnParams, kMaxGrouped> returns{};
};

PendingGroup& pending_group() {
  thread_local PendingGroup group;
  return group;
}

RecordLayout exchange_shape_record() {
  return {DCP_FIELD(ExchangeShape, num_instances),
          DCP_FIELD(ExchangeShape, max_home_rows),
          DCP_FIELD(ExchangeShape, max_attention_rows),
          DCP_FIELD(ExchangeShape, max_kv_rows),
          DCP_FIELD(ExchangeShape, max_return_rows),
          DCP_FIELD(ExchangeShape, num_heads),
          DCP_FIELD(ExchangeShape, query_row_bytes),
          DCP_FIELD(ExchangeShape, v_head_bytes),
          DCP_FIELD(ExchangeShape, kv_row_bytes),
          {"size", static_cast<int64_t>(sizeof(ExchangeShape))}};
}

ExchangeShape exchange_shape(const Bytes& packed) {
  const auto shape = read_record<ExchangeShape>("an exchange shape", packed);
  check_limit("num_instances", shape.num_instances, 1, kMaxInstances);
  check_limit("max_home_rows", shape.max_home_rows, 1, kMaxHomeRows);
  check_limit("max_attention_rows", shape.max_attention_rows, 1, 8192);
  check_limit("max_kv_rows", shape.max_kv_rows, 1, shape.max_attention_rows);
  check_limit("max_return_rows", shape.max_return_rows, 1, kTargetSlotMask);
  check_limit("num_heads", shape.num_heads, 1, 1024);
  check_multiple("query_row_bytes", shape.query_row_bytes, kVectorBytes);
  check_limit("query_row_bytes", shape.query_row_bytes, kVectorBytes, 1 << 22);
  check_multiple("v_head_bytes", shape.v_head_bytes, kVectorBytes);
  check_limit("v_head_bytes", shape.v_head_bytes, kVectorBytes, kMaxHeadBytes);
  // The kernels count vectors of partial results in 32 bits.
  const int64_t num_vectors =
      int64_t{std::max(shape.max_attention_rows, shape.max_return_rows)} * shape.num_heads * (shape.v_head_bytes / kVectorBytes);
  check_limit("vectors of all partial results (rows x num_heads x v_head_bytes / 16)", num_vectors, 1, UINT32_MAX);
  check_multiple("kv_row_bytes", shape.kv_row_bytes, kVectorBytes);
  check_limit("kv_row_bytes", shape.kv_row_bytes, kVectorBytes, 1 << 20);
  return shape;
}

Map<String, int64_t> exchange_layout(Bytes shape) {
  const ExchangeLayout layout = ExchangeLayout::make(exchange_shape(shape));
  return {{"num_query_pieces", layout.num_query_pieces},
          {"num_return_pieces", layout.num_return_pieces},
          {"num_merge_pieces", layout.num_merge_pieces},
          {"acknowledgement", layout.acknowledgement},
          {"query_flag", layout.query_flag},
          {"kv_flag", layout.kv_flag},
          {"return_lse", layout.return_lse},
          {"query_rows", layout.query_rows},
          {"kv_rows", layout.kv_rows},
          {"return_slots", layout.return_slots},
          {"total_bytes", layout.total_bytes},
          {"state_bytes", static_cast<int64_t>(sizeof(InstanceState))},
          {"silent_mask", static_cast<int64_t>(offsetof(InstanceState, silent_mask))},
          {"silent_epoch", static_cast<int64_t>(offsetof(InstanceState, silent_epoch))}};
}

// Loads a kernel's code now (a lazy load during its first launch would wait for kernels that wait for it) and makes sure that all
// blocks of a grid run at once on this device.
template <typename Kernel>
void prepare_kernel(Kernel kernel, const char* name) {
  cudaFuncAttributes attributes;
  check_cuda(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
  for (const auto& [threads, needed] : {std::pair{kThreads, kBlocksPerMultiprocessor}, std::pair{kSharedThreads, 1}}) {
    int blocks = 0;
    check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, 0), "occupancy");
    if (blocks < needed) {
      TVM_FFI_THROW(RuntimeError) << name << ": " << blocks << " blocks of " << threads << " threads fit on a multiprocessor, needs "
                                  << needed;
    }
  }
}

// `peers`: addresses of the exchange buffers in this process. `num_sharing`: instances on this GPU; a waiting kernel takes at most
// 1 / num_sharing of the multiprocessors, so that all of them fit together. Returns a handle for destroy_exchange.
// `early_launch`: programmatic dependent launch, of these kernels and of their successors.
int64_t create_exchange(Bytes packed_shape, Bytes table_shape, Shape peers, int64_t rank, int64_t device, int64_t num_sharing,
                        int64_t wait_limit_ns, bool early_launch) {
  const ExchangeShape shape = exchange_shape(packed_shape);
  if (static_cast<int64_t>(peers.size()) != shape.num_instances) {
    TVM_FFI_THROW(ValueError) << "got " << peers.size() << " peer addresses for " << shape.num_instances << " instances";
  }
  check_limit("rank", rank, 0, shape.num_instances - 1);
  check_limit("num_sharing", num_sharing, 1, kMaxInstances);
  check_limit("wait_limit_ns", wait_limit_ns, 1000, int64_t{600} * 1000000000);
  const DeviceGuard guard(static_cast<int>(device));
  auto* exchange = new Exchange{};
  exchange->shape = shape;
  exchange->layout = ExchangeLayout::make(shape);
  exchange->table_shape = read_record<TableShape>("a table shape", table_shape);
  exchange->table = TableLayout::make(exchange->table_shape);
  for (int i = 0; i < shape.num_instances; ++i) exchange->peers.base[i] = reinterpret_cast<uint8_t*>(peers[i]);
  exchange->rank = static_cast<int32_t>(rank);
  exchange->device = static_cast<int32_t>(device);
  exchange->wait_limit_ns = static_cast<uint64_t>(wait_limit_ns);
  exchange->early_launch = early_launch;
  exchange->num_sharing = static_cast<int32_t>(num_sharing);
  exchange->num_multiprocessors = multiprocessor_count(exchange->device);
  prepare_kernel(dispatch_kernel<false, 1>, "dispatch_kernel");
  prepare_kernel(dispatch_kernel<true, 1>, "dispatch_kernel");
  prepare_kernel(dispatch_kernel<false, kMaxGrouped>, "dispatch_kernel of a group");
  prepare_kernel(dispatch_kernel<true, kMaxGrouped>, "dispatch_kernel of a group");
  prepare_kernel(return_merge_kernel<1>, "return_merge_kernel");
  prepare_kernel(return_merge_kernel<kMaxGrouped>, "return_merge_kernel of a group");
  return reinterpret_cast<int64_t>(exchange);
}

void destroy_exchange(int64_t handle) { delete reinterpret_cast<Exchange*>(handle); }

void set_part(RowSource& source, int part, const char* name, const TensorView& tensor, int64_t max_rows, int64_t heads) {
  if (tensor.device().device_type != kDLCUDA) TVM_FFI_THROW(ValueError) << name << " must be a CUDA tensor";
  if (tensor.dtype().code != kDLBfloat || tensor.dtype().bits != 16) TVM_FFI_THROW(ValueError) << name << " must be bfloat16";
  if (tensor.ndim() != 3 || tensor.size(1) != heads) {
    TVM_FFI_THROW(ValueError) << name << " must be [rows, " << heads << " heads, dim], has " << tensor.ndim() << " dimensions";
  }
  check_limit(name, tensor.size(0), 0, max_rows);
  if (tensor.stride(2) != 1) TVM_FFI_THROW(ValueError) << name << " must be dense in its last dimension";
  check_multiple("bytes of one head", tensor.size(2) * 2, kVectorBytes);
  if (tensor.stride(0) * 2 % kVectorBytes != 0 || tensor.stride(1) * 2 % kVectorBytes != 0 ||
      reinterpret_cast<uintptr_t>(tensor.data_ptr()) % kVectorBytes != 0) {
    TVM_FFI_THROW(ValueError) << name << ": start and strides must be multiples of " << kVectorBytes << " bytes";
  }
  source.base[part] = static_cast<const uint8_t*>(tensor.data_ptr());
  source.row_stride[part] = tensor.stride(0) * 2;
  source.head_stride[part] = tensor.stride(1) * 2;
  source.num_vectors[part] = static_cast<int32_t>(tensor.size(2) * 2 / kVectorBytes);
}

void set_pool(PoolTarget& pool, int part, const char* name, const TensorView& tensor, int64_t row_vectors) {
  if (tensor.dtype().code != kDLBfloat || tensor.dtype().bits != 16) TVM_FFI_THROW(ValueError) << name << " must be bfloat16";
  if (tensor.ndim() != 2 || tensor.stride(1) != 1) TVM_FFI_THROW(ValueError) << name << " must be [slots, elements], dense in the last";
  check_limit(name, tensor.size(1) * 2, row_vectors * kVectorBytes, row_vectors * kVectorBytes);
  check_multiple("pool stride in bytes", tensor.stride(0) * 2, kVectorBytes);
  pool.base[part] = static_cast<uint8_t*>(tensor.data_ptr());
  pool.stride[part] = tensor.stride(0) * 2;
}

int64_t bytes_per_row(const RowSource& source, int64_t heads) {
  return (source.num_vectors[0] + source.num_vectors[1]) * heads * kVectorBytes;
}

template <typename Members>
void launch(void (*kernel)(Members), const Members& members, unsigned blocks, unsigned threads, bool early_launch, cudaStream_t stream,
            const char* name) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = early_launch ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, members), name);
}

// Alone on its GPU, or with all that share it in one launch: small blocks on every multiprocessor, all of them running at once with room
// for the successor's. Otherwise large blocks on this instance's share of the multiprocessors, so that all waiting kernels fit together.
template <typename Params>
void launch_one(void (*kernel)(Group<Params, 1>), const Exchange& exchange, const Params& params, int64_t max_items, cudaStream_t stream,
                const char* name) {
  const bool alone = exchange.num_sharing == 1;
  const int64_t threads = alone ? kThreads : kSharedThreads;
  const int64_t limit = alone ? exchange.num_multiprocessors * kBlocksPerMultiprocessor
                              : std::max(1, exchange.num_multiprocessors / exchange.num_sharing);
  const int64_t blocks = std::clamp<int64_t>(divide_up(max_items, threads / 32), 1, limit);
  const DeviceGuard guard(exchange.device);
  launch(kernel, Group<Params, 1>{{params}, 1}, static_cast<unsigned>(blocks), static_cast<unsigned>(threads),
         exchange.early_launch && alone, stream, name);
}

template <typename Params>
void launch_group(void (*kernel)(Group<Params, kMaxGrouped>), const Exchange& exchange, const Group<Params, kMaxGrouped>& group,
                  cudaStream_t stream, const char* name) {
  const DeviceGuard guard(exchange.device);
  const auto blocks = static_cast<unsigned>(exchange.num_multiprocessors * kBlocksPerMultiprocessor);
  launch(kernel, group, blocks, kThreads, exchange.early_launch, stream, name);
}

// Whether a launch is on hold; then `params` has joined `members`.
template <typename Params>
bool hold(const Exchange& exchange, Group<Params, kMaxGrouped>& members, const Params& params) {
  PendingGroup& group = pending_group();
  if (!group.open) return false;
  if (group.dispatches.size + group.returns.size > members.size) TVM_FFI_THROW(ValueError) << "a group holds one kind of call";
  check_limit("calls in one group", members.size + 1, 1, kMaxGrouped);
  members.members[members.size++] = params;
  group.exchange = &exchange;
  return true;
}

void begin_group() {
  pending_group() = PendingGroup{};
  pending_group().open = true;
}

void abandon_group() { pending_group() = PendingGroup{}; }

// Launches what was held since begin_group as one kernel on the current stream of `tensor`'s device.
void end_group(TensorView tensor) {
  PendingGroup& group = pending_group();
  group.open = false;
  if (group.dispatches.size > 0) {
    launch_group(group.two_parts ? dispatch_kernel<true, kMaxGrouped> : dispatch_kernel<false, kMaxGrouped>, *group.exchange,
                 group.dispatches, current_stream(tensor), "dispatch_kernel of a group");
  } else if (group.returns.size > 0) {
    launch_group(return_merge_kernel<kMaxGrouped>, *group.exchange, group.returns, current_stream(tensor),
                 "return_merge_kernel of a group");
  }
}

template <typename Params>
Params base_params(const Exchange& exchange, const TensorView& tables, const TensorView& state, int64_t phases) {
  check_tensor("tables", tables, kDLInt, 32, {exchange.table.total_size});
  check_tensor("state", state, kDLUInt, 8, {static_cast<int64_t>(sizeof(InstanceState))});
  check_limit("phases", phases, 1, 3);
  Params params{};
  params.peers = exchange.peers;
  params.state = static_cast<InstanceState*>(state.data_ptr());
  params.tables = static_cast<const int32_t*>(tables.data_ptr());
  params.shape = exchange.shape;
  params.exchange = exchange.layout;
  params.table = exchange.table;
  params.wait_limit_ns = exchange.wait_limit_ns;
  params.rank = exchange.rank;
  params.phases = static_cast<int32_t>(phases) | (exchange.early_launch ? kAnnounce : 0);
  return params;
}

// query [rows, heads, dim] and optionally query_rope with the rest of each head; key [rows, 1, elements] and value likewise (or the
// two parts of an MLA latent) with the pools their parts go to. `num_rows` bounds the grid, the tables say what is really there.
void dispatch(int64_t handle, TensorView tables, TensorView state, TensorView query, Optional<TensorView> query_rope,
              Optional<TensorView> key, Optional<TensorView> value, Optional<TensorView> key_pool, Optional<TensorView> value_pool,
              int64_t phases) {
  const Exchange& exchange = *reinterpret_cast<const Exchange*>(handle);
  auto params = base_params<DispatchParams>(exchange, tables, state, phases);
  const int64_t heads = exchange.shape.num_heads, max_rows = exchange.shape.max_home_rows;
  set_part(params.query, 0, "query", query, max_rows, heads);
  if (query_rope.has_value()) set_part(params.query, 1, "query_rope", query_rope.value(), max_rows, heads);
  const int64_t query_bytes = bytes_per_row(params.query, heads);
  check_limit("bytes of one query row (heads x dim x 2)", query_bytes, exchange.shape.query_row_bytes, exchange.shape.query_row_bytes);
  if (key.has_value() != key_pool.has_value() || value.has_value() != value_pool.has_value() || (value.has_value() && !key.has_value())) {
    TVM_FFI_THROW(ValueError) << "key comes with key_pool, value with value_pool, and value not without key";
  }
  if (key.has_value()) {
    set_part(params.key_value, 0, "key", key.value(), max_rows, 1);
    set_pool(params.pool, 0, "key_pool", key_pool.value(), params.key_value.num_vectors[0]);
    if (value.has_value()) {
      set_part(params.key_value, 1, "value", value.value(), max_rows, 1);
      set_pool(params.pool, 1, "value_pool", value_pool.value(), params.key_value.num_vectors[1]);
    }
    const int64_t bytes = bytes_per_row(params.key_value, 1);
    check_limit("bytes of one K/V row", bytes, exchange.shape.kv_row_bytes, exchange.shape.kv_row_bytes);
  }
  const bool two_parts = query_rope.has_value() || query.stride(1) != query.size(2);
  if (hold(exchange, pending_group().dispatches, params)) {
    pending_group().two_parts |= two_parts;
    return;
  }
  const int64_t pieces = exchange.layout.num_query_pieces;
  const int64_t items = std::max(exchange.shape.max_home_rows * pieces, divide_up(exchange.shape.max_attention_rows * pieces, int64_t{32}));
  launch_one(two_parts ? dispatch_kernel<true, 1> : dispatch_kernel<false, 1>, exchange, params, items, current_stream(query),
             "dispatch_kernel");
}

void return_merge(int64_t handle, TensorView tables, TensorView state, TensorView partial, TensorView partial_lse, TensorView merged,
                  Optional<TensorView> merged_lse, int64_t phases) {
  const Exchange& exchange = *reinterpret_cast<const Exchange*>(handle);
  auto params = base_params<ReturnParams>(exchange, tables, state, phases);
  const int64_t heads = exchange.shape.num_heads, dim = exchange.shape.v_head_bytes / 2;
  check_tensor("partial", partial, kDLBfloat, 16, {-1, heads, dim});
  check_limit("partial.shape[0] (attention rows)", partial.size(0), 0, exchange.shape.max_attention_rows);
  check_tensor("partial_lse", partial_lse, kDLFloat, 32, {partial.size(0), heads});
  check_tensor("merged", merged, kDLBfloat, 16, {-1, heads, dim});
  check_limit("merged.shape[0] (home rows)", merged.size(0), 0, exchange.shape.max_home_rows);
  if (merged_lse.has_value()) {
    check_tensor("merged_lse", merged_lse.value(), kDLFloat, 32, {merged.size(0), heads});
    params.merged_lse = static_cast<float*>(merged_lse.value().data_ptr());
  }
  params.partial = static_cast<const uint8_t*>(partial.data_ptr());
  params.partial_lse = static_cast<const float*>(partial_lse.data_ptr());
  params.merged = static_cast<uint8_t*>(merged.data_ptr());
  if (hold(exchange, pending_group().returns, params)) return;
  const int64_t items = std::max(int64_t{exchange.shape.max_attention_rows} * exchange.layout.num_return_pieces,
                                 int64_t{exchange.shape.max_home_rows} * exchange.layout.num_merge_pieces);
  launch_one(return_merge_kernel<1>, exchange, params, items, current_stream(partial), "return_merge_kernel");
}

}  // namespace
}  // namespace dcp

TVM_FFI_DLL_EXPORT_TYPED_FUNC(exchange_shape_record, dcp::exchange_shape_record);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(exchange_layout, dcp::exchange_layout);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(create_exchange, dcp::create_exchange);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(destroy_exchange, dcp::destroy_exchange);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(begin_group, dcp::begin_group);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(abandon_group, dcp::abandon_group);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(end_group, dcp::end_group);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(dispatch, dcp::dispatch);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(return_merge, dcp::return_merge);
