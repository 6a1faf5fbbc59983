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
  int32_t key[MOST], point[MOST], chosen[PATHS];
  int32_t list[PATHS];  // where each path's continuations are listed
};

size_t trellis_beam_scratch(const TrellisBeam&) { return sizeof(TrellisScratch); }

ISA int32_t count_up_to(const int32_t* key, int count, int32_t limit) {
  const Ints above = set1(limit + 1);
  int32_t sum = 0;
  for (int i = 0; i < count; i += LANES) sum += __builtin_popcount(bits(less(load(key + i), above)));
  return sum;
}

// The places of the PATHS least of `count` keys that are not negative (INT32_MAX: not there), of all when there are
// fewer; how many. Every key is above `below`, and at least PATHS, or all, are at most `limit` < INT32_MAX.
ISA int32_t least_keys(const int32_t* key, int count, int32_t below, int32_t limit, int32_t* place) {
  int32_t fewer = 0, within = count_up_to(key, count, limit);
  for (int round = 0; within > PATHS && limit - below > 1; round++) {
    // Between their extremes costs are spread about evenly: halving is for when they are not.
    const double share = round % 4 == 3 ? 0.5 : (PATHS + 0.5 - fewer) / (within - fewer + 1);
    int32_t middle = below + static_cast<int32_t>(share * (limit - below));
    middle = middle <= below ? below + 1 : middle >= limit ? limit - 1 : middle;
    const int32_t reached = count_up_to(key, count, middle);
    if (reached < PATHS) {
      below = middle;
      fewer = reached;
    } else {
      limit = middle;
      within = reached;
    }
  }
  const bool ties = within > PATHS;  // all up to `below`, and as many that are `limit` as there is room for
  int32_t chosen = 0;
  for (int i = 0; i < count; i += LANES) {
    uint32_t mask = bits(less(load(key + i), set1((ties ? below : limit) + 1)));
    for (; mask; mask &= mask - 1) place[chosen++] = i + __builtin_ctz(mask);
  }
  for (int i = 0; ties && chosen < PATHS && i < count; i++)
    if (key[i] == limit) place[chosen++] = i;
  return chosen;
}

// A point, two bf16 numbers in one int.
INLINE Floats re_of(Ints point) { return as_floats(shift_left(point, 16)); }
INLINE Floats im_of(Ints point) { return as_floats(and_(point, set1(static_cast<int32_t>(0xffff0000)))); }

// The windows of a block and their errors, from the last step's path back; returns the path it started from.
ISA int32_t settle(const TrellisBeam& job, int64_t row, int64_t start, int64_t columns, const uint16_t (*windows)[PATHS],
                   const uint16_t (*parents)[PATHS], int32_t path) {
  for (int64_t c = columns - 2; c >= 0; c -= 2) {
    const int32_t window = windows[c / 2][path];
    job.states[(start + c) / 2 * job.rows + row] = window;
    float re[LANES], im[LANES];
    store(re, re_of(set1(job.points[window])));
    store(im, im_of(set1(job.points[window])));
    const int64_t at = (start + c) * job.rows + row;
    job.target[at] -= re[0];
    job.target[at + job.rows] -= im[0];
    path = parents[c / 2][path];
  }
  return path;
}

// The cell of the grid of lists that an aim lies in.
INLINE Ints cell_of(const TrellisBeam& job, Floats re, Floats im) {
  const float most = static_cast<float>(job.reach);
  const Floats reach = set1(most), scale = set1(static_cast<float>(job.side) / (2 * most));
  return square_of(mul(add(re, reach), scale), mul(add(im, reach), scale), job.side);
}

// Finds the lists of the paths at column c, and asks for them: they are megabytes, read at random.
ISA void find_lists(const TrellisBeam& job, int64_t c, const TrellisRow& r, TrellisScratch& s) {
  const Ints cells = set1(static_cast<int32_t>(job.side * job.side)), tried = set1(static_cast<int32_t>(job.tried));
  for (int p = 0; p < PATHS; p += LANES) {
    const Ints group = shift_right(load(r.window + p), static_cast<int>(job.code_bits));
    const Ints cell = cell_of(job, load(s.aim[c] + p), load(s.aim[c + 1] + p));
    store(s.list + p, mul(add(mul(group, cells), cell), tried));
  }
  for (int p = 0; p < PATHS; p++) __builtin_prefetch(job.lists + s.list[p]);
}

