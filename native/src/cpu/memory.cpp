#include "ktrain/cpu.h"
#include "ktrain/parallel.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdint>

#include <sys/mman.h>
#include <unistd.h>

namespace ktrain {
namespace {

constexpr std::size_t kPartNbytes = std::size_t{64} << 20;

// Adds nothing to one byte of each page: a write that changes no byte even while others write.
void touch_pages(std::byte* begin, std::byte* end, std::size_t page_nbytes) noexcept {
  for (std::byte* page = begin; page < end; page += page_nbytes) {
    __atomic_fetch_or(reinterpret_cast<unsigned char*>(page), static_cast<unsigned char>(0), __ATOMIC_RELAXED);
  }
}

int populate(std::byte* begin, std::byte* end, std::size_t page_nbytes) noexcept {
#if defined(__linux__)
  constexpr int kMadvPopulateWrite = 23;  // Linux 5.14; older headers do not name it.
  while (::madvise(begin, static_cast<std::size_t>(end - begin), kMadvPopulateWrite) != 0) {
    const int error = errno;
    if (error == EINTR) {
      continue;
    }
    if (error != EINVAL && error != ENOSYS) {
      return error;  // Out of memory or of volume: touching would end the process by SIGBUS.
    }
    touch_pages(begin, end, page_nbytes);
    return 0;
  }
  return 0;
#else
  touch_pages(begin, end, page_nbytes);
  return 0;
#endif
}

}  // namespace

int prefault(std::span<std::byte> target, unsigned num_threads) {
  if (target.empty()) {
    return 0;
  }
  const auto page_nbytes = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  // Whole pages around the target: its neighbours on the border pages are populated, never changed.
  const std::size_t lead = reinterpret_cast<std::uintptr_t>(target.data()) % page_nbytes;
  std::byte* const begin = target.data() - lead;
  const std::size_t nbytes = (lead + target.size() + page_nbytes - 1) / page_nbytes * page_nbytes;
  const std::size_t num_parts = (nbytes + kPartNbytes - 1) / kPartNbytes;
  std::atomic<int> first_error{0};
  parallel_for(num_parts, num_threads, [&](std::size_t part) noexcept {
    if (first_error.load(std::memory_order_relaxed) != 0) {
      return;
    }
    const std::size_t from = part * kPartNbytes;
    const std::size_t to = std::min(from + kPartNbytes, nbytes);
    const int error = populate(begin + from, begin + to, page_nbytes);
    if (int none = 0; error != 0) {
      first_error.compare_exchange_strong(none, error, std::memory_order_relaxed);
    }
  });
  return first_error.load(std::memory_order_relaxed);
}

}  // namespace ktrain
