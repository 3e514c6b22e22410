// attention: against sums written out, over strides, masks, sizes and lengths of every kind.
#include <math.h>

#include <algorithm>
#include <vector>

#include "check.h"

namespace {

struct Case {
  elision_attention_args a{};
  std::vector<int64_t> offsets;
};

// Strides of [batch, heads, tokens, width], dense, or with tokens before heads.
void strides(int64_t* out, int64_t heads, int64_t tokens, int64_t width, bool joined) {
  out[0] = heads * tokens * width, out[1] = joined ? width : tokens * width, out[2] = joined ? heads * width : width;
}

double mask_value(const elision_attention_args& a, int64_t b, int64_t h, int64_t i, int64_t j) {
  double added = a.causal && j > i ? static_cast<double>(a.masked) : 0.0;
  if (a.mask == nullptr) return added;
  const int64_t at = a.mask_offset[b] + h * a.mask_stride[0] + i * a.mask_stride[1] + j * a.mask_stride[2];
  if (a.mask_dtype == ELISION_BOOL)
    return added + (static_cast<const unsigned char*>(a.mask)[at] ? 0.0 : static_cast<double>(a.masked));
  return added + static_cast<double>(static_cast<const float*>(a.mask)[at]);
}

void compare(const elision_attention_args& a) {
  const float *q = static_cast<const float*>(a.q), *k = static_cast<const float*>(a.k), *v = static_cast<const float*>(a.v);
  const float* out = static_cast<const float*>(a.out);
  std::vector<double> weight(static_cast<size_t>(a.keys));
  for (int64_t b = 0; b < a.batch; ++b)
    for (int64_t h = 0; h < a.heads; ++h)
      for (int64_t i = 0; i < a.queries; i += a.queries > 40 ? 37 : 1) {
        const int64_t shared = h / (a.heads / a.kv_heads);
        double most = -INFINITY, total = 0;
        for (int64_t j = 0; j < a.keys; ++j) {
          double logit = 0;
          for (int64_t c = 0; c < a.width; ++c)
            logit += static_cast<double>(q[b * a.q_stride[0] + h * a.q_stride[1] + i * a.q_stride[2] + c]) *
                     static_cast<double>(k[b * a.k_stride[0] + shared * a.k_stride[1] + j * a.k_stride[2] + c]);
          logit = logit * static_cast<double>(a.scale) + mask_value(a, b, h, i, j);
          if (a.size != nullptr) {
            const float size = a.size[(a.size_batch == 1 ? 0 : b / a.batch_per_size) * a.keys + j];
            logit += size > 0 ? log(static_cast<double>(size)) : -3e4;
          }
          weight[static_cast<size_t>(j)] = logit, most = std::max(most, logit);
        }
        for (double& w : weight) w = most > -INFINITY ? exp(w - most) : 0, total += w;
        for (int64_t c = 0; c < a.value_width; ++c) {
          double sum = 0;
          for (int64_t j = 0; j < a.keys; ++j)
            sum += weight[static_cast<size_t>(j)] *
                   static_cast<double>(v[b * a.v_stride[0] + shared * a.v_stride[1] + j * a.v_stride[2] + c]);
          const double found = static_cast<double>(out[b * a.out_stride[0] + h * a.out_stride[1] + i * a.out_stride[2] + c]);
          CHECK(fabs(found - (total > 0 ? sum / total : 0)) < (most < -1e4 ? 2e-2 : 1e-4));
        }
      }
}

void run(Random& random, int32_t dtype, int64_t queries, int64_t keys) {
  elision_attention_args a{};
  a.dtype = dtype, a.queries = queries, a.keys = keys;
  a.batch = between(random, 0, 2), a.kv_heads = between(random, 1, 2), a.heads = a.kv_heads * between(random, 1, 2);
  a.width = one_of(random, {0, 1, 5, 8, 16, 20, 33, 64}), a.value_width = one_of(random, {0, 1, 6, 16, 24, 40});
  if (queries > 100 || keys > 100) a.batch = 1, a.width = 8, a.value_width = 12;
  a.batch_per_size = 1, a.size_batch = random() % 2 ? 1 : a.batch;
  a.scale = 0.3f, a.masked = random() % 2 ? -6e4f : -INFINITY, a.causal = random() % 3 == 0;
  strides(a.q_stride, a.heads, queries, a.width, random() % 2), strides(a.k_stride, a.kv_heads, keys, a.width, random() % 2);
  strides(a.v_stride, a.kv_heads, keys, a.value_width, random() % 2);
  strides(a.out_stride, a.heads, queries, a.value_width, random() % 2);
  const int64_t of_q = a.batch * a.heads * queries * a.width, of_k = a.batch * a.kv_heads * keys * a.width;
  const int64_t of_v = a.batch * a.kv_heads * keys * a.value_width, of_out = a.batch * a.heads * queries * a.value_width;
  const int64_t item = bytes_of(dtype);
  const Guarded<unsigned char> q(of_q * item), k(of_k * item), v(of_v * item), out(of_out * item);
  fill(random, q.data(), of_q, dtype), fill(random, k.data(), of_k, dtype), fill(random, v.data(), of_v, dtype);
  a.q = q.given(), a.k = k.given(), a.v = v.given(), a.out = out.given();

  const bool per_sample = random() % 2, per_head = random() % 2, per_query = random() % 2;
  const int64_t of_query = keys, of_head = of_query * (per_query ? queries : 1), of_batch = of_head * (per_head ? a.heads : 1);
  a.mask_dtype = random() % 2 ? ELISION_BOOL : dtype;
  const int64_t of_mask = of_batch * (per_sample ? a.batch : 1);
  const Guarded<unsigned char> mask(of_mask * bytes_of(a.mask_dtype));
  fill(random, mask.data(), of_mask, a.mask_dtype);
  std::vector<int64_t> offsets;
  for (int64_t b = 0; b < a.batch; ++b) offsets.push_back(per_sample ? b * of_batch : 0);
  if (random() % 2) a.mask = mask.given(), a.mask_offset = offsets.data();
  if (a.mask != nullptr && offsets.empty()) a.mask_offset = &a.batch;  // read by none
  a.mask_stride[0] = per_head ? of_head : 0, a.mask_stride[1] = per_query ? of_query : 0, a.mask_stride[2] = 1;
  const Guarded<float> size(a.size_batch * keys);
  for (int64_t j = 0; j < size.count(); ++j) size[j] = static_cast<float>(between(random, 0, 3));
  if (random() % 2) a.size = size.given();
  Call call(static_cast<int>(between(random, 1, 3)));
  CHECK(call(elision_attention, a) == 0);
  if (dtype == ELISION_F32) compare(a);
}

}  // namespace

