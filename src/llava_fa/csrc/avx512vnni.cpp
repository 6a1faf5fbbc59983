// The packed layer for AVX-512 with VNNI; which CPU has it is asked in linear.cpp.
#include "dft.h"
#include "linear.h"

#if defined(__x86_64__)

#include <cstring>

#include "lookup_avx512vnni.h"

namespace llava_fa {
namespace avx512vnni {
#include "linear.inl"
#include "dft.inl"
}  // namespace avx512vnni

const LinearKernels* avx512vnni_linear() {
  using namespace avx512vnni;
  static const LinearKernels table LINEAR_KERNELS;
  return &table;
}
}  // namespace llava_fa

#else

const llava_fa::LinearKernels* llava_fa::avx512vnni_linear() { return nullptr; }

#endif
