// Products of int8 (in linear.inl): points and x rounded to it, sums of a group in int32.

constexpr int64_t STEPS = 16;  // vectors of four numbers of every row, in a unit

// f of each of I. Loops over registers are spelled out: compilers keep an array that a loop goes through in memory, and
// write every sum back after every addition, for half of the speed.
template <class F, int... I>
INLINE void each(std::integer_sequence<int, I...>, F f) {
  (f(std::integral_constant<int, I>()), ...);
}

// Whether points are multiplied where they are looked up: few vectors. Others are multiplied by tiles, where there are some.
INLINE bool is_direct(const Linear& job) { return job.batch <= (job.addends ? direct_sums(job.code_bits) : job.state_bits ? 0 : DIRECT); }

#ifdef LLAVA_FA_TILES
#include "linear_tiles.inl"
INLINE bool is_tiled(const Linear& job) { return !is_direct(job); }
#else
INLINE bool is_tiled(const Linear&) { return false; }
#endif

// Points to int8, one step for all of them: what it stands for.
ISA float int8_tables(const uint16_t* codebook, int64_t code_bits, uint8_t* tables) {
  const int count = 1 << code_bits;
  float value[512], most = 0;
  for (int i = 0; i < 2 * count; i++) {
    value[i] = float_of(codebook[i]);
    const float size = value[i] < 0 ? -value[i] : value[i];
    if (size > most) most = size;
  }
  const float step = most > 0 ? most / 127 : 1;
  const int all = shown(static_cast<int>(code_bits));  // fewer are repeated: bits above a code's are not looked at
  for (int i = 0; i < all; i++) {
    uint8_t point[2];
    for (int part = 0; part < 2; part++)
      point[part] = static_cast<uint8_t>(static_cast<int>(__builtin_nearbyintf(value[2 * (i % count) + part] / step)) + OFFSET);
    if (planes(static_cast<int>(code_bits))) {
      tables[i] = point[0];
      tables[all + i] = point[1];
    } else {
      std::memcpy(tables + 2 * i, point, 2);
    }
  }
  return step;
}

// Columns that are multiplied together, whose numbers lie together: all; or COLUMNS, of the last ones 4, and what is left.
struct Panel {
  int64_t first, width;
};
INLINE Panel panel_at(int64_t first, int64_t batch) {
  const int64_t left = batch - first;
  return {first, left >= COLUMNS ? COLUMNS : left >= 4 ? 4 : left};
}
INLINE Panel panel_of(int64_t column, const Linear& job) {
  if (is_direct(job)) return {0, job.batch};
  Panel panel = panel_at(column / COLUMNS * COLUMNS, job.batch);
  while (column >= panel.first + panel.width) panel = panel_at(panel.first + panel.width, job.batch);
  return panel;
}

// A group's numbers in the order in which they meet points: four re, then four im (planes); coefficients (0, 2), (1, 3) of
// four as (re, im, re, im); or, for trellis codes, i and i + 16 of a unit like that.
INLINE void order(const Linear& job, const int8_t* re, const int8_t* im, int8_t* to) {
  if (job.state_bits) {
    const auto sixteen = [](const int8_t* p) TILE { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); };
    for (int64_t u = 0; u < GROUP; u++, re += UNIT, im += UNIT) {
      const __m128i r = sixteen(re), j = sixteen(im), later_r = sixteen(re + HALF), later_j = sixteen(im + HALF);
      const __m128i low = _mm_unpacklo_epi8(r, j), later_low = _mm_unpacklo_epi8(later_r, later_j);
      const __m128i high = _mm_unpackhi_epi8(r, j), later_high = _mm_unpackhi_epi8(later_r, later_j);
      for (const __m128i four : {_mm_unpacklo_epi16(low, later_low), _mm_unpackhi_epi16(low, later_low),
                                 _mm_unpacklo_epi16(high, later_high), _mm_unpackhi_epi16(high, later_high)}) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), four);
        to += 16;
      }
    }
    return;
  }
  const bool apart = planes(static_cast<int>(job.code_bits));
  for (int64_t i = 0; i < GROUP * UNIT; i += 4, to += 8) {
    uint32_t r, j;
    std::memcpy(&r, re + i, 4);
    std::memcpy(&j, im + i, 4);
    const uint32_t two[2] = {apart ? r : (r & 0x00ff00ffu) | (j & 0x00ff00ffu) << 8,
                             apart ? j : (r >> 8 & 0x00ff00ffu) | (j & 0xff00ff00u)};
    std::memcpy(to, two, 8);
  }
}

