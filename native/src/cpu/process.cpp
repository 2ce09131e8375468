#include "ktrain/cpu.h"

#include <cerrno>

#if defined(__linux__)
#include <sys/prctl.h>
#endif

namespace ktrain {

int set_parent_death_signal([[maybe_unused]] int signum) noexcept {
#if defined(__linux__)
  if (::prctl(PR_SET_PDEATHSIG, static_cast<unsigned long>(signum), 0UL, 0UL, 0UL) != 0) {
    return errno;
  }
#endif
  return 0;
}

}  // namespace ktrain
