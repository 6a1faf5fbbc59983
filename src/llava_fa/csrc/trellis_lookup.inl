// Windows of trellis codes → points (in the middle of linear.inl). A unit's words hold bits of its first 16 coefficients in
// their low half and of its last 16 in their high half (kernels/interleaved.py), so that one shift serves both.
// Points are read one by one here; those that are sums of two tables are in trellis_sums.inl.

// Gathers, which compilers like to make of that, take more than twice the time on CPUs that had to be mended (gather data
// sampling).
#define KEEP_SCALAR(index) asm("" : "+r"(index))

#ifdef LLAVA_FA_INT8
constexpr float GRID = 1.0f / 32;  // the multiples of it that a codebook consists of are its int8 points, exactly

// Entries of four bytes: 0, 0, re, im, so that two points of one vector are joined by one "or" of reads that differ by two.
ISA float trellis_tables(const uint16_t* codebook, int64_t state_bits, uint8_t* tables) {
  const int64_t count = int64_t{1} << state_bits;
  uint32_t* to = reinterpret_cast<uint32_t*>(tables);
  std::memset(to + count, 0, trellis_table_bytes(state_bits) - static_cast<size_t>(count) * 4);
  std::memcpy(to, codebook, static_cast<size_t>(count) * 4);
  int64_t whole = (count + LANES - 1) / LANES * LANES;  // beyond the last are zeros
  const Ints upper = set1(static_cast<int32_t>(0xffff0000u)), byte = set1(int32_t{0xff});
  const Floats zero = set1(0.0f), magic = set1(12582912.0f);
  int32_t* words = reinterpret_cast<int32_t*>(tables);
  Floats high = zero, off = zero;  // the largest, and the largest distance from a multiple of GRID, in GRIDs
  const auto rest = [&](Floats v) ISA {
    const Floats steps = mul(v, set1(1 / GRID));
    return magnitude(sub(steps, sub(add(steps, magic), magic)));
  };
  for (int64_t i = 0; i < whole; i += LANES) {
    const Ints two = load(words + i);
    const Floats re = as_floats(shift_left(two, 16)), im = as_floats(and_(two, upper));
    high = max(high, max(magnitude(re), magnitude(im)));
    off = max(off, max(rest(re), rest(im)));
  }
  const float most = highest(high);
  const float step = highest(off) == 0 && most <= 127 * GRID ? GRID : most > 0 ? most / 127 : 1;
  const Floats inverse = set1(1 / step);
  for (int64_t i = 0; i < whole; i += LANES) {
    const Ints two = load(words + i);
    const Floats re = as_floats(shift_left(two, 16)), im = as_floats(and_(two, upper));
    const auto rounded = [&](Floats v) ISA {
      return and_(add(as_ints(add(mul(v, inverse), magic)), set1(int32_t{OFFSET})), byte);
    };
    store(words + i, or_(shift_left(rounded(re), 16), shift_left(rounded(im), 24)));
  }
  return step;
}

// Bits BITS · I … of both halves, in words: at least WIDTH of them; above a window's they are not zero.
template <int BITS, int I, int WIDTH = 16>
INLINE Bytes window(const Bytes* w) {
  constexpr int BIT = BITS * I % 16;
  const Bytes low = shift<BIT>(w[BITS * I / 16]);
  return BIT + WIDTH <= 16 ? low : or_(low, shift<BIT ? BIT - 16 : 0>(w[BITS * I / 16 + 1]));
}

// The words that hold a unit's windows; what follows the first half is the second, what follows that the next unit.
template <int BITS>
INLINE void words_of(const uint8_t* unit, Bytes* w) {
  for (int j = 0; j <= BITS; j++) w[j] = load_bytes(unit + 64 * j);
  w[BITS] = or_(shift_right(w[0], 16), shift_left(w[BITS], 16));
}

template <int BITS, int... I>
INLINE void windows(const uint8_t* unit, int32_t mask, uint8_t* out, std::integer_sequence<int, I...>) {
  for (size_t part = 0; part < 64; part += sizeof(Bytes)) {
    Bytes w[BITS + 1];
    words_of<BITS>(unit + part, w);
    (store_all(out + 64 * I + part, and_(window<BITS, I>(w), set1(mask))), ...);
  }
}

// As RingCodes; vectors of coefficients I and I + 16, as (re, im, re, im).
template <int BITS>
struct TrellisCodes {
  const uint8_t *from, *table;
  int64_t words;
  int32_t mask;
  static constexpr int64_t BYTES = BITS * 64;

  INLINE void start(TrellisCodes& self, const Linear& job) {
    const int32_t mask = static_cast<int32_t>((1u << job.state_bits) - 1);
    self = {job.codes, job.tables, job.words, mask | mask << 16};
  }

  INLINE void points(const TrellisCodes& self, int64_t block, int64_t unit, uint8_t* out) {
    windows<BITS>(self.from + (block * self.words + unit * BITS) * 64, self.mask, out,
                  std::make_integer_sequence<int, HALF>());
#pragma GCC unroll 8
    for (int64_t i = 0; i < HALF * ROWS; i++, out += 4) {
      uint32_t both, a, b;
      std::memcpy(&both, out, 4);
      uint64_t first = both & 0xffff, second = both >> 16;
      KEEP_SCALAR(first);
      KEEP_SCALAR(second);
      std::memcpy(&a, self.table + 4 * first + 2, 4);
      std::memcpy(&b, self.table + 4 * second, 4);
      a |= b;
      std::memcpy(out, &a, 4);
    }
  }
};
#endif
