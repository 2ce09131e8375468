#include "ktrain/cpu.h"

namespace ktrain {

// The compiler's builtin asks the operating system too: wide registers count only where it saves them.
#if defined(__x86_64__)
bool cpu_has_pclmul() noexcept {
  return __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
}

bool cpu_has_vpclmul() noexcept {
  return __builtin_cpu_supports("vpclmulqdq") && __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq");
}
#else
bool cpu_has_pclmul() noexcept { return false; }
bool cpu_has_vpclmul() noexcept { return false; }
#endif

}  // namespace ktrain
