// What the three builds of the kernels (portable, AVX2, AVX-512) share: the arguments of each, one struct a kernel.
// Rows of a weight are columns of these matrices, as in the Python code: row r of the weight is column r.
#pragma once

#include <cstddef>
#include <cstdint>

namespace llava_fa {

// maths/trellis.py, Trellis.encode.
struct Viterbi {
  const float* target;  // [2 steps, rows]
  int64_t steps, rows;
  const float* table;  // [2^state_bits, 3]: -2 re, -2 im, |c|^2
  int64_t state_bits, code_bits;
  int32_t* states;  // [steps, rows]
};

// One instruction set's implementations. Each does `lanes` rows (fewer at the end), from `first` on, in `scratch`.
struct Kernels {
  int64_t lanes;
  size_t (*viterbi_scratch)(const Viterbi&);
  void (*viterbi)(const Viterbi&, int64_t first, char* scratch);
};

const Kernels* portable_kernels();
const Kernels* avx2_kernels();    // null where they were not built
const Kernels* avx512_kernels();  // the same

}  // namespace llava_fa
