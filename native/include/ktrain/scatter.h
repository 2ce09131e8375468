// The opposite of a gather: bytes of a payload to where they belong in memory, each chunk proven before it is copied.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace ktrain {

// Row i is `count` runs of `nbytes` bytes: the first one from `offset` of the payload to `address`, every next one
// `source_step` and `target_step` bytes further. A row with one run is a plain segment; more are the rows of a box.
struct Runs {
  std::span<const std::uint64_t> address;
  std::span<const std::uint64_t> nbytes;
  std::span<const std::uint64_t> offset;
  std::span<const std::uint64_t> count;
  std::span<const std::uint64_t> source_step;
  std::span<const std::uint64_t> target_step;
};

// What is wrong with a table of runs, if anything.
enum class RunFault { kNone, kLengthsDiffer, kNotSorted, kOverlap, kTooLong };

struct RunCheck {
  RunFault fault;
  std::size_t index;  // of the first row at fault
};

// Rows are sorted by offset; they may overlap in the payload. The runs of one row do not overlap.
RunCheck check_runs(const Runs& runs) noexcept;

// Digests every chunk of `source`, which holds the payload's bytes from `begin` on (where a chunk begins), and copies
// what the runs want of the chunks that match `expected`. Nothing of another chunk is written anywhere. Runs that
// leave the source are copied as far as it goes.
//
// `expected` and `is_bad` have one entry for each chunk of the source. Targets of different runs do not overlap.
void prove_scatter(std::span<const std::byte> source, std::uint64_t begin, std::size_t chunk_nbytes,
                   std::span<const std::uint64_t> expected, const Runs& runs, unsigned num_threads,
                   std::span<std::uint8_t> is_bad);

}  // namespace ktrain
