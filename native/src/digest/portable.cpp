// The oracle: plain C++ without any instruction set. Sixteen bytes at a time by sixteen tables
// (Kounavis and Berry, "Novel Table Lookup-Based Algorithms for High-Performance CRC Generation", 2008).
#include "ktrain/digest.h"
#include "ktrain/streaming.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace ktrain {
namespace {

using Tables = std::array<std::array<std::uint64_t, 256>, 16>;

constexpr Tables make_tables() noexcept {
  Tables tables{};
  for (std::uint64_t byte = 0; byte < 256; ++byte) {
    std::uint64_t value = byte;
    for (int bit = 0; bit < 8; ++bit) {
      value = (value >> 1) ^ ((value & 1) != 0 ? kPolynomial : 0);
    }
    tables[0][byte] = value;
  }
  for (std::size_t slice = 1; slice < tables.size(); ++slice) {
    for (std::size_t byte = 0; byte < 256; ++byte) {
      const std::uint64_t before = tables[slice - 1][byte];
      tables[slice][byte] = (before >> 8) ^ tables[0][before & 0xFF];
    }
  }
  return tables;
}

constexpr Tables kTables = make_tables();

std::uint64_t load_little_endian(const std::byte* data) noexcept {
  std::uint64_t word;
  std::memcpy(&word, data, sizeof word);
  if constexpr (std::endian::native == std::endian::big) {
    word = __builtin_bswap64(word);
  }
  return word;
}

// The eight bytes of a word, the first of which has `slice` + 7 bytes behind it in the block.
inline std::uint64_t look_up_word(std::uint64_t word, std::size_t slice) noexcept {
  std::uint64_t value = 0;
  for (std::size_t i = 0; i < 8; ++i) {
    value ^= kTables[slice + 7 - i][(word >> (8 * i)) & 0xFF];
  }
  return value;
}

}  // namespace

std::uint64_t update_portable(std::uint64_t state, const std::byte* data, std::size_t nbytes) noexcept {
  for (; nbytes >= 16; data += 16, nbytes -= 16) {
    state = look_up_word(load_little_endian(data) ^ state, 8) ^ look_up_word(load_little_endian(data + 8), 0);
  }
  for (; nbytes > 0; ++data, --nbytes) {
    state = (state >> 8) ^ kTables[0][(state ^ static_cast<std::uint64_t>(*data)) & 0xFF];
  }
  return state;
}

std::uint64_t copy_update_portable(std::uint64_t state, std::byte* target, const std::byte* source,
                                   std::size_t nbytes) noexcept {
  std::uint64_t words[8];
  for (std::size_t at = 0; at < nbytes; at += sizeof words) {
    const std::size_t taken = std::min(sizeof words, nbytes - at);
    std::memcpy(words, source + at, taken);
    const auto* line = reinterpret_cast<const std::byte*>(words);
    state = update_portable(state, line, taken);
    std::memcpy(target + at, line, taken);
  }
  return state;
}

std::uint64_t stream_update_portable(std::uint64_t state, const std::byte* data, std::byte* target,
                                     const std::byte* source, std::size_t nbytes) noexcept {
  copy_streaming(target, source, nbytes);
  return update_portable(state, data, nbytes);
}

}  // namespace ktrain