ISA void quantise(const Linear& job, int64_t column, const float* re, const float* im, int8_t* x, float* scale, int32_t* bias,
                  int32_t* steep) {
  constexpr int64_t LENGTH = GROUP * UNIT;
  const Ints size = set1(int32_t{0x7fffffff});
  const Panel panel = panel_of(column, job);
  for (int64_t g = 0; g < job.groups; g++, re += LENGTH, im += LENGTH) {
    Ints high = set1(int32_t{0});  // bits of what is not negative are in the order of the numbers, NaN the highest
    for (int64_t i = 0; i < LENGTH; i += LANES)
      high = max(high, max(and_(as_ints(load(re + i)), size), and_(as_ints(load(im + i)), size)));
    int32_t lanes[LANES], highest = 0;
    store(lanes, high);
    for (const int32_t lane : lanes) highest = lane > highest ? lane : highest;
    float most;
    std::memcpy(&most, &highest, sizeof most);
    const bool finite = highest < 0x7f800000, usable = finite && most > 1e-30f;
    const int64_t at = g * job.batch + column;
    int8_t rounded[2 * LENGTH] = {}, ordered[2 * LENGTH], laid[LENGTH / 2 * X_BYTES];
    scale[at] = !finite ? __builtin_nanf("") : usable ? most / 127 : 0.0f;
    if (usable)
      for (int64_t i = 0; i < LENGTH; i += 32) {
        store_nearest(rounded + i, re + i, set1(127 / most));
        store_nearest(rounded + LENGTH + i, im + i, set1(127 / most));
      }
    int32_t sum = 0;
    for (int64_t i = 0; OFFSET && i < 2 * LENGTH; i++) sum -= OFFSET * rounded[i];
    bias[at] = sum;
    steep[at] = steep_units(rounded, rounded + LENGTH, job.level);
    order(job, rounded, rounded + LENGTH, ordered);
    if (is_tiled(job)) {
      std::memcpy(x + at * 2 * LENGTH, ordered, 2 * LENGTH);
      continue;
    }
    lay(ordered, laid);
    int8_t* to = x + ((g * job.batch + panel.first) * LENGTH / 2 + column - panel.first) * X_BYTES;
    for (int64_t i = 0; i < LENGTH / 2; i++, to += panel.width * X_BYTES) std::memcpy(to, laid + i * X_BYTES, X_BYTES);
  }
}

// codes_of ROWS rows.
template <int BITS, int Q>
INLINE Wide wide_codes(const uint8_t* unit) {
  Wide c;
  for (int part = 0; part < PARTS; part++) c.part[part] = codes_of<BITS, Q>(unit + part * sizeof(Bytes));
  return c;
}

// Points of a unit's codes: STEPS vectors.
template <int BITS, bool QUADRANT>
struct RingCodes {
  using Points = Table<BITS, QUADRANT>;
  const uint8_t* from;
  int64_t units;
  Points table;

  INLINE void start(RingCodes& self, const Linear& job) {
    self.from = job.codes;
    self.units = job.units;
    Points::load(self.table, job.tables);
  }

  INLINE void points(const RingCodes& self, int64_t block, int64_t unit, uint8_t* out) {
    const uint8_t* at = self.from + (block * self.units + unit) * BITS * 64;
    each(std::make_integer_sequence<int, 8>(), [&](auto q) TILE {
      Wide a, b;
      Points::look(self.table, wide_codes<BITS, q>(at), a, b);
      store_wide(out + 128 * q, a);
      store_wide(out + 128 * q + 64, b);
    });
  }
};

// f of a number from 1 to MOST that is known when compiled; otherwise nothing, and false.
template <int MOST, class F>
INLINE bool few(int64_t count, F f) {
  if (count == MOST) return f(std::integral_constant<int, MOST>()), true;
  if constexpr (MOST > 1) return few<MOST - 1>(count, f);
  return false;
}

INLINE Wide sums(int32_t v) {
  Wide sum;
  for (int part = 0; part < PARTS; part++) sum.part[part] = set1(v);
  return sum;
}

