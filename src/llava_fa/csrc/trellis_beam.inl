// The beam of solver/trellis_beam.py, one row after the other, paths in lanes.
//
// As in beam.inl errors are pushed forward: a path is what it corrects the columns of this block and the next to.

constexpr int PATHS = 32, BLOCK = 32, VECTORS = PATHS / LANES, MOST = 256;

// A row's paths between two blocks, the same for every instruction set.
struct TrellisRow {
  float ahead[BLOCK][PATHS];  // what the last block's errors ask of the next block's columns
  float cost[PATHS];
  int32_t window[PATHS];
  int32_t alive;                                                   // paths
  uint16_t windows[BLOCK / 2][PATHS], parents[BLOCK / 2][PATHS];  // of the last block, step by step
};

namespace {

struct TrellisScratch {
  float aim[2 * BLOCK][PATHS];
  uint16_t windows[BLOCK / 2][PATHS], parents[BLOCK / 2][PATHS];
  int32_t origin[PATHS];  // which path of the last block each continues
  // Continuation j of path p at j * PATHS + p: its cost's bits, which keep its order as it is not negative.
  int32_t key[MOST], window[MOST], chosen[PATHS];
};

size_t trellis_beam_scratch(const TrellisBeam&) { return sizeof(TrellisScratch); }

ISA int32_t count_up_to(const int32_t* key, int count, int32_t limit) {
  const Ints above = set1(limit + 1);
  int32_t found = 0;
  for (int i = 0; i < count; i += LANES) found += __builtin_popcount(bits(less(load(key + i), above)));
  return found;
}

// The places of the PATHS least of `count` keys that are not negative (INT32_MAX: not there), of all when there are
// fewer; how many. `enough`: a key that at least PATHS reach, or INT32_MAX - 1.
ISA int32_t least_keys(const int32_t* key, int count, int32_t enough, int32_t* place) {
  int32_t below = -1, limit = enough, found = count_up_to(key, count, limit);
  if (found > PATHS) {
    while (limit - below > 1) {
      const int32_t middle = below + (limit - below) / 2, reached = count_up_to(key, count, middle);
      if (reached < PATHS) {
        below = middle;
      } else {
        limit = middle;
        found = reached;
        if (reached == PATHS) break;
      }
    }
  }
  const bool ties = found > PATHS;  // all up to `below`, and as many that are `limit` as there is room for
  int32_t taken = 0;
  for (int i = 0; i < count; i += LANES) {
    uint32_t mask = bits(less(load(key + i), set1((ties ? below : limit) + 1)));
    for (; mask; mask &= mask - 1) place[taken++] = i + __builtin_ctz(mask);
  }
  for (int i = 0; ties && taken < PATHS && i < count; i++)
    if (key[i] == limit) place[taken++] = i;
  return taken;
}

// The windows of a block and their errors, from the last step's path back; returns the path it started from.
ISA int32_t settle(const TrellisBeam& job, int64_t row, int64_t start, int64_t columns, const uint16_t (*windows)[PATHS],
                   const uint16_t (*parents)[PATHS], int32_t path) {
  for (int64_t c = columns - 2; c >= 0; c -= 2) {
    const int32_t window = windows[c / 2][path];
    job.states[(start + c) / 2 * job.rows + row] = window;
    for (int64_t i = 0; i < 2; i++) {
      const int64_t at = (start + c + i) * job.rows + row;
      job.error[at] = job.target[at] - job.points[2 * window + i];
    }
    path = parents[c / 2][path];
  }
  return path;
}

// All continuations of the `alive` paths of column c, then the best of them as the new paths.
ISA int32_t extend(const TrellisBeam& job, int64_t row, int64_t c, int32_t alive, TrellisRow& r, TrellisScratch& s) {
  const bool opening = job.start + c == 0;  // no window before: any can be
  const float* metric = job.metric + c / 2 * 3;
  const Floats a = set1(metric[0]), b = set1(2 * metric[1]), d = set1(metric[2]), zero = set1(0.0f);
  const Floats reach = set1(job.reach), scale = set1(static_cast<float>(job.side) / (2 * job.reach));
  const Floats last = set1(static_cast<float>(job.side - 1));
  const Ints side = set1(static_cast<int32_t>(job.side)), never = set1(INT32_MAX);
  int32_t number[LANES], least[PATHS];
  for (int i = 0; i < LANES; i++) number[i] = i;
  const int count = static_cast<int>(opening ? job.tried_first : job.tried * PATHS);
  if (opening) {
    const float re = s.aim[c][0], im = s.aim[c + 1][0];
    int32_t cell[LANES];
    store(cell, add(mul(truncate(min(max(mul(add(set1(re), reach), scale), zero), last)), side),
                    truncate(min(max(mul(add(set1(im), reach), scale), zero), last))));
    for (int i = 0; i < (count + LANES - 1) / LANES * LANES; i++) {
      s.key[i] = INT32_MAX;
      if (i >= count) continue;
      s.window[i] = job.first[cell[0] * job.tried_first + i];
      const float x = re - job.points[2 * s.window[i]], y = im - job.points[2 * s.window[i] + 1];
      const float total = metric[0] * x * x + 2 * metric[1] * x * y + metric[2] * y * y, cost = total > 0 ? total : 0;
      std::memcpy(&s.key[i], &cost, sizeof cost);
    }
  } else {
    for (int v = 0; v < VECTORS; v++) {
      const int p = v * LANES;
      const Mask there = less(add(load(number), set1(p)), set1(alive));
      const Floats re = load(s.aim[c] + p), im = load(s.aim[c + 1] + p), cost = load(r.cost + p);
      const Ints cell = add(mul(truncate(min(max(mul(add(re, reach), scale), zero), last)), side),
                            truncate(min(max(mul(add(im, reach), scale), zero), last)));
      const Ints group = shift_right(load(r.window + p), static_cast<int>(job.code_bits));
      const Ints list = mul(add(mul(group, mul(side, side)), cell), set1(static_cast<int32_t>(job.tried)));
      Ints best = never;
      for (int j = 0; j < job.tried; j++) {
        const Ints window = gather(job.lists, select(there, add(list, set1(j)), set1(int32_t{0})));
        const Ints point = shift_left(window, 1);
        const Floats x = sub(re, gather(job.points, point)), y = sub(im, gather(job.points + 1, point));
        const Floats total = fma(x, fma(a, x, mul(b, y)), fma(d, mul(y, y), cost));
        const Ints total_key = select(there, as_ints(max(total, zero)), never);
        best = min(best, total_key);
        store(s.key + j * PATHS + p, total_key);
        store(s.window + j * PATHS + p, window);
      }
      store(least + p, best);
    }
  }
  int32_t enough = INT32_MAX - 1;
  if (!opening && alive == PATHS) {  // each path's best continuation alone makes PATHS
    enough = 0;
    for (int p = 0; p < PATHS; p++) enough = least[p] > enough ? least[p] : enough;
  }
  const int32_t kept = least_keys(s.key, (count + LANES - 1) / LANES * LANES, enough, s.chosen);
  int32_t parent[PATHS], origin[PATHS];
  float error[2][PATHS] = {};
  for (int p = 0; p < PATHS; p++) {
    const int from = s.chosen[p < kept ? p : 0];  // beyond the paths: anything that is there
    parent[p] = opening ? 0 : from % PATHS;
    std::memcpy(&r.cost[p], &s.key[from], sizeof(float));
    r.window[p] = s.window[from];
    origin[p] = s.origin[parent[p]];
    s.windows[c / 2][p] = static_cast<uint16_t>(s.window[from]);
    s.parents[c / 2][p] = static_cast<uint16_t>(parent[p]);
    for (int i = 0; i < 2; i++)
      error[i][p] = job.target[(job.start + c + i) * job.rows + row] - job.points[2 * s.window[from] + i];
  }
  for (int p = 0; p < PATHS; p++) s.origin[p] = origin[p];
  const float* unit = job.unit + c * job.ahead;
  for (int64_t later = c + 2; later < job.ahead; later++) {
    const Floats u = set1(unit[later]), v = set1(unit[job.ahead + later]);
    Floats next[VECTORS];
    for (int i = 0; i < VECTORS; i++)
      next[i] = fma(load(error[0] + i * LANES), u,
                    fma(load(error[1] + i * LANES), v, pick32(s.aim[later], load(parent + i * LANES))));
    for (int i = 0; i < VECTORS; i++) store(s.aim[later] + i * LANES, next[i]);
  }
  return kept;
}

ISA void trellis_row(const TrellisBeam& job, int64_t row, TrellisScratch& s) {
  TrellisRow& r = reinterpret_cast<TrellisRow*>(job.paths)[row];
  if (job.start == 0) {
    std::memset(&r, 0, sizeof r);
    r.alive = 1;
  }
  for (int64_t c = 0; c < job.columns; c++)
    for (int p = 0; p < PATHS; p++) s.aim[c][p] = job.base[c * job.rows + row] + r.ahead[c][p];
  for (int64_t c = job.columns; c < job.ahead; c++)
    for (int p = 0; p < PATHS; p++) s.aim[c][p] = 0;
  for (int p = 0; p < PATHS; p++) s.origin[p] = p;
  int32_t alive = r.alive;
  for (int64_t c = 0; c < job.columns; c += 2) alive = extend(job, row, c, alive, r, s);
  int32_t best = 0;
  for (int p = 1; p < alive; p++)
    if (r.cost[p] < r.cost[best]) best = p;
  const int32_t origin = s.origin[best];
  if (job.start) settle(job, row, job.start - BLOCK, BLOCK, r.windows, r.parents, origin);
  if (job.start + job.columns == job.size) {
    settle(job, row, job.start, job.columns, s.windows, s.parents, best);
    return;
  }
  // Paths that differ before this block contradict what has just been settled.
  const float least = r.cost[best];
  const int64_t end = job.columns / 2 - 1;
  int32_t kept = 0, place[PATHS];
  for (int p = 0; p < alive; p++)
    if (!job.start || s.origin[p] == origin) place[kept++] = p;
  for (int p = 0; p < kept; p++) {
    r.cost[p] = r.cost[place[p]] - least;
    r.window[p] = r.window[place[p]];
    s.windows[end][p] = s.windows[end][place[p]];
    s.parents[end][p] = s.parents[end][place[p]];
  }
  for (int64_t c = job.columns; c < job.ahead; c++)
    for (int p = 0; p < kept; p++) r.ahead[c - job.columns][p] = s.aim[c][place[p]];
  r.alive = kept;
  std::memcpy(r.windows, s.windows, sizeof r.windows);
  std::memcpy(r.parents, s.parents, sizeof r.parents);
}

ISA void trellis_beam(const TrellisBeam& job, int64_t first, char* scratch) {
  for (int64_t row = first; row < first + LANES && row < job.rows; row++)
    trellis_row(job, row, *reinterpret_cast<TrellisScratch*>(scratch));
}

}  // namespace
