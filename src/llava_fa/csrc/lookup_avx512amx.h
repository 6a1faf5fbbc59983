// The packed layer on AVX-512 with VNNI, VBMI and AMX: as avx512vbmi, but for products of many vectors, which are tiles'.
#pragma once

#define LLAVA_FA_INT8
#define LLAVA_FA_TILES

#ifdef LLAVA_FA_EMULATE_AMX  // for tests on a CPU without it
#define LLAVA_FA_ISA "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"
#else
#define LLAVA_FA_ISA "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,amx-tile,amx-int8"
#endif
#include "simd_avx512.h"

namespace llava_fa {
namespace avx512amx {
using namespace avx512;

constexpr const char* NAME = "avx512amx";

constexpr int DIRECT = 4;
constexpr int direct_sums(int64_t code_bits) { return code_bits <= 4 ? 4 : 8; }

#include "lookup_avx512.inl"
#include "lookup_avx512vbmi.inl"

// Tiles 0 … 7 of 1024 bytes: the rows of 0 … 5 are told by `use_tiles`, the others have 16; a row has 64 bytes.
#ifdef LLAVA_FA_EMULATE_AMX
thread_local int8_t emulated[8][16][64];
thread_local int64_t emulated_rows;

INLINE void use_tiles(int64_t rows) { emulated_rows = rows; }
INLINE void leave_tiles() { emulated_rows = 0; }
template <int T>
INLINE void clear_tile() {
  std::memset(emulated[T], 0, sizeof emulated[T]);
}
template <int T>
INLINE void load_tile(const void* p, int64_t stride) {
  for (int64_t i = 0; i < (T < 6 ? emulated_rows : 16); i++)
    std::memcpy(emulated[T][i], static_cast<const char*>(p) + i * stride, 64);
}
template <int T>
INLINE void store_tile(int32_t* p) {
  std::memcpy(p, emulated[T], static_cast<size_t>(emulated_rows) * 64);
}
template <int SUM, int X, int W>
INLINE void dot_tiles() {
  for (int64_t i = 0; i < emulated_rows; i++) {
    int32_t sum[16];
    std::memcpy(sum, emulated[SUM][i], sizeof sum);
    for (int k = 0; k < 64; k++)
      for (int j = 0; j < 16; j++) sum[j] += emulated[X][i][k] * static_cast<uint8_t>(emulated[W][k / 4][4 * j + k % 4]);
    std::memcpy(emulated[SUM][i], sum, sizeof sum);
  }
}
#else
INLINE void use_tiles(int64_t rows) {
  struct {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  static_assert(sizeof config == 64);
  for (int i = 0; i < 8; i++) {
    config.row_bytes[i] = 64;
    config.rows[i] = static_cast<uint8_t>(i < 6 ? rows : 16);
  }
  asm volatile("ldtilecfg %0" : : "m"(config));
}
INLINE void leave_tiles() { asm volatile("tilerelease"); }
// Compilers' intrinsics are macros that take no template argument.
template <int T>
INLINE void clear_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(T));
}
template <int T>
INLINE void load_tile(const void* p, int64_t stride) {
  asm volatile("tileloadd (%1,%2), %%tmm%c0" : : "i"(T), "r"(p), "r"(stride) : "memory");
}
template <int T>
INLINE void store_tile(int32_t* p) {
  asm volatile("tilestored %%tmm%c0, (%1,%2)" : : "i"(T), "r"(p), "r"(int64_t{64}) : "memory");
}
template <int SUM, int X, int W>
INLINE void dot_tiles() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUM), "i"(X), "i"(W));
}
#endif

}  // namespace avx512amx
}  // namespace llava_fa
