// One block of the rounding with feedback of solver/feedback.py for LANES rows at a time, one row a lane. Errors are
// pushed forward, as in beam.inl.

namespace {

size_t greedy_scratch(const Greedy& job) { return job.columns * LANES * sizeof(float); }

ISA void greedy(const Greedy& job, int64_t first, char* scratch) {
  float* aim = reinterpret_cast<float*>(scratch);
  const int64_t lanes = job.rows - first < LANES ? job.rows - first : LANES, n = job.columns;
  load_columns(job.base, n, job.rows, first, lanes, aim);
  for (int64_t c = 0; c < n; c += 2) {
    const Ints code = nearest(job.search, load(aim + c * LANES), load(aim + (c + 1) * LANES));
    int32_t codes[LANES];
    store(codes, code);
    for (int64_t i = 0; i < lanes; i++) job.codes[c / 2 * job.rows + first + i] = codes[i];
    const Ints at = shift_left(code, 1);
    float* target = job.target + c * job.rows + first;
    const Floats re = sub(load_some(target, lanes), gather(job.search.points, at));
    const Floats im = sub(load_some(target + job.rows, lanes), gather(job.search.points + 1, at));
    store_some(target, re, lanes);
    store_some(target + job.rows, im, lanes);
    push(aim, job.unit, n, c, re, im);
  }
}

}  // namespace
