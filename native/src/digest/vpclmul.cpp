// The folding of pclmul.cpp, four lanes in a 64-byte register. The weights are explained there.
#include "ktrain/digest.h"

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

inline __m512i load(const std::byte* data) noexcept { return _mm512_loadu_si512(data); }

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

}  // namespace

std::uint64_t update_vpclmul(std::uint64_t state, const std::byte* data, std::size_t nbytes) noexcept {
  if (nbytes < 2 * kStrideNbytes) {
    return update_pclmul(state, data, nbytes);
  }
  const __m512i stride_constants = _mm512_broadcast_i32x4(constants_of(kFoldStrideFirst, kFoldStrideLast));
  const __m512i vector_constants = _mm512_broadcast_i32x4(constants_of(kFoldVectorFirst, kFoldVectorLast));
  const __m128i lane_constants = constants_of(kFoldLaneFirst, kFoldLaneLast);

  __m512i vectors[kNumVectors];
  for (std::size_t i = 0; i < kNumVectors; ++i) {
    vectors[i] = load(data + i * kVectorNbytes);
  }
  const __m128i start = _mm_cvtsi64_si128(static_cast<long long>(state));
  vectors[0] = _mm512_xor_si512(vectors[0], _mm512_zextsi128_si512(start));
  data += kStrideNbytes;
  nbytes -= kStrideNbytes;
  for (; nbytes >= kStrideNbytes; data += kStrideNbytes, nbytes -= kStrideNbytes) {
    for (std::size_t i = 0; i < kNumVectors; ++i) {
      vectors[i] = fold(vectors[i], stride_constants, load(data + i * kVectorNbytes));
    }
  }
  __m512i vector = vectors[0];
  for (std::size_t i = 1; i < kNumVectors; ++i) {
    vector = fold(vector, vector_constants, vectors[i]);
  }
  for (; nbytes >= kVectorNbytes; data += kVectorNbytes, nbytes -= kVectorNbytes) {
    vector = fold(vector, vector_constants, load(data));
  }
  __m128i lane = _mm512_extracti32x4_epi32(vector, 0);
  lane = fold_lane(lane, lane_constants, _mm512_extracti32x4_epi32(vector, 1));
  lane = fold_lane(lane, lane_constants, _mm512_extracti32x4_epi32(vector, 2));
  lane = fold_lane(lane, lane_constants, _mm512_extracti32x4_epi32(vector, 3));
  alignas(16) std::byte rest[kLaneNbytes];
  _mm_store_si128(reinterpret_cast<__m128i*>(rest), lane);
  return update_portable(update_portable(0, rest, kLaneNbytes), data, nbytes);
}

}  // namespace ktrain
