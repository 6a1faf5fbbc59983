// Which build of the packed layer a level means on this CPU.

#include "linear.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace {

#if defined(__x86_64__)
bool has_vbmi() {
#if defined(LLAVA_FA_EMULATE_VBMI)
  return true;
#elif defined(LLAVA_FA_WITHOUT_VBMI)  // for tests on a CPU with it
  return false;
#else
  return __builtin_cpu_supports("avx512vbmi");
#endif
}

bool has_avxvnni() {  // not every compiler's __builtin_cpu_supports knows it; asked once, for it takes microseconds in a VM
  static const bool has = [] {
    unsigned a = 0, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 4 & 1;
  }();
  return has;
}

// Whether the CPU has int8 tiles, and the system lets this process use them, which must be asked for.
bool has_amx() {
#if defined(LLAVA_FA_EMULATE_AMX)
  return true;
#elif !defined(__linux__)
  return false;
#else
  static const bool has = [] {
    constexpr unsigned TILES = 1u << 24, INT8 = 1u << 25;
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA of <asm/prctl.h>
    unsigned a = 0, b, c, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & (TILES | INT8)) == (TILES | INT8) &&
           !syscall(SYS_arch_prctl, REQUEST, TILE_DATA);
  }();
  return has;
#endif
}
#endif

}  // namespace

// level: 0 portable, 1 AVX2, 2 AVX-512, which without VNNI is served by AVX2; each with what more of it the CPU has.
const llava_fa::LinearKernels* llava_fa::linear_kernels(int64_t level) {
#if defined(__x86_64__)
  if (level == 2 && avx512vnni_linear() && __builtin_cpu_supports("avx512vnni"))
    return !has_vbmi() ? avx512vnni_linear() : avx512amx_linear() && has_amx() ? avx512amx_linear() : avx512vbmi_linear();
  if (level >= 1 && avx2_linear()) return avxvnni_linear() && has_avxvnni() ? avxvnni_linear() : avx2_linear();
#endif
  (void)level;
  return portable_linear();
}
