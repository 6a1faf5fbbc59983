// Codes → int8 points by VBMI: re and im by permutations of bytes, 64 or 128 points at once. Points are stored plus 128.

constexpr bool planes(int) { return true; }

// The byte of 64 at the low six bits of each index; of 128 at the low seven.
#ifdef LLAVA_FA_EMULATE_VBMI
INLINE Bytes of128(Bytes low, Bytes high, Bytes index) {
  uint8_t table[128], at[64];
  store_all(table, low);
  store_all(table + 64, high);
  store_all(at, index);
  for (uint8_t& i : at) i = table[i & 127];
  return load_bytes(at);
}
INLINE Bytes of64(Bytes table, Bytes index) { return of128(table, table, index); }
#else
INLINE Bytes of64(Bytes table, Bytes index) { return _mm512_permutexvar_epi8(index, table); }
INLINE Bytes of128(Bytes low, Bytes high, Bytes index) { return _mm512_permutex2var_epi8(low, index, high); }
#endif

template <int BITS, bool QUADRANT>
struct Table {
  static constexpr int ALL = BITS <= 6 ? 1 : 1 << (BITS - 6), VECTORS = QUADRANT ? ALL / 4 : ALL;  // of each part
  Bytes t[2 * VECTORS];

  INLINE void load(Table& self, const uint8_t* p) {
    for (int i = 0; i < 2 * VECTORS; i++) {
      const int at = i / VECTORS * ALL + i % VECTORS;
      self.t[i] = BITS <= 4 ? _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16 * at)))
                            : load_bytes(p + 64 * at);
    }
  }

  INLINE Bytes part(const Bytes* t, Bytes c) {
    if (BITS <= 4) return _mm512_shuffle_epi8(t[0], masked(c, 0x0f));
    if (VECTORS == 1) return of64(t[0], c);
    const Bytes low = of128(t[0], t[VECTORS > 1 ? 1 : 0], c);
    if (BITS == 7) return low;
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(c), low, of128(t[VECTORS > 2 ? 2 : 0], t[VECTORS > 2 ? 3 : 0], c));
  }

  // re and im of four coefficients of ROWS rows.
  INLINE void look(const Table& self, const Wide& code, Wide& re, Wide& im) {
    const Bytes c = code.part[0];
    Bytes &a = re.part[0], &b = im.part[0];
    a = part(self.t, c);
    b = part(self.t + VECTORS, c);
    if (QUADRANT) {
      a = signed_by(c, a);
      b = signed_by(_mm512_slli_epi16(c, 1), b);
    }
  }
};
