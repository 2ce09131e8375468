// Files in this process's memory, in large pages where the system has them for files in memory.
#pragma once

#include <cstddef>
#include <span>

namespace ktrain {

// What the processor maps by one entry of its tables, where the system has such pages for tmpfs.
inline constexpr std::size_t kHugePageNbytes = std::size_t{2} << 20;

// A shared mapping of a file's first bytes, at an address where huge pages of the file fit. Not copied; unmaps itself.
class Mapping {
 public:
  // On failure `error` is an errno and there are no bytes. `nbytes` is at least 1, the file at least as long.
  Mapping(int fd, std::size_t nbytes, bool is_writable) noexcept;
  ~Mapping();
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  int error() const noexcept { return error_; }
  bool is_writable() const noexcept { return is_writable_; }
  std::span<std::byte> bytes() const noexcept { return {data_, nbytes_}; }

 private:
  std::byte* data_ = nullptr;
  std::size_t nbytes_ = 0;
  bool is_writable_ = false;
  int error_ = 0;
};

// Backs [begin, end) of a tmpfs file by huge pages, as far as they lie in [0, end) as a whole and the system has them;
// no byte changes, and the file is at least `end` long. Returns how many bytes such pages back. What is left is no
// failure: ordinary pages do the same, slower. Nothing is tried elsewhere than on tmpfs.
std::size_t back_huge(int fd, std::size_t begin, std::size_t end, unsigned num_threads) noexcept;

}  // namespace ktrain
