// One block of the coordinate descent of solver/feedback.py for LANES rows at a time, one row a lane.

namespace {

size_t refine_scratch(const Refine& job) { return job.columns * LANES * sizeof(float); }

// xᵀ (a b; b d) x
INLINE Floats quadratic(Floats x, Floats y, Floats a, Floats b, Floats d) {
  return fma(x, fma(a, x, mul(b, y)), mul(y, fma(b, x, mul(d, y))));
}

ISA void refine(const Refine& job, int64_t first, char* scratch) {
  float* gradient = reinterpret_cast<float*>(scratch);
  const int64_t lanes = job.rows - first < LANES ? job.rows - first : LANES, n = job.columns;
  int32_t code[LANES] = {}, changed[LANES] = {};
  load_columns(job.gradient, n, job.rows, first, lanes, gradient);
  for (int64_t c = 0; c < n; c += 2) {
    int32_t* codes = job.codes + c / 2 * job.rows + first;
    for (int64_t i = 0; i < lanes; i++) code[i] = codes[i];
    const Ints old = load(code), old_at = shift_left(old, 1);
    const Floats old_re = gather(job.search.points, old_at), old_im = gather(job.search.points + 1, old_at);
    const Floats g = load(gradient + c * LANES), h = load(gradient + (c + 1) * LANES);
    const float *inverse = job.inverse + 2 * c, *moment = job.moment + c * n;
    const Floats x = fma(set1(inverse[0]), g, mul(set1(inverse[1]), h));
    const Floats y = fma(set1(inverse[2]), g, mul(set1(inverse[3]), h));
    const Floats re = add(old_re, x), im = add(old_im, y);
    const Ints best = nearest(job.search, re, im), best_at = shift_left(best, 1);
    const Floats new_re = gather(job.search.points, best_at), new_im = gather(job.search.points + 1, best_at);
    const Floats a = set1(moment[c]), b = set1(moment[c + 1]), d = set1(moment[n + c + 1]);
    const Mask better = less(quadratic(sub(re, new_re), sub(im, new_im), a, b, d), quadratic(x, y, a, b, d));
    // The same code can look better by rounding alone, for ever.
    const Ints taken = select(better, best, old);
    int32_t now[LANES];
    store(now, taken);
    bool moved = false;
    for (int64_t i = 0; i < lanes; i++)
      if (now[i] != code[i]) {
        codes[i] = now[i];
        changed[i]++;
        moved = true;
      }
    if (!moved) continue;
    const Floats zero = set1(0.0f);
    const Mask same = equal(taken, old);
    const Floats step_re = select(same, zero, sub(old_re, new_re)), step_im = select(same, zero, sub(old_im, new_im));
    float* error = job.error + c * job.rows + first;
    store_some(error, add(load_some(error, lanes), step_re), lanes);
    store_some(error + job.rows, add(load_some(error + job.rows, lanes), step_im), lanes);
    push(gradient, job.moment, n, c, step_re, step_im);
  }
  for (int64_t i = 0; i < lanes; i++) job.changed[first + i] = changed[i];
}

}  // namespace
