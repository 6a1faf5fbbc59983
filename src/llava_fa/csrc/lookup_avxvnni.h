// Products on AVX2 with AVX-VNNI, as CPUs without AVX-512 have them. Points are stored plus 128, for vpdpbusd multiplies unsigned
// by signed bytes.
#pragma once

#define LLAVA_FA_INT8

#include "simd_avx2.h"

namespace llava_fa {
namespace avxvnni {
using namespace avx2;

constexpr const char* NAME = "avxvnni";
constexpr int OFFSET = 128;
constexpr int COLUMNS = 6, BLOCKS = 1, DIRECT = 2;
constexpr int direct_sums(int64_t) { return 1; }
constexpr auto FETCH = _MM_HINT_T1;
constexpr int chains(int columns) { return columns == 1 ? 4 : 2; }

#include "lookup_avx2.inl"

constexpr int64_t X_BYTES = 4;
constexpr bool PAIRED = false;
INLINE void lay(const int8_t* x, int8_t* to) { std::memcpy(to, x, 256); }
INLINE int32_t steep_units(const int8_t*, const int8_t*, int32_t) { return 0; }
// _mm256_dpbusd_avx_epi32 (see lookup_avx512.inl).
INLINE void dot(Wide& sum, const Wide& w, const int8_t* x) {
  const Bytes v = four(x);
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum.part[0]) : "x"(w.part[0]), "x"(v));
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum.part[1]) : "x"(w.part[1]), "x"(v));
}

}  // namespace avxvnni
}  // namespace llava_fa
