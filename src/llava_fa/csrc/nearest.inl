// The nearest codebook point of LANES complex numbers at a time, as maths/nearest.py: the cell of a grid says it, or which
// few it can be; beyond the grid it can be any.

namespace {

ISA inline int32_t nearest_of(const Nearest& s, float re, float im, const int32_t* among, int64_t count) {
  int32_t best = 0;
  float highest = -__builtin_inff();
  for (int64_t i = 0; i < count; i++) {
    const int32_t code = among ? among[i] : static_cast<int32_t>(i);
    const float score = s.points[2 * code] * re + s.points[2 * code + 1] * im - s.half_norm[code];
    if (score > highest) {
      highest = score;
      best = code;
    }
  }
  return best;
}

ISA inline Ints nearest(const Nearest& s, Floats re, Floats im) {
  const float most = static_cast<float>(s.reach);
  const Floats reach = set1(most), scale = set1(static_cast<float>(s.side) / (2 * most));
  const Floats row = mul(add(re, reach), scale), column = mul(add(im, reach), scale);
  const Ints codes = gather(s.cells, square_of(row, column, s.side));
  const Mask above = less(set1(-1e-6f), min(row, column)), below = less(max(row, column), set1(static_cast<float>(s.side)));
  const uint32_t within = bits(both(above, below));
  const uint32_t open = (((1u << LANES) - 1) & ~within) | bits(less(codes, set1(int32_t{0})));
  if (!open) return codes;
  float x[LANES], y[LANES];
  int32_t code[LANES];
  store(x, re);
  store(y, im);
  store(code, codes);
  for (uint32_t left = open; left; left &= left - 1) {
    const int i = __builtin_ctz(left);
    if (within >> i & 1)
      code[i] = nearest_of(s, x[i], y[i], s.candidates - (1 + code[i]) * s.width, s.width);
    else
      code[i] = nearest_of(s, x[i], y[i], nullptr, s.size);
  }
  return load(code);
}

}  // namespace
