// Work shared by threads that live for one call.
//
// There is no pool: threads of a pool do not survive fork() while the locks they held do, and workers,
// loaders and launchers around us fork. A thread costs about 20 us to start, a call worth
// several threads lasts milliseconds.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <system_error>
#include <thread>
#include <vector>

namespace ktrain {

// Calls work(take) on at most num_threads threads, this one included. take() gives each of them the next i below
// num_items, in order, and num_items when none is left. `work` does not throw.
template <typename Work>
void parallel_take(std::size_t num_items, unsigned num_threads, const Work& work) {
  std::atomic<std::size_t> next{0};
  const auto take = [&]() noexcept { return std::min(next.fetch_add(1, std::memory_order_relaxed), num_items); };
  const auto run = [&]() noexcept { work(take); };
  const std::size_t num_wanted = std::min<std::size_t>(num_items, std::max(num_threads, 1u));
  std::vector<std::jthread> others;
  for (std::size_t i = 1; i < num_wanted; ++i) {
    try {
      others.emplace_back(run);
    } catch (const std::system_error&) {
      break;  // The process may start no more threads: fewer do the same work.
    }
  }
  run();
}

// Calls work(i) once for every i below num_items, on at most num_threads threads, this one included.
// Items are taken in order, one at a time. `work` does not throw.
template <typename Work>
void parallel_for(std::size_t num_items, unsigned num_threads, const Work& work) {
  parallel_take(num_items, num_threads, [&](const auto& take) noexcept {
    for (std::size_t item = take(); item < num_items; item = take()) {
      work(item);
    }
  });
}

}  // namespace ktrain
