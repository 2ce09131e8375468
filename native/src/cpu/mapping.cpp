#include "ktrain/mapping.h"
#include "ktrain/parallel.h"

#include <atomic>
#include <cerrno>
#include <cstdint>

#include <sys/mman.h>
#include <unistd.h>

#if defined(__linux__)
#include <sys/vfs.h>
#endif

namespace ktrain {
namespace {

// Where memory is in pieces each try for a huge page costs a search; after so many in vain it is given up.
constexpr unsigned kMaxFailures = 8;

// An address range where a file's huge pages can be mapped as such: file and memory have the same place within one.
void* try_reserve_aligned(std::size_t nbytes) noexcept {
  if (nbytes > SIZE_MAX - kHugePageNbytes) {
    return nullptr;
  }
  void* const room = ::mmap(nullptr, nbytes + kHugePageNbytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                            -1, 0);
  if (room == MAP_FAILED) {
    return nullptr;
  }
  auto* const begin = static_cast<std::byte*>(room);
  const std::size_t lead =
      (kHugePageNbytes - reinterpret_cast<std::uintptr_t>(begin) % kHugePageNbytes) % kHugePageNbytes;
  const auto page_nbytes = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  const std::size_t used = lead + (nbytes + page_nbytes - 1) / page_nbytes * page_nbytes;
  if (lead != 0) {
    ::munmap(begin, lead);
  }
  if (used < nbytes + kHugePageNbytes) {
    ::munmap(begin + used, nbytes + kHugePageNbytes - used);
  }
  return begin + lead;
}

#if defined(__linux__)
constexpr int kMadvPopulateWrite = 23;  // Linux 5.14
constexpr int kMadvCollapse = 25;       // Linux 6.1; older headers name neither

bool is_tmpfs(int fd) noexcept {
  constexpr unsigned long kTmpfsMagic = 0x01021994;
  struct statfs about{};
  return ::fstatfs(fd, &about) == 0 && static_cast<unsigned long>(about.f_type) == kTmpfsMagic;
}

// 0, or an errno.
int advise(std::byte* begin, std::size_t nbytes, int advice) noexcept {
  while (::madvise(begin, nbytes, advice) != 0) {
    if (errno != EINTR) {
      return errno;
    }
  }
  return 0;
}

// One huge page. The system makes one only where the file has a page already; the rest of it may be missing.
int collapse(std::byte* begin, std::size_t page_nbytes) noexcept {
  const int error = advise(begin, page_nbytes, kMadvPopulateWrite);
  return error != 0 ? error : advise(begin, kHugePageNbytes, kMadvCollapse);
}
#endif

}  // namespace

Mapping::Mapping(int fd, std::size_t nbytes, bool is_writable) noexcept : is_writable_(is_writable) {
  const int protection = is_writable ? PROT_READ | PROT_WRITE : PROT_READ;
  void* const at = try_reserve_aligned(nbytes);
  const int flags = at == nullptr ? MAP_SHARED : MAP_SHARED | MAP_FIXED;
  void* const mapped = ::mmap(at, nbytes, protection, flags, fd, 0);
  if (mapped == MAP_FAILED) {
    error_ = errno;
    if (at != nullptr) {
      ::munmap(at, nbytes);
    }
    return;
  }
  data_ = static_cast<std::byte*>(mapped);
  nbytes_ = nbytes;
}

Mapping::~Mapping() {
  if (data_ != nullptr) {
    ::munmap(data_, nbytes_);
  }
}

std::size_t back_huge(int fd, std::size_t begin, std::size_t end, unsigned num_threads) noexcept {
#if defined(__linux__)
  const std::size_t first = begin / kHugePageNbytes;
  const std::size_t num_pages = end / kHugePageNbytes;
  if (num_pages <= first || !is_tmpfs(fd)) {
    return 0;
  }
  const Mapping mapping(fd, num_pages * kHugePageNbytes, true);
  const std::span<std::byte> bytes = mapping.bytes();
  if (bytes.empty() || reinterpret_cast<std::uintptr_t>(bytes.data()) % kHugePageNbytes != 0) {
    return 0;
  }
  const auto page_nbytes = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  std::atomic<std::size_t> num_backed{0};
  std::atomic<unsigned> num_failures{0};
  parallel_for(num_pages - first, num_threads, [&](std::size_t index) noexcept {
    if (num_failures.load(std::memory_order_relaxed) >= kMaxFailures) {
      return;
    }
    if (collapse(bytes.data() + (first + index) * kHugePageNbytes, page_nbytes) == 0) {
      num_backed.fetch_add(1, std::memory_order_relaxed);
    } else {
      num_failures.fetch_add(1, std::memory_order_relaxed);
    }
  });
  return num_backed.load(std::memory_order_relaxed) * kHugePageNbytes;
#else
  static_cast<void>(fd);
  static_cast<void>(begin);
  static_cast<void>(end);
  static_cast<void>(num_threads);
  return 0;
#endif
}

}  // namespace ktrain
