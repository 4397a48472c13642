// Layout queries and launcher of the step's table kernel.
#include <sgl_kernel_dcp/tables.cuh>

#include "checks.h"
#include "records.h"

#include <algorithm>
#include <cstring>

#include <tvm/ffi/container/map.h>
#include <tvm/ffi/string.h>

namespace dcp {
namespace {

using tvm::ffi::Bytes;
using tvm::ffi::Map;
using tvm::ffi::String;

RecordLayout table_shape_record() {
  return {DCP_FIELD(TableShape, num_instances),
          DCP_FIELD(TableShape, max_home_rows),
          DCP_FIELD(TableShape, max_attention_rows),
          DCP_FIELD(TableShape, max_kv_rows),
          DCP_FIELD(TableShape, max_pages),
          DCP_FIELD(TableShape, max_pages_per_row),
          DCP_FIELD(TableShape, page_size),
          {"size", static_cast<int64_t>(sizeof(TableShape))}};
}

TableShape table_shape(const Bytes& packed) {
  const auto shape = read_record<TableShape>("a table shape", packed);
  check_limit("num_instances", shape.num_instances, 1, kMaxInstances);
  check_limit("max_home_rows", shape.max_home_rows, 1, kMaxHomeRows);
  check_limit("max_attention_rows", shape.max_attention_rows, 1, 8192);
  check_limit("max_kv_rows", shape.max_kv_rows, 1, shape.max_attention_rows);
  check_limit("max_pages", shape.max_pages, 1, INT32_MAX / 2);
  check_limit("max_pages_per_row", shape.max_pages_per_row, 1, INT32_MAX / 2);
  check_limit("page_size", shape.page_size, 1, 1 << 20);
  const int64_t num_words = TableLayout::make(shape).total_size;
  check_limit("words of all tables (max_attention_rows x max_pages_per_row is the largest)", num_words, 1, INT32_MAX);
  return shape;
}

Map<String, int64_t> table_layout(Bytes shape) {
  const TableLayout layout = TableLayout::make(table_shape(shape));
  return {{"input_counts", int64_t{layout.input_counts}},
          {"input_routes", int64_t{layout.input_routes}},
          {"input_rows", int64_t{layout.input_rows}},
          {"input_size", int64_t{layout.input_size}},
          {"header", int64_t{layout.header}},
          {"target_count", int64_t{layout.target_count}},
          {"send_target", int64_t{layout.send_target}},
          {"merge_source", int64_t{layout.merge_source}},
          {"kv_target", int64_t{layout.kv_target}},
          {"return_target", int64_t{layout.return_target}},
          {"kv_source", int64_t{layout.kv_source}},
          {"kv_slot", int64_t{layout.kv_slot}},
          {"kv_length", int64_t{layout.kv_length}},
          {"page_indptr", int64_t{layout.page_indptr}},
          {"last_page_length", int64_t{layout.last_page_length}},
          {"page_indices", int64_t{layout.page_indices}},
          {"block_table", int64_t{layout.block_table}},
          {"total_size", int64_t{layout.total_size}}};
}

void build_tables(TensorView tables, TensorView resident_pages, TensorView token_table, int64_t pool_pages, Bytes shape, int64_t rank) {
  TablesParams params;
  params.shape = table_shape(shape);
  params.layout = TableLayout::make(params.shape);
  check_tensor("tables", tables, kDLInt, 32, {params.layout.total_size});
  check_tensor("resident_pages", resident_pages, kDLInt, 32, {-1, params.shape.max_pages_per_row});
  check_tensor("token_table", token_table, kDLInt, 32, {-1, -1});
  check_limit("pool_pages", pool_pages, 1, INT32_MAX);
  check_limit("rank", rank, 0, params.shape.num_instances - 1);
  params.tables = static_cast<int32_t*>(tables.data_ptr());
  params.resident_pages = static_cast<int32_t*>(resident_pages.data_ptr());
  params.token_table = static_cast<const int32_t*>(token_table.data_ptr());
  params.token_lines = static_cast<int32_t>(std::min<int64_t>(token_table.size(0), INT32_MAX));
  params.token_width = token_table.size(1);
  params.pool_pages = static_cast<int32_t>(pool_pages);
  params.rank = static_cast<int32_t>(rank);
  const int device = tables.device().device_id;
  const DeviceGuard guard(device);
  const int64_t page_blocks = divide_up(params.shape.max_pages, 2 * kTableThreads);
  const unsigned blocks = 1 + static_cast<unsigned>(std::min<int64_t>(page_blocks, multiprocessor_count(device) - 1));
  const size_t shared_bytes = sizeof(int) * (params.shape.max_attention_rows + 1);
  step_tables_kernel<<<blocks, kTableThreads, shared_bytes, current_stream(tables)>>>(params);
  check_cuda(cudaGetLastError(), "step_tables_kernel");
}

constexpr int kWordsPerLaunch = 1000;  // with the rest below the 4 KB that every driver passes

struct Words {
  int32_t values[kWordsPerLaunch];
};

__global__ void __launch_bounds__(1024, 1) store_words_kernel(int32_t* to, int count, const __grid_constant__ Words words) {
  if (static_cast<int>(threadIdx.x) < count) to[threadIdx.x] = words.values[threadIdx.x];
}

// `count` words of the host to tables[begin ...], in the order of the stream. They travel as a launch's parameters, which the driver has
// taken in when the launch returns: no pinned buffer that would have to be guarded from step to step.
void send_words(TensorView tables, int64_t words, int64_t begin, int64_t count) {
  check_tensor("tables", tables, kDLInt, 32, {-1});
  check_limit("begin", begin, 0, tables.size(0));
  check_limit("count", count, 0, tables.size(0) - begin);
  const DeviceGuard guard(tables.device().device_id);
  const cudaStream_t stream = current_stream(tables);
  const auto* from = reinterpret_cast<const int32_t*>(words);
  int32_t* to = static_cast<int32_t*>(tables.data_ptr()) + begin;
  for (int64_t done = 0; done < count; done += kWordsPerLaunch) {
    const int part = static_cast<int>(std::min<int64_t>(count - done, kWordsPerLaunch));
    Words block;
    std::memcpy(block.values, from + done, sizeof(int32_t) * static_cast<size_t>(part));
    store_words_kernel<<<1, 1024, 0, stream>>>(to + done, part, block);
    check_cuda(cudaGetLastError(), "store_words_kernel");
  }
}

}  // namespace
}  // namespace dcp

TVM_FFI_DLL_EXPORT_TYPED_FUNC(table_shape_record, dcp::table_shape_record);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(table_layout, dcp::table_layout);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(build_tables, dcp::build_tables);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(send_words, dcp::send_words);
