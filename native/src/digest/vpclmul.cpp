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

// Long runs are gone through some pages side by side: the processor has to find where each of them lies, which takes as
// long as to read a part of it, and it does so for several at a time.
constexpr std::size_t kPageNbytes = 4096;
constexpr std::size_t kPagesAtOnce = 4;
constexpr std::size_t kPagesNbytes = kPagesAtOnce * kPageNbytes;

constexpr std::uint64_t kFoldStrideFirst = power_of_x(8 * kStrideNbytes + 63);
constexpr std::uint64_t kFoldStrideLast = power_of_x(8 * kStrideNbytes - 1);
constexpr std::uint64_t kFoldVectorFirst = power_of_x(8 * kVectorNbytes + 63);
constexpr std::uint64_t kFoldVectorLast = power_of_x(8 * kVectorNbytes - 1);
constexpr std::uint64_t kFoldLaneFirst = power_of_x(8 * kLaneNbytes + 63);
constexpr std::uint64_t kFoldLaneLast = power_of_x(8 * kLaneNbytes - 1);
constexpr std::uint64_t kFoldPairFirst = power_of_x(8 * 2 * kVectorNbytes + 63);
constexpr std::uint64_t kFoldPairLast = power_of_x(8 * 2 * kVectorNbytes - 1);
constexpr std::uint64_t kFoldPageFirst = power_of_x(8 * kPageNbytes + 63);
constexpr std::uint64_t kFoldPageLast = power_of_x(8 * kPageNbytes - 1);
constexpr int kXorOfThree = 0x96;

inline __m512i load(const std::byte* data) noexcept { return _mm512_loadu_si512(data); }

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

// The four lanes folded into the last of them.
inline __m128i last_lane(__m512i vector) noexcept {
  const __m128i lane_constants = constants_of(kFoldLaneFirst, kFoldLaneLast);
  __m128i lane = _mm512_extracti32x4_epi32(vector, 0);
  lane = fold_lane(lane, lane_constants, _mm512_extracti32x4_epi32(vector, 1));
  lane = fold_lane(lane, lane_constants, _mm512_extracti32x4_epi32(vector, 2));
  return fold_lane(lane, lane_constants, _mm512_extracti32x4_epi32(vector, 3));
}

// A lane stands for sixteen bytes that follow an empty register; the tables do the last division.
inline std::uint64_t state_of(__m128i lane) noexcept {
  alignas(16) std::byte bytes[kLaneNbytes];
  _mm_store_si128(reinterpret_cast<__m128i*>(bytes), lane);
  return update_portable(0, bytes, kLaneNbytes);
}

// What is digested stays where it is.
struct Stay {
  void vector(std::size_t, __m512i) const noexcept {}
  std::uint64_t rest(std::uint64_t state, std::size_t, const std::byte* data, std::size_t nbytes) const noexcept {
    return update_portable(state, data, nbytes);
  }
};

// What is digested goes to a target on the border of a vector, past the caches.
struct Stream {
  std::byte* target;

  void vector(std::size_t at, __m512i value) const noexcept {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(target + at), value);
  }
  std::uint64_t rest(std::uint64_t state, std::size_t at, const std::byte* data, std::size_t nbytes) const noexcept {
    return copy_update_portable(state, target + at, data, nbytes);
  }
};

// Beside what is digested as much is copied, to a target on the border of a vector, past the caches.
struct StreamBeside {
  std::byte* target;
  const std::byte* source;

  void vector(std::size_t at, __m512i) const noexcept {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(target + at), load(source + at));
  }
  std::uint64_t rest(std::uint64_t state, std::size_t at, const std::byte* data, std::size_t nbytes) const noexcept {
    std::memcpy(target + at, source + at, nbytes);
    return update_portable(state, data, nbytes);
  }
};

