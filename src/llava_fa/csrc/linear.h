// The layer y = diag(row_scale) codebook[codes] T (x / s) + L R x + bias: what the builds for each instruction set share.
// kernels/interleaved.py defines the order of the codes, kernels/definition.py the result.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <utility>

namespace llava_fa {

// Rows of the weight in one block, coefficients in one unit, units that share a scale of x.
constexpr int64_t ROWS = 16, UNIT = 32, GROUP = 4;

// Words of 32 bits of one row of trellis codes: those of its units, and one where the last window ends.
inline int64_t trellis_words(int64_t count, int64_t code_bits, int64_t state_bits) {
  return state_bits ? (count + UNIT - 1) / UNIT * code_bits + 1 : 0;
}

// A transform x → packed real DFT of one length; made once, by one instruction set, for itself.
struct Dft;

// Codes as stored → in the kernels' order, or back.
struct Interleave {
  const uint8_t* source;
  uint8_t* to;
  int64_t m, coefficients;  // of a row
  int64_t code_bits, state_bits, back;
};

// Of the tensors that a layer is given.
enum class Dtype : int64_t { bf16 = 0, float32 = 2, int8 = 3 };

// One call of a packed layer: kernels/packed.py's BestWeight, x and y, as llava_fa/native.py fills it field by field.
struct Layer {
  const char* x;  // [batch, n]
  char* out;      // [batch, m]
  int64_t batch;
  Dtype dtype;           // of x and out: bf16 or float32
  const uint8_t* codes;  // in the order of kernels/interleaved.py
  const uint16_t *row_scale, *input_scale;
  const uint8_t* signs;
  const uint16_t* codebook;
  const char *left, *right;                    // int8 with scales, bf16 without
  const uint16_t *left_scale, *right_scale;    // or null
  int64_t rank;
  const char* bias;  // or null
  Dtype bias_dtype;  // bf16 or float32
  int64_t m, n, code_bits, state_bits;
  int64_t exact;  // whether T (x / s) stays in float32
};

// What the rows of the weight are multiplied with.
struct Linear {
  const uint8_t* codes;  // rings [blocks, units, code_bits, 64]; trellis [blocks, words, 64]
  int64_t blocks, units, code_bits, state_bits, words;
  bool quadrant;         // 8 bits: points 0 … 63, bit 7 turns re's sign and bit 6 im's: a quarter of the table is enough
  const uint8_t* tables;   // int8: of `tables`, `trellis_tables`; float: a dword a point, bf16 (re, im), rings at least 16
  const uint8_t* addends;  // int8, trellis: the tables whose sums the points are, of `trellis_addends`; or null
  int64_t batch, groups;
  const int8_t* x;         // int8: [groups, panels of columns, 64, columns of the panel, x_bytes], as `quantise` orders them
  const float* x_scale;    // [groups, batch]
  const int32_t* x_bias;   // [groups, batch]: what makes up for the tables' offset
  const int32_t* x_steep;  // [groups, batch]: bit u is set where sums of four products of unit u may take more than 16 bits
  int32_t level;           // int8: two coefficients whose squares add up to no more make no such sums with any points
  const float* x_float;    // float: [batch, units * 64]: re, im of each coefficient
};

// One instruction set's implementation.
struct LinearKernels {
  const char* name;
  // The transform of length size (even).
  std::shared_ptr<const Dft> (*plan)(int64_t size);
  size_t (*dft_scratch)(const Dft&);  // floats
  // re, im [size / 2] of the packed DFT of x [n] (bf16 or float32) · sign / s.
  void (*dft)(const Dft&, const void* x, Dtype dtype, int64_t n, const uint16_t* input_scale, const uint8_t* signs,
              float* re, float* im, float* scratch);
  int64_t x_bytes;  // that four numbers of int8 x take
  // One column of int8 x, with one scale for every group, of re and im [groups * GROUP * UNIT]. Null, as the next and int8,
  // where float32 is as fast.
  void (*quantise)(const Linear&, int64_t column, const float* re, const float* im, int8_t* x, float* scale, int32_t* bias,
                   int32_t* steep);
  // Tables of 2^code_bits points (re, im) in int8 and the float that one step stands for; of 2^state_bits, in
  // trellis_table_bytes.
  float (*tables)(const uint16_t* codebook, int64_t code_bits, uint8_t* tables);
  float (*trellis_tables)(const uint16_t* codebook, int64_t state_bits, uint8_t* tables);
  // Whether all points of `trellis_tables` are sums of two tables of 64 (maths/trellis.py): then `parts`, ADDENDS bytes, gets
  // those. Null without int8.
  bool (*trellis_addends)(const uint8_t* tables, int64_t code_bits, int64_t state_bits, uint8_t* parts);
  // y [count, batch, ROWS] = blocks first … first + count - 1 times x. Scratch: `scratch` bytes.
  size_t scratch;
  void (*int8)(const Linear&, int64_t first, int64_t count, float* y, char* scratch);
  void (*exact)(const Linear&, int64_t first, int64_t count, float* y, char* scratch);
  // Σ_j a_j x_j, j < n; a is int8 or bf16.
  float (*dot)(const void* a, Dtype dtype, const float* x, int64_t n);
  // out [n] = y · scale + low_rank + bias, each rounded to float32, n <= ROWS; low_rank may be null. out is bf16 or float32.
  void (*finish)(const float* y, const float* scale, const float* low_rank, const float* bias, int64_t n, void* out,
                 Dtype dtype);
  // float from x [n], bf16 or float32.
  void (*widen)(const void* x, Dtype dtype, int64_t n, float* out);
};

constexpr size_t TABLES = 1024;  // bytes that `tables` may write
constexpr size_t ADDENDS = 256;  // and `trellis_addends`
constexpr size_t trellis_table_bytes(int64_t state_bits) { return (size_t{4} << state_bits) + 64; }

const LinearKernels* portable_linear();
const LinearKernels* avx2_linear();      // null where they were not built
const LinearKernels* avxvnni_linear();   // the same
const LinearKernels* avx512vnni_linear();  // the same
const LinearKernels* avx512vbmi_linear();  // the same
const LinearKernels* avx512amx_linear();   // the same
const LinearKernels* linear_kernels(int64_t level);

}  // namespace llava_fa
