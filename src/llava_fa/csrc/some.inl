// Fewer than LANES rows, at the end of a matrix.

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

}  // namespace
