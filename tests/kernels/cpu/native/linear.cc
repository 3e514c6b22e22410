// Products with packed weights: right for odd lengths and every kind of weight, within their buffers, the same for a row
// alone; and what is no packed weight is refused.
#include <math.h>

#include <vector>

#include "check.h"

namespace {

struct Weight {
  int64_t channels, width, group, groups;
  int32_t bits, zero_dtype, weight_dtype, scale_dtype;
  Guarded<unsigned char> weight, scales, zeros;

  static int64_t groups_of(int64_t width, int64_t group) { return group == 0 ? 0 : (width + group - 1) / group; }
  static int64_t size(int32_t dtype) { return dtype == 0 ? 0 : dtype == ELISION_U8 ? 1 : bytes_of(dtype); }

  Weight(Random& random, int32_t bits, int64_t channels, int64_t width, int64_t group, int32_t zero_dtype, int32_t weight_dtype)
      : channels(channels), width(width), group(bits > 8 ? 0 : group), groups(groups_of(width, this->group)), bits(bits),
        zero_dtype(bits > 8 ? 0 : zero_dtype), weight_dtype(weight_dtype),
        scale_dtype(bits > 8 ? 0 : random() % 2 ? ELISION_F32 : ELISION_F16),
        weight(bits > 8 ? channels * width * bits / 8 : channels * groups * group * bits / 8),
        scales(channels * groups * size(scale_dtype)), zeros(channels * groups * size(this->zero_dtype)) {
    if (bits > 8) {
      fill(random, weight.data(), channels * width, weight_dtype);
      return;
    }
    for (int64_t i = 0; i < weight.count(); ++i) weight[i] = static_cast<unsigned char>(random());
    fill(random, scales.data(), channels * groups, scale_dtype);
    if (zero_dtype == ELISION_U8)
      for (int64_t i = 0; i < zeros.count(); ++i) zeros[i] = static_cast<unsigned char>(random() % (bits == 4 ? 16 : 256));
    else if (zero_dtype != 0)
      fill(random, zeros.data(), channels * groups, zero_dtype);
  }

  static double number_at(const unsigned char* at, int64_t i, int32_t dtype) {
    if (dtype == ELISION_U8) return at[i];
    if (dtype == ELISION_F32) {
      float value;
      memcpy(&value, at + 4 * i, 4);
      return value;
    }
    uint16_t half;
    memcpy(&half, at + 2 * i, 2);
    const int shift = dtype == ELISION_F16 ? 10 : 7, bias = dtype == ELISION_F16 ? 15 : 127;
    const int exponent = (half & 0x7fff) >> shift, fraction = half & ((1 << shift) - 1);
    const double magnitude = exponent == 0 ? ldexp(fraction, 1 - bias - shift) : ldexp((1 << shift) + fraction, exponent - bias - shift);
    return half & 0x8000 ? -magnitude : magnitude;
  }

  double at(int64_t n, int64_t k) const {
    if (bits > 8) return number_at(weight.data(), n * width + k, weight_dtype);
    const int64_t columns = groups * group, i = n * columns + k, g = n * groups + k / group;
    const int q = bits == 8 ? weight[i] : weight[i / 2] >> (i % 2 * 4) & 15;
    const double scale = number_at(scales.data(), g, scale_dtype);
    if (zero_dtype == 0) return (q - (1 << (bits - 1))) * scale;
    const double zero = number_at(zeros.data(), g, zero_dtype);
    return zero_dtype == ELISION_U8 ? (q - zero) * scale : q * scale + zero;
  }

