// What both AVX2 builds of the packed layer share: codes → int8 points by byte shuffles of tables of 16, one after the other.

INLINE Bytes select_bits(int mask, Bytes yes, Bytes no) {
  const Bytes m = _mm256_set1_epi8(static_cast<char>(mask));
  return _mm256_or_si256(_mm256_and_si256(m, yes), _mm256_andnot_si256(m, no));
}

// Minus v where a byte's sign is set; what is stored plus 128 stays so, in eight bits.
INLINE Bytes signed_by(Bytes sign, Bytes v) { return _mm256_blendv_epi8(v, _mm256_sub_epi8(_mm256_setzero_si256(), v), sign); }

constexpr bool planes(int) { return true; }
constexpr int shown(int code_bits) { return code_bits < 4 ? 16 : 1 << code_bits; }

template <int BITS, bool QUADRANT>
struct Table {
  const uint8_t* t;  // tables of 16: re of all points, then im

  INLINE void load(Table& self, const uint8_t* p) { self.t = p; }

  INLINE void look(const Table& self, Bytes c, Bytes& a, Bytes& b) {
    constexpr int ALL = BITS <= 4 ? 1 : 1 << (BITS - 4), COUNT = QUADRANT ? ALL / 4 : ALL;
    const auto table = [&](int i) ISA {
      return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(self.t + 16 * i)));
    };
    Bytes index = masked(c, BITS <= 4 ? 0x0f : (1 << (QUADRANT ? BITS - 2 : BITS)) - 1);
    a = _mm256_setzero_si256();
    b = a;
    // 0x70 more, and all but 0 … 15 have bit 7, which makes the shuffle give zero.
    for (int i = 0; i < COUNT; i++) {
      const Bytes here = _mm256_adds_epu8(_mm256_xor_si256(index, _mm256_set1_epi8(static_cast<char>(16 * i))),
                                          _mm256_set1_epi8(0x70));
      a = _mm256_or_si256(a, _mm256_shuffle_epi8(table(i), here));
      b = _mm256_or_si256(b, _mm256_shuffle_epi8(table(ALL + i), here));
    }
    if (QUADRANT) {
      a = signed_by(c, a);
      b = signed_by(_mm256_slli_epi16(c, 1), b);
    }
  }
};

struct Sums {
  __m256i half[2];
};
INLINE Sums sums(int32_t v) { return {{_mm256_set1_epi32(v), _mm256_set1_epi32(v)}}; }
INLINE void accumulate(float* y, Sums sum, float scale) {
  for (int i = 0; i < 2; i++) store(y + 8 * i, fma(convert(sum.half[i]), set1(scale), load(y + 8 * i)));
}
