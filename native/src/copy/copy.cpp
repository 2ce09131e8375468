#include "ktrain/copy.h"
#include "ktrain/digest.h"
#include "ktrain/parallel.h"
#include "ktrain/streaming.h"

#include <algorithm>
#include <cstring>

namespace ktrain {
namespace {

// Bytes that stay in the nearest caches between their digest and their copy.
constexpr std::size_t kBlockNbytes = std::size_t{64} << 10;

// What one thread takes of a gather at a time.
constexpr std::size_t kGatherNbytes = std::size_t{1} << 20;

// Small pieces that one thread digests before it asks for more.
constexpr std::size_t kPiecesAtOnce = 64;

// From this size on a piece of a gather is worth a digest of its own.
constexpr std::size_t kLargePieceNbytes = std::size_t{2} << 10;

// Copies and digests. A copy for the cache is digested first: that fetches the block, the copy then reads it there.
std::uint64_t copy_and_update(std::uint64_t state, std::span<std::byte> target, const std::byte* source,
                              bool is_streamed) noexcept {
  if (is_streamed) {
    return best_variant().copy_update(state, target.data(), source, target.size());
  }
  const UpdateFunction update = best_variant().update;
  for (std::size_t at = 0; at < target.size(); at += kBlockNbytes) {
    const std::size_t nbytes = std::min(kBlockNbytes, target.size() - at);
    state = update(state, source + at, nbytes);
    std::memcpy(target.data() + at, source + at, nbytes);
  }
  return state;
}

// Calls work(i) for every chunk. A thread takes neighbours, some more at a time: to ask for work and to wait for stores
// that go past the caches takes as long as to copy some kilobytes.
template <typename Work>
void parallel_for_chunks(std::size_t num, std::size_t chunk_nbytes, unsigned num_threads, const Work& work) {
  const std::size_t group = std::max<std::size_t>(1, kGatherNbytes / chunk_nbytes);
  parallel_for(num_chunks(num, group), num_threads, [&](std::size_t item) noexcept {
    const std::size_t end = std::min((item + 1) * group, num);
    for (std::size_t chunk = item * group; chunk < end; ++chunk) {
      work(chunk);
    }
    fence_stores();
  });
}

}  // namespace

void digest_chunks(std::span<const std::byte> source, std::size_t chunk_nbytes, unsigned num_threads,
                   std::span<std::uint64_t> digests) {
  parallel_for(digests.size(), num_threads, [&](std::size_t chunk) noexcept {
    const std::size_t begin = chunk * chunk_nbytes;
    digests[chunk] = crc64(source.data() + begin, std::min(chunk_nbytes, source.size() - begin));
  });
}

void copy_digest(std::span<std::byte> target, std::span<const std::byte> source, std::size_t chunk_nbytes,
                 unsigned num_threads, std::span<std::uint64_t> digests) {
  const bool is_streamed = is_worth_streaming(target.size());
  parallel_for_chunks(digests.size(), chunk_nbytes, num_threads, [&](std::size_t chunk) noexcept {
    const std::size_t begin = chunk * chunk_nbytes;
    const std::size_t nbytes = std::min(chunk_nbytes, source.size() - begin);
    const std::span<std::byte> to = target.subspan(begin, nbytes);
    digests[chunk] = ~copy_and_update(~std::uint64_t{0}, to, source.data() + begin, is_streamed);
  });
}

SegmentCheck check_segments(const Segments& segments, std::size_t target_nbytes) noexcept {
  const std::size_t num_segments = segments.address.size();
  if (segments.nbytes.size() != num_segments || segments.offset.size() != num_segments) {
    return {SegmentFault::kLengthsDiffer, 0};
  }
  std::uint64_t end_before = 0;
  for (std::size_t i = 0; i < num_segments; ++i) {
    if (segments.offset[i] > target_nbytes || segments.nbytes[i] > target_nbytes - segments.offset[i]) {
      return {SegmentFault::kOutsideTarget, i};
    }
    if (segments.offset[i] < end_before) {
      return {SegmentFault::kNotSorted, i};
    }
    end_before = segments.offset[i] + segments.nbytes[i];
  }
  return {SegmentFault::kNone, 0};
}

namespace {

// First segment that ends behind `position`: ends grow as offsets do.
std::size_t find_segment(const Segments& segments, std::size_t position) noexcept {
  std::size_t low = 0;
  std::size_t high = segments.offset.size();
  while (low < high) {
    const std::size_t middle = low + (high - low) / 2;
    if (segments.offset[middle] + segments.nbytes[middle] > position) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// Fills [begin, end) of the target from the segments that touch it and returns the digest of the whole region.
//
// Large pieces are digested on their way. Small ones and gaps wait in the target, and are digested there
// together: the digest needs long runs to be fast.
std::uint64_t gather_region(std::span<std::byte> target, const Segments& segments, std::size_t begin,
                            std::size_t end, bool is_streamed) noexcept {
  const UpdateFunction update = best_variant().update;
  std::uint64_t state = ~std::uint64_t{0};
  std::size_t digested = begin;  // bytes in front of it are in `state`
  for (std::size_t i = find_segment(segments, begin); i < segments.offset.size() && segments.offset[i] < end; ++i) {
    const std::size_t from = std::max<std::size_t>(segments.offset[i], begin);
    const std::size_t to = std::min<std::size_t>(segments.offset[i] + segments.nbytes[i], end);
    if (from >= to) {
      continue;
    }
    const std::byte* source = reinterpret_cast<const std::byte*>(segments.address[i]) + (from - segments.offset[i]);
    if (to - from >= kLargePieceNbytes) {
      state = update(state, target.data() + digested, from - digested);
      state = copy_and_update(state, target.subspan(from, to - from), source, is_streamed);
      digested = to;
    } else {
      std::memcpy(target.data() + from, source, to - from);
      if (to - digested >= kBlockNbytes) {
        state = update(state, target.data() + digested, to - digested);
        digested = to;
      }
    }
  }
  return ~update(state, target.data() + digested, end - digested);
}

}  // namespace

void gather_digest(std::span<std::byte> target, const Segments& segments, std::size_t chunk_nbytes,
                   unsigned num_threads, std::span<std::uint64_t> digests) {
  const bool is_streamed = is_worth_streaming(target.size());
  parallel_for_chunks(digests.size(), chunk_nbytes, num_threads, [&](std::size_t chunk) noexcept {
    const std::size_t begin = chunk * chunk_nbytes;
    const std::size_t end = begin + std::min(chunk_nbytes, target.size() - begin);
    digests[chunk] = gather_region(target, segments, begin, end, is_streamed);
  });
}

void gather(std::span<std::byte> target, const Segments& segments, unsigned num_threads) {
  std::size_t nbytes = 0;
  for (const std::uint64_t length : segments.nbytes) {
    nbytes += length;
  }
  if (nbytes <= kGatherNbytes) {  // not worth a look at every region of a large target
    for (std::size_t i = 0; i < segments.offset.size(); ++i) {
      if (segments.nbytes[i] > 0) {
        std::memcpy(target.data() + segments.offset[i], reinterpret_cast<const std::byte*>(segments.address[i]),
                    segments.nbytes[i]);
      }
    }
    return;
  }
  const StreamFunction stream = best_variant().stream;
  const bool is_streamed = is_worth_streaming(nbytes);
  // Regions of the target, as in gather_digest: one large segment is shared by all threads.
  parallel_for(num_chunks(target.size(), kGatherNbytes), num_threads, [&](std::size_t region) noexcept {
    const std::size_t begin = region * kGatherNbytes;
    const std::size_t end = begin + std::min(kGatherNbytes, target.size() - begin);
    for (std::size_t i = find_segment(segments, begin); i < segments.offset.size() && segments.offset[i] < end; ++i) {
      const std::size_t from = std::max<std::size_t>(segments.offset[i], begin);
      const std::size_t to = std::min<std::size_t>(segments.offset[i] + segments.nbytes[i], end);
      if (from < to) {
        const auto* source = reinterpret_cast<const std::byte*>(segments.address[i]) + (from - segments.offset[i]);
        if (is_streamed && to - from >= kLargePieceNbytes) {
          stream(target.data() + from, source, to - from);
        } else {
          std::memcpy(target.data() + from, source, to - from);
        }
      }
    }
    fence_stores();
  });
}

void digest_pieces(std::span<const std::uint64_t> address, std::span<const std::uint64_t> nbytes,
                   unsigned num_threads, std::span<std::uint64_t> digests) {
  parallel_for(num_chunks(address.size(), kPiecesAtOnce), num_threads, [&](std::size_t group) noexcept {
    const std::size_t end = std::min(address.size(), (group + 1) * kPiecesAtOnce);
    for (std::size_t i = group * kPiecesAtOnce; i < end; ++i) {
      digests[i] = crc64(reinterpret_cast<const std::byte*>(address[i]), nbytes[i]);
    }
  });
}

}  // namespace ktrain
