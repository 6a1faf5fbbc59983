// Which build of the packed layer a level means on this CPU.

#include "linear.h"
#include "tiles.h"

#if defined(__x86_64__)
#include <cpuid.h>
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
#endif

}  // namespace

// level: 0 portable, 1 AVX2, 2 AVX-512, which without VNNI is served by AVX2; each with what more of it the CPU has.
const llava_fa::LinearKernels* llava_fa::linear_kernels(int64_t level) {
#if defined(__x86_64__)
  if (level == 2 && avx512vnni_linear() && __builtin_cpu_supports("avx512vnni"))
    return !has_vbmi() ? avx512vnni_linear() : avx512amx_linear() && has_int8_tiles() ? avx512amx_linear() : avx512vbmi_linear();
  if (level >= 1 && avx2_linear()) return avxvnni_linear() && has_avxvnni() ? avxvnni_linear() : avx2_linear();
#endif
  (void)level;
  return portable_linear();
}
