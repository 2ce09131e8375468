#include "ktrain/cpu.h"
#include "ktrain/digest.h"
#include "ktrain/streaming.h"

namespace ktrain {
namespace {

struct Registry {
  std::array<Variant, 3> entries{};
  std::size_t size = 0;

  Registry() noexcept {
    add({"portable", update_portable, copy_update_portable, copy_streaming, stream_update_portable});
#if defined(KTRAIN_HAS_PCLMUL)
    if (cpu_has_pclmul()) {
      add({"pclmul", update_pclmul, copy_update_pclmul, copy_streaming, stream_update_pclmul});
    }
#endif
#if defined(KTRAIN_HAS_VPCLMUL)
    if (cpu_has_vpclmul()) {
      add({"vpclmul", update_vpclmul, copy_update_vpclmul, stream_avx512, stream_update_vpclmul});
    }
#endif
  }

  void add(Variant variant) noexcept { entries[size++] = variant; }
};

const Registry& registry() noexcept {
  static const Registry instance;
  return instance;
}

}  // namespace

std::span<const Variant> variants() noexcept { return {registry().entries.data(), registry().size}; }

const Variant& best_variant() noexcept {
  static const Variant& best = variants().back();
  return best;
}

}  // namespace ktrain
