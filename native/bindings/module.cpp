// ktrain._native. The only file that includes Python. Arguments are checked here or in ktrain/native.py,
// never in the kernels; ValueError and BufferError become ConfigError there.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "ktrain/copy.h"
#include "ktrain/cpu.h"
#include "ktrain/digest.h"
#include "ktrain/dlpack.h"
#include "ktrain/mapping.h"
#include "ktrain/scatter.h"

namespace nb = nanobind;

namespace {

using Digests = std::vector<std::uint64_t>;

// Holds a contiguous buffer of a Python object. Made and destroyed under the GIL.
class BufferView {
 public:
  BufferView(nb::handle object, int flags) {
    if (PyObject_GetBuffer(object.ptr(), &view_, flags) != 0) {
      throw nb::python_error();
    }
  }
  ~BufferView() { PyBuffer_Release(&view_); }
  BufferView(const BufferView&) = delete;
  BufferView& operator=(const BufferView&) = delete;

  std::size_t size() const noexcept { return static_cast<std::size_t>(view_.len); }
  std::span<const std::byte> bytes() const noexcept { return {static_cast<const std::byte*>(view_.buf), size()}; }
  std::span<std::byte> writable() const noexcept { return {static_cast<std::byte*>(view_.buf), size()}; }
  std::span<const std::uint64_t> words() const {
    if (size() == 0) {
      return {};  // an empty array may point anywhere
    }
    if (size() % sizeof(std::uint64_t) != 0 ||
        reinterpret_cast<std::uintptr_t>(view_.buf) % alignof(std::uint64_t) != 0) {
      throw std::invalid_argument("a segment column is no array of aligned 64-bit integers");
    }
    return {static_cast<const std::uint64_t*>(view_.buf), size() / sizeof(std::uint64_t)};
  }

 private:
  Py_buffer view_{};
};

// Gives the GIL up for work that is worth it. A thread that gives it up for less may get it back only after another one
// has had it for 5 ms (sys.getswitchinterval), for which training would stand.
class GilRelease {
 public:
  explicit GilRelease(std::span<const std::uint64_t> sizes) {
    std::size_t nbytes = sizes.size() * kPieceNbytes;
    for (const std::uint64_t size : sizes) {
      nbytes += size;
    }
    if (nbytes > kShortNbytes) {
      release_.emplace();
    }
  }

