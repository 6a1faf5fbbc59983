// Plans of the packed real DFT (maths/dft.py): what depends on the length alone, in tables. dft.inl carries them out.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace llava_fa {

// Of a length N = 2 M: a complex DFT of length M, as columns · lanes: `lanes` DFTs of length `rows` side by side, one in
// each lane of a vector (Stockham's algorithm, radix after radix), then `rows` DFTs across the lanes. Where M has no
// such factors, Bluestein's algorithm makes it a convolution of length `length`, which has.
struct Dft {
  int64_t size, half, length, lanes, rows;
  std::vector<int> radices;
  std::vector<float> twiddles;            // stage after stage [rows left, radix - 1] of (cos, -sin)
  std::vector<float> roots;               // odd radices, one after the other: [radix / 2, radix / 2] of (cos, sin)
  std::vector<float> cross_re, cross_im;  // [blocks of lanes rows, lanes, lanes]: e^{-2πi lane row / length}
  std::vector<float> post_cos, post_sin;  // [half]: of 2π f / N, times the packed DFT's scale
  std::vector<float> chirp_re, chirp_im;  // Bluestein: [half] e^{-πi j² / M}
  std::vector<float> kernel_re, kernel_im;  // [length]: the DFT of its inverse, / length
  float half_scale, first_scale;          // √2 N^-½ / 2 and N^-½

  // Floats of working space: two complex arrays.
  int64_t padded() const { return length + lanes * lanes; }
  int64_t scratch() const { return 4 * padded(); }
};

std::shared_ptr<const Dft> plan_dft(int64_t size, int64_t lanes);

}  // namespace llava_fa
