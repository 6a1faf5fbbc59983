// Four lanes of float32 in the vector types of GCC and Clang, for any CPU (SSE2, NEON, …).
#pragma once

#include <cstdint>
#include <cstring>

#define ISA
#define INLINE static inline __attribute__((always_inline))

namespace llava_fa {
namespace portable {

constexpr int LANES = 4;
typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
using Mask = Ints;  // 0 or -1

INLINE Floats load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
INLINE void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }
INLINE Floats set1(float v) { return Floats{v, v, v, v}; }
INLINE Floats add(Floats a, Floats b) { return a + b; }
INLINE Floats sub(Floats a, Floats b) { return a - b; }
INLINE Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }
INLINE Floats min(Floats a, Floats b) { return a < b ? a : b; }
INLINE Mask less(Floats a, Floats b) { return a < b; }
INLINE Ints set1(int32_t v) { return Ints{v, v, v, v}; }
INLINE Ints select(Mask m, Ints yes, Ints no) { return (m & yes) | (~m & no); }
INLINE void store(int32_t* p, Ints v) { std::memcpy(p, &v, sizeof v); }
// The low byte of each lane.
INLINE void store_bytes(uint8_t* p, Ints v) {
  for (int i = 0; i < LANES; i++) p[i] = static_cast<uint8_t>(v[i]);
}

}  // namespace portable
}  // namespace llava_fa
