// The kernels for AVX2 and FMA; which CPU has it is asked in library.cpp.
#include "dft.h"
#include "kernels.h"
#include "linear.h"

#if defined(__x86_64__)

#include "lookup_avx2.h"
#include "simd_avx2.h"

namespace llava_fa {
namespace avx2 {
#include "some.inl"
#include "viterbi.inl"
#include "nearest.inl"
#include "beam.inl"
#include "greedy.inl"
#include "refine.inl"
#include "trellis_beam.inl"
#include "linear.inl"
#include "dft.inl"
}  // namespace avx2

const Kernels* avx2_kernels() {
  using namespace avx2;
  static const Kernels table{LANES,  viterbi_scratch, viterbi,        beam_scratch, beam,
                             greedy_scratch, greedy, refine_scratch, refine,       trellis_beam_scratch,
                             trellis_beam};
  return &table;
}

const LinearKernels* avx2_linear() {
  using namespace avx2;
  static const LinearKernels table LINEAR_KERNELS;
  return &table;
}
}  // namespace llava_fa

#else

const llava_fa::Kernels* llava_fa::avx2_kernels() { return nullptr; }
const llava_fa::LinearKernels* llava_fa::avx2_linear() { return nullptr; }

#endif
