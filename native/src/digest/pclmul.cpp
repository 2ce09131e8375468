// Folding by carry-less multiplication, 16 bytes a lane (Gopal et al., "Fast CRC Computation for Generic
// Polynomials Using PCLMULQDQ Instruction", Intel, 2009), in the reflected form of section "Bit-Reflected".
//
// A lane holds bytes that stand D bits before those it is folded into. Its first eight bytes weigh
// x^(D + 64), its last eight x^D; reflected products lie one bit low, so both constants are one power less.
#include "ktrain/digest.h"

#include <emmintrin.h>
#include <smmintrin.h>
#include <wmmintrin.h>

namespace ktrain {
namespace {

constexpr std::size_t kLaneNbytes = 16;
constexpr std::size_t kNumLanes = 8;  // enough to hide the latency of a multiplication
constexpr std::size_t kStrideNbytes = kLaneNbytes * kNumLanes;

constexpr std::uint64_t kFoldStrideFirst = power_of_x(8 * kStrideNbytes + 63);
constexpr std::uint64_t kFoldStrideLast = power_of_x(8 * kStrideNbytes - 1);
constexpr std::uint64_t kFoldLaneFirst = power_of_x(8 * kLaneNbytes + 63);
constexpr std::uint64_t kFoldLaneLast = power_of_x(8 * kLaneNbytes - 1);

inline __m128i load(const std::byte* data) noexcept {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(data));
}

inline __m128i fold(__m128i lane, __m128i constants, __m128i next) noexcept {
  const __m128i first = _mm_clmulepi64_si128(lane, constants, 0x00);
  const __m128i last = _mm_clmulepi64_si128(lane, constants, 0x11);
  return _mm_xor_si128(_mm_xor_si128(first, last), next);
}

}  // namespace

std::uint64_t update_pclmul(std::uint64_t state, const std::byte* data, std::size_t nbytes) noexcept {
  if (nbytes < 2 * kStrideNbytes) {
    return update_portable(state, data, nbytes);
  }
  const __m128i stride_constants =
      _mm_set_epi64x(static_cast<long long>(kFoldStrideLast), static_cast<long long>(kFoldStrideFirst));
  const __m128i lane_constants =
      _mm_set_epi64x(static_cast<long long>(kFoldLaneLast), static_cast<long long>(kFoldLaneFirst));

  __m128i lanes[kNumLanes];
  for (std::size_t i = 0; i < kNumLanes; ++i) {
    lanes[i] = load(data + i * kLaneNbytes);
  }
  lanes[0] = _mm_xor_si128(lanes[0], _mm_cvtsi64_si128(static_cast<long long>(state)));
  data += kStrideNbytes;
  nbytes -= kStrideNbytes;
  for (; nbytes >= kStrideNbytes; data += kStrideNbytes, nbytes -= kStrideNbytes) {
    for (std::size_t i = 0; i < kNumLanes; ++i) {
      lanes[i] = fold(lanes[i], stride_constants, load(data + i * kLaneNbytes));
    }
  }
  __m128i lane = lanes[0];
  for (std::size_t i = 1; i < kNumLanes; ++i) {
    lane = fold(lane, lane_constants, lanes[i]);
  }
  for (; nbytes >= kLaneNbytes; data += kLaneNbytes, nbytes -= kLaneNbytes) {
    lane = fold(lane, lane_constants, load(data));
  }
  // The lane stands for sixteen bytes that follow an empty register; the tables do the last division.
  alignas(16) std::byte rest[kLaneNbytes];
  _mm_store_si128(reinterpret_cast<__m128i*>(rest), lane);
  return update_portable(update_portable(0, rest, kLaneNbytes), data, nbytes);
}

}  // namespace ktrain
