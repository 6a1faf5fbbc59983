// What the AVX-512 builds of the packed layer share: vectors of bytes, products, and points in float32.

constexpr int OFFSET = 128;
// Rows in vectors of sums; columns of x and blocks of rows taken together, so that sums stay in registers.
constexpr int COLUMNS = 12, BLOCKS = 2;
constexpr auto FETCH = _MM_HINT_T1;  // codes to the second level: the first one's few waiting reads bound a thread's speed

INLINE Bytes select_bits(int mask, Bytes yes, Bytes no) {
  return _mm512_ternarylogic_epi64(_mm512_set1_epi8(static_cast<char>(mask)), yes, no, 0xca);
}

constexpr int shown(int code_bits) { return code_bits < 4 ? 16 : code_bits == 5 ? 64 : 1 << code_bits; }

// Minus v where a byte's sign is set; what is stored plus 128 stays so, in eight bits.
INLINE Bytes signed_by(Bytes sign, Bytes v) {
  return _mm512_mask_sub_epi8(v, _mm512_movepi8_mask(sign), _mm512_setzero_si512(), v);
}

// Sums of one column that do not wait for each other, where so many columns are multiplied at once.
constexpr int chains(int columns) { return columns == 1 ? 4 : 2; }

constexpr int64_t X_BYTES = 4;
constexpr bool PAIRED = false;
INLINE void lay(const int8_t* x, int8_t* to) { std::memcpy(to, x, 256); }
INLINE int32_t steep_units(const int8_t*, const int8_t*, int32_t) { return 0; }
// _mm512_dpbusd_epi32, whose sum GCC copies to another register and often to memory, for a third of the speed.
INLINE void dot(Wide& sum, const Wide& w, const int8_t* x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum.part[0]) : "v"(w.part[0]), "v"(four(x)));
}

// a ^ (b & mask), of words.
INLINE Bytes xor_masked(Bytes a, Bytes b, int mask) {
  return _mm512_ternarylogic_epi64(a, b, _mm512_set1_epi16(static_cast<int16_t>(mask)), 0x78);
}

// Points that are sums: of two tables of 64, (re, im) as words; bits above an index' six are not looked at.
struct Addends {
  Bytes t[4];

  INLINE void load(Addends& self, const uint8_t* p) {
    for (int i = 0; i < 4; i++) self.t[i] = load_bytes(p + 64 * i);
  }

  INLINE void look(const Addends& self, const Wide* first, const Wide* second, Wide* points) {
    for (int i = 0; i < 2; i++)
      points[i].part[0] = _mm512_add_epi8(_mm512_permutex2var_epi16(self.t[0], first[i].part[0], self.t[1]),
                                          _mm512_permutex2var_epi16(self.t[2], second[i].part[0], self.t[3]));
  }
};

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
