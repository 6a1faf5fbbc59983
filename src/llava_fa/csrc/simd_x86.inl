// What AVX2 and AVX-512 share: ps(f), pd(f), epi32(f) … name the instruction f of their width for numbers of a type, si(f) for
// all bits.

#define ISA __attribute__((target(LLAVA_FA_ISA)))
#define INLINE static inline __attribute__((always_inline, target(LLAVA_FA_ISA)))

#define TILE ISA __attribute__((always_inline))  // of lambdas

INLINE Floats load(const float* p) { return ps(loadu)(p); }
INLINE void store(float* p, Floats v) { ps(storeu)(p, v); }
INLINE Floats set1(float v) { return ps(set1)(v); }
INLINE Floats add(Floats a, Floats b) { return ps(add)(a, b); }
INLINE Floats sub(Floats a, Floats b) { return ps(sub)(a, b); }
INLINE Floats mul(Floats a, Floats b) { return ps(mul)(a, b); }
INLINE Floats div(Floats a, Floats b) { return ps(div)(a, b); }
INLINE Floats fma(Floats a, Floats b, Floats c) { return ps(fmadd)(a, b, c); }
INLINE Floats min(Floats a, Floats b) { return ps(min)(a, b); }
INLINE Floats max(Floats a, Floats b) { return ps(max)(a, b); }

INLINE Ints load(const int32_t* p) { return si(loadu)(reinterpret_cast<const Ints*>(p)); }
INLINE void store(int32_t* p, Ints v) { si(storeu)(reinterpret_cast<Ints*>(p), v); }
INLINE Ints set1(int32_t v) { return epi32(set1)(v); }
INLINE Ints add(Ints a, Ints b) { return epi32(add)(a, b); }
INLINE Ints mul(Ints a, Ints b) { return epi32(mullo)(a, b); }
INLINE Ints min(Ints a, Ints b) { return epi32(min)(a, b); }
INLINE Ints max(Ints a, Ints b) { return epi32(max)(a, b); }
INLINE Ints and_(Ints a, Ints b) { return si(and)(a, b); }
INLINE Ints or_(Ints a, Ints b) { return si(or)(a, b); }
INLINE Ints shift_left(Ints a, int by) { return epi32(slli)(a, by); }
INLINE Ints shift_right(Ints a, int by) { return epi32(srli)(a, by); }
INLINE Ints truncate(Floats v) { return epi32(cvttps)(v); }
INLINE Floats convert(Ints v) { return ps(cvtepi32)(v); }
INLINE Ints as_ints(Floats v) { return reinterpret_cast<Ints>(v); }
INLINE Floats as_floats(Ints v) { return reinterpret_cast<Floats>(v); }

// Quads: four lanes each. Lane i of a quad from lane which[i] of it.
INLINE Floats permute_quads(Floats v, Ints which) { return ps(permutevar)(v, which); }
INLINE Ints permute_quads(Ints v, Ints which) { return as_ints(permute_quads(as_floats(v), which)); }

// Of four vectors each: vector i, lane j of every quad ↔ vector j, lane i.
INLINE void transpose_quads(Floats* v) {
  Floats t[LANES];
  for (int i = 0; i < LANES; i += 2) {
    t[i] = ps(unpacklo)(v[i], v[i + 1]);
    t[i + 1] = ps(unpackhi)(v[i], v[i + 1]);
  }
  for (int i = 0; i < LANES; i += 4)
    for (int h = 0; h < 2; h++) {
      const Doubles a = reinterpret_cast<Doubles>(t[i + h]), b = reinterpret_cast<Doubles>(t[i + 2 + h]);
      v[i + 2 * h] = reinterpret_cast<Floats>(pd(unpacklo)(a, b));
      v[i + 2 * h + 1] = reinterpret_cast<Floats>(pd(unpackhi)(a, b));
    }
}

// Bytes, for the packed layer.
using Bytes = Ints;
INLINE Bytes load_bytes(const uint8_t* p) { return si(loadu)(reinterpret_cast<const Bytes*>(p)); }
INLINE void store_all(uint8_t* p, Bytes v) { si(storeu)(reinterpret_cast<Bytes*>(p), v); }
template <int BY>  // right by BY bits, left if negative, of words: bits that cross a byte are not looked at
INLINE Bytes shift(Bytes v) {
  return BY > 0 ? epi16(srli)(v, BY > 0 ? BY : 0) : BY < 0 ? epi16(slli)(v, BY < 0 ? -BY : 0) : v;
}
INLINE Bytes masked(Bytes v, int mask) { return and_(v, epi8(set1)(static_cast<char>(mask))); }

// A number of ROWS rows in 32 bits (linear.h), or four of each in 8.
struct Wide {
  Bytes part[64 / sizeof(Bytes)];
};
INLINE Wide load_wide(const uint8_t* p) {
  Wide v;
  for (size_t i = 0; i < 64 / sizeof(Bytes); i++) v.part[i] = load_bytes(p + i * sizeof(Bytes));
  return v;
}
INLINE void store_wide(uint8_t* p, const Wide& v) {
  for (size_t i = 0; i < 64 / sizeof(Bytes); i++) store_all(p + i * sizeof(Bytes), v.part[i]);
}
INLINE Bytes four(const int8_t* p) {  // bytes, in every dword
  int32_t v;
  std::memcpy(&v, p, sizeof v);
  return set1(v);
}

#undef ps
#undef pd
#undef epi16
#undef epi8
#undef epi32
#undef si