void test_attention() {
  Random random(6);
  const int32_t dtypes[] = {ELISION_F32, ELISION_F32, ELISION_F16, ELISION_BF16};
  for (int i = 0; i < 500; ++i)
    run(random, dtypes[random() % 4], one_of(random, {0, 1, 2, 3, 11, 12, 13, 24, 25}), one_of(random, {0, 1, 2, 15, 16, 17, 33, 50}));
  for (const int32_t dtype : {ELISION_F32, ELISION_BF16}) {
    run(random, dtype, 289, 31), run(random, dtype, 3, 513), run(random, dtype, 600, 1100);
    run(random, dtype, 288, 512), run(random, dtype, 25, 1024);
  }
  Call call;
  elision_attention_args a{};
  a.batch = 4, a.heads = 4, a.kv_heads = 2, a.queries = a.keys = 3, a.width = a.value_width = 8;
  a.batch_per_size = 1, a.size_batch = 1, a.dtype = ELISION_F32, a.scale = 1;
  const auto broken = [&](const char* part, auto change) {
    elision_attention_args b = a;
    change(b);
    return call.refuses(elision_attention, b, part);
  };
  const char* misfit = "do not fit together";
  static const float size[8] = {};
  static const int64_t offset[4] = {};
  CHECK(broken("neither float32", [](auto& b) { b.dtype = 0; }));
  CHECK(broken("neither bool", [](auto& b) { b.mask = size, b.mask_offset = offset, b.mask_dtype = 7; }));
  CHECK(broken("no offsets", [](auto& b) { b.mask = size, b.mask_dtype = ELISION_F32; }));
  CHECK(broken("do not divide", [](auto& b) { b.kv_heads = 3; }) && broken("do not divide", [](auto& b) { b.kv_heads = 0; }));
  CHECK(broken("do not divide", [](auto& b) { b.kv_heads = -2; }));
  CHECK(broken(misfit, [](auto& b) { b.queries = -1; }) && broken(misfit, [](auto& b) { b.keys = INT64_MAX; }));
  CHECK(broken(misfit, [](auto& b) { b.heads = -4; }) && broken(misfit, [](auto& b) { b.width = 1LL << 60; }));
  CHECK(broken(misfit, [](auto& b) { b.queries = 0, b.batch = 1LL << 40, b.width = 1LL << 40; }));
  CHECK(broken(misfit, [](auto& b) { b.size = size, b.size_batch = 3; }));
  CHECK(broken(misfit, [](auto& b) { b.size = size, b.batch_per_size = 0; }));
  CHECK(broken(misfit, [](auto& b) { b.size = size, b.batch_per_size = 3, b.size_batch = 1; }));
  CHECK(broken("out of memory", [](auto& b) { b.width = 1LL << 43, b.batch = b.heads = b.kv_heads = 1; }));
}
