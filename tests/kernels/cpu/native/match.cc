// match_tokens and mean_heads: every shape gives a map that holds together, or a sentence.
#include <math.h>

#include <algorithm>

#include "check.h"

namespace {

constexpr int32_t DTYPES[] = {ELISION_F32, ELISION_F16, ELISION_BF16};

int64_t removed(const elision_match_args& a) {
  const int64_t free = a.count - a.prefix - a.suffix;
  const int64_t wish = a.r >= 0 ? a.r : a.count * a.numerator / a.denominator;
  return free < 2 ? 0 : std::min(wish, free / 2);
}

elision_match_args lengths(int64_t batch, int64_t count, int64_t width) {
  elision_match_args a{};
  a.batch = batch, a.count = count, a.width = width, a.r = 1, a.denominator = 1;
  a.dtype = ELISION_F32, a.published = 1, a.size_batch = 1;
  a.gone = removed(a);
  return a;
}

// Runs a call on guarded memory and checks the map. `special`: a bit pattern that some elements get.
void run(Random& random, elision_match_args a, bool sized, float special) {
  Guarded<unsigned char> metric(a.batch * a.count * a.width * bytes_of(a.dtype));
  fill(random, metric.data(), a.batch * a.count * a.width, a.dtype);
  if (a.dtype == ELISION_F32 && special != 0)
    for (int64_t i = 0; i + 4 <= metric.count(); i += 4 * between(random, 1, 40)) memcpy(&metric[i], &special, 4);
  Guarded<float> size(sized ? a.size_batch * a.count : 0);
  for (int64_t i = 0; i < size.count(); ++i) size[i] = static_cast<float>(std::max<int64_t>(0, between(random, -2, 3)));
  a.gone = removed(a);
  const int64_t left = a.count - a.gone;
  Guarded<int32_t> slot(a.batch * a.count), keep(a.batch * left), source(a.batch * a.gone);
  a.metric = metric.given(), a.size = sized ? size.given() : nullptr;
  a.slot = slot.given(), a.keep = keep.given(), a.source = source.given();
  Call call(static_cast<int>(between(random, 1, 3)));
  CHECK(call(elision_match, a) == 0);
  for (int64_t b = 0; b < a.batch; ++b) {
    Guarded<unsigned char> seen(a.count);
    memset(seen.data(), 0, seen.bytes());
    const int32_t* slots = a.slot + b * a.count;
    for (int64_t j = 0; j < left; ++j) {
      const int32_t at = keep[b * left + j];
      CHECK(at >= 0 && at < a.count && ++seen[at] == 1 && slots[at] == j);
    }
    for (int64_t i = 0; i < a.gone; ++i) {
      const int32_t at = source[b * a.gone + i];
      CHECK(at >= 0 && at < a.count && ++seen[at] == 1 && slots[at] >= -1 && slots[at] < left);
      CHECK(slots[at] >= 0 || (sized && !(size[(a.size_batch == 1 ? 0 : b * a.count) + at] > 0)));
    }
  }
}

void refusals() {
  Call call;
  const char* misfit = "do not fit together";
  const int64_t huge = INT64_MAX;
  elision_match_args a = lengths(2, 8, 4);
  a.dtype = 11;
  CHECK(call.refuses(elision_match, a, "neither float32"));
  const int64_t shapes[][3] = {{-1, 8, 4},      {2, -8, 4},         {2, 8, -4},       {huge, 8, 4},       {2, 8, huge},
                               {1, 2, 1LL << 51}, {1LL << 40, 1, 1LL << 30}, {1LL << 31, 1 << 20, 0}, {1LL << 40, 1 << 20, 0},
                               {0, huge, 4},    {1, 1LL << 31, 1},  {0, 1LL << 20, 1LL << 44}};
  for (const auto& shape : shapes) CHECK(call.refuses(elision_match, lengths(shape[0], shape[1], shape[2]), misfit));
  for (const int64_t gone : {int64_t{-1}, int64_t{0}, int64_t{2}, int64_t{4}, int64_t{5}, huge}) {
    a = lengths(2, 8, 4);  // one token goes
    a.gone = gone;
    CHECK(call.refuses(elision_match, a, misfit));
  }
  float size[8] = {};
  for (const int64_t rows : {int64_t{0}, int64_t{2}, int64_t{4}, int64_t{-1}}) {
    a = lengths(3, 8, 4);
    a.size = size, a.size_batch = rows;
    CHECK(call.refuses(elision_match, a, misfit));
  }
  for (const int64_t wrong : {int64_t{-1}, INT64_MIN, huge}) {
    a = lengths(2, 8, 4);
    a.prefix = wrong;
    CHECK(call.refuses(elision_match, a, "prefix and suffix"));
    a.prefix = 0, a.suffix = wrong;
    CHECK(call.refuses(elision_match, a, "prefix and suffix"));
  }
  const int64_t shares[][2] = {{1, 0}, {-1, 2}, {3, 2}, {1, -2}, {1, huge}};
  for (const auto& share : shares) {
    a = lengths(2, 8, 4);
    a.r = -1, a.numerator = share[0], a.denominator = share[1];
    CHECK(call.refuses(elision_match, a, "ratio between 0 and 1"));
  }
  CHECK(call.refuses(elision_match, lengths(1, 8, 1LL << 46), "out of memory"));
  CHECK(elision_match(&a, &call.runner, nullptr, 0) == 1);  // no room for a sentence
  char small[4] = "xyz";
  CHECK(elision_match(&a, &call.runner, small, sizeof small) == 1 && small[3] == 0);
}

}  // namespace

