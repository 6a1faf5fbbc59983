// Sixteen lanes of float32 on AVX-512.
#pragma once

#include <immintrin.h>

#include <cstdint>

#define ISA __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")))
#define INLINE static inline __attribute__((always_inline, target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")))

namespace llava_fa {
namespace avx512 {

constexpr int LANES = 16;
using Floats = __m512;
using Ints = __m512i;
using Mask = __mmask16;

INLINE Floats load(const float* p) { return _mm512_loadu_ps(p); }
INLINE void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
INLINE Floats set1(float v) { return _mm512_set1_ps(v); }
INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
INLINE Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
INLINE Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
INLINE Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
INLINE Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
INLINE Mask less(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
INLINE Mask both(Mask a, Mask b) { return a & b; }
INLINE uint32_t bits(Mask m) { return m; }
INLINE Floats select(Mask m, Floats yes, Floats no) { return _mm512_mask_blend_ps(m, no, yes); }
INLINE Floats gather(const float* p, Ints i) { return _mm512_i32gather_ps(i, p, 4); }

INLINE Ints load(const int32_t* p) { return _mm512_loadu_si512(p); }
INLINE Ints set1(int32_t v) { return _mm512_set1_epi32(v); }
INLINE Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
INLINE Ints mul(Ints a, Ints b) { return _mm512_mullo_epi32(a, b); }
INLINE Ints min(Ints a, Ints b) { return _mm512_min_epi32(a, b); }
INLINE Ints max(Ints a, Ints b) { return _mm512_max_epi32(a, b); }
INLINE Ints and_(Ints a, Ints b) { return _mm512_and_si512(a, b); }
INLINE Ints or_(Ints a, Ints b) { return _mm512_or_si512(a, b); }
INLINE Ints shift_left(Ints a, int by) { return _mm512_slli_epi32(a, by); }
INLINE Ints shift_right(Ints a, int by) { return _mm512_srli_epi32(a, by); }
INLINE Mask less(Ints a, Ints b) { return _mm512_cmplt_epi32_mask(a, b); }
INLINE Mask equal(Ints a, Ints b) { return _mm512_cmpeq_epi32_mask(a, b); }
INLINE Ints truncate(Floats v) { return _mm512_cvttps_epi32(v); }
INLINE Ints as_ints(Floats v) { return _mm512_castps_si512(v); }
INLINE Floats as_floats(Ints v) { return _mm512_castsi512_ps(v); }
INLINE Ints gather(const int32_t* p, Ints i) { return _mm512_i32gather_epi32(i, p, 4); }
INLINE Ints select(Mask m, Ints yes, Ints no) { return _mm512_mask_blend_epi32(m, no, yes); }
INLINE void store(int32_t* p, Ints v) { _mm512_storeu_si512(p, v); }
// The low byte of each lane.
INLINE void store_bytes(uint8_t* p, Ints v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v)); }
// Of numbers that are not negative; two bytes beyond the last may be read.
INLINE Ints gather(const int16_t* p, Ints i) { return _mm512_and_si512(_mm512_i32gather_epi32(i, p, 2), _mm512_set1_epi32(0xffff)); }
// As gather, from 32 floats.
INLINE Floats pick32(const float* p, Ints i) { return _mm512_permutex2var_ps(load(p), i, load(p + 16)); }

// Quads: four lanes each. p[i] in all lanes of quad i; lane i of a quad from lane which[i] of it; its halves swapped.
INLINE Floats spread(const float* p) {
  const __m512i quad = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
  return _mm512_permutexvar_ps(quad, _mm512_castps128_ps512(_mm_loadu_ps(p)));
}
INLINE Floats permute_quads(Floats v, Ints which) { return _mm512_permutevar_ps(v, which); }
INLINE Ints permute_quads(Ints v, Ints which) { return as_ints(_mm512_permutevar_ps(_mm512_castsi512_ps(v), which)); }
INLINE Ints swap_neighbours(Ints v) { return _mm512_shuffle_epi32(v, _MM_PERM_CDAB); }
INLINE Ints swap_halves(Ints v) { return _mm512_shuffle_epi32(v, _MM_PERM_BADC); }

INLINE Ints convert(const int8_t* p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
INLINE Floats convert(Ints v) { return _mm512_cvtepi32_ps(v); }
INLINE Floats convert(const uint16_t* bf16) {
  return as_floats(shift_left(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bf16))), 16));
}

// Vector i, lane j ↔ vector j, lane i.
INLINE void transpose(Floats* v) {
  Floats t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int h = 0; h < 2; h++) {
      const __m512d a = _mm512_castps_pd(t[i + h]), b = _mm512_castps_pd(t[i + 2 + h]);
      v[i + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      v[i + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
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

INLINE Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
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