 private:
  static constexpr std::size_t kShortNbytes = std::size_t{2} << 20;  // some 0.5 ms
  static constexpr std::size_t kPieceNbytes = std::size_t{1} << 10;  // what a piece costs beside its bytes
  std::optional<nb::gil_scoped_release> release_;
};

std::uint64_t crc64(nb::handle data, std::uint64_t value) {
  const BufferView view(data, PyBUF_SIMPLE);
  const nb::gil_scoped_release release;
  return ktrain::crc64(view.bytes().data(), view.size(), value);
}

std::uint64_t crc64_with(const std::string& name, nb::handle data, std::uint64_t value) {
  for (const ktrain::Variant& variant : ktrain::variants()) {
    if (name == variant.name) {
      const BufferView view(data, PyBUF_SIMPLE);
      return ~variant.update(~value, view.bytes().data(), view.size());
    }
  }
  throw std::invalid_argument("this processor has no digest variant named " + name);
}

std::vector<std::string> variants() {
  std::vector<std::string> names;
  for (const ktrain::Variant& variant : ktrain::variants()) {
    names.emplace_back(variant.name);
  }
  return names;
}

Digests digest_chunks(nb::handle data, std::size_t chunk_nbytes, unsigned num_threads) {
  const BufferView view(data, PyBUF_SIMPLE);
  const nb::gil_scoped_release release;
  Digests digests(ktrain::num_chunks(view.size(), chunk_nbytes));
  ktrain::digest_chunks(view.bytes(), chunk_nbytes, num_threads, digests);
  return digests;
}

Digests copy_digest(nb::handle target, nb::handle source, std::size_t chunk_nbytes, unsigned num_threads) {
  const BufferView to(target, PyBUF_WRITABLE);
  const BufferView from(source, PyBUF_SIMPLE);
  if (to.size() != from.size()) {
    throw std::invalid_argument("the target holds " + std::to_string(to.size()) + " bytes, the source " +
                                std::to_string(from.size()) + "; they must be equal");
  }
  const nb::gil_scoped_release release;
  Digests digests(ktrain::num_chunks(to.size(), chunk_nbytes));
  ktrain::copy_digest(to.writable(), from.bytes(), chunk_nbytes, num_threads, digests);
  return digests;
}

void refuse_bad_segments(const ktrain::Segments& segments, std::size_t target_nbytes) {
  const ktrain::SegmentCheck check = ktrain::check_segments(segments, target_nbytes);
  if (check.fault == ktrain::SegmentFault::kNone) {
    return;
  }
  if (check.fault == ktrain::SegmentFault::kLengthsDiffer) {
    throw std::invalid_argument("the columns address, nbytes and offset have " +
                                std::to_string(segments.address.size()) + ", " +
                                std::to_string(segments.nbytes.size()) + " and " +
                                std::to_string(segments.offset.size()) + " entries; they must be equal");
  }
  const std::string where = "segment " + std::to_string(check.index) + " (offset " +
                            std::to_string(segments.offset[check.index]) + ", " +
                            std::to_string(segments.nbytes[check.index]) + " bytes)";
  if (check.fault == ktrain::SegmentFault::kOutsideTarget) {
    throw std::invalid_argument(where + " ends behind the target of " + std::to_string(target_nbytes) + " bytes");
  }
  throw std::invalid_argument(where + " begins before the end of the segment in front of it; sort by offset");
}

Digests gather_digest(nb::handle target, nb::tuple columns, std::size_t chunk_nbytes, unsigned num_threads) {
  const BufferView to(target, PyBUF_WRITABLE);
  const BufferView address(columns[0], PyBUF_SIMPLE);
  const BufferView nbytes(columns[1], PyBUF_SIMPLE);
  const BufferView offset(columns[2], PyBUF_SIMPLE);
  const ktrain::Segments segments{address.words(), nbytes.words(), offset.words()};
  refuse_bad_segments(segments, to.size());
  const nb::gil_scoped_release release;
  Digests digests(ktrain::num_chunks(to.size(), chunk_nbytes));
  ktrain::gather_digest(to.writable(), segments, chunk_nbytes, num_threads, digests);
  return digests;
}

void refuse_bad_runs(const ktrain::Runs& runs) {
  const ktrain::RunCheck check = ktrain::check_runs(runs);
  const std::string where = "row " + std::to_string(check.index);
  switch (check.fault) {
    case ktrain::RunFault::kNone:
      return;
    case ktrain::RunFault::kLengthsDiffer:
      throw std::invalid_argument("the columns of the runs have different lengths");
    case ktrain::RunFault::kNotSorted:
      throw std::invalid_argument(where + " begins before the row in front of it; sort by offset");
    case ktrain::RunFault::kOverlap:
      throw std::invalid_argument(where + ": its runs overlap one another");
    case ktrain::RunFault::kTooLong:
      throw std::invalid_argument(where + " ends beyond what a payload can have");
  }
}

std::vector<std::size_t> prove_scatter(nb::handle source, std::uint64_t begin, std::size_t chunk_nbytes,
                                       nb::handle expected, nb::tuple columns, unsigned num_threads) {
  const BufferView from(source, PyBUF_SIMPLE);
  const BufferView digests(expected, PyBUF_SIMPLE);
  const BufferView address(columns[0], PyBUF_SIMPLE);
  const BufferView nbytes(columns[1], PyBUF_SIMPLE);
  const BufferView offset(columns[2], PyBUF_SIMPLE);
  const BufferView count(columns[3], PyBUF_SIMPLE);
  const BufferView source_step(columns[4], PyBUF_SIMPLE);
  const BufferView target_step(columns[5], PyBUF_SIMPLE);
  const ktrain::Runs runs{address.words(), nbytes.words(),      offset.words(),
                          count.words(),   source_step.words(), target_step.words()};
  refuse_bad_runs(runs);
  const std::size_t num_chunks = ktrain::num_chunks(from.size(), chunk_nbytes);
  if (digests.words().size() != num_chunks || begin % chunk_nbytes != 0) {
    throw std::invalid_argument("expected " + std::to_string(num_chunks) + " digests of chunks from where one begins");
  }
  std::vector<std::size_t> bad;
  {
    const nb::gil_scoped_release release;
    std::vector<std::uint8_t> is_bad(num_chunks);
    ktrain::prove_scatter(from.bytes(), begin, chunk_nbytes, digests.words(), runs, num_threads, is_bad);
    for (std::size_t index = 0; index < num_chunks; ++index) {
      if (is_bad[index] != 0) {
        bad.push_back(index);
      }
    }
  }
  return bad;
}

void gather(nb::handle target, nb::tuple columns, unsigned num_threads) {
  const BufferView to(target, PyBUF_WRITABLE);
  const BufferView address(columns[0], PyBUF_SIMPLE);
  const BufferView nbytes(columns[1], PyBUF_SIMPLE);
  const BufferView offset(columns[2], PyBUF_SIMPLE);
  const ktrain::Segments segments{address.words(), nbytes.words(), offset.words()};
  refuse_bad_segments(segments, to.size());
  const GilRelease release(segments.nbytes);
  ktrain::gather(to.writable(), segments, num_threads);
}

// The digests as the bytes of an array: many thousand integers would cost more than the digests.
nb::bytes digest_pieces(nb::handle addresses, nb::handle sizes, unsigned num_threads) {
  const BufferView address(addresses, PyBUF_SIMPLE);
  const BufferView nbytes(sizes, PyBUF_SIMPLE);
  if (address.size() != nbytes.size()) {
    throw std::invalid_argument("the columns address and nbytes differ in length");
  }
  Digests digests(address.words().size());
  {
    const GilRelease release(nbytes.words());
    ktrain::digest_pieces(address.words(), nbytes.words(), num_threads, digests);
  }
  return nb::bytes(reinterpret_cast<const char*>(digests.data()), digests.size() * sizeof(std::uint64_t));
}

// The function that describes tensors, of the table in the capsule or of an older one behind it; null without one.
auto describer(nb::handle capsule) -> decltype(ktrain::dlpack::Exchange::tensor_from_py_object) {
  if (PyCapsule_IsValid(capsule.ptr(), ktrain::dlpack::kCapsule) == 0) {
    return nullptr;
  }
  const void* found = PyCapsule_GetPointer(capsule.ptr(), ktrain::dlpack::kCapsule);
  const auto* header = static_cast<const ktrain::dlpack::Header*>(found);
  while (header != nullptr && header->major > ktrain::dlpack::kMajor) {
    header = header->older;
  }
  if (header == nullptr || header->major != ktrain::dlpack::kMajor) {
    return nullptr;
  }
  return reinterpret_cast<const ktrain::dlpack::Exchange*>(header)->tensor_from_py_object;
}

using Describer = decltype(ktrain::dlpack::Exchange::tensor_from_py_object);
using Record = std::vector<std::int64_t>;

std::int64_t word_of(nb::handle object) { return reinterpret_cast<std::int64_t>(object.ptr()); }

// Appends identity, class, address, device, dtype, shape and strides of a tensor; false where it cannot be described.
bool describe_into(Record& record, Describer describe, nb::handle tensor) {
  ktrain::dlpack::Tensor form{};
  if (describe(tensor.ptr(), &form) != 0) {
    PyErr_Clear();
    return false;
  }
  const std::int64_t dtype = form.dtype_code | form.dtype_bits << 8 | form.dtype_lanes << 16;
  record.insert(record.end(),
                {word_of(tensor), word_of(tensor.type()),
                 reinterpret_cast<std::int64_t>(form.data) + static_cast<std::int64_t>(form.byte_offset),
                 static_cast<std::int64_t>(form.device_type) << 32 | form.device_id, dtype << 32 | form.ndim});
  record.insert(record.end(), form.shape, form.shape + form.ndim);
  if (form.ndim > 0) {
    record.insert(record.end(), form.strides, form.strides + form.ndim);
  }
  return true;
}

nb::bytes to_bytes(const Record& record) {
  return nb::bytes(reinterpret_cast<const char*>(record.data()), record.size() * sizeof(std::int64_t));
}

// A record of all tensors; equal records say that nothing but values changed. None where the capsule has no such
// function or a tensor cannot be described.
nb::object describe_tensors(nb::handle capsule, nb::tuple tensors) {
  const Describer describe = describer(capsule);
  if (describe == nullptr) {
    return nb::none();
  }
  Record record;
  record.reserve(tensors.size() * 10);  // of tensors of two dimensions
  for (const nb::handle tensor : tensors) {
    if (!describe_into(record, describe, tensor)) {
      return nb::none();
    }
  }
  return to_bytes(record);
}

// The same of tensors some of which are of a class around others: of these, identity, class and specification, and
// then what is inside. With the record, all tensors with the inner ones in the place of those around them. None too where
// one of these is of no class in `plain`.
nb::object describe_parts(nb::handle capsule, nb::tuple tensors, nb::handle around, nb::str specification,
                          nb::str inside, nb::tuple plain) {
  const Describer describe = describer(capsule);
  if (describe == nullptr || PyType_Check(around.ptr()) == 0) {
    return nb::none();
  }
  auto* const kind = reinterpret_cast<PyTypeObject*>(around.ptr());
  Record record;
  record.reserve(tensors.size() * 13);
  nb::list parts;
  for (const nb::handle tensor : tensors) {
    nb::object part = nb::borrow(tensor);
    if (PyObject_TypeCheck(tensor.ptr(), kind) != 0) {
      const nb::object spec = tensor.attr(specification);
      record.insert(record.end(), {word_of(tensor), word_of(tensor.type()), word_of(spec)});
      part = tensor.attr(inside);
    }
    const auto is_class_of_part = [&part](nb::handle one) { return one.ptr() == part.type().ptr(); };
    if (std::none_of(plain.begin(), plain.end(), is_class_of_part) || !describe_into(record, describe, part)) {
      return nb::none();
    }
    parts.append(part);
  }
  return nb::make_tuple(to_bytes(record), parts);
}

int prefault(nb::handle target, unsigned num_threads) {
  const BufferView view(target, PyBUF_WRITABLE);
  const nb::gil_scoped_release release;
  return ktrain::prefault(view.writable(), num_threads);
}

// A Mapping that Python's buffers are taken from; it lives as long as the last of them.
struct MappedFile : ktrain::Mapping {
  using Mapping::Mapping;
};

int lend_mapped_file(PyObject* object, Py_buffer* view, int flags) noexcept {
  const ktrain::Mapping& mapping = *nb::inst_ptr<MappedFile>(nb::handle(object));
  const std::span<std::byte> bytes = mapping.bytes();
  return PyBuffer_FillInfo(view, object, bytes.data(), static_cast<Py_ssize_t>(bytes.size()),
                           mapping.is_writable() ? 0 : 1, flags);
}

PyType_Slot mapped_file_slots[] = {
    {Py_bf_getbuffer, reinterpret_cast<void*>(&lend_mapped_file)},
    {0, nullptr},
};

// The mapping, or the errno that says why there is none.
nb::object map_file(int fd, std::size_t nbytes, bool is_writable) {
  auto mapping = std::make_unique<MappedFile>(fd, nbytes, is_writable);
  if (mapping->error() != 0) {
    return nb::cast(mapping->error());
  }
  return nb::cast(mapping.release(), nb::rv_policy::take_ownership);
}

}  // namespace

