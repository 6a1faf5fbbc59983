#include "tiles.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

// Tiles must be asked for.
bool has(unsigned kind) {
  constexpr unsigned TILES = 1u << 24;
  constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA of <asm/prctl.h>
  unsigned a = 0, b, c, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & (TILES | kind)) == (TILES | kind) &&
         !syscall(SYS_arch_prctl, REQUEST, TILE_DATA);
}

}  // namespace
#else
static bool has(unsigned) { return false; }
#endif

#ifdef LLAVA_FA_EMULATE_AMX  // for tests on a CPU without it
bool llava_fa::has_int8_tiles() { return true; }
bool llava_fa::has_bf16_tiles() { return true; }
#else
bool llava_fa::has_int8_tiles() {
  static const bool there = has(1u << 25);
  return there;
}
bool llava_fa::has_bf16_tiles() {
  static const bool there = has(1u << 22);
  return there;
}
#endif
