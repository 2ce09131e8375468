// Copies that digest what they carry, chunk by chunk, on several threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace ktrain {

// Bytes at `address` that belong at `offset` of the target.
struct Segments {
  std::span<const std::uint64_t> address;
  std::span<const std::uint64_t> nbytes;
  std::span<const std::uint64_t> offset;
};

// What is wrong with a segment table, if anything.
enum class SegmentFault { kNone, kLengthsDiffer, kNotSorted, kOutsideTarget };

struct SegmentCheck {
  SegmentFault fault;
  std::size_t index;  // of the first segment at fault
};

constexpr std::size_t num_chunks(std::size_t nbytes, std::size_t chunk_nbytes) noexcept {
  return nbytes / chunk_nbytes + (nbytes % chunk_nbytes != 0 ? 1 : 0);
}

// `digests` has num_chunks(...) entries in all three; chunk_nbytes is at least 1.
void digest_chunks(std::span<const std::byte> source, std::size_t chunk_nbytes, unsigned num_threads,
                   std::span<std::uint64_t> digests);

// Source and target have one length and do not overlap.
void copy_digest(std::span<std::byte> target, std::span<const std::byte> source, std::size_t chunk_nbytes,
                 unsigned num_threads, std::span<std::uint64_t> digests);

// Segments are sorted by offset and disjoint (see check_segments). Bytes of the target that no segment
// covers stay as they are and are digested.
void gather_digest(std::span<std::byte> target, const Segments& segments, std::size_t chunk_nbytes,
                   unsigned num_threads, std::span<std::uint64_t> digests);

// Copies the segments, and digests nothing.
void gather(std::span<std::byte> target, const Segments& segments, unsigned num_threads);

// One digest for each piece of memory; the three have one length. Pieces may overlap.
void digest_pieces(std::span<const std::uint64_t> address, std::span<const std::uint64_t> nbytes,
                   unsigned num_threads, std::span<std::uint64_t> digests);

SegmentCheck check_segments(const Segments& segments, std::size_t target_nbytes) noexcept;

}  // namespace ktrain
