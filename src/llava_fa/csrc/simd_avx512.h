// Sixteen lanes of float32 on AVX-512.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#ifndef LLAVA_FA_ISA  // builds for more of it name that
#define LLAVA_FA_ISA "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"
#endif
#define ps(f) _mm512_##f##_ps
#define epi32(f) _mm512_##f##_epi32
#define si(f) _mm512_##f##_si512
#define pd(f) _mm512_##f##_pd
#define epi16(f) _mm512_##f##_epi16
#define epi8(f) _mm512_##f##_epi8

namespace llava_fa {
namespace avx512 {

constexpr int LANES = 16;
using Floats = __m512;
using Doubles = __m512d;
using Ints = __m512i;
using Mask = __mmask16;

#include "simd_x86.inl"

INLINE Mask less(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
INLINE Mask both(Mask a, Mask b) { return a & b; }
INLINE uint32_t bits(Mask m) { return m; }
INLINE Floats select(Mask m, Floats yes, Floats no) { return _mm512_mask_blend_ps(m, no, yes); }
INLINE Floats gather(const float* p, Ints i) { return _mm512_i32gather_ps(i, p, 4); }

INLINE Mask less(Ints a, Ints b) { return _mm512_cmplt_epi32_mask(a, b); }
INLINE Mask equal(Ints a, Ints b) { return _mm512_cmpeq_epi32_mask(a, b); }
INLINE Ints gather(const int32_t* p, Ints i) { return _mm512_i32gather_epi32(i, p, 4); }
INLINE Ints select(Mask m, Ints yes, Ints no) { return _mm512_mask_blend_epi32(m, no, yes); }
// The low byte of each lane.
INLINE void store_bytes(uint8_t* p, Ints v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v)); }
// 32 numbers times a factor, to the nearest int8; those that are in its range.
INLINE void store_nearest(int8_t* p, const float* v, Floats factor) {
  for (int i = 0; i < 32; i += 16)
    store_bytes(reinterpret_cast<uint8_t*>(p + i), _mm512_cvtps_epi32(mul(load(v + i), factor)));
}
// Of numbers that are not negative; two bytes beyond the last may be read.
INLINE Ints gather(const int16_t* p, Ints i) { return _mm512_and_si512(_mm512_i32gather_epi32(i, p, 2), _mm512_set1_epi32(0xffff)); }
// As gather, from 32 floats.
INLINE Floats pick32(const float* p, Ints i) { return _mm512_permutex2var_ps(load(p), i, load(p + 16)); }

// Quads: four lanes each. p[i] in all lanes of quad i; lane i of a quad from lane which[i] of it; its halves swapped.
INLINE Floats spread(const float* p) {
  const __m512i quad = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
  return _mm512_permutexvar_ps(quad, _mm512_castps128_ps512(_mm_loadu_ps(p)));
}
INLINE Ints swap_neighbours(Ints v) { return _mm512_shuffle_epi32(v, _MM_PERM_CDAB); }
INLINE Ints swap_halves(Ints v) { return _mm512_shuffle_epi32(v, _MM_PERM_BADC); }

INLINE Ints convert(const int8_t* p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
INLINE Floats convert(const uint16_t* bf16) {
  return as_floats(shift_left(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bf16))), 16));
}

// Vector i, lane j ↔ vector j, lane i.
INLINE void transpose(Floats* v) {
  Floats t[16];
  transpose_quads(v);
  for (int half = 0; half < 16; half += 8)
    for (int i = 0; i < 4; i++) {
      t[half + i] = _mm512_shuffle_f32x4(v[half + i], v[half + 4 + i], 0x88);
      t[half + 4 + i] = _mm512_shuffle_f32x4(v[half + i], v[half + 4 + i], 0xdd);
    }
  for (int i = 0; i < 8; i++) {
    v[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    v[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
  }
}

INLINE Floats reverse(Floats v) {
  return _mm512_permutexvar_ps(_mm512_set_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), v);
}
// Every second of the numbers in a and then b, from the first and from the second on.
INLINE void split(Floats a, Floats b, Floats& even, Floats& odd) {
  const __m512i index = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  even = _mm512_permutex2var_ps(a, index, b);
  odd = _mm512_permutex2var_ps(a, _mm512_add_epi32(index, _mm512_set1_epi32(1)), b);
}

}  // namespace avx512
}  // namespace llava_fa