// There are at least two strides.
template <typename Use>
std::uint64_t update_vectors(std::uint64_t state, const std::byte* data, std::size_t nbytes, Use use) noexcept {
  const __m512i stride_constants = _mm512_broadcast_i32x4(constants_of(kFoldStrideFirst, kFoldStrideLast));
  const __m512i vector_constants = _mm512_broadcast_i32x4(constants_of(kFoldVectorFirst, kFoldVectorLast));

  const auto take = [&](std::size_t at) noexcept {
    const __m512i value = load(data + at);
    use.vector(at, value);
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
  return use.rest(state_of(last_lane(vector)), at, data + at, nbytes - at);
}

// Some whole pages side by side.
template <typename Use>
std::uint64_t update_pages(std::uint64_t state, const std::byte* data, Use use) noexcept {
  const __m512i pair_constants = _mm512_broadcast_i32x4(constants_of(kFoldPairFirst, kFoldPairLast));
  const __m512i vector_constants = _mm512_broadcast_i32x4(constants_of(kFoldVectorFirst, kFoldVectorLast));
  const __m128i page_constants = constants_of(kFoldPageFirst, kFoldPageLast);

  const auto take = [&](std::size_t at) noexcept {
    const __m512i value = load(data + at);
    use.vector(at, value);
    return value;
  };
  __m512i vectors[kPagesAtOnce][2];
  for (std::size_t page = 0; page < kPagesAtOnce; ++page) {
    vectors[page][0] = take(page * kPageNbytes);
    vectors[page][1] = take(page * kPageNbytes + kVectorNbytes);
  }
  const __m128i start = _mm_cvtsi64_si128(static_cast<long long>(state));
  vectors[0][0] = _mm512_xor_si512(vectors[0][0], _mm512_zextsi128_si512(start));
  for (std::size_t at = 2 * kVectorNbytes; at < kPageNbytes; at += 2 * kVectorNbytes) {
    for (std::size_t page = 0; page < kPagesAtOnce; ++page) {
      const std::size_t from = page * kPageNbytes + at;
      vectors[page][0] = fold(vectors[page][0], pair_constants, take(from));
      vectors[page][1] = fold(vectors[page][1], pair_constants, take(from + kVectorNbytes));
    }
  }
  __m128i lane = last_lane(fold(vectors[0][0], vector_constants, vectors[0][1]));
  for (std::size_t page = 1; page < kPagesAtOnce; ++page) {
    const __m128i next = last_lane(fold(vectors[page][0], vector_constants, vectors[page][1]));
    lane = fold_lane(lane, page_constants, next);
  }
  return state_of(lane);
}

}  // namespace

std::uint64_t update_vpclmul(std::uint64_t state, const std::byte* data, std::size_t nbytes) noexcept {
  if (nbytes < 2 * kStrideNbytes) {
    return update_pclmul(state, data, nbytes);
  }
  std::size_t at = 0;
  for (; nbytes - at >= kPagesNbytes; at += kPagesNbytes) {
    state = update_pages(state, data + at, Stay{});
  }
  if (nbytes - at < 2 * kStrideNbytes) {
    return update_pclmul(state, data + at, nbytes - at);
  }
  return update_vectors(state, data + at, nbytes - at, Stay{});
}

std::uint64_t copy_update_vpclmul(std::uint64_t state, std::byte* target, const std::byte* source,
                                  std::size_t nbytes) noexcept {
  const std::size_t lead = bytes_to_line(target);
  if (nbytes < lead + 2 * kStrideNbytes) {
    return copy_update_pclmul(state, target, source, nbytes);
  }
  state = copy_update_portable(state, target, source, lead);
  std::size_t at = lead;
  for (; nbytes - at >= kPagesNbytes; at += kPagesNbytes) {
    state = update_pages(state, source + at, Stream{target + at});
  }
  if (nbytes - at < 2 * kStrideNbytes) {
    return copy_update_pclmul(state, target + at, source + at, nbytes - at);
  }
  return update_vectors(state, source + at, nbytes - at, Stream{target + at});
}

std::uint64_t stream_update_vpclmul(std::uint64_t state, const std::byte* data, std::byte* target,
                                    const std::byte* source, std::size_t nbytes) noexcept {
  const std::size_t lead = bytes_to_line(target);
  if (nbytes < lead + 2 * kStrideNbytes) {
    std::memcpy(target, source, nbytes);
    return update_vpclmul(state, data, nbytes);
  }
  std::memcpy(target, source, lead);
  state = update_portable(state, data, lead);
  std::size_t at = lead;
  for (; nbytes - at >= kPagesNbytes; at += kPagesNbytes) {
    state = update_pages(state, data + at, StreamBeside{target + at, source + at});
  }
  if (nbytes - at < 2 * kStrideNbytes) {
    std::memcpy(target + at, source + at, nbytes - at);
    return update_vpclmul(state, data + at, nbytes - at);
  }
  return update_vectors(state, data + at, nbytes - at, StreamBeside{target + at, source + at});
}

void stream_avx512(std::byte* target, const std::byte* source, std::size_t nbytes) noexcept {
  const std::size_t lead = bytes_to_line(target);
  if (nbytes < lead + kVectorNbytes) {
    std::memcpy(target, source, nbytes);
    return;
  }
  std::memcpy(target, source, lead);
  std::size_t at = lead;
  for (; nbytes - at >= kPagesNbytes; at += kPagesNbytes) {
    for (std::size_t in_page = at; in_page < at + kPageNbytes; in_page += kVectorNbytes) {
      for (std::size_t page = 0; page < kPagesAtOnce; ++page) {
        const std::size_t offset = in_page + page * kPageNbytes;
        _mm512_stream_si512(reinterpret_cast<__m512i*>(target + offset), load(source + offset));
      }
    }
  }
  for (; nbytes - at >= kVectorNbytes; at += kVectorNbytes) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(target + at), load(source + at));
  }
  std::memcpy(target + at, source + at, nbytes - at);
}

}  // namespace ktrain
