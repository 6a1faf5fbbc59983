// Codes → int8 points on AVX-512 with VNNI. Up to 16 points: re and im by byte shuffle. More: (re, im) as one word of tables
// of 64, by two-source permutation. Points are stored plus 128, for vpdpbusd multiplies unsigned by signed bytes.
#pragma once

#define LLAVA_FA_INT8

#define LLAVA_FA_ISA "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"
#include "simd_avx512.h"

namespace llava_fa {
namespace avx512vnni {
using namespace avx512;

constexpr const char* NAME = "avx512vnni";

constexpr int DIRECT = 8;
constexpr int direct_sums(int64_t) { return 8; }

#include "lookup_avx512.inl"

constexpr bool planes(int code_bits) { return code_bits <= 4; }

template <int BITS, bool QUADRANT>
struct Table {
  static constexpr int FULL = QUADRANT ? BITS - 2 : BITS;  // bits that a point is looked up by
  Bytes t[FULL <= 6 ? 2 : FULL == 7 ? 4 : 8];

  INLINE void load(Table& self, const uint8_t* p) {
    if (planes(BITS)) {
      for (int i = 0; i < 2; i++)
        self.t[i] = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16 * i)));
    } else {
      for (size_t i = 0; i < sizeof self.t / sizeof *self.t; i++) self.t[i] = load_bytes(p + 64 * i);
    }
  }

  // The points of the codes in the low bytes of words, as words; of quadrants without their signs.
  INLINE Bytes words(const Table& self, Bytes c) {
    const Bytes* t = self.t;
    Bytes r = _mm512_permutex2var_epi16(t[0], c, t[1]);
    if (FULL >= 7) {
      const __mmask32 sixth = _mm512_test_epi16_mask(c, _mm512_set1_epi16(0x40));
      r = _mm512_mask_blend_epi16(sixth, r, _mm512_permutex2var_epi16(t[FULL >= 7 ? 2 : 0], c, t[FULL >= 7 ? 3 : 0]));
      if (FULL == 8) {
        const Bytes low = _mm512_permutex2var_epi16(t[FULL == 8 ? 4 : 0], c, t[FULL == 8 ? 5 : 0]);
        const Bytes high = _mm512_permutex2var_epi16(t[FULL == 8 ? 6 : 0], c, t[FULL == 8 ? 7 : 0]);
        r = _mm512_mask_blend_epi16(_mm512_test_epi16_mask(c, _mm512_set1_epi16(0x80)), r,
                                    _mm512_mask_blend_epi16(sixth, low, high));
      }
    }
    return r;
  }

  // planes: a = re, b = im of four coefficients; else a: coefficients 0 and 2, b: 1 and 3, as (re, im).
  INLINE void look(const Table& self, const Wide& code, Wide& first, Wide& second) {
    const Bytes c = code.part[0];
    Bytes &a = first.part[0], &b = second.part[0];
    if (planes(BITS)) {
      const Bytes index = masked(c, 0x0f);
      a = _mm512_shuffle_epi8(self.t[0], index);
      b = _mm512_shuffle_epi8(self.t[1], index);
    } else {
      const Bytes odd = _mm512_srli_epi16(c, 8);
      a = words(self, c);
      b = words(self, odd);
      if (QUADRANT) {
        a = signed_by(low_bytes(c, _mm512_slli_epi16(c, 9)), a);
        b = signed_by(low_bytes(odd, _mm512_slli_epi16(c, 1)), b);
      }
    }
  }

  // The low bytes of words of one, the high ones of the other.
  INLINE Bytes low_bytes(Bytes low, Bytes high) {
    return _mm512_ternarylogic_epi64(_mm512_set1_epi16(0x00ff), low, high, 0xca);
  }
};

}  // namespace avx512vnni
}  // namespace llava_fa
