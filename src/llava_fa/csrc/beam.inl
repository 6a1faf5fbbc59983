// The beam search of solver/beam.py with four hypotheses: a quad of lanes is a row, a lane one of its hypotheses.
//
// Errors are pushed forward: once a coefficient is chosen, all later columns of the block are corrected for it, so that a
// hypothesis is only what it corrects its columns to, and taking over a parent's past is a permutation inside the quad.

namespace {

constexpr int QUADS = LANES / 4;

struct BeamScratch {
  float* aim;       // [columns, LANES]
  float* error;     // [columns, LANES]: errors of each hypothesis' own last step
  int32_t* code;    // [columns / 2, LANES]
  int32_t* parent;  // the same: which hypothesis it continues

  BeamScratch(const Beam& job, char* at) {
    aim = reinterpret_cast<float*>(at);
    error = aim + job.columns * LANES;
    code = reinterpret_cast<int32_t*>(error + job.columns * LANES);
    parent = code + job.columns / 2 * LANES;
  }
};

size_t beam_scratch(const Beam& job) { return job.columns * LANES * 3 * sizeof(float); }

INLINE void order(Ints& a, Ints& b) {
  const Ints low = min(a, b);
  b = max(a, b);
  a = low;
}

// The four least of a quad's sixteen keys, v[i] being four of each lane: one in each lane.
INLINE Ints four_least(Ints v[4]) {
  order(v[0], v[1]);
  order(v[2], v[3]);
  order(v[0], v[2]);
  order(v[1], v[3]);
  order(v[1], v[2]);
  // Lane by lane sorted. The least four of two sorted fours are the lesser of the i-th and the (3 - i)-th; they rise,
  // then fall, and two rounds sort them.
  Ints w[4];
  for (int i = 0; i < 4; i++) w[i] = min(v[i], swap_neighbours(v[3 - i]));
  order(w[0], w[2]);
  order(w[1], w[3]);
  order(w[0], w[1]);
  order(w[2], w[3]);
  // Of two pairs of lanes the same. Lanes 2 and 3 see the result of lanes 0 and 1 backwards.
  const Ints outer = min(w[0], swap_halves(w[3])), inner = min(w[1], swap_halves(w[2]));
  int32_t middle[LANES];
  for (int i = 0; i < LANES; i++) middle[i] = i % 4 == 1 || i % 4 == 2;
  return select(equal(load(middle), set1(int32_t{1})), inner, outer);
}

// QUADS rows, from `row` on; `rows` of them exist.
ISA void beam_quads(const Beam& job, int64_t row, int64_t rows, const BeamScratch& s) {
  int32_t lane[LANES];
  float start[LANES], padded[QUADS] = {};
  for (int i = 0; i < LANES; i++) {
    lane[i] = i % 4;
    start[i] = i % 4 ? 1e30f : 0.0f;  // a block starts with one hypothesis
  }
  const Ints lanes = load(lane);
  Floats cost = load(start);
  for (int64_t c = 0; c < job.columns; c++) {
    for (int64_t i = 0; i < rows; i++) padded[i] = job.base[c * job.rows + row + i];
    store(s.aim + c * LANES, spread(padded));
  }
  for (int64_t c = 0; c < job.columns; c += 2) {
    const Floats re = load(s.aim + c * LANES), im = load(s.aim + (c + 1) * LANES);
    const Ints first = nearest(job.search, re, im);
    const float* metric = job.metric + c / 2 * 3;
    const Floats a = set1(metric[0]), b = set1(metric[1]), d = set1(metric[2]);
    Floats total[4];
    Ints key[4];
    for (int t = 0; t < 4; t++) {
      const Ints point = add(shift_left(first, 3), set1(int32_t{2 * t}));
      const Floats x = sub(re, gather(job.tried, point)), y = sub(im, gather(job.tried + 1, point));
      const Floats u = mul(a, x), v = fma(b, x, mul(d, y));
      total[t] = fma(u, u, fma(v, v, cost));
      // Costs are not negative: as integers they keep their order. Their last four bits say whose they are.
      key[t] = or_(and_(as_ints(total[t]), set1(int32_t{~15})), add(lanes, set1(int32_t{4 * t})));
    }
    const Ints best = four_least(key), parent = and_(best, set1(int32_t{3}));
    const Ints which = and_(shift_right(best, 2), set1(int32_t{3}));
    cost = permute_quads(total[0], parent);
    for (int t = 1; t < 4; t++)
      cost = select(equal(which, set1(int32_t{t})), permute_quads(total[t], parent), cost);
    const Ints place = add(shift_left(permute_quads(first, parent), 2), which);
    store(s.code + c / 2 * LANES, gather(job.numbers, place));
    store(s.parent + c / 2 * LANES, parent);
    Floats error[2];
    for (int i = 0; i < 2; i++) {
      for (int64_t j = 0; j < rows; j++) padded[j] = job.target[(c + i) * job.rows + row + j];
      error[i] = sub(spread(padded), gather(job.tried + i, shift_left(place, 1)));
      store(s.error + (c + i) * LANES, error[i]);
    }
    const float* unit = job.unit + c * job.columns;
    for (int64_t later = c + 2; later < job.columns; later++) {
      float* aim = s.aim + later * LANES;
      const Floats own = permute_quads(load(aim), parent);
      store(aim, fma(error[0], set1(unit[later]), fma(error[1], set1(unit[job.columns + later]), own)));
    }
  }
  float final[LANES];
  store(final, cost);
  for (int64_t i = 0; i < rows; i++) {
    int64_t at = 4 * i;
    for (int64_t j = 4 * i + 1; j < 4 * i + 4; j++)
      if (final[j] < final[at]) at = j;
    for (int64_t c = job.columns - 2; c >= 0; c -= 2) {
      job.codes[c / 2 * job.rows + row + i] = s.code[c / 2 * LANES + at];
      for (int64_t k = 0; k < 2; k++) job.target[(c + k) * job.rows + row + i] = s.error[(c + k) * LANES + at];
      at = 4 * i + s.parent[c / 2 * LANES + at];
    }
  }
}

ISA void beam(const Beam& job, int64_t first, char* scratch) {
  const BeamScratch s(job, scratch);
  const int64_t end = first + LANES < job.rows ? first + LANES : job.rows;
  for (int64_t row = first; row < end; row += QUADS)
    beam_quads(job, row, end - row < QUADS ? end - row : QUADS, s);
}

}  // namespace
