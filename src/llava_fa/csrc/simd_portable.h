// Four lanes of float32 in the vector types of GCC and Clang, for any CPU (SSE2, NEON, …).
#pragma once

#include <cstdint>
#include <cstring>

#define ISA
#define TILE __attribute__((always_inline))  // of lambdas
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
INLINE Floats mul(Floats a, Floats b) { return a * b; }
INLINE Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }
INLINE Floats min(Floats a, Floats b) { return a < b ? a : b; }
INLINE Floats max(Floats a, Floats b) { return a > b ? a : b; }
INLINE Mask less(Floats a, Floats b) { return a < b; }
INLINE Mask both(Mask a, Mask b) { return a & b; }
INLINE uint32_t bits(Mask m) { return (m[0] & 1) | (m[1] & 2) | (m[2] & 4) | (m[3] & 8); }
INLINE Floats select(Mask m, Floats yes, Floats no) { return m ? yes : no; }
INLINE Floats gather(const float* p, Ints i) { return Floats{p[i[0]], p[i[1]], p[i[2]], p[i[3]]}; }

INLINE Ints load(const int32_t* p) {
  Ints v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
INLINE Ints set1(int32_t v) { return Ints{v, v, v, v}; }
INLINE Ints add(Ints a, Ints b) { return a + b; }
INLINE Ints mul(Ints a, Ints b) { return a * b; }
INLINE Ints min(Ints a, Ints b) { return a < b ? a : b; }
INLINE Ints max(Ints a, Ints b) { return a > b ? a : b; }
INLINE Ints and_(Ints a, Ints b) { return a & b; }
INLINE Ints or_(Ints a, Ints b) { return a | b; }
INLINE Ints shift_left(Ints a, int by) { return a << by; }
INLINE Ints shift_right(Ints a, int by) { return a >> by; }
INLINE Mask less(Ints a, Ints b) { return a < b; }
INLINE Mask equal(Ints a, Ints b) { return a == b; }
INLINE Ints truncate(Floats v) { return __builtin_convertvector(v, Ints); }
INLINE Ints as_ints(Floats v) { return reinterpret_cast<Ints>(v); }
INLINE Floats as_floats(Ints v) { return reinterpret_cast<Floats>(v); }
INLINE Ints gather(const int32_t* p, Ints i) { return Ints{p[i[0]], p[i[1]], p[i[2]], p[i[3]]}; }
INLINE Ints select(Mask m, Ints yes, Ints no) { return (m & yes) | (~m & no); }
INLINE void store(int32_t* p, Ints v) { std::memcpy(p, &v, sizeof v); }
// The low byte of each lane.
INLINE void store_bytes(uint8_t* p, Ints v) {
  for (int i = 0; i < LANES; i++) p[i] = static_cast<uint8_t>(v[i]);
}
// Of numbers that are not negative; two bytes beyond the last may be read.
INLINE Ints gather(const int16_t* p, Ints i) { return Ints{p[i[0]], p[i[1]], p[i[2]], p[i[3]]}; }
// As gather, from 32 floats.
INLINE Floats pick32(const float* p, Ints i) { return gather(p, i); }

// Quads: four lanes each. p[i] in all lanes of quad i; lane i of a quad from lane which[i] of it; its halves swapped.
INLINE Floats spread(const float* p) { return set1(*p); }
INLINE Floats permute_quads(Floats v, Ints which) { return Floats{v[which[0]], v[which[1]], v[which[2]], v[which[3]]}; }
INLINE Ints permute_quads(Ints v, Ints which) { return Ints{v[which[0]], v[which[1]], v[which[2]], v[which[3]]}; }
INLINE Ints swap_neighbours(Ints v) { return Ints{v[1], v[0], v[3], v[2]}; }
INLINE Ints swap_halves(Ints v) { return Ints{v[2], v[3], v[0], v[1]}; }

INLINE Ints convert(const int8_t* p) { return Ints{p[0], p[1], p[2], p[3]}; }
INLINE Floats convert(Ints v) { return __builtin_convertvector(v, Floats); }
INLINE Floats convert(const uint16_t* p) {
  return as_floats(Ints{p[0] << 16, p[1] << 16, p[2] << 16, p[3] << 16});
}

// Vector i, lane j ↔ vector j, lane i.
INLINE void transpose(Floats* v) {
  for (int i = 0; i < LANES; i++)
    for (int j = 0; j < i; j++) {
      const float other = v[i][j];
      v[i][j] = v[j][i];
      v[j][i] = other;
    }
}

INLINE Floats div(Floats a, Floats b) { return a / b; }
INLINE Floats reverse(Floats v) { return Floats{v[3], v[2], v[1], v[0]}; }
// Every second of the numbers in a and then b, from the first and from the second on.
INLINE void split(Floats a, Floats b, Floats& even, Floats& odd) {
  even = Floats{a[0], a[2], b[0], b[2]};
  odd = Floats{a[1], a[3], b[1], b[3]};
}

}  // namespace portable
}  // namespace llava_fa
