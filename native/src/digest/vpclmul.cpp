// The folding of pclmul.cpp, four lanes in a 64-byte register. The weights are explained there.
#include "ktrain/digest.h"

#include <cstring>

#include <immintrin.h>

namespace ktrain {
namespace {

constexpr std::size_t kLaneNbytes = 16;
constexpr std::size_t kVectorNbytes = 64;
constexpr std::size_t kNumVectors = 8;
constexpr std::size_t kStrideNbytes = kVectorNbytes * kNumVectors;

constexpr std::uint64_t kFoldStrideFirst = power_of_x(8 * kStrideNbytes + 63);
constexpr std::uint64_t kFoldStrideLast = power_of_x(8 * kStrideNbytes - 1);
constexpr std::uint64_t kFoldVectorFirst = power_of_x(8 * kVectorNbytes + 63);
constexpr std::uint64_t kFoldVectorLast = power_of_x(8 * kVectorNbytes - 1);
constexpr std::uint64_t kFoldLaneFirst = power_of_x(8 * kLaneNbytes + 63);
constexpr std::uint64_t kFoldLaneLast = power_of_x(8 * kLaneNbytes - 1);
constexpr int kXorOfThree = 0x96;

// How far in front of a copy its source is asked for: the processor's own look ahead ends with each page.
constexpr std::size_t kAheadNbytes = 2048;

inline __m512i load(const std::byte* data) noexcept { return _mm512_loadu_si512(data); }

// What is fetched may lie outside of any memory, where a pointer may not go, but a number may.
template <_mm_hint kHint>
inline void prefetch(const std::byte* data, std::size_t ahead) noexcept {
  _mm_prefetch(reinterpret_cast<const char*>(reinterpret_cast<std::uintptr_t>(data) + ahead), kHint);
}

inline std::size_t bytes_to_line(const std::byte* target) noexcept {
  return (kVectorNbytes - reinterpret_cast<std::uintptr_t>(target) % kVectorNbytes) % kVectorNbytes;
}

inline __m128i constants_of(std::uint64_t first, std::uint64_t last) noexcept {
  return _mm_set_epi64x(static_cast<long long>(last), static_cast<long long>(first));
}

inline __m512i fold(__m512i vector, __m512i constants, __m512i next) noexcept {
  const __m512i first = _mm512_clmulepi64_epi128(vector, constants, 0x00);
  const __m512i last = _mm512_clmulepi64_epi128(vector, constants, 0x11);
  return _mm512_ternarylogic_epi64(first, last, next, kXorOfThree);
}

inline __m128i fold_lane(__m128i lane, __m128i constants, __m128i next) noexcept {
  const __m128i first = _mm_clmulepi64_si128(lane, constants, 0x00);
  const __m128i last = _mm_clmulepi64_si128(lane, constants, 0x11);
  return _mm_ternarylogic_epi64(first, last, next, kXorOfThree);
}

// What is digested stays where it is.
struct Stay {
  void vector(std::size_t, const std::byte*, __m512i) const noexcept {}
  std::uint64_t rest(std::uint64_t state, std::size_t, const std::byte* data, std::size_t nbytes) const noexcept {
    return update_portable(state, data, nbytes);
  }
};

// What is digested goes to a target on the border of a vector, past the caches.
struct Stream {
  std::byte* target;

  void vector(std::size_t at, const std::byte* data, __m512i value) const noexcept {
    prefetch<_MM_HINT_T0>(data, kAheadNbytes);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(target + at), value);
  }
  std::uint64_t rest(std::uint64_t state, std::size_t at, const std::byte* data, std::size_t nbytes) const noexcept {
    return copy_update_portable(state, target + at, data, nbytes);
  }
};

// There are at least two strides.
template <typename Use>
std::uint64_t update_vectors(std::uint64_t state, const std::byte* data, std::size_t nbytes, Use use) noexcept {
  const __m512i stride_constants = _mm512_broadcast_i32x4(constants_of(kFoldStrideFirst, kFoldStrideLast));
  const __m512i vector_constants = _mm512_broadcast_i32x4(constants_of(kFoldVectorFirst, kFoldVectorLast));
  const __m128i lane_constants = constants_of(kFoldLaneFirst, kFoldLaneLast);

  const auto take = [&](std::size_t at) noexcept {
    const __m512i value = load(data + at);
    use.vector(at, data + at, value);
    return value;
  };
  __m512i vectors[kNumVectors];
  for (std::size_t i = 0; i < kNumVectors; ++i) {
    vectors[i] = take(i * kVectorNbytes);
  }
  const __m128i start = _mm_cvtsi64_si128(static_cast<long long>(state));
  vectors[0] = _mm512_xor_si512(vectors[0], _mm512_zextsi128_si512(start));
  std::size_t at = kStrideNbytes;
  for (; nbytes - at >= kStrideNbytes; at += kStrideNbytes) {
    for (std::size_t i = 0; i < kNumVectors; ++i) {
      vectors[i] = fold(vectors[i], stride_constants, take(at + i * kVectorNbytes));
    }
  }
  __m512i vector = vectors[0];
  for (std::size_t i = 1; i < kNumVectors; ++i) {
    vector = fold(vector, vector_constants, vectors[i]);
  }
  for (; nbytes - at >= kVectorNbytes; at += kVectorNbytes) {
    vector = fold(vector, vector_constants, take(at));
  }
  __m128i lane = _mm512_extracti32x4_epi32(vector, 0);
  lane = fold_lane(lane, lane_constants, _mm512_extracti32x4_epi32(vector, 1));
  lane = fold_lane(lane, lane_constants, _mm512_extracti32x4_epi32(vector, 2));
  lane = fold_lane(lane, lane_constants, _mm512_extracti32x4_epi32(vector, 3));
  alignas(16) std::byte last[kLaneNbytes];
  _mm_store_si128(reinterpret_cast<__m128i*>(last), lane);
  return use.rest(update_portable(0, last, kLaneNbytes), at, data + at, nbytes - at);
}

}  // namespace

std::uint64_t update_vpclmul(std::uint64_t state, const std::byte* data, std::size_t nbytes) noexcept {
  if (nbytes < 2 * kStrideNbytes) {
    return update_pclmul(state, data, nbytes);
  }
  return update_vectors(state, data, nbytes, Stay{});
}

std::uint64_t copy_update_vpclmul(std::uint64_t state, std::byte* target, const std::byte* source,
                                  std::size_t nbytes) noexcept {
  const std::size_t lead = bytes_to_line(target);
  if (nbytes < lead + 2 * kStrideNbytes) {
    return copy_update_pclmul(state, target, source, nbytes);
  }
  state = copy_update_portable(state, target, source, lead);
  return update_vectors(state, source + lead, nbytes - lead, Stream{target + lead});
}

void stream_avx512(std::byte* target, const std::byte* source, std::size_t nbytes, std::size_t ahead) noexcept {
  const std::size_t lead = bytes_to_line(target);
  if (nbytes < lead + kVectorNbytes) {
    std::memcpy(target, source, nbytes);
    return;
  }
  std::memcpy(target, source, lead);
  std::size_t at = lead;
  for (; nbytes - at >= kVectorNbytes; at += kVectorNbytes) {
    if (ahead != 0) {
      prefetch<_MM_HINT_T1>(source + at, ahead);
    }
    _mm512_stream_si512(reinterpret_cast<__m512i*>(target + at), load(source + at));
  }
  std::memcpy(target + at, source + at, nbytes - at);
}

}  // namespace ktrain
