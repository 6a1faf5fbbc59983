// Rows of a weight in lanes, fewer than LANES at the end of a matrix.

namespace {

// `count` ≤ LANES neighbours, zeros after them.
INLINE Floats load_some(const float* p, int64_t count) {
  if (count >= LANES) return load(p);
  float padded[LANES] = {};
  for (int64_t i = 0; i < count; i++) padded[i] = p[i];
  return load(padded);
}

// The first `count` lanes.
INLINE void store_some(float* p, Floats v, int64_t count) {
  float all[LANES];
  store(all, v);
  for (int64_t i = 0; i < count; i++) p[i] = all[i];
}

// Columns of a matrix [columns, rows], of `lanes` rows from `first` on, as vectors.
INLINE void load_columns(const float* from, int64_t columns, int64_t rows, int64_t first, int64_t lanes, float* to) {
  for (int64_t c = 0; c < columns; c++) store(to + c * LANES, load_some(from + c * rows + first, lanes));
}

// Pushes the errors of columns c and c + 1 forward: what they ask, by a matrix [n, n], of the columns after them.
INLINE void push(float* columns, const float* matrix, int64_t n, int64_t c, Floats re, Floats im) {
  const float *first = matrix + c * n, *second = first + n;
  for (int64_t later = c + 2; later < n; later++) {
    float* to = columns + later * LANES;
    store(to, fma(re, set1(first[later]), fma(im, set1(second[later]), load(to))));
  }
}

// The number of the square of a grid of side² that a point in units of it lies in, or is nearest to.
INLINE Ints square_of(Floats row, Floats column, int64_t side) {
  const Floats first = set1(0.0f), last = set1(static_cast<float>(side - 1));
  return add(mul(truncate(min(max(row, first), last)), set1(static_cast<int32_t>(side))),
             truncate(min(max(column, first), last)));
}

}  // namespace