NB_MODULE(_native, module) {
  nb::set_leak_warnings(false);  // a mapping may live until the process ends: a slot's, by its last view
  module.def("crc64", &crc64, nb::arg("data"), nb::arg("value"));
  module.def("crc64_with", &crc64_with, nb::arg("variant"), nb::arg("data"), nb::arg("value"));
  module.def("crc64_combine", &ktrain::crc64_combine, nb::arg("first"), nb::arg("second"), nb::arg("second_nbytes"));
  module.def("variants", &variants);
  module.def("isa", [] { return ktrain::best_variant().name; });
  module.def("digest_chunks", &digest_chunks, nb::arg("data"), nb::arg("chunk_nbytes"), nb::arg("num_threads"));
  module.def("copy_digest", &copy_digest, nb::arg("target"), nb::arg("source"), nb::arg("chunk_nbytes"),
             nb::arg("num_threads"));
  module.def("gather_digest", &gather_digest, nb::arg("target"), nb::arg("columns"), nb::arg("chunk_nbytes"),
             nb::arg("num_threads"));
  module.def("prove_scatter", &prove_scatter, nb::arg("source"), nb::arg("begin"), nb::arg("chunk_nbytes"),
             nb::arg("expected"), nb::arg("columns"), nb::arg("num_threads"));
  module.def("gather", &gather, nb::arg("target"), nb::arg("columns"), nb::arg("num_threads"));
  module.def("digest_pieces", &digest_pieces, nb::arg("addresses"), nb::arg("sizes"), nb::arg("num_threads"));
  module.def("describe_tensors", &describe_tensors, nb::arg("exchange").none(), nb::arg("tensors"));
  module.def("describe_parts", &describe_parts, nb::arg("exchange").none(), nb::arg("tensors"), nb::arg("around"),
             nb::arg("specification"), nb::arg("inside"), nb::arg("plain"));
  module.def("prefault", &prefault, nb::arg("target"), nb::arg("num_threads"));
  nb::class_<MappedFile>(module, "MappedFile", nb::type_slots(mapped_file_slots), nb::is_weak_referenceable())
      .def("__len__", [](const MappedFile& mapping) { return mapping.bytes().size(); });
  module.def("map_file", &map_file, nb::arg("fd"), nb::arg("nbytes"), nb::arg("is_writable"));
  module.def("back_huge", &ktrain::back_huge, nb::arg("fd"), nb::arg("begin"), nb::arg("end"), nb::arg("num_threads"),
             nb::call_guard<nb::gil_scoped_release>());
  module.def("set_parent_death_signal", &ktrain::set_parent_death_signal, nb::arg("signum"));
}
