// The Viterbi search of maths/trellis.py for LANES rows at a time, one row a lane.
//
// Where Python keeps the path costs of all coefficients and finds on the way back which of the 2^k windows of a group
// was the best, this keeps the winner itself: a byte instead of four, and the way back is one look-up a coefficient.

namespace {

struct ViterbiScratch {
  float *before, *after;  // [groups, LANES]: least cost of a path into each group
  uint8_t* winner;        // [steps, groups, LANES]: low k bits of that path's window

  ViterbiScratch(const Viterbi& job, char* at) {
    const int64_t groups = int64_t{1} << (job.state_bits - job.code_bits);
    before = reinterpret_cast<float*>(at);
    after = before + groups * LANES;
    winner = reinterpret_cast<uint8_t*>(after + groups * LANES);
  }
};

size_t viterbi_scratch(const Viterbi& job) {
  const size_t cells = (size_t{1} << (job.state_bits - job.code_bits)) * LANES;
  return cells * (2 * sizeof(float) + job.steps);
}

// One window more of a group: what the path through it costs, and whether it is the best so far.
INLINE void viterbi_window(const float* table, const float* before, Floats re, Floats im, int32_t low, Floats& best,
                           Ints& winner) {
  const Floats cost = fma(set1(table[0]), re, fma(set1(table[1]), im, add(load(before), set1(table[2]))));
  const Mask better = less(cost, best);
  best = min(cost, best);
  winner = select(better, set1(low), winner);
}

// after[g] = min over the windows w of group g (w >> k = g) of distance(w) + before[w mod groups].
// Two groups at a time: one minimum would wait for the one before it.
template <int PAIR>
ISA void viterbi_step(const Viterbi& job, Floats re, Floats im, const ViterbiScratch& s, uint8_t* winners) {
  const int64_t groups = int64_t{1} << (job.state_bits - job.code_bits), branches = int64_t{1} << job.code_bits;
  for (int64_t group = 0; group < groups; group += PAIR) {
    Floats best[PAIR];
    Ints winner[PAIR];
    for (int i = 0; i < PAIR; i++) {
      best[i] = set1(__builtin_inff());
      winner[i] = set1(int32_t{0});
    }
    const int64_t window = group * branches;
#pragma GCC unroll 4
    for (int64_t low = 0; low < branches; low++)
      for (int i = 0; i < PAIR; i++) {
        const int64_t w = window + i * branches + low;
        viterbi_window(job.table + 3 * w, s.before + (w & (groups - 1)) * LANES, re, im, static_cast<int32_t>(low),
                       best[i], winner[i]);
      }
    for (int i = 0; i < PAIR; i++) {
      store(s.after + (group + i) * LANES, best[i]);
      store_bytes(winners + (group + i) * LANES, winner[i]);
    }
  }
}

// The number of each lane's cheapest group; the least cost is taken off all of them.
ISA void viterbi_settle(float* costs, int64_t groups, int32_t* cheapest) {
  Floats least = load(costs);
  Ints which = set1(int32_t{0});
  for (int64_t group = 1; group < groups; group++) {
    const Floats cost = load(costs + group * LANES);
    which = select(less(cost, least), set1(static_cast<int32_t>(group)), which);
    least = min(cost, least);
  }
  for (int64_t group = 0; group < groups; group++) store(costs + group * LANES, sub(load(costs + group * LANES), least));
  store(cheapest, which);
}

ISA void viterbi(const Viterbi& job, int64_t first, char* scratch) {
  ViterbiScratch s(job, scratch);
  const int64_t groups = int64_t{1} << (job.state_bits - job.code_bits);
  const int64_t lanes = job.rows - first < LANES ? job.rows - first : LANES;
  int32_t group[LANES];
  for (int64_t i = 0; i < groups * LANES; i++) s.before[i] = 0;
  for (int64_t t = 0; t < job.steps; t++) {
    const float* aim = job.target + 2 * t * job.rows + first;
    const Floats re = load_some(aim, lanes), im = load_some(aim + job.rows, lanes);
    uint8_t* winners = s.winner + t * groups * LANES;
    if (groups > 1)
      viterbi_step<2>(job, re, im, s, winners);
    else
      viterbi_step<1>(job, re, im, s, winners);
    float* done = s.after;
    s.after = s.before;
    s.before = done;
    // Costs are sums over all coefficients so far: kept small, so that float32 keeps their differences.
    if (t % 16 == 15 || t + 1 == job.steps) viterbi_settle(done, groups, group);
  }
  for (int64_t t = job.steps - 1; t >= 0; t--) {
    const uint8_t* winners = s.winner + t * groups * LANES;
    for (int64_t lane = 0; lane < lanes; lane++) {
      const int32_t window = static_cast<int32_t>(group[lane] << job.code_bits) | winners[group[lane] * LANES + lane];
      job.states[t * job.rows + first + lane] = window;
      group[lane] = window & static_cast<int32_t>(groups - 1);
    }
  }
}

}  // namespace
