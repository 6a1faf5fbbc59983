// What the builds of the solver's kernels (portable, AVX2, AVX-512) share: the arguments of each, one struct a kernel, which
// llava_fa/native.py fills field by field: eight bytes each number and address.
// Rows of a weight are columns of these matrices, as in the Python code: row r of the weight is column r.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "threads.h"

namespace llava_fa {

// maths/trellis.py, Trellis.encode.
struct Viterbi {
  const float* target;  // [2 steps, rows]
  int64_t steps, rows;
  const float* table;  // [2^state_bits, 3]: -2 re, -2 im, |c|^2
  int64_t state_bits, code_bits;
  int32_t* states;  // [steps, rows]
};

// maths/nearest.py, NearestCode: its tables.
struct Nearest {
  const int32_t* cells;       // [side, side]: a code, or -1 - row of `candidates`
  const int32_t* candidates;  // [·, width]
  const float* points;        // [size, 2]
  const float* half_norm;     // [size]
  int64_t side, width, size;
  double reach;
};

// solver/beam.py, one block of columns; four hypotheses a row, four codes tried for each.
struct Beam {
  float *target, *base;  // [columns, rows]: what codes stand for (becomes the errors), and the same corrected
  int64_t columns, rows;
  const float* unit;     // [columns, columns]
  const float* metric;   // [columns / 2, 3]: R_pp = (a b; 0 c)
  const float* tried;    // [size, 4, 2]: each code's nearest points
  const int32_t* numbers;  // [size, 4]: their codes
  Nearest search;
  int32_t* codes;  // [columns / 2, rows]
};

// solver/feedback.py, round_with_feedback, one block of columns.
struct Greedy {
  float *target, *base;  // as for Beam
  int64_t columns, rows;
  const float* unit;  // [columns, columns]
  Nearest search;
  int32_t* codes;  // [columns / 2, rows]
};

// solver/feedback.py, refine, one block of columns.
struct Refine {
  float *error, *gradient;  // [columns, rows]: E, and H E (spoilt)
  int64_t columns, rows;
  const float* moment;   // [columns, columns]
  const float* inverse;  // [columns / 2, 2, 2]
  Nearest search;
  int32_t *codes, *changed;  // [columns / 2, rows] and [rows]: how many codes of a row
};

// solver/trellis_beam.py, one block of columns of all rows.
struct TrellisBeam {
  float* target;      // [size, rows]; what is settled becomes errors
  const float* base;  // [columns, rows]: its columns, corrected for what is settled
  int64_t start, columns, size, rows;
  const float* unit;    // [columns, ahead], ahead = columns of this block and the next
  int64_t ahead;
  const float* metric;  // [columns / 2, 3]: a, b, c of D_p = (a b; b c)
  const int32_t* points;  // [2^state_bits]: (re, im), bf16
  int64_t code_bits;
  const int16_t* lists;  // [groups, side, side, tried] and two bytes more
  const int16_t* first;  // [side, side, tried_first] and two bytes more
  int64_t side, tried, tried_first;
  double reach;
  char* paths;      // [rows] of trellis_row_bytes, kept from block to block
  int32_t* states;  // [size / 2, rows]
};

int64_t trellis_row_bytes();

// maths/products.py. Of a and b the lines (rows of a, columns of b) or what runs along them lies without gaps.
struct Product {
  const float *a, *b;  // [m, k], [k, n]
  float* c;            // [m, n]
  int64_t m, n, k;
  int64_t a_row, a_column, b_row, b_column, c_row;  // strides
  int64_t sign;                                     // 0: c = a b; 1: c += a b; -1: c -= a b
  int64_t rough;                                    // whether a and b are rounded to bf16
};

bool multiplies();  // whether this CPU and this build have `product`
bool product(const Product&, int64_t threads, Parallel);  // false: no memory

// One instruction set's implementations. Each does `lanes` rows (fewer at the end), from `first` on, in `scratch`.
struct Kernels {
  int64_t lanes;
  size_t (*viterbi_scratch)(const Viterbi&);
  void (*viterbi)(const Viterbi&, int64_t first, char* scratch);
  size_t (*beam_scratch)(const Beam&);
  void (*beam)(const Beam&, int64_t first, char* scratch);
  size_t (*greedy_scratch)(const Greedy&);
  void (*greedy)(const Greedy&, int64_t first, char* scratch);
  size_t (*refine_scratch)(const Refine&);
  void (*refine)(const Refine&, int64_t first, char* scratch);
  size_t (*trellis_beam_scratch)(const TrellisBeam&);
  void (*trellis_beam)(const TrellisBeam&, int64_t first, char* scratch);
};

const Kernels* portable_kernels();
const Kernels* avx2_kernels();    // null where they were not built
const Kernels* avx512_kernels();  // the same

}  // namespace llava_fa
