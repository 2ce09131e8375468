// What the processor and the operating system offer.
#pragma once

#include <cstddef>
#include <span>

namespace ktrain {

bool cpu_has_pclmul() noexcept;
bool cpu_has_vpclmul() noexcept;

// Makes every page of the target present and writable without changing a byte. 0, or an errno.
int prefault(std::span<std::byte> target, unsigned num_threads);

// Asks that this process gets the signal when its parent thread dies; 0 takes that back. 0, or an errno.
// Without effect where the system has no such thing.
int set_parent_death_signal(int signum) noexcept;

}  // namespace ktrain
