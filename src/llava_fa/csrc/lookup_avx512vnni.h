// Codes → int8 points on AVX-512 with VNNI. Up to 16 points: re and im by byte shuffle. More: (re, im) as one word of tables
// of 64, by two-source permutation. Points are stored plus 128, for vpdpbusd multiplies unsigned by signed bytes.
#pragma once

#define LLAVA_FA_INT8
#define LLAVA_FA_DIRECT

#include "simd_avx512.h"

#undef ISA
#undef INLINE
#define ISA __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))
#define INLINE static inline __attribute__((always_inline, target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))

namespace llava_fa {
namespace avx512vnni {
using namespace avx512;

constexpr const char* NAME = "avx512vnni";
constexpr int OFFSET = 128;
// Rows in vectors of sums; columns of x and blocks of rows taken together, so that sums stay in registers.
constexpr int COLUMNS = 12, BLOCKS = 2;

using Bytes = __m512i;
INLINE Bytes load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
INLINE void store_all(uint8_t* p, Bytes v) { _mm512_storeu_si512(p, v); }
template <int BY>  // right by BY bits, left if negative, of words: bits that cross a byte are not looked at
INLINE Bytes shift(Bytes v) {
  return BY > 0 ? _mm512_srli_epi16(v, BY > 0 ? BY : 0) : BY < 0 ? _mm512_slli_epi16(v, BY < 0 ? -BY : 0) : v;
}
INLINE Bytes masked(Bytes v, int mask) { return _mm512_and_si512(v, _mm512_set1_epi8(static_cast<char>(mask))); }
INLINE Bytes select_bits(int mask, Bytes yes, Bytes no) {
  return _mm512_ternarylogic_epi64(_mm512_set1_epi8(static_cast<char>(mask)), yes, no, 0xca);
}

constexpr bool planes(int code_bits) { return code_bits <= 4; }

template <int BITS>
struct Table {
  Bytes t[BITS <= 4 ? 2 : BITS <= 6 ? 2 : BITS == 7 ? 4 : 8];

  INLINE void load(Table& self, const uint8_t* p) {
    if (planes(BITS)) {
      for (int i = 0; i < 2; i++)
        self.t[i] = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16 * i)));
    } else {
      for (size_t i = 0; i < sizeof self.t / sizeof *self.t; i++) self.t[i] = load_bytes(p + 64 * i);
    }
  }

  // The points of the codes in the low bytes of words, as words.
  INLINE Bytes words(const Table& self, Bytes c) {
    const Bytes* t = self.t;
    Bytes r = _mm512_permutex2var_epi16(t[0], c, t[1]);
    if (BITS >= 7) {
      const __mmask32 sixth = _mm512_test_epi16_mask(c, _mm512_set1_epi16(0x40));
      r = _mm512_mask_blend_epi16(sixth, r, _mm512_permutex2var_epi16(t[BITS >= 7 ? 2 : 0], c, t[BITS >= 7 ? 3 : 0]));
      if (BITS == 8) {
        const Bytes low = _mm512_permutex2var_epi16(t[BITS == 8 ? 4 : 0], c, t[BITS == 8 ? 5 : 0]);
        const Bytes high = _mm512_permutex2var_epi16(t[BITS == 8 ? 6 : 0], c, t[BITS == 8 ? 7 : 0]);
        r = _mm512_mask_blend_epi16(_mm512_test_epi16_mask(c, _mm512_set1_epi16(0x80)), r,
                                    _mm512_mask_blend_epi16(sixth, low, high));
      }
    }
    return r;
  }

  // planes: a = re, b = im of four coefficients; else a: coefficients 0 and 2, b: 1 and 3, as (re, im).
  INLINE void look(const Table& self, Bytes c, Bytes& a, Bytes& b) {
    if (planes(BITS)) {
      const Bytes index = masked(c, 0x0f);
      a = _mm512_shuffle_epi8(self.t[0], index);
      b = _mm512_shuffle_epi8(self.t[1], index);
    } else {
      a = words(self, c);
      b = words(self, _mm512_srli_epi16(c, 8));
    }
  }
};

// Sums of ROWS rows.
using Sums = __m512i;
INLINE Sums sums(int32_t v) { return _mm512_set1_epi32(v); }
INLINE void dot(Sums& sum, Bytes w, int32_t x) { sum = _mm512_dpbusd_epi32(sum, w, _mm512_set1_epi32(x)); }
INLINE void dot(Sums& sum, const uint8_t* w, int32_t x) { dot(sum, load_bytes(w), x); }
INLINE void accumulate(float* y, Sums sum, float scale) { store(y, fma(convert(sum), set1(scale), load(y))); }

// Table of at least 16 dwords by code.
#define LLAVA_FA_PICK
template <int BITS>
INLINE Ints pick(const int32_t* t, Ints i) {
  if (BITS <= 4) return _mm512_permutexvar_epi32(i, load(t));
  constexpr int COUNT = BITS <= 5 ? 1 : 1 << (BITS - 5);
  Ints r[COUNT];
  for (int k = 0; k < COUNT; k++) r[k] = _mm512_permutex2var_epi32(load(t + 32 * k), i, load(t + 32 * k + 16));
  for (int bit = 5, left = COUNT / 2; left; bit++, left /= 2) {
    const __mmask16 set = _mm512_test_epi32_mask(i, _mm512_set1_epi32(1 << bit));
    for (int k = 0; k < left; k++) r[k] = _mm512_mask_blend_epi32(set, r[2 * k], r[2 * k + 1]);
  }
  return r[0];
}

}  // namespace avx512vnni
}  // namespace llava_fa