void test_match() {
  refusals();
  Random random(1);
  for (int i = 0; i < 1500; ++i) {
    elision_match_args a = lengths(one_of(random, {0, 1, 1, 2, 3}), one_of(random, {0, 1, 2, 3, 5, 16, 17, 33, 64, 97, 197, 401}),
                                   one_of(random, {0, 1, 3, 7, 8, 16, 17, 31, 33, 64}));
    a.r = one_of(random, {0, 1, 2, 7, 40, INT64_MAX, -1});
    a.denominator = one_of(random, {1, 2, 10, 10000}), a.numerator = between(random, 0, a.denominator);
    a.prefix = one_of(random, {0, 0, 1, 2, 5, 300, INT32_MAX}), a.suffix = one_of(random, {0, 0, 1, 2, 300, INT32_MAX});
    a.published = static_cast<int32_t>(random() % 2), a.dtype = DTYPES[random() % 3];
    a.size_batch = random() % 2 ? 1 : a.batch;
    run(random, a, random() % 2, i % 3 ? 0.0f : i % 2 ? NAN : INFINITY);
  }
}

void test_mean() {
  Call call(2);
  elision_mean_args a{};
  a.batch = 2, a.heads = 0, a.tokens = 4, a.width = 4, a.dtype = ELISION_F32;
  CHECK(call.refuses(elision_mean, a, "do not fit together"));
  a.heads = 1LL << 40, a.tokens = 1LL << 40;
  CHECK(call.refuses(elision_mean, a, "do not fit together"));
  a.batch = 0;
  CHECK(call.refuses(elision_mean, a, "do not fit together"));
  a.batch = a.heads = 1, a.tokens = -4;
  CHECK(call.refuses(elision_mean, a, "do not fit together"));
  a.dtype = ELISION_BOOL;
  CHECK(call.refuses(elision_mean, a, "neither float32"));
  Random random(2);
  for (int i = 0; i < 300; ++i) {
    a.batch = between(random, 0, 3), a.heads = between(random, 1, 5), a.dtype = DTYPES[random() % 3];
    a.tokens = one_of(random, {0, 1, 5, 63, 400}), a.width = one_of(random, {0, 1, 5, 16, 17, 64});
    const bool joined = random() % 2;  // heads side by side
    a.k_stride[0] = a.heads * a.tokens * a.width, a.k_stride[1] = joined ? a.width : a.tokens * a.width;
    a.k_stride[2] = joined ? a.heads * a.width : a.width;
    Guarded<unsigned char> k(a.batch * a.k_stride[0] * bytes_of(a.dtype));
    Guarded<unsigned char> out(a.batch * a.tokens * a.width * bytes_of(a.dtype));
    fill(random, k.data(), a.batch * a.k_stride[0], a.dtype);
    a.k = k.given(), a.metric = out.given();
    CHECK(call(elision_mean, a) == 0);
    if (a.dtype != ELISION_F32) continue;
    const float* in = reinterpret_cast<const float*>(k.data());
    for (int64_t b = 0; b < a.batch; ++b)
      for (int64_t t = 0; t < a.tokens; ++t)
        for (int64_t c = 0; c < a.width; ++c) {
          double total = 0;
          for (int64_t h = 0; h < a.heads; ++h)
            total += static_cast<double>(in[b * a.k_stride[0] + h * a.k_stride[1] + t * a.k_stride[2] + c]);
          const float found = reinterpret_cast<const float*>(out.data())[(b * a.tokens + t) * a.width + c];
          CHECK(fabs(static_cast<double>(found) - total / static_cast<double>(a.heads)) < 1e-5);
        }
  }
}
