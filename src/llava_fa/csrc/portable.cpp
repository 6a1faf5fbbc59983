// The kernels for any CPU.
#include "dft.h"
#include "kernels.h"
#include "linear.h"
#include "lookup_portable.h"
#include "simd_portable.h"

namespace llava_fa {
namespace portable {
#include "some.inl"
#include "viterbi.inl"
#include "nearest.inl"
#include "beam.inl"
#include "greedy.inl"
#include "refine.inl"
#include "trellis_beam.inl"
#include "linear.inl"
#include "dft.inl"
}  // namespace portable

int64_t trellis_row_bytes() { return sizeof(portable::TrellisRow); }

const Kernels* portable_kernels() {
  using namespace portable;
  static const Kernels table{LANES,  viterbi_scratch, viterbi,        beam_scratch, beam,
                             greedy_scratch, greedy, refine_scratch, refine,       trellis_beam_scratch,
                             trellis_beam};
  return &table;
}

const LinearKernels* portable_linear() {
  using namespace portable;
  static const LinearKernels table LINEAR_KERNELS;
  return &table;
}
}  // namespace llava_fa
