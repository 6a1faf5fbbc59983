// What both AVX2 builds of the packed layer share: codes → int8 points by byte shuffles of tables of 16.

INLINE Bytes select_bits(int mask, Bytes yes, Bytes no) {
  const Bytes m = _mm256_set1_epi8(static_cast<char>(mask));
  return _mm256_or_si256(_mm256_and_si256(m, yes), _mm256_andnot_si256(m, no));
}

// Minus v where a byte's sign is set; what is stored plus 128 stays so, in eight bits.
INLINE Bytes signed_by(Bytes sign, Bytes v) { return _mm256_blendv_epi8(v, _mm256_sub_epi8(_mm256_setzero_si256(), v), sign); }

// a ^ (b & mask), of words.
INLINE Bytes xor_masked(Bytes a, Bytes b, int mask) {
  return _mm256_xor_si256(a, _mm256_and_si256(b, _mm256_set1_epi16(static_cast<int16_t>(mask))));
}

constexpr bool planes(int) { return true; }
constexpr int shown(int code_bits) { return code_bits < 4 ? 16 : 1 << code_bits; }

// Keeps compilers from adding up later, in another order, what does not fit into registers meanwhile.
INLINE void settle(Bytes& v) { asm("" : "+x"(v)); }

// Up to 128 pairs of bytes as COUNT tables of 16 of each part. From the second on each is xored with the one before: an index
// loses 16 from table to table. Once it is negative the shuffle gives zero, and what it picked before its own table is
// taken out again by the next.
template <int COUNT>
struct Shuffles {
  Bytes re[COUNT], im[COUNT];

  INLINE Bytes table(const uint8_t* p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }

  INLINE void load(Shuffles& self, const uint8_t* re, const uint8_t* im) {
    self.re[0] = table(re);
    self.im[0] = table(im);
    for (int i = 1; i < COUNT; i++) {
      self.re[i] = _mm256_xor_si256(table(re + 16 * i), table(re + 16 * i - 16));
      self.im[i] = _mm256_xor_si256(table(im + 16 * i), table(im + 16 * i - 16));
    }
  }

  // Two vectors at a time, for tables have to be loaded: there are not registers enough.
  INLINE void look(const Shuffles& self, Wide index, Wide& re, Wide& im) {
    for (int v = 0; v < 2; v++) {
      re.part[v] = _mm256_shuffle_epi8(self.re[0], index.part[v]);
      im.part[v] = _mm256_shuffle_epi8(self.im[0], index.part[v]);
    }
    for (int i = 1; i < COUNT; i++)
      for (int v = 0; v < 2; v++) {
        index.part[v] = _mm256_sub_epi8(index.part[v], _mm256_set1_epi8(16));
        re.part[v] = _mm256_xor_si256(re.part[v], _mm256_shuffle_epi8(self.re[i], index.part[v]));
        im.part[v] = _mm256_xor_si256(im.part[v], _mm256_shuffle_epi8(self.im[i], index.part[v]));
        settle(re.part[v]);
        settle(im.part[v]);
      }
  }
};

template <int BITS, bool QUADRANT>
struct Table {
  static constexpr int FULL = QUADRANT ? BITS - 2 : BITS;  // bits that a point is looked up by
  static constexpr int ALL = BITS <= 4 ? 16 : 1 << BITS, COUNT = FULL <= 4 ? 1 : FULL >= 7 ? 8 : 1 << (FULL - 4);
  Shuffles<COUNT> t[FULL == 8 ? 2 : 1];

  INLINE void load(Table& self, const uint8_t* p) {
    Shuffles<COUNT>::load(self.t[0], p, p + ALL);
    if (FULL == 8) Shuffles<COUNT>::load(self.t[FULL == 8], p + 128, p + 128 + ALL);
  }

  // re and im of four coefficients of ROWS rows.
  INLINE void look(const Table& self, const Wide& c, Wide& re, Wide& im) {
    Wide index, high_re, high_im;
    for (int v = 0; v < 2; v++) index.part[v] = masked(c.part[v], 16 * COUNT - 1);
    Shuffles<COUNT>::look(self.t[0], index, re, im);
    if (FULL == 8) Shuffles<COUNT>::look(self.t[FULL == 8], index, high_re, high_im);
    for (int v = 0; v < 2; v++) {
      if (FULL == 8) {
        re.part[v] = _mm256_blendv_epi8(re.part[v], high_re.part[v], c.part[v]);
        im.part[v] = _mm256_blendv_epi8(im.part[v], high_im.part[v], c.part[v]);
      }
      if (QUADRANT) {
        re.part[v] = signed_by(c.part[v], re.part[v]);
        im.part[v] = signed_by(_mm256_slli_epi16(c.part[v], 1), im.part[v]);
      }
    }
  }
};

// Points that are sums: of two tables of 64, (re, im) as words; bits above an index' six are not looked at.
struct Addends {
  Shuffles<4> first, second;

  INLINE void load(Addends& self, const uint8_t* p) {
    uint8_t re[128], im[128];
    for (int i = 0; i < 128; i += 16) {
      const __m256i words = load_bytes(p + 2 * i), low = _mm256_and_si256(words, _mm256_set1_epi16(0xff));
      const __m256i both = _mm256_permute4x64_epi64(_mm256_packus_epi16(low, _mm256_srli_epi16(words, 8)), 0xd8);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(re + i), _mm256_castsi256_si128(both));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(im + i), _mm256_extracti128_si256(both, 1));
    }
    Shuffles<4>::load(self.first, re, im);
    Shuffles<4>::load(self.second, re + 64, im + 64);
  }

  // Of words.
  INLINE void look(const Addends& self, const Wide* first, const Wide* second, Wide* points) {
    const auto bytes = [&](const Wide* words) TILE {
      const Bytes six = _mm256_set1_epi16(63);
      Wide both;
      for (int v = 0; v < 2; v++)
        both.part[v] = _mm256_packus_epi16(_mm256_and_si256(words[0].part[v], six), _mm256_and_si256(words[1].part[v], six));
      return both;
    };
    Wide re, im, more_re, more_im;
    Shuffles<4>::look(self.first, bytes(first), re, im);
    Shuffles<4>::look(self.second, bytes(second), more_re, more_im);
    for (int v = 0; v < 2; v++) {
      const Bytes r = _mm256_add_epi8(re.part[v], more_re.part[v]), j = _mm256_add_epi8(im.part[v], more_im.part[v]);
      points[0].part[v] = _mm256_unpacklo_epi8(r, j);
      points[1].part[v] = _mm256_unpackhi_epi8(r, j);
    }
  }
};