// What errors cost: a, 2 b, d of a metric (a b; b d).
struct Metric {
  Floats a, b, d;
};
INLINE Metric metric_of(const float* m) { return {set1(m[0]), set1(2 * m[1]), set1(m[2])}; }

// The key of a continuation: of an aim, a point and what the path has cost.
INLINE Ints key_of(const Metric& m, Floats re, Floats im, Ints point, Floats cost) {
  const Floats x = sub(re, re_of(point)), y = sub(im, im_of(point));
  return as_ints(max(fma(x, fma(m.a, x, mul(m.b, y)), fma(m.d, mul(y, y), cost)), set1(0.0f)));
}

// Keys of the first windows, of which any can be: those listed for the aim. How many.
INLINE int opening_keys(const TrellisBeam& job, const Metric& metric, const int32_t* number, TrellisScratch& s) {
  const int count = static_cast<int>(job.tried_first);
  const Floats re = set1(s.aim[0][0]), im = set1(s.aim[1][0]), zero = set1(0.0f);
  int32_t cell[LANES];
  store(cell, cell_of(job, load(s.aim[0]), load(s.aim[1])));
  s.list[0] = static_cast<int32_t>(cell[0] * job.tried_first);
  for (int i = 0; i < count; i += LANES) {
    const Ints at = add(load(number), set1(i));
    const Ints point = gather(job.points, gather(job.first, add(min(at, set1(count - 1)), set1(s.list[0]))));
    store(s.key + i, select(less(at, set1(count)), key_of(metric, re, im, point, zero), set1(INT32_MAX)));
  }
  return count;
}

// Keys of what is listed for each path at column c, and the least of each path. How many.
INLINE int listed_keys(const TrellisBeam& job, const Metric& metric, const int32_t* number, int64_t c, int32_t alive,
                       const TrellisRow& r, TrellisScratch& s, int32_t* least) {
  // One by one: the gather instructions of today's CPUs are slower.
  for (int p = 0; p < PATHS; p++)
    for (int64_t j = 0; j < job.tried; j++) s.point[j * PATHS + p] = job.points[job.lists[s.list[p] + j]];
  for (int p = 0; p < PATHS; p += LANES) {
    const Mask there = less(add(load(number), set1(p)), set1(alive));
    const Floats re = load(s.aim[c] + p), im = load(s.aim[c + 1] + p), cost = load(r.cost + p);
    const Ints never = set1(INT32_MAX);
    Ints best = never;
    for (int j = 0; j < job.tried; j++) {
      const Ints key = select(there, key_of(metric, re, im, load(s.point + j * PATHS + p), cost), never);
      best = min(best, key);
      store(s.key + j * PATHS + p, key);
    }
    store(least + p, best);
  }
  return static_cast<int>(job.tried * PATHS);
}

// Corrects the columns after c for each path's error at c, from its parent's columns.
INLINE void push_paths(const TrellisBeam& job, int64_t row, int64_t c, const int32_t* point, const int32_t* parent,
                       const TrellisRow& r, TrellisScratch& s) {
  float error[2][PATHS];
  const float* target = job.target + (job.start + c) * job.rows + row;
  for (int p = 0; p < PATHS; p += LANES) {
    store(error[0] + p, sub(set1(target[0]), re_of(load(point + p))));
    store(error[1] + p, sub(set1(target[job.rows]), im_of(load(point + p))));
  }
  const float* unit = job.unit + c * job.ahead;
  for (int64_t later = c + 2; later < job.ahead; later++) {
    const Floats u = set1(unit[later]), v = set1(unit[job.ahead + later]);
    Floats next[VECTORS];
    for (int i = 0; i < VECTORS; i++)
      next[i] = fma(load(error[0] + i * LANES), u,
                    fma(load(error[1] + i * LANES), v, pick32(s.aim[later], load(parent + i * LANES))));
    for (int i = 0; i < VECTORS; i++) store(s.aim[later] + i * LANES, next[i]);
    if (later == c + 3 && later < job.columns) find_lists(job, c + 2, r, s);
  }
}

