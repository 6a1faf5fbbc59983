// The packed layer for AVX-512 with VNNI and VBMI; which CPU has it is asked in linear.cpp.
#include "dft.h"
#include "linear.h"

#if defined(__x86_64__)

#include <cstring>

#include "lookup_avx512vbmi.h"

namespace llava_fa {
namespace avx512vbmi {
#include "linear.inl"
#include "dft.inl"
}  // namespace avx512vbmi

const LinearKernels* avx512vbmi_linear() {
  using namespace avx512vbmi;
  static const LinearKernels table LINEAR_KERNELS;
  return &table;
}
}  // namespace llava_fa

#else

const llava_fa::LinearKernels* llava_fa::avx512vbmi_linear() { return nullptr; }

#endif
