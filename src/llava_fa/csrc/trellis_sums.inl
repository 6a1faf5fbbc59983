// Trellis codes whose points are sums of two tables of 64 (maths/trellis.py), looked up a vector or two at a time (in
// linear.inl).

constexpr int ADDENDS_STATE_BITS = 12;

// The points of two vectors of windows; above a window's their bits are not zero. One part is found by the low six bits xor
// the high BITS, the other by the high six.
template <int BITS>
INLINE void sum_points(const Addends& table, const Wide* windows, Wide* points) {
  Wide first[2], second[2];
  for (int i = 0; i < 2; i++)
    for (int part = 0; part < PARTS; part++) {
      const Bytes window = windows[i].part[part];
      first[i].part[part] = xor_masked(window, shift<ADDENDS_STATE_BITS - BITS>(window), (1 << BITS) - 1);
      second[i].part[part] = shift<ADDENDS_STATE_BITS - 6>(window);
    }
  Addends::look(table, first, second, points);
}

// Of a unit's windows, all of them; f is given the number of a vector, and the vector.
template <int BITS, class F>
INLINE void each_sum(const Addends& table, const uint8_t* unit, F f) {
  Bytes w[PARTS][BITS + 1];
  for (int part = 0; part < PARTS; part++) words_of<BITS>(unit + part * sizeof(Bytes), w[part]);
  each(std::make_integer_sequence<int, HALF / 2>(), [&](auto i) TILE {
    Wide windows[2], points[2];
    for (int part = 0; part < PARTS; part++) {
      windows[0].part[part] = window<BITS, 2 * i, ADDENDS_STATE_BITS>(w[part]);
      windows[1].part[part] = window<BITS, 2 * i + 1, ADDENDS_STATE_BITS>(w[part]);
    }
    sum_points<BITS>(table, windows, points);
    f(std::integral_constant<int, 2 * i>(), points[0]);
    f(std::integral_constant<int, 2 * i + 1>(), points[1]);
  });
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
  for (int32_t first = 0; first < 1 << ADDENDS_STATE_BITS; first += ROWS) {
    uint8_t twice[64], sum[64];  // a window in both words of a dword
    for (int32_t i = 0; i < ROWS; i++) {
      const int32_t window = (first + i) * 0x10001;
      std::memcpy(twice + 4 * i, &window, 4);
    }
    const Wide windows[2] = {load_wide(twice), load_wide(twice)};
    Wide points[2];
    sum_points<BITS>(table, windows, points);
    store_wide(sum, points[0]);
    for (int32_t i = 0; i < ROWS; i++)
      if (std::memcmp(sum + 4 * i + 2, tables + 4 * (first + i) + 2, 2)) return false;
  }
  return true;
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

  INLINE void points(const AddendCodes& self, int64_t block, int64_t unit, uint8_t* out) {
    each_sum<BITS>(self.table, self.from + (block * self.words + unit * BITS) * 64,
                   [&](auto step, const Wide& points) TILE { store_wide(out + 64 * step, points); });
  }
};

template <int BITS, int C>
ISA void addends_direct(const Linear& job, int64_t first, int64_t count, float* y) {
  Addends table;
  Addends::load(table, job.addends);
  direct<C>(job, first, count, job.words * 64, BITS * 64, y,
            [&](const uint8_t* unit, auto dots) TILE { each_sum<BITS>(table, unit, dots); });
}
