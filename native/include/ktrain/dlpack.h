// What ktrain reads of DLPack 1.x (dmlc/dlpack, dlpack.h): a tensor's form, from a table of C functions that a
// framework publishes. The layout is fixed for a major version. See ADR 0024.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ktrain::dlpack {

inline constexpr std::uint32_t kMajor = 1;
inline constexpr char kCapsule[] = "dlpack_exchange_api";

// DLTensor: lent by the producer until the tensor changes.
struct Tensor {
  void* data;
  std::int32_t device_type;
  std::int32_t device_id;
  std::int32_t ndim;
  std::uint8_t dtype_code;
  std::uint8_t dtype_bits;
  std::uint16_t dtype_lanes;
  std::int64_t* shape;
  std::int64_t* strides;  // in items; may be null where ndim is 0
  std::uint64_t byte_offset;
};

// DLPackExchangeAPIHeader: the same in every version.
struct Header {
  std::uint32_t major;
  std::uint32_t minor;
  const Header* older;  // null, or a table of an older version
};

// DLPackExchangeAPI. Functions that ktrain does not call are untyped.
struct Exchange {
  Header header;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object;
  void* managed_tensor_to_py_object;
  // 0, or -1 with a Python exception set. Holds the GIL; may be null.
  int (*tensor_from_py_object)(void* py_object, Tensor* out);
  void* current_work_stream;
};

static_assert(sizeof(void*) == 8 && sizeof(Tensor) == 48 && offsetof(Tensor, shape) == 24);
static_assert(sizeof(Header) == 16 && offsetof(Exchange, tensor_from_py_object) == 40);

}  // namespace ktrain::dlpack
