// The kernels against slow, obvious code, meant to run under sanitizers. Prints the first failure and ends with 1.
//
// Every buffer is allocated at its exact size, so that reading or writing one byte too far is seen.
#include <array>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "ktrain/copy.h"
#include "ktrain/cpu.h"
#include "ktrain/digest.h"
#include "ktrain/mapping.h"
#include "ktrain/scatter.h"
#include "ktrain/streaming.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

namespace {

#define EXPECT(condition, ...)                                                       \
  do {                                                                               \
    if (!(condition)) {                                                              \
      std::fprintf(stderr, "%s:%d: expected %s; ", __FILE__, __LINE__, #condition);  \
      std::fprintf(stderr, __VA_ARGS__);                                             \
      std::fprintf(stderr, "\n");                                                    \
      std::exit(1);                                                                  \
    }                                                                                \
  } while (false)

// A heap block whose bytes begin `shift` bytes behind an aligned address and end with the block.
class Bytes {
 public:
  Bytes(std::size_t nbytes, std::size_t shift, std::uint32_t seed)
      : shift_(shift), nbytes_(nbytes), block_(std::make_unique<std::byte[]>(nbytes + shift)) {
    std::mt19937 random(seed);
    for (std::size_t i = 0; i < nbytes; ++i) {
      data()[i] = static_cast<std::byte>(random());
    }
  }
  std::byte* data() { return block_.get() + shift_; }
  std::span<std::byte> span() { return {data(), nbytes_}; }

 private:
  std::size_t shift_;
  std::size_t nbytes_;
  std::unique_ptr<std::byte[]> block_;
};

std::uint64_t slow_crc64(const std::byte* data, std::size_t nbytes) {
  std::uint64_t state = ~std::uint64_t{0};
  for (std::size_t i = 0; i < nbytes; ++i) {
    state ^= static_cast<std::uint64_t>(data[i]);
    for (int bit = 0; bit < 8; ++bit) {
      state = (state >> 1) ^ ((state & 1) != 0 ? ktrain::kPolynomial : 0);
    }
  }
  return ~state;
}

void test_digest_of_check_string_is_the_published_value() {
  const char text[] = {'1', '2', '3', '4', '5', '6', '7', '8', '9'};
  const auto value = ktrain::crc64(reinterpret_cast<const std::byte*>(text), sizeof text);
  EXPECT(value == 0xAE8B14860A799888ULL, "got %llx", static_cast<unsigned long long>(value));
}

void test_every_variant_agrees_with_slow_code_at_every_length_and_shift() {
  for (const ktrain::Variant& variant : ktrain::variants()) {
    for (std::size_t nbytes : {0, 1, 7, 15, 16, 17, 127, 128, 129, 255, 256, 257, 271, 272, 300, 1023, 1024, 1025,
                               1040, 1087, 1088, 1089, 1535, 1536, 4095, 4096, 4097, 16384, 17408, 40000}) {
      for (std::size_t shift : {0, 1, 8, 15}) {
        Bytes bytes(nbytes, shift, static_cast<std::uint32_t>(nbytes));
        const std::uint64_t value = ~variant.update(~std::uint64_t{0}, bytes.data(), nbytes);
        EXPECT(value == slow_crc64(bytes.data(), nbytes), "%s, %zu bytes, shift %zu", variant.name, nbytes, shift);
      }
    }
  }
}

void test_every_variant_copies_past_the_caches_exactly_and_digests_what_it_wrote() {
  for (const ktrain::Variant& variant : ktrain::variants()) {
    for (std::size_t nbytes : {0, 1, 15, 63, 64, 65, 255, 256, 300, 1023, 1024, 1087, 1200, 16383, 16384, 16447, 16448,
                               17500, 40000}) {
      for (std::size_t shift : {0, 1, 8, 63}) {
        Bytes source(nbytes, 5, static_cast<std::uint32_t>(nbytes));
        Bytes target(nbytes, shift, 1);
        const std::uint64_t value = ~variant.copy_update(~std::uint64_t{0}, target.data(), source.data(), nbytes);
        ktrain::fence_stores();
        const bool is_copied = nbytes == 0 || std::memcmp(source.data(), target.data(), nbytes) == 0;
        EXPECT(is_copied, "%s, %zu bytes, shift %zu", variant.name, nbytes, shift);
        EXPECT(value == slow_crc64(target.data(), nbytes), "%s, %zu bytes, shift %zu", variant.name, nbytes, shift);
        Bytes again(nbytes, shift, 2);
        variant.stream(again.data(), source.data(), nbytes);
        ktrain::fence_stores();
        const bool is_same = nbytes == 0 || std::memcmp(source.data(), again.data(), nbytes) == 0;
        EXPECT(is_same, "%s, %zu bytes, shift %zu", variant.name, nbytes, shift);
        Bytes beside(nbytes, shift, 3);
        Bytes other(nbytes, 9, 4);
        const std::uint64_t found =
            ~variant.stream_update(~std::uint64_t{0}, other.data(), beside.data(), source.data(), nbytes);
        ktrain::fence_stores();
        const bool is_beside = nbytes == 0 || std::memcmp(source.data(), beside.data(), nbytes) == 0;
        EXPECT(is_beside, "%s, %zu bytes, shift %zu", variant.name, nbytes, shift);
        EXPECT(found == slow_crc64(other.data(), nbytes), "%s, %zu bytes, shift %zu", variant.name, nbytes, shift);
      }
    }
  }
}

void test_digest_in_two_parts_is_the_digest_of_the_whole() {
  Bytes bytes(5000, 3, 1);
  const std::uint64_t whole = ktrain::crc64(bytes.data(), 5000);
  for (std::size_t cut : {0, 1, 16, 1024, 2500, 4999, 5000}) {
    const std::uint64_t first = ktrain::crc64(bytes.data(), cut);
    const std::uint64_t second = ktrain::crc64(bytes.data() + cut, 5000 - cut);
    EXPECT(ktrain::crc64(bytes.data() + cut, 5000 - cut, first) == whole, "running value, cut at %zu", cut);
    EXPECT(ktrain::crc64_combine(first, second, 5000 - cut) == whole, "combined, cut at %zu", cut);
  }
}

void test_copy_digest_copies_and_digests_every_chunk() {
  for (std::size_t nbytes : {std::size_t{0}, std::size_t{1}, std::size_t{70000}, (std::size_t{4} << 20) + 77}) {
    for (std::size_t chunk_nbytes : {std::size_t{1} << 16, std::size_t{100003}}) {
      Bytes source(nbytes, 5, 2);
      Bytes target(nbytes, 9, 3);
      std::vector<std::uint64_t> digests(ktrain::num_chunks(nbytes, chunk_nbytes));
      std::vector<std::uint64_t> again(digests.size());
      ktrain::copy_digest(target.span(), source.span(), chunk_nbytes, 4, digests);
      ktrain::digest_chunks(target.span(), chunk_nbytes, 3, again);
      EXPECT(nbytes == 0 || std::memcmp(source.data(), target.data(), nbytes) == 0, "%zu bytes", nbytes);
      EXPECT(digests == again, "%zu bytes in chunks of %zu", nbytes, chunk_nbytes);
      for (std::size_t i = 0; i < digests.size(); ++i) {
        const std::size_t begin = i * chunk_nbytes;
        const std::uint64_t value = ktrain::crc64(source.data() + begin, std::min(chunk_nbytes, nbytes - begin));
        EXPECT(digests[i] == value, "chunk %zu", i);
      }
    }
  }
}

void test_gather_digest_fills_segments_and_keeps_gaps() {
  std::mt19937 random(4);
  for (int round = 0; round < 20; ++round) {
    const std::size_t nbytes = round % 5 == 0 ? (std::size_t{4} << 20) + 13 : 300000;
    const std::size_t chunk_nbytes = 1 + random() % 200000;
    Bytes target(nbytes, 1, 5);
    std::vector<std::byte> expected(target.span().begin(), target.span().end());
    std::vector<Bytes> sources;
    std::vector<std::uint64_t> address, lengths, offset;
    for (std::size_t at = random() % 100; at < nbytes;) {
      const std::size_t wanted = random() % 3 == 0 ? random() % 150000 : random() % 50;
      const std::size_t length = std::min(wanted, nbytes - at);
      sources.emplace_back(length, random() % 16, static_cast<std::uint32_t>(random()));
      address.push_back(reinterpret_cast<std::uintptr_t>(sources.back().data()));
      lengths.push_back(length);
      offset.push_back(at);
      if (length != 0) {
        std::memcpy(expected.data() + at, sources.back().data(), length);
      }
      at += length + (random() % 2) * (random() % 70000) + (length == 0 ? 1 : 0);
    }
    const ktrain::Segments segments{address, lengths, offset};
    EXPECT(ktrain::check_segments(segments, nbytes).fault == ktrain::SegmentFault::kNone, "round %d", round);
    std::vector<std::uint64_t> digests(ktrain::num_chunks(nbytes, chunk_nbytes));
    ktrain::gather_digest(target.span(), segments, chunk_nbytes, 4, digests);
    EXPECT(std::memcmp(expected.data(), target.data(), nbytes) == 0, "round %d", round);
    std::memset(target.data(), 0, nbytes);
    ktrain::gather(target.span(), segments, 4);
    std::vector<std::uint64_t> pieces(address.size());
    ktrain::digest_pieces(address, lengths, 4, pieces);
    for (std::size_t i = 0; i < address.size(); ++i) {
      const auto* source = reinterpret_cast<const std::byte*>(address[i]);
      EXPECT(lengths[i] == 0 || std::memcmp(target.data() + offset[i], source, lengths[i]) == 0, "round %d", round);
      EXPECT(pieces[i] == ktrain::crc64(source, lengths[i]), "round %d, piece %zu", round, i);
    }
    for (std::size_t i = 0; i < digests.size(); ++i) {
      const std::size_t begin = i * chunk_nbytes;
      const std::uint64_t value = ktrain::crc64(expected.data() + begin, std::min(chunk_nbytes, nbytes - begin));
      EXPECT(digests[i] == value, "round %d, chunk %zu", round, i);
    }
  }
}

void test_check_segments_names_the_first_bad_one() {
  using Column = std::vector<std::uint64_t>;
  const auto check = [](Column nbytes, Column offset) {
    const Column address(nbytes.size(), 0);
    return ktrain::check_segments({address, nbytes, offset}, 100);
  };
  EXPECT(check({10, 10}, {0, 9}).fault == ktrain::SegmentFault::kNotSorted, "overlap");
  EXPECT(check({10, 10}, {0, 9}).index == 1, "overlap");
  EXPECT(check({10, 91}, {0, 10}).fault == ktrain::SegmentFault::kOutsideTarget, "too long");
  EXPECT(check({~std::uint64_t{0}}, {1}).fault == ktrain::SegmentFault::kOutsideTarget, "sum wraps around");
  EXPECT(check({10}, {0, 10}).fault == ktrain::SegmentFault::kLengthsDiffer, "lengths");
  EXPECT(check({10, 90}, {0, 10}).fault == ktrain::SegmentFault::kNone, "full");
}

void test_prove_scatter_copies_from_good_chunks_alone() {
  std::mt19937 random(9);
  for (int round = 0; round < 20; ++round) {
    const std::size_t nbytes = round % 5 == 0 ? (std::size_t{4} << 20) + 13 : 200000;
    const std::size_t chunk_nbytes = 1 + random() % 50000;
    const std::uint64_t begin = chunk_nbytes * (random() % 3);
    Bytes source(nbytes, 3, static_cast<std::uint32_t>(round));
    std::vector<std::uint64_t> expected(ktrain::num_chunks(nbytes, chunk_nbytes));
    ktrain::digest_chunks(source.span(), chunk_nbytes, 2, expected);
    const std::size_t spoilt = random() % expected.size();
    expected[spoilt] ^= 1;
    std::vector<Bytes> targets;
    std::vector<std::uint64_t> address, lengths, offset, count, source_step, target_step;
    for (std::uint64_t at = random() % 3000; at < begin + nbytes; at += random() % 30000) {
      const std::uint64_t length = random() % 3000;
      const std::uint64_t num_runs = random() % 20;
      count.push_back(num_runs);
      lengths.push_back(length);
      offset.push_back(at);
      source_step.push_back(length + random() % 500);
      target_step.push_back(length + random() % 5);
      targets.emplace_back(num_runs == 0 ? 0 : (num_runs - 1) * target_step.back() + length, 1, 0);
      std::memset(targets.back().data(), 0xEE, targets.back().span().size());
      address.push_back(reinterpret_cast<std::uintptr_t>(targets.back().data()));
    }
    const ktrain::Runs runs{address, lengths, offset, count, source_step, target_step};
    EXPECT(ktrain::check_runs(runs).fault == ktrain::RunFault::kNone, "round %d", round);
    std::vector<std::uint8_t> is_bad(expected.size());
    ktrain::prove_scatter(source.span(), begin, chunk_nbytes, expected, runs, 4, is_bad);
    for (std::size_t i = 0; i < is_bad.size(); ++i) {
      EXPECT((is_bad[i] != 0) == (i == spoilt), "round %d, chunk %zu", round, i);
    }
    for (std::size_t row = 0; row < offset.size(); ++row) {
      std::vector<std::byte> wanted(targets[row].span().size(), std::byte{0xEE});
      for (std::uint64_t run = 0; run < count[row]; ++run) {
        for (std::uint64_t i = 0; i < lengths[row]; ++i) {
          const std::uint64_t at = offset[row] + run * source_step[row] + i - begin;  // wraps around in front of it
          if (at < nbytes && at / chunk_nbytes != spoilt) {
            wanted[run * target_step[row] + i] = source.data()[at];
          }
        }
      }
      EXPECT(wanted.empty() || std::memcmp(wanted.data(), targets[row].data(), wanted.size()) == 0, "row %zu", row);
    }
  }
}

void test_prefault_changes_no_byte() {
  Bytes bytes(100000, 3, 6);
  const std::vector<std::byte> before(bytes.span().begin(), bytes.span().end());
  EXPECT(ktrain::prefault(bytes.span(), 2) == 0, "prefault failed");
  EXPECT(std::memcmp(before.data(), bytes.data(), before.size()) == 0, "a byte changed");
  EXPECT(ktrain::prefault({}, 2) == 0, "nothing to do");
}

#if defined(__linux__)
void test_mapping_shows_the_file_and_refuses_a_closed_one() {
  const int fd = ::memfd_create("ktrain-test", MFD_CLOEXEC);
  const std::size_t nbytes = 3 * ktrain::kHugePageNbytes + 5000;
  EXPECT(fd >= 0 && ::ftruncate(fd, static_cast<off_t>(nbytes)) == 0, "no file in memory");
  const ktrain::Mapping writable(fd, nbytes, true);
  const ktrain::Mapping readable(fd, nbytes, false);
  EXPECT(writable.error() == 0 && readable.error() == 0, "errno %d, %d", writable.error(), readable.error());
  EXPECT(writable.bytes().size() == nbytes, "size");
  EXPECT(reinterpret_cast<std::uintptr_t>(readable.bytes().data()) % ktrain::kHugePageNbytes == 0, "not aligned");
  writable.bytes()[nbytes - 1] = std::byte{7};
  EXPECT(readable.bytes()[nbytes - 1] == std::byte{7}, "not the same file");
  const ktrain::Mapping none(-1, nbytes, true);
  EXPECT(none.error() == EBADF && none.bytes().empty(), "errno %d", none.error());
  ::close(fd);
}

void test_back_huge_changes_no_byte_and_makes_no_page_behind_the_end() {
  const int fd = ::memfd_create("ktrain-test", MFD_CLOEXEC);
  const std::size_t nbytes = 3 * ktrain::kHugePageNbytes + 5000;
  EXPECT(fd >= 0 && ::ftruncate(fd, static_cast<off_t>(nbytes)) == 0, "no file in memory");
  const ktrain::Mapping mapping(fd, nbytes, true);
  Bytes values(ktrain::kHugePageNbytes, 0, 11);
  std::memcpy(mapping.bytes().data() + 4096, values.data(), values.span().size());
  const std::size_t backed = ktrain::back_huge(fd, 5000, nbytes, 2);  // what the system gives, down to nothing
  EXPECT(backed % ktrain::kHugePageNbytes == 0 && backed < nbytes, "%zu bytes", backed);
  EXPECT(std::memcmp(mapping.bytes().data() + 4096, values.data(), values.span().size()) == 0, "a byte changed");
  struct stat about{};
  EXPECT(::fstat(fd, &about) == 0, "no stat");
  EXPECT(static_cast<std::size_t>(about.st_blocks) * 512 <= 3 * ktrain::kHugePageNbytes, "a page behind the end");
  EXPECT(ktrain::back_huge(fd, 0, 5000, 2) == 0, "no whole page fits");
  EXPECT(ktrain::back_huge(-1, 0, nbytes, 2) == 0, "no file");
  ::close(fd);
}
#endif

void test_calls_from_several_threads_do_not_disturb_each_other() {
  Bytes source(3000000, 0, 7);
  std::vector<std::jthread> threads;
  const std::uint64_t expected = slow_crc64(source.data(), 1000000);
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      Bytes target(3000000, 0, 8);
      std::vector<std::uint64_t> digests(3);
      ktrain::copy_digest(target.span(), source.span(), 1000000, 2, digests);
      EXPECT(digests[0] == expected, "thread");
    });
  }
}

}  // namespace

int main() {
  // First, so that the dispatch is resolved by racing threads.
  test_calls_from_several_threads_do_not_disturb_each_other();
  test_digest_of_check_string_is_the_published_value();
  test_every_variant_agrees_with_slow_code_at_every_length_and_shift();
  test_digest_in_two_parts_is_the_digest_of_the_whole();
  test_copy_digest_copies_and_digests_every_chunk();
  test_gather_digest_fills_segments_and_keeps_gaps();
  test_check_segments_names_the_first_bad_one();
  test_prove_scatter_copies_from_good_chunks_alone();
  test_every_variant_copies_past_the_caches_exactly_and_digests_what_it_wrote();
  test_prefault_changes_no_byte();
#if defined(__linux__)
  test_mapping_shows_the_file_and_refuses_a_closed_one();
  test_back_huge_changes_no_byte_and_makes_no_page_behind_the_end();
#endif
  std::printf("native tests passed with");
  for (const ktrain::Variant& variant : ktrain::variants()) {
    std::printf(" %s", variant.name);
  }
  std::printf("\n");
  return 0;
}