// All continuations of the `alive` paths of column c, then the best of them as the new paths.
ISA int32_t extend(const TrellisBeam& job, int64_t row, int64_t c, int32_t alive, TrellisRow& r, TrellisScratch& s) {
  const bool opening = job.start + c == 0;
  const Metric metric = metric_of(job.metric + c / 2 * 3);
  int32_t number[LANES], least[PATHS];
  for (int i = 0; i < LANES; i++) number[i] = i;
  const int count =
      opening ? opening_keys(job, metric, number, s) : listed_keys(job, metric, number, c, alive, r, s, least);
  int32_t below = -1, limit = INT32_MAX - 1;
  if (!opening && alive == PATHS) {  // each path's best continuation alone makes PATHS
    below = limit;
    limit = 0;
    for (int p = 0; p < PATHS; p++) {
      limit = least[p] > limit ? least[p] : limit;
      below = least[p] <= below ? least[p] - 1 : below;
    }
  }
  const int32_t width = least_keys(s.key, (count + LANES - 1) / LANES * LANES, below, limit, s.chosen);
  int32_t parent[PATHS], origin[PATHS], point[PATHS];
  for (int p = 0; p < PATHS; p++) {
    const int from = s.chosen[p < width ? p : 0];  // beyond the paths: anything that is there
    parent[p] = opening ? 0 : from % PATHS;
    const int32_t window = opening ? job.first[s.list[0] + from] : job.lists[s.list[parent[p]] + from / PATHS];
    std::memcpy(&r.cost[p], &s.key[from], sizeof(float));
    r.window[p] = window;
    point[p] = job.points[window];
    origin[p] = s.origin[parent[p]];
    s.windows[c / 2][p] = static_cast<uint16_t>(window);
    s.parents[c / 2][p] = static_cast<uint16_t>(parent[p]);
  }
  std::memcpy(s.origin, origin, sizeof origin);
  push_paths(job, row, c, point, parent, r, s);
  return width;
}

ISA void trellis_row(const TrellisBeam& job, int64_t row, TrellisScratch& s) {
  TrellisRow& r = reinterpret_cast<TrellisRow*>(job.paths)[row];
  if (job.start == 0) {
    std::memset(&r, 0, sizeof r);
    r.alive = 1;
  }
  for (int64_t c = 0; c < job.ahead; c++)
    for (int p = 0; p < PATHS; p += LANES) {
      const bool here = c < job.columns;
      store(s.aim[c] + p, here ? add(set1(job.base[c * job.rows + row]), load(r.ahead[c] + p)) : set1(0.0f));
    }
  for (int p = 0; p < PATHS; p++) s.origin[p] = p;
  int32_t alive = r.alive;
  find_lists(job, 0, r, s);
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
  int32_t width = 0, place[PATHS] = {};
  for (int p = 0; p < alive; p++)
    if (!job.start || s.origin[p] == origin) place[width++] = p;
  for (int p = 0; p < width; p++) {
    r.cost[p] = r.cost[place[p]] - least;
    r.window[p] = r.window[place[p]];
    s.windows[end][p] = s.windows[end][place[p]];
    s.parents[end][p] = s.parents[end][place[p]];
  }
  for (int64_t c = job.columns; c < job.ahead; c++)
    for (int p = 0; p < PATHS; p += LANES)
      store(r.ahead[c - job.columns] + p, pick32(s.aim[c], load(place + p)));
  r.alive = width;
  std::memcpy(r.windows, s.windows, sizeof r.windows);
  std::memcpy(r.parents, s.parents, sizeof r.parents);
}

ISA void trellis_beam(const TrellisBeam& job, int64_t first, char* scratch) {
  for (int64_t row = first; row < first + LANES && row < job.rows; row++)
    trellis_row(job, row, *reinterpret_cast<TrellisScratch*>(scratch));
}

}  // namespace
