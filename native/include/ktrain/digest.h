// Digests: CRC-64/NVME (NVM Express NVM Command Set Specification 1.0, section 5.2.1.3.4; reflected
// polynomial 0x9A6C9329AC4BC9B5, register starts and ends inverted, check value of "123456789" is
// 0xAE8B14860A799888). Chosen because buckets compute the same one on their side.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

namespace ktrain {

inline constexpr std::uint64_t kPolynomial = 0x9A6C9329AC4BC9B5ULL;

// Takes the register as it is (not inverted) over the bytes. Every variant gives the same result.
using UpdateFunction = std::uint64_t (*)(std::uint64_t state, const std::byte* data, std::size_t nbytes) noexcept;

// Copies the bytes past the caches and takes them into the register on their way, each read once: what it digests is
// what it writes. fence_stores() must follow before another thread reads. The two do not overlap.
using CopyUpdateFunction = std::uint64_t (*)(std::uint64_t state, std::byte* target, const std::byte* source,
                                             std::size_t nbytes) noexcept;

// Copies past the caches: see copy_streaming.
using StreamFunction = void (*)(std::byte* target, const std::byte* source, std::size_t nbytes) noexcept;

// Copies past the caches and takes as many other bytes, those at `data`, into the register meanwhile: while the ones
// are on their way to memory, the others come from there. fence_stores() must follow before another thread reads.
using StreamUpdateFunction = std::uint64_t (*)(std::uint64_t state, const std::byte* data, std::byte* target,
                                               const std::byte* source, std::size_t nbytes) noexcept;

struct Variant {
  const char* name;
  UpdateFunction update;
  CopyUpdateFunction copy_update;
  StreamFunction stream;
  StreamUpdateFunction stream_update;
};

// The variants that this processor can run, slowest first; the first one is always the portable oracle.
std::span<const Variant> variants() noexcept;

// The fastest of them. Resolved once, safe from any thread.
const Variant& best_variant() noexcept;

// Digest of the bytes, continuing from `value` (0 to begin), as zlib.crc32 does.
inline std::uint64_t crc64(const std::byte* data, std::size_t nbytes, std::uint64_t value = 0) noexcept {
  return ~best_variant().update(~value, data, nbytes);
}

// Digest of two byte strings joined, from their digests and the length of the second one.
std::uint64_t crc64_combine(std::uint64_t first, std::uint64_t second, std::uint64_t second_nbytes) noexcept;

std::uint64_t update_portable(std::uint64_t state, const std::byte* data, std::size_t nbytes) noexcept;
std::uint64_t update_pclmul(std::uint64_t state, const std::byte* data, std::size_t nbytes) noexcept;
std::uint64_t update_vpclmul(std::uint64_t state, const std::byte* data, std::size_t nbytes) noexcept;

std::uint64_t copy_update_portable(std::uint64_t state, std::byte* target, const std::byte* source,
                                   std::size_t nbytes) noexcept;
std::uint64_t copy_update_pclmul(std::uint64_t state, std::byte* target, const std::byte* source,
                                 std::size_t nbytes) noexcept;
std::uint64_t copy_update_vpclmul(std::uint64_t state, std::byte* target, const std::byte* source,
                                  std::size_t nbytes) noexcept;

std::uint64_t stream_update_portable(std::uint64_t state, const std::byte* data, std::byte* target,
                                     const std::byte* source, std::size_t nbytes) noexcept;
std::uint64_t stream_update_pclmul(std::uint64_t state, const std::byte* data, std::byte* target,
                                   const std::byte* source, std::size_t nbytes) noexcept;
std::uint64_t stream_update_vpclmul(std::uint64_t state, const std::byte* data, std::byte* target,
                                    const std::byte* source, std::size_t nbytes) noexcept;

void stream_avx512(std::byte* target, const std::byte* source, std::size_t nbytes) noexcept;

// x^n modulo the polynomial. Bits are reflected: bit 63 is the coefficient of x^0.
constexpr std::uint64_t power_of_x(unsigned n) noexcept {
  std::uint64_t value = 1ULL << 63;
  for (unsigned i = 0; i < n; ++i) {
    value = (value >> 1) ^ ((value & 1) != 0 ? kPolynomial : 0);
  }
  return value;
}

}  // namespace ktrain
