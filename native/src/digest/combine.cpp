#include "ktrain/digest.h"

namespace ktrain {
namespace {

constexpr std::uint64_t multiply(std::uint64_t a, std::uint64_t b) noexcept {
  std::uint64_t product = 0;
  for (; a != 0; a <<= 1) {  // from x^0, the highest bit, onwards
    if ((a >> 63) != 0) {
      product ^= b;
    }
    b = (b >> 1) ^ ((b & 1) != 0 ? kPolynomial : 0);
  }
  return product;
}

// x^(8 * 2^k): what 2^k bytes that follow do to a digest.
constexpr std::array<std::uint64_t, 64> make_powers() noexcept {
  std::array<std::uint64_t, 64> powers{};
  powers[0] = power_of_x(8);
  for (std::size_t k = 1; k < powers.size(); ++k) {
    powers[k] = multiply(powers[k - 1], powers[k - 1]);
  }
  return powers;
}

constexpr std::array<std::uint64_t, 64> kPowers = make_powers();

}  // namespace

// The inversions at the start and the end cancel out, as both are all ones.
std::uint64_t crc64_combine(std::uint64_t first, std::uint64_t second, std::uint64_t second_nbytes) noexcept {
  for (std::size_t k = 0; second_nbytes != 0; ++k, second_nbytes >>= 1) {
    if ((second_nbytes & 1) != 0) {
      first = multiply(kPowers[k], first);
    }
  }
  return first ^ second;
}

}  // namespace ktrain
