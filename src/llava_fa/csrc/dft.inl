// The packed real DFT of one vector, by a plan: LANES transforms side by side, then one across the lanes (dft.h).

namespace {

INLINE void dft4(Floats* re, Floats* im, int step) {
  const Floats ar = add(re[0], re[2 * step]), ai = add(im[0], im[2 * step]);
  const Floats br = sub(re[0], re[2 * step]), bi = sub(im[0], im[2 * step]);
  const Floats cr = add(re[step], re[3 * step]), ci = add(im[step], im[3 * step]);
  const Floats dr = sub(re[step], re[3 * step]), di = sub(im[step], im[3 * step]);
  re[0] = add(ar, cr), im[0] = add(ai, ci);
  re[step] = add(br, di), im[step] = sub(bi, dr);
  re[2 * step] = sub(ar, cr), im[2 * step] = sub(ai, ci);
  re[3 * step] = sub(br, di), im[3 * step] = add(bi, dr);
}

// v · (c + i s)
INLINE void turn(Floats& re, Floats& im, Floats c, Floats s) {
  const Floats r = sub(mul(re, c), mul(im, s));
  im = fma(re, s, mul(im, c));
  re = r;
}

// cos(2πk / 16); -sin is four further on.
constexpr float COSINE[20] = {1.0f, 0.92387953251f, 0.70710678119f, 0.38268343236f, 0.0f, -0.38268343236f, -0.70710678119f,
                              -0.92387953251f, -1.0f, -0.92387953251f, -0.70710678119f, -0.38268343236f, 0.0f,
                              0.38268343236f, 0.70710678119f, 0.92387953251f, 1.0f, 0.92387953251f, 0.70710678119f,
                              0.38268343236f};

// DFT of LANES vectors, in place, in natural order: as 4 · (LANES / 4).
template <int N>
INLINE void dft_lanes(Floats* re, Floats* im) {
  constexpr int INNER = N / 4;
  if (N == 4) {
    dft4(re, im, 1);
    return;
  }
  for (int b = 0; b < INNER; b++) {
    dft4(re + b, im + b, INNER);  // over n1 of x[INNER n1 + b] → [k1]
    for (int k = 1; k < 4; k++)
      if (b) turn(re[b + INNER * k], im[b + INNER * k], set1(COSINE[16 / N * b * k]), set1(COSINE[16 / N * b * k + 4]));
  }
  Floats outr[N], outi[N];
  for (int k = 0; k < 4; k++) {
    Floats *r = re + INNER * k, *i = im + INNER * k;
    if (INNER == 4) {
      dft4(r, i, 1);
    } else {
      const Floats ar = r[0], ai = i[0];
      r[0] = add(ar, r[1]), i[0] = add(ai, i[1]);
      r[1] = sub(ar, r[1]), i[1] = sub(ai, i[1]);
    }
    for (int j = 0; j < INNER; j++) outr[k + 4 * j] = r[j], outi[k + 4 * j] = i[j];
  }
  for (int k = 0; k < N; k++) re[k] = outr[k], im[k] = outi[k];
}

struct Complexes {
  float *re, *im;
};

// One radix: y[q + s (r p + k)] = w^{p k} Σ_j x[q + s (p + m j)] e^{-2πi jk / r}, elements are vectors.
ISA void stage2(Complexes x, Complexes y, int64_t m, int64_t s, const float* twiddles) {
  for (int64_t p = 0; p < m; p++) {
    const Floats c = set1(twiddles[2 * p]), w = set1(twiddles[2 * p + 1]);
    for (int64_t q = 0; q < s; q++) {
      const int64_t a = (q + s * p) * LANES, b = a + s * m * LANES, to = (q + 2 * s * p) * LANES;
      const Floats ar = load(x.re + a), ai = load(x.im + a), br = load(x.re + b), bi = load(x.im + b);
      store(y.re + to, add(ar, br));
      store(y.im + to, add(ai, bi));
      Floats dr = sub(ar, br), di = sub(ai, bi);
      turn(dr, di, c, w);
      store(y.re + to + s * LANES, dr);
      store(y.im + to + s * LANES, di);
    }
  }
}

ISA void stage4(Complexes x, Complexes y, int64_t m, int64_t s, const float* twiddles) {
  for (int64_t p = 0; p < m; p++) {
    const float* w = twiddles + 6 * p;
    const Floats c1 = set1(w[0]), s1 = set1(w[1]), c2 = set1(w[2]), s2 = set1(w[3]), c3 = set1(w[4]), s3 = set1(w[5]);
    for (int64_t q = 0; q < s; q++) {
      Floats re[4], im[4];
      for (int j = 0; j < 4; j++) {
        re[j] = load(x.re + (q + s * (p + m * j)) * LANES);
        im[j] = load(x.im + (q + s * (p + m * j)) * LANES);
      }
      dft4(re, im, 1);
      turn(re[1], im[1], c1, s1);
      turn(re[2], im[2], c2, s2);
      turn(re[3], im[3], c3, s3);
      for (int k = 0; k < 4; k++) {
        store(y.re + (q + s * (4 * p + k)) * LANES, re[k]);
        store(y.im + (q + s * (4 * p + k)) * LANES, im[k]);
      }
    }
  }
}

// Odd r, by its definition, with x_j ± x_{r-j} taken together. R: r where it is known in advance, else 0.
template <int R>
ISA void stage_odd(Complexes x, Complexes y, int64_t m, int64_t s, int radix, const float* twiddles, const float* roots) {
  const int r = R ? R : radix, h = r / 2;
  constexpr int MOST = R ? R / 2 : 48;
  Floats ar[MOST], ai[MOST], br[MOST], bi[MOST];
  for (int64_t p = 0; p < m; p++) {
    const float* w = twiddles + 2 * (r - 1) * p;
    for (int64_t q = 0; q < s; q++) {
      const auto from = [&](int j) { return (q + s * (p + m * j)) * LANES; };
      const auto to = [&](int k) { return (q + s * (r * p + k)) * LANES; };
      const Floats r0 = load(x.re + from(0)), i0 = load(x.im + from(0));
      Floats sumr = r0, sumi = i0;
      for (int j = 1; j <= h; j++) {
        const Floats ur = load(x.re + from(j)), ui = load(x.im + from(j));
        const Floats vr = load(x.re + from(r - j)), vi = load(x.im + from(r - j));
        ar[j - 1] = add(ur, vr), ai[j - 1] = add(ui, vi);
        br[j - 1] = sub(ur, vr), bi[j - 1] = sub(ui, vi);
        sumr = add(sumr, ar[j - 1]), sumi = add(sumi, ai[j - 1]);
      }
      store(y.re + to(0), sumr);
      store(y.im + to(0), sumi);
      for (int k = 1; k <= h; k++) {
        const float* root = roots + 2 * h * (k - 1);
        Floats cr = r0, ci = i0, sr = set1(0.0f), si = sr;
        for (int j = 0; j < h; j++) {
          const Floats c = set1(root[2 * j]), sine = set1(root[2 * j + 1]);
          cr = fma(ar[j], c, cr), ci = fma(ai[j], c, ci);
          sr = fma(br[j], sine, sr), si = fma(bi[j], sine, si);
        }
        Floats ur = add(cr, si), ui = sub(ci, sr), vr = sub(cr, si), vi = add(ci, sr);
        turn(ur, ui, set1(w[2 * (k - 1)]), set1(w[2 * (k - 1) + 1]));
        turn(vr, vi, set1(w[2 * (r - k - 1)]), set1(w[2 * (r - k - 1) + 1]));
        store(y.re + to(k), ur);
        store(y.im + to(k), ui);
        store(y.re + to(r - k), vr);
        store(y.im + to(r - k), vi);
      }
    }
  }
}

// Across the lanes: x holds DFTs of length rows in its columns; y[k1 + rows k2] in natural order.
ISA void across(const Dft& d, Complexes x, Complexes y) {
  for (int64_t first = 0; first < d.rows; first += LANES) {
    Floats re[LANES], im[LANES];
    for (int64_t i = 0; i < LANES; i++) {
      re[i] = load(x.re + (first + i) * LANES);
      im[i] = load(x.im + (first + i) * LANES);
    }
    transpose(re);
    transpose(im);
    for (int64_t i = 1; i < LANES; i++) {
      const int64_t at = (first + i) * LANES;
      turn(re[i], im[i], load(d.cross_re.data() + at), load(d.cross_im.data() + at));
    }
    dft_lanes<LANES>(re, im);
    if (first + LANES <= d.rows) {
      for (int64_t k = 0; k < LANES; k++) {
        store(y.re + first + d.rows * k, re[k]);
        store(y.im + first + d.rows * k, im[k]);
      }
    } else {
      float some[LANES];
      const size_t bytes = static_cast<size_t>(d.rows - first) * sizeof(float);
      for (int64_t k = 0; k < LANES; k++) {
        store(some, re[k]);
        std::memcpy(y.re + first + d.rows * k, some, bytes);
        store(some, im[k]);
        std::memcpy(y.im + first + d.rows * k, some, bytes);
      }
    }
  }
}

// DFT of length d.length of x; the result is where it says, x or y.
ISA Complexes complex_dft(const Dft& d, Complexes x, Complexes y) {
  int64_t left = d.rows, s = 1;
  const float *twiddles = d.twiddles.data(), *roots = d.roots.data();
  for (const int r : d.radices) {
    left /= r;
    if (r == 2) stage2(x, y, left, s, twiddles);
    if (r == 4) stage4(x, y, left, s, twiddles);
    if (r == 3) stage_odd<3>(x, y, left, s, r, twiddles, roots);
    if (r == 5) stage_odd<5>(x, y, left, s, r, twiddles, roots);
    if (r == 7) stage_odd<7>(x, y, left, s, r, twiddles, roots);
    if (r > 7) stage_odd<0>(x, y, left, s, r, twiddles, roots);
    twiddles += 2 * left * (r - 1);
    if (r % 2) roots += 2 * (r / 2) * (r / 2);
    s *= r;
    const Complexes other = x;
    x = y;
    y = other;
  }
  across(d, x, y);
  return y;
}

ISA Complexes bluestein(const Dft& d, Complexes x, Complexes y) {
  const int64_t m = d.half;
  const auto times = [](Complexes v, const float* re, const float* im, int64_t n) ISA {
    for (int64_t j = 0; j < n; j++) {
      const float r = v.re[j] * re[j] - v.im[j] * im[j];
      v.im[j] = v.re[j] * im[j] + v.im[j] * re[j];
      v.re[j] = r;
    }
  };
  times(x, d.chirp_re.data(), d.chirp_im.data(), m);
  std::memset(x.re + m, 0, static_cast<size_t>(d.length - m) * sizeof(float));
  std::memset(x.im + m, 0, static_cast<size_t>(d.length - m) * sizeof(float));
  Complexes z = complex_dft(d, x, y);
  times(z, d.kernel_re.data(), d.kernel_im.data(), d.length);
  Complexes swapped{z.im, z.re}, free = z.re == x.re ? Complexes{y.im, y.re} : Complexes{x.im, x.re};
  z = complex_dft(d, swapped, free);  // the inverse: re and im exchanged before and after
  z = {z.im, z.re};
  times(z, d.chirp_re.data(), d.chirp_im.data(), m);
  return z;
}

ISA void packed_dft(const Dft& d, const void* x, Dtype dtype, int64_t n, const uint16_t* input_scale,
                    const uint8_t* signs, float* re, float* im, float* scratch) {
  const int64_t m = d.half, space = d.padded();
  Complexes a{scratch, scratch + space}, b{scratch + 2 * space, scratch + 3 * space};
  const float* floats = static_cast<const float*>(x);
  const uint16_t* halves = static_cast<const uint16_t*>(x);
  int32_t lane_bits[LANES];
  for (int i = 0; i < LANES; i++) lane_bits[i] = 1 << i;
  const Ints lanes = load(lane_bits);
  const auto given = [&](int64_t j) TILE {  // x_j … · sign / s
    uint16_t bits = signs[j / 8];
    if (LANES == 16) std::memcpy(&bits, signs + j / 8, 2);
    const Mask minus = equal(and_(set1(int32_t{bits} >> j % 8), lanes), lanes);
    const Floats v = dtype == Dtype::float32 ? load(floats + j) : convert(halves + j);
    return div(mul(v, select(minus, set1(-1.0f), set1(1.0f))), convert(input_scale + j));
  };
  int64_t i = 0;
  for (; 2 * i + 2 * LANES <= n; i += LANES) {
    Floats even, odd;
    split(given(2 * i), given(2 * i + LANES), even, odd);
    store(a.re + i, even);
    store(a.im + i, odd);
  }
  for (int64_t j = 2 * i; j < d.size; j++) {
    float v = 0;
    if (j < n) {
      v = dtype == Dtype::float32 ? floats[j] : float_of(halves[j]);
      v = v * (signs[j / 8] >> j % 8 & 1 ? -1.0f : 1.0f) / float_of(input_scale[j]);
    }
    (j % 2 ? a.im : a.re)[j / 2] = v;
  }
  const Complexes z = d.chirp_re.empty() ? complex_dft(d, a, b) : bluestein(d, a, b);
  // X_f = ½ (Z_f + conj Z_{M-f}) - ½ i e^{-2πi f / N} (Z_f - conj Z_{M-f})
  const float *zr = z.re, *zi = z.im, *c = d.post_cos.data(), *s = d.post_sin.data();
  const Floats h = set1(d.half_scale);
  int64_t f = 1;
  for (; f + LANES <= m; f += LANES) {
    const Floats ar = load(zr + f), ai = load(zi + f);
    const Floats br = reverse(load(zr + m - f - LANES + 1)), bi = reverse(load(zi + m - f - LANES + 1));
    const Floats dr = sub(ar, br), di = add(ai, bi), cosine = load(c + f), sine = load(s + f);
    store(re + f, fma(h, add(ar, br), sub(mul(cosine, di), mul(sine, dr))));
    store(im + f, sub(mul(h, sub(ai, bi)), fma(cosine, dr, mul(sine, di))));
  }
  for (; f < m; f++) {
    const float dr = zr[f] - zr[m - f], di = zi[f] + zi[m - f];
    re[f] = d.half_scale * (zr[f] + zr[m - f]) + (c[f] * di - s[f] * dr);
    im[f] = d.half_scale * (zi[f] - zi[m - f]) - (c[f] * dr + s[f] * di);
  }
  re[0] = (zr[0] + zi[0]) * d.first_scale;
  im[0] = (zr[0] - zi[0]) * d.first_scale;
}

}  // namespace
