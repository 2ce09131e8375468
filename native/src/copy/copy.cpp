#include "ktrain/copy.h"
#include "ktrain/digest.h"
#include "ktrain/parallel.h"

#include <algorithm>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace ktrain {
namespace {

// Bytes that stay in the nearest caches between their digest and their copy.
constexpr std::size_t kBlockNbytes = std::size_t{64} << 10;

// Below this size a target may still be in cache when its reader comes; above, stores go past the caches,
// which spares reading the target's lines first.
constexpr std::size_t kStreamNbytes = std::size_t{4} << 20;

#if defined(__SSE2__)
// Stores past the caches. fence_stores() must follow before another thread reads.
void copy_streaming(std::byte* target, const std::byte* source, std::size_t nbytes) noexcept {
  const std::size_t lead = std::min(nbytes, (64 - reinterpret_cast<std::uintptr_t>(target) % 64) % 64);
  std::memcpy(target, source, lead);
  target += lead;
  source += lead;
  nbytes -= lead;
  for (; nbytes >= 64; target += 64, source += 64, nbytes -= 64) {
    const auto* from = reinterpret_cast<const __m128i*>(source);
    auto* to = reinterpret_cast<__m128i*>(target);
    const __m128i a = _mm_loadu_si128(from);
    const __m128i b = _mm_loadu_si128(from + 1);
    const __m128i c = _mm_loadu_si128(from + 2);
    const __m128i d = _mm_loadu_si128(from + 3);
    _mm_stream_si128(to, a);
    _mm_stream_si128(to + 1, b);
    _mm_stream_si128(to + 2, c);
    _mm_stream_si128(to + 3, d);
  }
  std::memcpy(target, source, nbytes);
}

void fence_stores() noexcept { _mm_sfence(); }
#else
void copy_streaming(std::byte* target, const std::byte* source, std::size_t nbytes) noexcept {
  std::memcpy(target, source, nbytes);
}

void fence_stores() noexcept {}
#endif

using CopyFunction = void (*)(std::byte*, const std::byte*, std::size_t) noexcept;

void copy_cached(std::byte* target, const std::byte* source, std::size_t nbytes) noexcept {
  std::memcpy(target, source, nbytes);
}

CopyFunction choose_copy(std::size_t nbytes) noexcept {
  return nbytes >= kStreamNbytes ? copy_streaming : copy_cached;
}

// The digest runs first and fetches the block, the copy then reads it from cache.
std::uint64_t copy_and_update(std::uint64_t state, std::span<std::byte> target, const std::byte* source,
                              CopyFunction copy) noexcept {
  const UpdateFunction update = best_variant().update;
  for (std::size_t at = 0; at < target.size(); at += kBlockNbytes) {
    const std::size_t nbytes = std::min(kBlockNbytes, target.size() - at);
    state = update(state, source + at, nbytes);
    copy(target.data() + at, source + at, nbytes);
  }
  return state;
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
  const CopyFunction copy = choose_copy(target.size());
  parallel_for(digests.size(), num_threads, [&](std::size_t chunk) noexcept {
    const std::size_t begin = chunk * chunk_nbytes;
    const std::size_t nbytes = std::min(chunk_nbytes, source.size() - begin);
    digests[chunk] = ~copy_and_update(~std::uint64_t{0}, target.subspan(begin, nbytes), source.data() + begin, copy);
    fence_stores();
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

// Fills one region of the target from the segments that touch it and returns the register after it.
class RegionGather {
 public:
  RegionGather(std::span<std::byte> target, const Segments& segments, CopyFunction copy) noexcept
      : target_(target), segments_(segments), copy_(copy) {}

  std::uint64_t run(std::size_t begin, std::size_t end) noexcept {
    // First segment that ends behind `begin`: ends grow as offsets do.
    std::size_t low = 0;
    std::size_t high = segments_.offset.size();
    while (low < high) {
      const std::size_t middle = low + (high - low) / 2;
      if (end_of(middle) > begin) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    index_ = low;
    std::uint64_t state = ~std::uint64_t{0};
    for (std::size_t at = begin; at < end; at += kBlockNbytes) {
      state = gather_block(state, at, std::min(at + kBlockNbytes, end));
    }
    return ~state;
  }

 private:
  std::size_t end_of(std::size_t i) const noexcept { return segments_.offset[i] + segments_.nbytes[i]; }

  const std::byte* source_at(std::size_t i, std::size_t position) const noexcept {
    return reinterpret_cast<const std::byte*>(segments_.address[i]) + (position - segments_.offset[i]);
  }

  std::uint64_t gather_block(std::uint64_t state, std::size_t begin, std::size_t end) noexcept {
    const std::size_t num_segments = segments_.offset.size();
    while (index_ < num_segments && end_of(index_) <= begin) {
      ++index_;
    }
    if (index_ < num_segments && segments_.offset[index_] <= begin && end_of(index_) >= end) {
      return copy_and_update(state, target_.subspan(begin, end - begin), source_at(index_, begin), copy_);
    }
    // Several pieces or gaps: assemble the block in the target, digest it there while it is in cache.
    for (std::size_t i = index_; i < num_segments && segments_.offset[i] < end; ++i) {
      const std::size_t from = std::max<std::size_t>(segments_.offset[i], begin);
      const std::size_t to = std::min(end_of(i), end);
      if (from < to) {
        std::memcpy(target_.data() + from, source_at(i, from), to - from);
      }
    }
    return best_variant().update(state, target_.data() + begin, end - begin);
  }

  std::span<std::byte> target_;
  const Segments& segments_;
  CopyFunction copy_;
  std::size_t index_ = 0;  // first segment that may still touch the next block
};

}  // namespace

void gather_digest(std::span<std::byte> target, const Segments& segments, std::size_t chunk_nbytes,
                   unsigned num_threads, std::span<std::uint64_t> digests) {
  const CopyFunction copy = choose_copy(target.size());
  parallel_for(digests.size(), num_threads, [&](std::size_t chunk) noexcept {
    const std::size_t begin = chunk * chunk_nbytes;
    const std::size_t end = begin + std::min(chunk_nbytes, target.size() - begin);
    digests[chunk] = RegionGather(target, segments, copy).run(begin, end);
    fence_stores();
  });
}

}  // namespace ktrain
