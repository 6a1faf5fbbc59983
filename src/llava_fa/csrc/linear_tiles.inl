// Products of int8 of many vectors by matrix instructions (in linear_int8.inl). A tile of x is 16 columns or fewer by a unit's
// numbers of each; a tile of points, as looked up, is a unit of a block; a tile of sums is those columns by the block's rows.
// The sums, and what is made of them, are those of the other builds to the last bit. x: [groups, batch, units of the group, STEPS,
// X_BYTES].

constexpr int64_t TILE_COLUMNS = 16;
static_assert(STEPS == 16 && ROWS == 16 && X_BYTES == 4);

// Columns of every tile: as many each as come out even. The last tile ends with the last column, and begins in the one before.
INLINE int64_t columns_of_tile(int64_t batch) {
  const int64_t tiles = (batch + TILE_COLUMNS - 1) / TILE_COLUMNS;
  return (batch + tiles - 1) / tiles;
}

// The calling thread's tiles, while there is one of these.
struct Tiles {
  ISA explicit Tiles(int64_t batch) { use_tiles(columns_of_tile(batch)); }
  ISA ~Tiles() { leave_tiles(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// C tiles of columns, the first of them from column `first`, times R blocks.
template <int C, int R>
INLINE void multiply_tiles(const Linear& job, int64_t group, int64_t units, const uint8_t* w, int64_t first, int64_t width,
                           float* y) {
  constexpr int64_t STRIDE = GROUP * STEPS * X_BYTES;
  const auto columns = std::make_integer_sequence<int, C>(), blocks = std::make_integer_sequence<int, R>();
  const auto all = std::make_integer_sequence<int, C * R>();  // tile c of block r is c R + r
  const int64_t last = job.batch - width;
  const int8_t* x[C];
  int64_t from[C];
  each(columns, [&](auto c) TILE {
    from[c] = first + c * width < last ? first + c * width : last;
    x[c] = job.x + (group * job.batch + from[c]) * STRIDE;
  });
  each(all, [&](auto i) TILE { clear_tile<i>(); });
  for (int64_t u = 0; u < units; u++, w += STEPS * 64) {
    each(columns, [&](auto c) TILE { load_tile<4 + c>(x[c] + u * STEPS * X_BYTES, STRIDE); });
    each(blocks, [&](auto r) TILE { load_tile<6 + r>(w + r * BUFFER, 64); });
    each(all, [&](auto i) TILE { dot_tiles<i, 4 + i / R, 6 + i % R>(); });
  }
  alignas(64) int32_t sums[C * R][TILE_COLUMNS * ROWS];
  each(all, [&](auto i) TILE { store_tile<i>(sums[i]); });
  const int64_t batch = job.batch, block = batch * ROWS;
  const int32_t* const biases = job.x_bias + group * batch;
  const float* const scales = job.x_scale + group * batch;
  const char* const later = reinterpret_cast<const char*>(job.x + (group * batch + C * width) * STRIDE);
  for (int c = 0; c < C; c++)
    for (int64_t column = first + c * width, end = from[c] + width; column < end; column++) {
      for (int64_t line = 0; line < STRIDE; line += 64)  // the CPU does not foresee the loads of tiles
        _mm_prefetch(later + column * STRIDE + line, _MM_HINT_T0);
      const Ints bias = set1(biases[column]);
      const Floats scale = set1(scales[column]);
      const int32_t* sum = sums[c * R] + (column - from[c]) * ROWS;
      float* to = y + column * ROWS;
      Floats total[R];  // all are read before one is written: to a CPU addresses that differ by 4096 look the same at first
      each(blocks, [&](auto r) TILE {
        total[r] = fma(convert(add(load(sum + r * TILE_COLUMNS * ROWS), bias)), scale, load(to + r * block));
      });
      each(blocks, [&](auto r) TILE { store(to + r * block, total[r]); });
    }
}

template <int R>
ISA void tiled_columns(const Linear& job, int64_t group, int64_t units, const uint8_t* w, float* y) {
  const int64_t width = columns_of_tile(job.batch);
  int64_t first = 0;
  for (; first + width < job.batch; first += 2 * width) multiply_tiles<2, R>(job, group, units, w, first, width, y);
  if (first < job.batch) multiply_tiles<1, R>(job, group, units, w, first, width, y);
}
