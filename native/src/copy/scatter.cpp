#include "ktrain/scatter.h"
#include "ktrain/digest.h"
#include "ktrain/parallel.h"
#include "ktrain/streaming.h"

#include <algorithm>
#include <limits>
#include <vector>

namespace ktrain {
namespace {

// From this size on a run is worth the fences and odd ends of stores past the caches.
constexpr std::uint64_t kLargeRunNbytes = std::uint64_t{2} << 10;

constexpr std::uint64_t kMaxOffset = std::numeric_limits<std::int64_t>::max();

// Where the last run of a row ends.
std::uint64_t end_of(const Runs& runs, std::size_t row) noexcept {
  return runs.offset[row] + (runs.count[row] - 1) * runs.source_step[row] + runs.nbytes[row];
}

bool is_empty(const Runs& runs, std::size_t row) noexcept { return runs.count[row] == 0 || runs.nbytes[row] == 0; }

// For each row the greatest end of itself and the rows in front of it. Rows may overlap, so ends alone do not grow;
// these do, and a chunk finds its first row by halving.
std::vector<std::uint64_t> reaches(const Runs& runs) {
  std::vector<std::uint64_t> reach(runs.offset.size());
  std::uint64_t greatest = 0;
  for (std::size_t row = 0; row < reach.size(); ++row) {
    greatest = is_empty(runs, row) ? greatest : std::max(greatest, end_of(runs, row));
    reach[row] = greatest;
  }
  return reach;
}

// Copies what one row wants of [begin, end) of the payload, whose bytes are at `chunk`.
void copy_row(const Runs& runs, std::size_t row, const std::byte* chunk, std::uint64_t begin, std::uint64_t end,
              CopyFunction copy) noexcept {
  const std::uint64_t first = runs.offset[row];
  const std::uint64_t step = runs.source_step[row];
  const std::uint64_t nbytes = runs.nbytes[row];
  const CopyFunction copy_run = nbytes >= kLargeRunNbytes ? copy : copy_cached;
  for (std::uint64_t run = step == 0 || begin <= first ? 0 : (begin - first) / step; run < runs.count[row]; ++run) {
    const std::uint64_t at = first + run * step;
    if (at >= end) {
      return;
    }
    const std::uint64_t from = std::max(at, begin);
    const std::uint64_t to = std::min(at + nbytes, end);
    if (from < to) {
      auto* target = reinterpret_cast<std::byte*>(runs.address[row] + run * runs.target_step[row] + (from - at));
      copy_run(target, chunk + (from - begin), to - from);
    }
  }
}

}  // namespace

RunCheck check_runs(const Runs& runs) noexcept {
  const std::size_t num_rows = runs.offset.size();
  for (const auto& column : {runs.address, runs.nbytes, runs.count, runs.source_step, runs.target_step}) {
    if (column.size() != num_rows) {
      return {RunFault::kLengthsDiffer, 0};
    }
  }
  std::uint64_t before = 0;
  for (std::size_t row = 0; row < num_rows; ++row) {
    if (runs.offset[row] < before) {
      return {RunFault::kNotSorted, row};
    }
    before = runs.offset[row];
    if (is_empty(runs, row)) {
      continue;
    }
    const std::uint64_t num_steps = runs.count[row] - 1;
    if (num_steps != 0 && runs.source_step[row] < runs.nbytes[row]) {
      return {RunFault::kOverlap, row};
    }
    const std::uint64_t longest = std::max(runs.source_step[row], runs.target_step[row]);
    if (before > kMaxOffset || runs.nbytes[row] > kMaxOffset - before ||
        (num_steps != 0 && longest > (kMaxOffset - before - runs.nbytes[row]) / num_steps)) {
      return {RunFault::kTooLong, row};
    }
  }
  return {RunFault::kNone, 0};
}

void prove_scatter(std::span<const std::byte> source, std::uint64_t begin, std::size_t chunk_nbytes,
                   std::span<const std::uint64_t> expected, const Runs& runs, unsigned num_threads,
                   std::span<std::uint8_t> is_bad) {
  const CopyFunction copy = choose_copy(source.size());
  const std::vector<std::uint64_t> reach = reaches(runs);
  parallel_for(is_bad.size(), num_threads, [&](std::size_t index) noexcept {
    const std::size_t at = index * chunk_nbytes;
    const std::size_t nbytes = std::min(chunk_nbytes, source.size() - at);
    const std::byte* chunk = source.data() + at;
    is_bad[index] = crc64(chunk, nbytes) != expected[index] ? 1 : 0;
    if (is_bad[index] != 0) {
      return;
    }
    // The digest has brought the chunk into the cache, from where it is copied.
    const std::uint64_t from = begin + at;
    const std::uint64_t to = from + nbytes;
    const auto first = std::upper_bound(reach.begin(), reach.end(), from) - reach.begin();
    for (auto row = static_cast<std::size_t>(first); row < reach.size() && runs.offset[row] < to; ++row) {
      if (!is_empty(runs, row) && end_of(runs, row) > from) {
        copy_row(runs, row, chunk, from, to, copy);
      }
    }
    fence_stores();
  });
}

}  // namespace ktrain
