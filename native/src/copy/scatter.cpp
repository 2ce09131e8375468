#include "ktrain/scatter.h"
#include "ktrain/copy.h"
#include "ktrain/digest.h"
#include "ktrain/parallel.h"
#include "ktrain/streaming.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

namespace ktrain {
namespace {

// From this size on a run is worth the fences and odd ends of stores past the caches.
constexpr std::uint64_t kLargeRunNbytes = std::uint64_t{2} << 10;

// What one thread takes at a time.
constexpr std::size_t kGroupNbytes = std::size_t{1} << 20;

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

// A chunk and how far it is digested.
class Chunk {
 public:
  Chunk() = default;
  Chunk(std::size_t index, std::span<const std::byte> bytes) noexcept : index_(index), bytes_(bytes) {}

  std::size_t index() const noexcept { return index_; }
  std::span<const std::byte> bytes() const noexcept { return bytes_; }

  // Copies past the caches, and digests of this chunk as much meanwhile as there is left.
  void stream_beside(std::byte* target, const std::byte* source, std::size_t nbytes) noexcept {
    const std::size_t both = std::min(nbytes, bytes_.size() - done_);
    if (both != 0) {
      state_ = best_variant().stream_update(state_, bytes_.data() + done_, target, source, both);
      done_ += both;
    }
    if (both < nbytes) {
      best_variant().stream(target + both, source + both, nbytes - both);
    }
  }

  // Digests what is left.
  std::uint64_t digest() noexcept {
    state_ = best_variant().update(state_, bytes_.data() + done_, bytes_.size() - done_);
    done_ = bytes_.size();
    return ~state_;
  }

 private:
  std::size_t index_ = 0;
  std::span<const std::byte> bytes_;
  std::size_t done_ = 0;
  std::uint64_t state_ = ~std::uint64_t{0};
};

// Copies what one row wants of [begin, end) of the payload, whose bytes are at `chunk`; `next` is digested meanwhile.
void copy_row(const Runs& runs, std::size_t row, const std::byte* chunk, std::uint64_t begin, std::uint64_t end,
              bool is_streamed, Chunk& next) noexcept {
  const std::uint64_t first = runs.offset[row];
  const std::uint64_t step = runs.source_step[row];
  const std::uint64_t nbytes = runs.nbytes[row];
  const bool is_run_streamed = is_streamed && nbytes >= kLargeRunNbytes;
  for (std::uint64_t run = step == 0 || begin <= first ? 0 : (begin - first) / step; run < runs.count[row]; ++run) {
    const std::uint64_t at = first + run * step;
    if (at >= end) {
      return;
    }
    const std::uint64_t from = std::max(at, begin);
    const std::uint64_t to = std::min(at + nbytes, end);
    if (from < to) {
      auto* target = reinterpret_cast<std::byte*>(runs.address[row] + run * runs.target_step[row] + (from - at));
      if (is_run_streamed) {
        next.stream_beside(target, chunk + (from - begin), to - from);
      } else {
        std::memcpy(target, chunk + (from - begin), to - from);
      }
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
  const bool is_streamed = is_worth_streaming(source.size());
  const std::vector<std::uint64_t> reach = reaches(runs);
  const std::size_t group = std::max<std::size_t>(1, kGroupNbytes / chunk_nbytes);
  const std::size_t num_groups = num_chunks(is_bad.size(), group);
  parallel_take(num_groups, num_threads, [&](const auto& take) noexcept {
    std::size_t item = take();
    std::size_t index = item * group;
    // The next chunk of this thread; one without bytes when there is none. Neighbours, as long as its group lasts.
    const auto take_chunk = [&]() noexcept {
      if (item < num_groups && index == std::min((item + 1) * group, is_bad.size())) {
        item = take();
        index = item * group;
      }
      if (item >= num_groups) {
        return Chunk();
      }
      const std::size_t at = index * chunk_nbytes;
      return Chunk(index++, source.subspan(at, std::min(chunk_nbytes, source.size() - at)));
    };
    Chunk next = take_chunk();
    while (!next.bytes().empty()) {
      Chunk chunk = next;
      is_bad[chunk.index()] = chunk.digest() != expected[chunk.index()] ? 1 : 0;
      next = take_chunk();
      if (is_bad[chunk.index()] != 0) {
        continue;
      }
      // The chunk is proven, and in the cache. While it is copied from there, the next one comes and is digested.
      const std::uint64_t from = begin + chunk.index() * chunk_nbytes;
      const std::uint64_t to = from + chunk.bytes().size();
      const auto first = std::upper_bound(reach.begin(), reach.end(), from) - reach.begin();
      for (auto row = static_cast<std::size_t>(first); row < reach.size() && runs.offset[row] < to; ++row) {
        if (!is_empty(runs, row) && end_of(runs, row) > from) {
          copy_row(runs, row, chunk.bytes().data(), from, to, is_streamed, next);
        }
      }
    }
    fence_stores();
  });
}

}  // namespace ktrain
