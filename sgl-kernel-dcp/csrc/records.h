// Structs that Python packs: sgl_kernel_dcp/shapes.py declares the same fields, by name and in the same order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include <tvm/ffi/container/map.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/string.h>

namespace dcp {

// Name -> offset in bytes of every field, and "size".
using RecordLayout = tvm::ffi::Map<tvm::ffi::String, int64_t>;

#define DCP_FIELD(record, field) {#field, static_cast<int64_t>(offsetof(record, field))}

template <typename Record>
Record read_record(const char* name, const tvm::ffi::Bytes& bytes) {
  static_assert(std::is_trivially_copyable_v<Record>);
  if (bytes.size() != sizeof(Record)) {
    TVM_FFI_THROW(ValueError) << name << " has " << bytes.size() << " bytes, must have " << sizeof(Record);
  }
  Record record;
  std::memcpy(&record, bytes.data(), sizeof(Record));
  return record;
}

}  // namespace dcp
