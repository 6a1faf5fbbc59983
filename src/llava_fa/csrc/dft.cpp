// Making of plans: everything in double, once per length.

#include "dft.h"

#include <cmath>
#include <complex>

namespace llava_fa {
namespace {

// Longest prime that is transformed by its definition: r² / 2 multiplications for r numbers.
constexpr int64_t LONGEST = 97;

using Complex = std::complex<double>;

// e^{-2πi k / n}, k reduced first so that large ones lose nothing.
Complex root(int64_t k, int64_t n) {
  const double angle = -2 * M_PI * static_cast<double>(k % n) / static_cast<double>(n);
  return {std::cos(angle), std::sin(angle)};
}

std::vector<int> factors(int64_t n) {
  std::vector<int> radices;
  for (; n % 4 == 0; n /= 4) radices.push_back(4);
  for (int64_t p = 2; n > 1 && p <= LONGEST; p++)
    for (; n % p == 0; n /= p) radices.push_back(static_cast<int>(p));
  if (n > 1) radices.clear();
  return radices;
}

// Power of two, for the kernel of Bluestein's algorithm.
void fft(std::vector<Complex>& x) {
  const int64_t n = static_cast<int64_t>(x.size());
  for (int64_t i = 1, j = 0; i < n; i++) {
    int64_t bit = n >> 1;
    for (; j & bit; bit >>= 1) j ^= bit;
    j ^= bit;
    if (i < j) std::swap(x[i], x[j]);
  }
  for (int64_t width = 2; width <= n; width *= 2)
    for (int64_t start = 0; start < n; start += width)
      for (int64_t k = 0; k < width / 2; k++) {
        const Complex a = x[start + k], b = x[start + k + width / 2] * root(k, width);
        x[start + k] = a + b;
        x[start + k + width / 2] = a - b;
      }
}

void plan_bluestein(Dft& plan) {
  const int64_t m = plan.half;
  for (plan.length = plan.lanes; plan.length < 2 * m - 1;) plan.length *= 2;
  std::vector<Complex> kernel(plan.length);
  for (int64_t j = 0; j < m; j++) {
    const Complex chirp = root(j * j, 2 * m);
    plan.chirp_re.push_back(static_cast<float>(chirp.real()));
    plan.chirp_im.push_back(static_cast<float>(chirp.imag()));
    kernel[j] = kernel[(plan.length - j) % plan.length] = std::conj(chirp);
  }
  fft(kernel);
  for (const Complex& value : kernel) {
    plan.kernel_re.push_back(static_cast<float>(value.real() / static_cast<double>(plan.length)));
    plan.kernel_im.push_back(static_cast<float>(value.imag() / static_cast<double>(plan.length)));
  }
}

}  // namespace

std::shared_ptr<const Dft> plan_dft(int64_t size, int64_t lanes) {
  auto plan = std::make_shared<Dft>();
  plan->size = size;
  plan->half = plan->length = size / 2;
  plan->lanes = lanes;
  if (plan->half % lanes || (plan->half > lanes && factors(plan->half / lanes).empty())) plan_bluestein(*plan);
  plan->rows = plan->length / lanes;
  plan->radices = factors(plan->rows);
  int64_t left = plan->rows;
  for (const int radix : plan->radices) {
    for (int64_t p = 0; p < left / radix; p++)
      for (int k = 1; k < radix; k++) {
        const Complex w = root(p * k, left);
        plan->twiddles.push_back(static_cast<float>(w.real()));
        plan->twiddles.push_back(static_cast<float>(w.imag()));
      }
    left /= radix;
    for (int k = 1; radix % 2 && k <= radix / 2; k++)
      for (int j = 1; j <= radix / 2; j++) {
        const Complex w = root(int64_t{j} * k, radix);
        plan->roots.push_back(static_cast<float>(w.real()));
        plan->roots.push_back(static_cast<float>(-w.imag()));
      }
  }
  for (int64_t first = 0; first < plan->rows; first += lanes)
    for (int64_t lane = 0; lane < lanes; lane++)
      for (int64_t row = first; row < first + lanes; row++) {
        const Complex w = root(lane * row, plan->length);
        plan->cross_re.push_back(static_cast<float>(w.real()));
        plan->cross_im.push_back(static_cast<float>(w.imag()));
      }
  const double scale = 1 / std::sqrt(static_cast<double>(size));
  plan->first_scale = static_cast<float>(scale);
  plan->half_scale = static_cast<float>(scale * std::sqrt(0.5));
  for (int64_t f = 0; f < plan->half; f++) {
    const Complex w = root(f, size);
    plan->post_cos.push_back(static_cast<float>(w.real() * scale * std::sqrt(0.5)));
    plan->post_sin.push_back(static_cast<float>(-w.imag() * scale * std::sqrt(0.5)));
  }
  return plan;
}

}  // namespace llava_fa
