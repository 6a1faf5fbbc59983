// The kernels for any CPU.
#include "kernels.h"
#include "simd_portable.h"

namespace llava_fa {
namespace portable {
#include "viterbi.inl"
}  // namespace portable

const Kernels* portable_kernels() {
  static const Kernels table{portable::LANES, portable::viterbi_scratch, portable::viterbi};
  return &table;
}
}  // namespace llava_fa
