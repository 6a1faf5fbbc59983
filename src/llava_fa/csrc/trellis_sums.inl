// Trellis codes whose points are sums of two tables of 64 (maths/trellis.py), permuted 32 at a time (in linear.inl).

constexpr int ADDENDS_STATE_BITS = 12;

// The points of windows of words; above a window's their bits are not zero. One part is found by the low six bits xor the
// high BITS, the other by the high six.
template <int BITS>
INLINE Bytes sum_point(const Addends& table, Bytes window) {
  const Bytes first = xor_masked(window, shift<ADDENDS_STATE_BITS - BITS>(window), (1 << BITS) - 1);
  return Addends::look(table, first, shift<ADDENDS_STATE_BITS - 6>(window));
}

// Whether all points of `trellis_tables` are such sums; then those are found in `parts`.
template <int BITS>
INLINE bool addends_of(const uint8_t* tables, uint8_t* parts) {
  const auto first = [](int window) { return (window ^ window >> (ADDENDS_STATE_BITS - BITS)) & 63; };
  for (int window = 0; window < 64; window++) std::memcpy(parts + 2 * first(window), tables + 4 * window + 2, 2);
  for (int part = 0; part < 64; part++)
    for (int i = 0; i < 2; i++)
      parts[128 + 2 * part + i] = static_cast<uint8_t>(tables[256 * part + 2 + i] - parts[2 * first(64 * part) + i]);
  Addends table;
  Addends::load(table, parts);
  const Ints upper = set1(static_cast<int32_t>(0xffff0000u));
  Mask same = equal(upper, upper);
  for (int32_t window = 0; window < 1 << ADDENDS_STATE_BITS; window += LANES) {
    int32_t twice[LANES];
    for (int32_t i = 0; i < LANES; i++) twice[i] = (window + i) * 0x10001;
    const Ints sum = and_(sum_point<BITS>(table, load(twice)), upper);
    same = both(same, equal(sum, load(reinterpret_cast<const int32_t*>(tables) + window)));
  }
  return same == equal(upper, upper);
}

ISA bool trellis_addends(const uint8_t* tables, int64_t code_bits, int64_t state_bits, uint8_t* parts) {
  if (state_bits != ADDENDS_STATE_BITS) return false;
  return with_bits(code_bits, [&](auto bits) TILE { return addends_of<bits>(tables, parts); });
}

// As TrellisCodes.
template <int BITS>
struct AddendCodes {
  const uint8_t* from;
  int64_t words;
  Addends table;

  INLINE void start(AddendCodes& self, const Linear& job) {
    self.from = job.codes;
    self.words = job.words;
    Addends::load(self.table, job.addends);
  }

  template <int... I>
  INLINE void store_points(const Addends& table, const Bytes* w, uint8_t* out, std::integer_sequence<int, I...>) {
    (store_all(out + 64 * I, sum_point<BITS>(table, window<BITS, I, ADDENDS_STATE_BITS>(w))), ...);
  }

  INLINE void points(const AddendCodes& self, int64_t block, int64_t unit, uint8_t* out) {
    Bytes w[BITS + 1];
    words_of<BITS>(self.from + (block * self.words + unit * BITS) * 64, w);
    store_points(self.table, w, out, std::make_integer_sequence<int, HALF>());
  }
};

template <int BITS, int C>
ISA void addends_direct(const Linear& job, int64_t first, int64_t count, float* y) {
  Addends table;
  Addends::load(table, job.addends);
  direct<C>(job, first, count, job.words * 64, BITS * 64, y, [&](const uint8_t* unit, auto dots) TILE {
    Bytes w[BITS + 1];
    words_of<BITS>(unit, w);
    each(std::make_integer_sequence<int, HALF>(),
         [&](auto i) TILE { dots(i, sum_point<BITS>(table, window<BITS, i, ADDENDS_STATE_BITS>(w))); });
  });
}
