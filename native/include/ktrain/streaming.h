// Copies that go past the caches, for targets that nobody reads soon: that spares reading the target's lines first.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace ktrain {

// Below this size a target may still be in cache when its reader comes; above, stores go past the caches.
inline constexpr std::size_t kStreamNbytes = std::size_t{4} << 20;

// Copies past the caches. fence_stores() must follow before another thread reads.
#if defined(__SSE2__)
inline void copy_streaming(std::byte* target, const std::byte* source, std::size_t nbytes) noexcept {
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

inline void fence_stores() noexcept { _mm_sfence(); }
#else
inline void copy_streaming(std::byte* target, const std::byte* source, std::size_t nbytes) noexcept {
  std::memcpy(target, source, nbytes);
}

inline void fence_stores() noexcept {}
#endif

// Whether copies of that many bytes in all are better made past the caches.
inline bool is_worth_streaming(std::size_t nbytes) noexcept { return nbytes >= kStreamNbytes; }

}  // namespace ktrain
