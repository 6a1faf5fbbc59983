// The packed layer for AVX2 with AVX-VNNI; which CPU has it is asked in linear.cpp, whether the assembler knows it in
// CMakeLists.txt.
#include "dft.h"
#include "linear.h"

#if defined(LLAVA_FA_AVXVNNI)

#include <cstring>

#include "lookup_avxvnni.h"

namespace llava_fa {
namespace avxvnni {
#include "linear.inl"
#include "dft.inl"
}  // namespace avxvnni

const LinearKernels* avxvnni_linear() {
  using namespace avxvnni;
  static const LinearKernels table LINEAR_KERNELS;
  return &table;
}
}  // namespace llava_fa

#else

const llava_fa::LinearKernels* llava_fa::avxvnni_linear() { return nullptr; }

#endif