// C vectors, a panel of x, times R blocks, `steps` vectors each.
template <int C, int R>
INLINE void int8_tile(const Linear& job, int64_t group, int64_t steps, const uint8_t* w, int64_t column, float* y) {
  const auto all = std::make_integer_sequence<int, C * R>();  // column c of block r is c R + r
  Wide sum[C * R];
  const int64_t at = group * job.batch + column;
  const int8_t* x = job.x + at * STEPS * GROUP * X_BYTES;
  each(all, [&](auto i) TILE { sum[i] = sums(job.x_bias[at + i / R]); });
  if constexpr (PAIRED) {
    int32_t steep = 0;
    each(std::make_integer_sequence<int, C>(), [&](auto c) TILE { steep |= job.x_steep[at + c]; });
    for (int64_t s = 0; s < steps; steep >>= 1) {
      for (const int64_t stop = s + (steep & 1 ? 0 : STEPS); s < stop; s += 2, w += 128, x += 2 * X_BYTES * C)
        each(all, [&](auto i) TILE {
          const uint8_t* points = w + i % R * BUFFER;
          const int8_t* of = x + i / R * X_BYTES;
          dot(sum[i], load_wide(points), load_wide(points + 64), of, of + X_BYTES * C);
        });
      for (const int64_t stop = s + (steep & 1 ? STEPS : 0); s < stop; s++, w += 64, x += X_BYTES * C)
        each(all, [&](auto i) TILE { dot(sum[i], load_wide(w + i % R * BUFFER), x + i / R * X_BYTES); });
    }
  } else {
    for (int64_t s = 0; s < steps; s++, w += 64, x += X_BYTES * C)
      each(all, [&](auto i) TILE { dot(sum[i], load_wide(w + i % R * BUFFER), x + i / R * X_BYTES); });
  }
  each(all, [&](auto i) TILE {
    float* to = y + (i % R * job.batch + column + i / R) * ROWS;
    const Floats scale = set1(job.x_scale[at + i / R]);
    for (int part = 0; part < PARTS; part++, to += LANES) store(to, fma(convert(sum[i].part[part]), scale, load(to)));
  });
}

template <int R>
ISA void int8_columns(const Linear& job, int64_t group, int64_t units, const uint8_t* w, float* y) {
#ifdef LLAVA_FA_TILES
  tiled_columns<R>(job, group, units, w, y);
#else
  const int64_t steps = units * STEPS;
  for (Panel panel = panel_at(0, job.batch); panel.first < job.batch; panel = panel_at(panel.first + panel.width, job.batch)) {
    if (!few<4>(panel.width, [&](auto c) TILE { int8_tile<c, R>(job, group, steps, w, panel.first, y); }))
      int8_tile<COLUMNS, R>(job, group, steps, w, panel.first, y);
  }
#endif
}

template <class Codes>
ISA void int8_blocks(const Linear& job, int64_t first, int64_t count, float* y, char* scratch) {
  uint8_t* w = reinterpret_cast<uint8_t*>(scratch);
  Codes source;
  Codes::start(source, job);
  std::memset(y, 0, static_cast<size_t>(count * job.batch * ROWS) * sizeof(float));
  if (job.batch == 1 && count > 1) {  // nothing to share: one block's points stay in the first-level cache, tables beside them
    for (int64_t b = 0; b < count; b++) int8_blocks<Codes>(job, first + b, 1, y + b * ROWS, scratch);
    return;
  }
#ifdef LLAVA_FA_TILES
  const Tiles tiles(job.batch);
#endif
  const int64_t unit_bytes = job.code_bits * 64, row_bytes = job.state_bits ? job.words * 64 : job.units * unit_bytes;
  for (int64_t group = 0; group < job.groups; group++) {
    const int64_t units = job.units - group * GROUP < GROUP ? job.units - group * GROUP : GROUP;
    for (int64_t b = 0; b < count; b += BLOCKS) {
      const int64_t some = count - b < BLOCKS ? count - b : BLOCKS;
      for (int64_t i = 0; i < some; i++) {
        const uint8_t* later = job.codes + (first + b + i) * row_bytes + (group + 2) * GROUP * unit_bytes;
        for (int64_t at = 0; at < GROUP * unit_bytes; at += 64) __builtin_prefetch(later + at, 0, 2);
        for (int64_t u = 0; u < units; u++)
          Codes::points(source, first + b + i, group * GROUP + u, w + i * BUFFER + u * STEPS * 64);
      }
      float* to = y + b * job.batch * ROWS;
      if (some == BLOCKS)
        int8_columns<BLOCKS>(job, group, units, w, to);
      else
        for (int64_t i = 0; i < some; i++) int8_columns<1>(job, group, units, w + i * BUFFER, to + i * job.batch * ROWS);
    }
  }
}

