// A packed layer times vectors (linear.h). Lanes are rows of the weight; a block of ROWS rows goes through its codes once,
// whatever the batch: looked up, and multiplied at once (few vectors) or from a buffer in cache (many).

namespace {

INLINE float float_of(uint16_t bf16) {
  const uint32_t bits = static_cast<uint32_t>(bf16) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

INLINE Floats magnitude(Floats v) { return max(v, sub(set1(0.0f), v)); }

// The largest lane, or 0.
INLINE float highest(Floats v) {
  float lanes[LANES], most = 0;
  store(lanes, v);
  for (const float lane : lanes) most = lane > most ? lane : most;
  return most;
}

INLINE float total(Floats v) {
  float lanes[LANES], sum = 0;
  store(lanes, v);
  for (const float lane : lanes) sum += lane;
  return sum;
}

INLINE void widen(const void* x, Dtype dtype, int64_t n, float* out) {
  if (dtype == Dtype::float32) {
    std::memcpy(out, x, static_cast<size_t>(n) * sizeof(float));
    return;
  }
  const uint16_t* from = static_cast<const uint16_t*>(x);
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) store(out + i, convert(from + i));
  for (; i < n; i++) out[i] = float_of(from[i]);
}

// To nearest, ties to even; NaN stays NaN.
INLINE uint16_t bf16_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

ISA void finish(const float* y, const float* scale, const float* low_rank, const float* bias, int64_t n, void* out, Dtype dtype) {
  float values[ROWS];
  for (int64_t i = 0; i < ROWS; i += LANES) {
    Floats v = mul(load(y + i), load(scale + i));
    if (low_rank) v = add(v, load(low_rank + i));
    store(values + i, add(v, load(bias + i)));
  }
  if (dtype == Dtype::float32) {
    std::memcpy(out, values, static_cast<size_t>(n) * sizeof(float));
    return;
  }
  uint16_t halves[ROWS];
  for (int64_t i = 0; i < ROWS; i++) halves[i] = bf16_of(values[i]);
  if (n == ROWS)  // mostly, and of a size that compilers know
    std::memcpy(out, halves, sizeof halves);
  else
    std::memcpy(out, halves, static_cast<size_t>(n) * sizeof *halves);
}

ISA void widen_all(const void* x, Dtype dtype, int64_t n, float* out) { widen(x, dtype, n, out); }

ISA float dot_floats(const void* a, Dtype dtype, const float* x, int64_t n) {
  const int8_t* bytes = static_cast<const int8_t*>(a);
  const uint16_t* halves = static_cast<const uint16_t*>(a);
  Floats s0 = set1(0.0f), s1 = s0;
  int64_t j = 0;
  for (; j + 2 * LANES <= n; j += 2 * LANES) {
    const Floats a0 = dtype == Dtype::int8 ? convert(convert(bytes + j)) : convert(halves + j);
    const Floats a1 = dtype == Dtype::int8 ? convert(convert(bytes + j + LANES)) : convert(halves + j + LANES);
    s0 = fma(a0, load(x + j), s0);
    s1 = fma(a1, load(x + j + LANES), s1);
  }
  float sum = total(add(s0, s1));
  for (; j < n; j++) sum += (dtype == Dtype::int8 ? static_cast<float>(bytes[j]) : float_of(halves[j])) * x[j];
  return sum;
}

// f of the bits of a code, 2 to 8, known when compiled.
template <class F>
INLINE auto with_bits(int64_t bits, F f) {
  switch (bits) {
    case 2: return f(std::integral_constant<int, 2>());
    case 3: return f(std::integral_constant<int, 3>());
    case 4: return f(std::integral_constant<int, 4>());
    case 5: return f(std::integral_constant<int, 5>());
    case 6: return f(std::integral_constant<int, 6>());
    case 7: return f(std::integral_constant<int, 7>());
    default: return f(std::integral_constant<int, 8>());
  }
}

constexpr int64_t PARTS = ROWS / LANES;  // vectors of one number of every row
constexpr int64_t HALF = UNIT / 2;  // of a unit's trellis codes, see trellis_lookup.inl

// The codes of one unit (linear.h), four coefficients of ROWS rows a vector; bits above a code's are not zero.
template <int BITS, int Q>
INLINE Bytes codes_of(const uint8_t* unit) {
  const uint8_t* two = unit + (BITS >= 4 ? 256 : 0);
  const uint8_t* one = two + (BITS & 2 ? 128 : 0);
  Bytes c = load_bytes(unit + (BITS == 8 ? 64 * Q : BITS >= 4 ? 64 * (Q / 2) : 64 * (Q / 4)));
  if (BITS == 8) return c;
  if (BITS >= 4) {
    if (Q % 2) c = shift<4>(c);
    if (BITS & 2) c = select_bits(0x0f, c, shift<2 * (Q % 4) - 4>(load_bytes(two + 64 * (Q / 4))));
  } else {
    c = shift<2 * (Q % 4)>(c);
  }
  constexpr int PLACE = BITS - 1;
  if (BITS & 1) c = select_bits((1 << PLACE) - 1, c, shift<Q - PLACE>(load_bytes(one)));
  return c;
}

template <int BITS>
INLINE void codes(const uint8_t* unit, Bytes* c) {
  c[0] = codes_of<BITS, 0>(unit), c[1] = codes_of<BITS, 1>(unit), c[2] = codes_of<BITS, 2>(unit);
  c[3] = codes_of<BITS, 3>(unit), c[4] = codes_of<BITS, 4>(unit), c[5] = codes_of<BITS, 5>(unit);
  c[6] = codes_of<BITS, 6>(unit), c[7] = codes_of<BITS, 7>(unit);
}

constexpr int64_t BUFFER = GROUP * UNIT * 2 * ROWS;  // bytes of a block's points: one group in int8, one unit in float32

#include "trellis_lookup.inl"

#ifdef LLAVA_FA_INT8
#include "linear_int8.inl"
#else
constexpr int64_t X_BYTES = 0;
constexpr decltype(LinearKernels::quantise) quantise = nullptr;
constexpr decltype(LinearKernels::tables) int8_tables = nullptr, trellis_tables = nullptr;
constexpr decltype(LinearKernels::trellis_addends) trellis_addends = nullptr;
constexpr decltype(LinearKernels::int8) int8_rows = nullptr;
#endif

#include "linear_float.inl"

std::shared_ptr<const Dft> plan_for_lanes(int64_t size) { return plan_dft(size, LANES); }
size_t dft_scratch(const Dft& dft) { return static_cast<size_t>(dft.scratch()); }

}  // namespace
