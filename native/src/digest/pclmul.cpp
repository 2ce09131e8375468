// Folding by carry-less multiplication, 16 bytes a lane (Gopal et al., "Fast CRC Computation for Generic
// Polynomials Using PCLMULQDQ Instruction", Intel, 2009), in the reflected form of section "Bit-Reflected".
//
// A lane holds bytes that stand D bits before those it is folded into. Its first eight bytes weigh
// x^(D + 64), its last eight x^D; reflected products lie one bit low, so both constants are one power less.
#include "ktrain/digest.h"

#include <cstring>

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

// What is digested stays where it is.
struct Stay {
  void lane(std::size_t, __m128i) const noexcept {}
  std::uint64_t rest(std::uint64_t state, std::size_t, const std::byte* data, std::size_t nbytes) const noexcept {
    return update_portable(state, data, nbytes);
  }
};

// What is digested goes to a target on the border of a lane, past the caches.
struct Stream {
  std::byte* target;

  void lane(std::size_t at, __m128i value) const noexcept {
    _mm_stream_si128(reinterpret_cast<__m128i*>(target + at), value);
  }
  std::uint64_t rest(std::uint64_t state, std::size_t at, const std::byte* data, std::size_t nbytes) const noexcept {
    return copy_update_portable(state, target + at, data, nbytes);
  }
};

// Beside what is digested as much is copied, to a target on the border of a lane, past the caches.
struct StreamBeside {
  std::byte* target;
  const std::byte* source;

  void lane(std::size_t at, __m128i) const noexcept {
    _mm_stream_si128(reinterpret_cast<__m128i*>(target + at), load(source + at));
  }
  std::uint64_t rest(std::uint64_t state, std::size_t at, const std::byte* data, std::size_t nbytes) const noexcept {
    std::memcpy(target + at, source + at, nbytes);
    return update_portable(state, data, nbytes);
  }
};

// There are at least two strides.
template <typename Use>
std::uint64_t update_lanes(std::uint64_t state, const std::byte* data, std::size_t nbytes, Use use) noexcept {
  const __m128i stride_constants =
      _mm_set_epi64x(static_cast<long long>(kFoldStrideLast), static_cast<long long>(kFoldStrideFirst));
  const __m128i lane_constants =
      _mm_set_epi64x(static_cast<long long>(kFoldLaneLast), static_cast<long long>(kFoldLaneFirst));

  const auto take = [&](std::size_t at) noexcept {
    const __m128i value = load(data + at);
    use.lane(at, value);
    return value;
  };
  __m128i lanes[kNumLanes];
  for (std::size_t i = 0; i < kNumLanes; ++i) {
    lanes[i] = take(i * kLaneNbytes);
  }
  lanes[0] = _mm_xor_si128(lanes[0], _mm_cvtsi64_si128(static_cast<long long>(state)));
  std::size_t at = kStrideNbytes;
  for (; nbytes - at >= kStrideNbytes; at += kStrideNbytes) {
    for (std::size_t i = 0; i < kNumLanes; ++i) {
      lanes[i] = fold(lanes[i], stride_constants, take(at + i * kLaneNbytes));
    }
  }
  __m128i lane = lanes[0];
  for (std::size_t i = 1; i < kNumLanes; ++i) {
    lane = fold(lane, lane_constants, lanes[i]);
  }
  for (; nbytes - at >= kLaneNbytes; at += kLaneNbytes) {
    lane = fold(lane, lane_constants, take(at));
  }
  // The lane stands for sixteen bytes that follow an empty register; the tables do the last division.
  alignas(16) std::byte last[kLaneNbytes];
  _mm_store_si128(reinterpret_cast<__m128i*>(last), lane);
  return use.rest(update_portable(0, last, kLaneNbytes), at, data + at, nbytes - at);
}

}  // namespace

std::uint64_t update_pclmul(std::uint64_t state, const std::byte* data, std::size_t nbytes) noexcept {
  if (nbytes < 2 * kStrideNbytes) {
    return update_portable(state, data, nbytes);
  }
  return update_lanes(state, data, nbytes, Stay{});
}

std::uint64_t copy_update_pclmul(std::uint64_t state, std::byte* target, const std::byte* source,
                                 std::size_t nbytes) noexcept {
  const std::size_t lead = (kLaneNbytes - reinterpret_cast<std::uintptr_t>(target) % kLaneNbytes) % kLaneNbytes;
  if (nbytes < lead + 2 * kStrideNbytes) {
    return copy_update_portable(state, target, source, nbytes);
  }
  state = copy_update_portable(state, target, source, lead);
  return update_lanes(state, source + lead, nbytes - lead, Stream{target + lead});
}

std::uint64_t stream_update_pclmul(std::uint64_t state, const std::byte* data, std::byte* target,
                                   const std::byte* source, std::size_t nbytes) noexcept {
  const std::size_t lead = (kLaneNbytes - reinterpret_cast<std::uintptr_t>(target) % kLaneNbytes) % kLaneNbytes;
  if (nbytes < lead + 2 * kStrideNbytes) {
    return stream_update_portable(state, data, target, source, nbytes);
  }
  std::memcpy(target, source, lead);
  state = update_portable(state, data, lead);
  return update_lanes(state, data + lead, nbytes - lead, StreamBeside{target + lead, source + lead});
}

}  // namespace ktrain
