// The kernels for any CPU.
#include "kernels.h"
#include "simd_portable.h"

namespace llava_fa {
namespace portable {
#include "viterbi.inl"
#include "nearest.inl"
#include "beam.inl"
#include "refine.inl"
}  // namespace portable

const Kernels* portable_kernels() {
  using namespace portable;
  static const Kernels table{LANES, viterbi_scratch, viterbi, beam_scratch, beam, refine_scratch, refine};
  return &table;
}
}  // namespace llava_fa