// Few vectors, DIRECT or direct_sums at most: points are multiplied where they are looked up. `multiply` does that for one unit.
template <int C, class Multiply>
INLINE void direct(const Linear& job, int64_t first, int64_t count, int64_t row_bytes, int64_t unit_bytes, float* y,
                   Multiply multiply) {
  constexpr int CHAINS = chains(C);
  const auto columns = std::make_integer_sequence<int, C>();
  const auto totals = std::make_integer_sequence<int, C * PARTS>();
  for (int64_t b = 0; b < count; b++) {
    const uint8_t* unit = job.codes + (first + b) * row_bytes;
    const int8_t* x = job.x;
    Floats total[C * PARTS];
    each(totals, [&](auto i) TILE { total[i] = set1(0.0f); });
    for (int64_t group = 0; group < job.groups; group++) {
      const int64_t units = job.units - group * GROUP < GROUP ? job.units - group * GROUP : GROUP;
      Wide sum[C * CHAINS];
      each(std::make_integer_sequence<int, C * CHAINS>(),
           [&](auto i) TILE { sum[i] = sums(i % CHAINS ? 0 : job.x_bias[group * C + i / CHAINS]); });
      for (int64_t u = 0; u < units; u++, unit += unit_bytes, x += STEPS * C * X_BYTES) {
        for (int64_t at = 0; at < unit_bytes; at += 64) _mm_prefetch(reinterpret_cast<const char*>(unit + at + 8192), FETCH);
        multiply(unit, [&](auto step, const Wide& points) TILE {
          each(columns, [&](auto c) TILE { dot(sum[c * CHAINS + step % CHAINS], points, x + (step * C + c) * X_BYTES); });
        });
      }
      each(totals, [&](auto i) TILE {
        constexpr int c = i / PARTS, part = i % PARTS;
        Ints all = sum[c * CHAINS].part[part];
        for (int chain = 1; chain < CHAINS; chain++) all = add(all, sum[c * CHAINS + chain].part[part]);
        total[i] = fma(convert(all), set1(job.x_scale[group * C + c]), total[i]);
      });
    }
    each(totals, [&](auto i) TILE { store(y + b * C * ROWS + i * LANES, total[i]); });
  }
}

template <int BITS, bool QUADRANT, int C>
ISA void rings_direct(const Linear& job, int64_t first, int64_t count, float* y) {
  using Points = Table<BITS, QUADRANT>;
  Points table;
  Points::load(table, job.tables);
  direct<C>(job, first, count, job.units * BITS * 64, BITS * 64, y, [&](const uint8_t* unit, auto dots) TILE {
    each(std::make_integer_sequence<int, 8>(), [&](auto q) TILE {
      Wide a, b;
      Points::look(table, wide_codes<BITS, q>(unit), a, b);
      dots(std::integral_constant<int, 2 * q>(), a);
      dots(std::integral_constant<int, 2 * q + 1>(), b);
    });
  });
}

#include "trellis_sums.inl"

template <int BITS, bool QUADRANT = false>
INLINE void int8_bits(const Linear& job, int64_t first, int64_t count, float* y, char* scratch) {
  if (job.addends) {
    if (few<direct_sums(BITS)>(job.batch, [&](auto c) TILE { addends_direct<BITS, c>(job, first, count, y); })) return;
    return int8_blocks<AddendCodes<BITS>>(job, first, count, y, scratch);
  }
  if (job.state_bits) return int8_blocks<TrellisCodes<BITS>>(job, first, count, y, scratch);
  if (few<DIRECT>(job.batch, [&](auto c) TILE { rings_direct<BITS, QUADRANT, c>(job, first, count, y); })) return;
  int8_blocks<RingCodes<BITS, QUADRANT>>(job, first, count, y, scratch);
}

ISA void int8_rows(const Linear& job, int64_t first, int64_t count, float* y, char* scratch) {
  with_bits(job.code_bits, [&job, first, count, y, scratch](auto bits) TILE {
    if constexpr (bits == 8)
      if (job.quadrant) return int8_bits<8, true>(job, first, count, y, scratch);
    int8_bits<bits>(job, first, count, y, scratch);
  });
}