  elision_pack_args args() const {
    elision_pack_args a{};
    a.weight = weight.given(), a.scales = scales.given(), a.zeros = zeros.given();
    a.channels = channels, a.width = width, a.group = group, a.bits = bits;
    a.weight_dtype = bits > 8 ? weight_dtype : static_cast<int32_t>(ELISION_U8), a.scale_dtype = scale_dtype, a.zero_dtype = zero_dtype;
    return a;
  }
};

void one_weight(Random& random, Call& call, const Weight& w) {
  elision_pack_args packing = w.args();
  const int64_t size = elision_packed_bytes(&packing);
  CHECK(size > 0);
  Guarded<unsigned char> packed(size);
  packing.packed = packed.data();
  CHECK(call(elision_pack, packing) == 0);
  const int64_t rows = one_of(random, {1, 2, 3, 5, 7, 8, 9, 13, 17, 31});
  Guarded<float> x(rows * w.width), out(rows * w.channels), again(w.channels), bias(w.channels);
  // Multiples of 1/127 of the largest, which is in every block: bytes hold them exactly.
  for (int64_t i = 0; i < x.count(); ++i)
    x[i] = static_cast<float>(i % w.width % 16 == 0 ? 127 : between(random, -127, 127)) / 64.0f;
  for (int64_t i = 0; i < bias.count(); ++i) bias[i] = number(random);
  elision_linear_args a{};
  a.x = x.data(), a.packed = packed.data(), a.packed_bytes = size, a.bias = random() % 2 ? bias.data() : nullptr;
  a.out = out.data(), a.rows = rows, a.width = w.width, a.channels = w.channels, a.dtype = ELISION_F32;
  CHECK(call(elision_linear, a) == 0);
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t n = 0; n < w.channels; ++n) {
      double sum = a.bias == nullptr ? 0.0 : bias[n], size_of_terms = 1.0;
      for (int64_t k = 0; k < w.width; ++k) {
        const double term = static_cast<double>(x[m * w.width + k]) * w.at(n, k);
        sum += term, size_of_terms += fabs(term);
      }
      CHECK(fabs(sum - out[m * w.channels + n]) <= 2e-6 * size_of_terms * (w.bits == 8 ? 40 : 4));
    }
  const int64_t alone = between(random, 0, rows - 1);
  elision_linear_args one = a;
  one.x = x.data() + alone * w.width, one.out = again.data(), one.rows = 1;
  CHECK(call(elision_linear, one) == 0);
  CHECK(memcmp(again.data(), out.data() + alone * w.channels, again.bytes()) == 0);
  const int64_t k = between(random, 1, w.channels);
  Guarded<float> values(rows * k);
  Guarded<int64_t> indices(rows * k);
  elision_linear_args largest = a;
  largest.out = nullptr, largest.values = values.data(), largest.indices = indices.data(), largest.k = k;
  CHECK(call(elision_linear, largest) == 0);
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t i = 0; i < k; ++i) {
      const int64_t n = indices[m * k + i];
      CHECK(n >= 0 && n < w.channels && values[m * k + i] == out[m * w.channels + n]);
      if (i == 0) continue;
      const float before = values[m * k + i - 1];
      CHECK(before > values[m * k + i] || (before == values[m * k + i] && indices[m * k + i - 1] < n));
    }
  // ---- what is refused
  largest.k = w.channels + 1;
  CHECK(call.refuses(elision_linear, largest, "k is between"));
  largest.k = 0;
  CHECK(call.refuses(elision_linear, largest, "k is between"));
  elision_linear_args wrong = a;
  wrong.width = w.width + 1;
  CHECK(call.refuses(elision_linear, wrong, "do not fit together"));
  wrong = a, wrong.channels = w.channels - 1;
  CHECK(call.refuses(elision_linear, wrong, "do not fit together"));
  wrong = a, wrong.packed_bytes = size - 1;
  CHECK(call.refuses(elision_linear, wrong, "was not packed"));
  wrong = a, wrong.packed_bytes = 64;
  CHECK(call.refuses(elision_linear, wrong, "was not packed"));
  wrong = a, wrong.dtype = ELISION_BOOL;
  CHECK(call.refuses(elision_linear, wrong, "neither float32"));
  wrong = a, wrong.rows = INT64_MAX / 2;
  CHECK(call.refuses(elision_linear, wrong, "do not fit together"));
  for (int64_t at = 0; at < 64; at += 4) {  // a header with any other word
    int32_t word;
    memcpy(&word, packed.data() + at, 4);
    const int32_t other = word ^ 0x40000001;
    memcpy(packed.data() + at, &other, 4);
    CHECK(call(elision_linear, a) == 1);
    memcpy(packed.data() + at, &word, 4);
  }
  CHECK(call(elision_linear, a) == 0);
}

void no_weights(Random& random, Call& call) {
  const Weight w(random, 4, 8, 64, 32, 0, 0);
  for (const int64_t group : {0, 8, 17, 33, 48, -32}) {
    elision_pack_args a = w.args();
    a.group = group;
    CHECK(elision_packed_bytes(&a) == 0 && call.refuses(elision_pack, a, "no weight of 4 bits"));
  }
  for (const int32_t bits : {0, 2, 3, 5, 64, -4}) {
    elision_pack_args a = w.args();
    a.bits = bits;
    CHECK(elision_packed_bytes(&a) == 0);
  }
  elision_pack_args a = w.args();
  a.width = INT64_MAX;
  CHECK(elision_packed_bytes(&a) == 0);
  a = w.args(), a.channels = INT64_MAX / 3;
  CHECK(elision_packed_bytes(&a) == 0);
  a = w.args(), a.zero_dtype = ELISION_BF16;
  CHECK(elision_packed_bytes(&a) == 0);
}

void memory() {
  std::vector<void*> held;
  for (const size_t bytes : {size_t{1}, size_t{4096}, size_t{40} << 20, size_t{20} << 20, size_t{20} << 20, size_t{0}}) {
    void* at = elision_weight_memory(bytes);
    CHECK(at != nullptr && reinterpret_cast<uintptr_t>(at) % 4096 == 0);
    memset(at, 1, bytes);
    held.push_back(at);
  }
  CHECK(elision_weight_memory(SIZE_MAX) == nullptr);
  for (const size_t i : {3, 0, 5, 1, 2, 4}) elision_free_weight(held[i]);
  elision_free_weight(nullptr);
}

}  // namespace

void test_linear() {
  Random random(11);
  for (const int threads : {1, 3}) {
    Call call(threads);
    for (int i = 0; i < 60; ++i) {
      const int64_t width = one_of(random, {1, 15, 16, 31, 33, 64, 100, 257}), channels = one_of(random, {1, 2, 15, 16, 17, 33, 70});
      static const int32_t zeros[] = {0, ELISION_U8, ELISION_F32, ELISION_F16};
      const int64_t group = one_of(random, {16, 32, 64, 96, 288});
      const int32_t zero = zeros[random() % 4];
      one_weight(random, call, Weight(random, i % 2 ? 4 : 8, channels, width, group, zero, 0));
    }
    for (const int32_t dtype : {ELISION_F32, ELISION_F16, ELISION_BF16})
      for (int i = 0; i < 10; ++i)
        one_weight(random, call, Weight(random, dtype == ELISION_F32 ? 32 : 16, one_of(random, {1, 31, 32, 33, 70}),
                                        one_of(random, {1, 17, 64, 130}), 0, 0, dtype));
    no_weights(random, call);
  }
  memory();
}
