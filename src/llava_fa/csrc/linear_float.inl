// Products in float32 (in linear.inl): points as the codebook has them, x as it is.

// (re, im) of ROWS rows as bf16 in dwords → two numbers of every row.
INLINE void spread_points(const Ints* dword, float* out) {
  for (int64_t part = 0; part < PARTS; part++) {
    store(out + part * LANES, as_floats(shift_left(dword[part], 16)));
    store(out + ROWS + part * LANES, as_floats(and_(dword[part], set1(static_cast<int32_t>(0xffff0000u)))));
  }
}

INLINE void spread_dwords(const uint32_t (*dwords)[ROWS], int64_t count, float* out) {
  for (int64_t i = 0; i < count; i++, out += 2 * ROWS) {
    Ints rows[PARTS];
    for (int64_t part = 0; part < PARTS; part++)
      rows[part] = load(reinterpret_cast<const int32_t*>(dwords[i]) + LANES * part);
    spread_points(rows, out);
  }
}

template <int BITS>
ISA void points_rings(const Linear& job, int64_t block, int64_t unit, float* out) {
  uint8_t bytes[8 * 64];
  const uint8_t* from = job.codes + (block * job.units + unit) * BITS * 64;
  for (size_t part = 0; part < 64; part += sizeof(Bytes)) {
    Bytes c[8];
    codes<BITS>(from + part, c);
    for (int q = 0; q < 8; q++) store_all(bytes + 64 * q + part, masked(c[q], (1 << BITS) - 1));
  }
#ifdef LLAVA_FA_PICK
  const int32_t* table = reinterpret_cast<const int32_t*>(job.tables);
  const Ints mask = set1(int32_t{0xff});
  for (int q = 0; q < 8; q++)
    for (int j = 0; j < 4; j++, out += 2 * ROWS) {
      int32_t rows[LANES];
      std::memcpy(rows, bytes + 64 * q, sizeof rows);
      const Ints dwords = pick<BITS>(table, and_(shift_right(load(rows), 8 * j), mask));
      spread_points(&dwords, out);
    }
#else
  const uint32_t* table = reinterpret_cast<const uint32_t*>(job.tables);
  uint32_t dwords[UNIT][ROWS];
  for (int64_t p = 0; p < UNIT; p++)
    for (int64_t row = 0; row < ROWS; row++) {
      uint32_t code = bytes[p / 4 * 64 + 4 * row + p % 4];
      KEEP_SCALAR(code);
      dwords[p][row] = table[code];
    }
  spread_dwords(dwords, UNIT, out);
#endif
}

ISA void points_trellis(const Linear& job, int64_t block, int64_t unit, float* out) {
  const uint32_t* table = reinterpret_cast<const uint32_t*>(job.tables);
  const uint32_t mask = (1u << job.state_bits) - 1;
  const int64_t bits = job.code_bits;
  const uint32_t* words = reinterpret_cast<const uint32_t*>(job.codes) + (block * job.words + unit * bits) * ROWS;
  uint32_t half[2][9][ROWS], dwords[UNIT][ROWS];
  for (int64_t j = 0; j < bits; j++)
    for (int64_t row = 0; row < ROWS; row++) {
      half[0][j][row] = words[j * ROWS + row] & 0xffff;
      half[1][j][row] = words[j * ROWS + row] >> 16;
    }
  std::memcpy(half[0][bits], half[1][0], sizeof half[0][0]);
  for (int64_t row = 0; row < ROWS; row++) half[1][bits][row] = words[bits * ROWS + row] & 0xffff;
  for (int64_t i = 0; i < UNIT; i++) {
    const int64_t bit = i % HALF * bits;
    const uint32_t *low = half[i / HALF][bit / 16], *high = low + ROWS;
    for (int64_t row = 0; row < ROWS; row++) {
      uint32_t window = (low[row] | high[row] << 16) >> bit % 16 & mask;
      KEEP_SCALAR(window);
      dwords[i][row] = table[window];
    }
  }
  spread_dwords(dwords, UNIT, out);
}

ISA void points_float(const Linear& job, int64_t block, int64_t unit, float* out) {
  if (job.state_bits) return points_trellis(job, block, unit, out);
  with_bits(job.code_bits, [&](auto bits) TILE { points_rings<bits>(job, block, unit, out); });
}

template <int C>
INLINE void float_tile(const Linear& job, int64_t unit, const float* w, int64_t column, float* y) {
  Floats sum[C][PARTS];
  const float* x[C];
  for (int c = 0; c < C; c++) {
    x[c] = job.x_float + ((column + c) * job.units + unit) * 2 * UNIT;
    for (int64_t part = 0; part < PARTS; part++) sum[c][part] = set1(0.0f);
  }
  for (int64_t k = 0; k < 2 * UNIT; k++)
    for (int64_t part = 0; part < PARTS; part++) {
      const Floats point = load(w + k * ROWS + part * LANES);
      for (int c = 0; c < C; c++) sum[c][part] = fma(point, set1(x[c][k]), sum[c][part]);
    }
  for (int c = 0; c < C; c++)
    for (int64_t part = 0; part < PARTS; part++) {
      float* to = y + (column + c) * ROWS + part * LANES;
      store(to, add(load(to), sum[c][part]));
    }
}

ISA void float_rows(const Linear& job, int64_t first, int64_t count, float* y, char* scratch) {
  float* w = reinterpret_cast<float*>(scratch);
  std::memset(y, 0, static_cast<size_t>(count * job.batch * ROWS) * sizeof(float));
  for (int64_t b = 0; b < count; b++, y += job.batch * ROWS)
    for (int64_t unit = 0; unit < job.units; unit++) {
      points_float(job, first + b, unit, w);
      int64_t c = 0;
      for (; c + COLUMNS <= job.batch; c += COLUMNS) float_tile<COLUMNS>(job, unit, w, c, y);
      for (; c + 2 <= job.batch; c += 2) float_tile<2>(job, unit, w, c, y);
      for (; c < job.batch; c++) float_tile<1>(job, unit, w, c, y);
    }
}
