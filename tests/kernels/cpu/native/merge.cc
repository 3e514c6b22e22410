// merge_tokens and restore_tokens: right wherever tokens and batch stand, and no map leads out of the buffers.
#include <math.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <vector>

#include "check.h"

namespace {

int64_t elements(const elision_layout& l, int64_t batch, int64_t tokens) { return l.pre * batch * l.mid * tokens * l.width; }

int64_t place(const elision_layout& l, int64_t batch, int64_t tokens, int64_t p, int64_t b, int64_t m, int64_t t) {
  if (l.swapped) return (((p * tokens + t) * l.mid + m) * batch + b) * l.width;
  return (((p * batch + b) * l.mid + m) * tokens + t) * l.width;
}

elision_layout random_layout(Random& random) {
  const int64_t width = one_of(random, {0, 1, 1, 3, 8, 16, 17, 40});
  return {between(random, 1, 2), between(random, 1, 3), width, static_cast<int32_t>(random() % 2)};
}

// A map of random tokens, every slot represented.
struct Map {
  Guarded<int32_t> slot, keep, source;
  Map(Random& random, int64_t rows, int64_t count, int64_t gone)
      : slot(rows * count), keep(rows * (count - gone)), source(rows * gone) {
    const int64_t left = count - gone;
    std::vector<int32_t> order(static_cast<size_t>(count));
    for (int64_t b = 0; b < rows; ++b) {
      std::iota(order.begin(), order.end(), 0);
      std::shuffle(order.begin(), order.end(), random);
      for (int64_t j = 0; j < left; ++j) {
        keep[b * left + j] = order[static_cast<size_t>(j)];
        slot[b * count + order[static_cast<size_t>(j)]] = static_cast<int32_t>(j);
      }
      for (int64_t i = 0; i < gone; ++i) {
        source[b * gone + i] = order[static_cast<size_t>(left + i)];
        slot[b * count + order[static_cast<size_t>(left + i)]] = static_cast<int32_t>(between(random, -1, left - 1));
      }
    }
  }
};

void compare(const elision_merge_args& a) {
  const float *x = static_cast<const float*>(a.x), *y = static_cast<const float*>(a.y);
  const auto size_of = [&](int64_t b, int64_t t) {
    return a.size == nullptr ? 1.0 : static_cast<double>(a.size[(a.size_batch == 1 ? 0 : b) * a.count + t]);
  };
  for (int64_t b = 0; b < a.batch; ++b) {
    const int64_t row = a.map_batch == 1 ? 0 : b, own = a.x_batch == 1 ? 0 : b;
    for (int64_t j = 0; j < a.left; ++j) {
      std::vector<int64_t> members{a.keep[row * a.left + j]};
      double total = size_of(b, members[0]), received = 0;
      for (int64_t i = 0; i < a.gone; ++i) {
        const int64_t t = a.source[row * a.gone + i];
        if (a.slot[row * a.count + t] == j) members.push_back(t), received += size_of(b, t);
      }
      CHECK(fabs(static_cast<double>(a.new_size[b * a.left + j]) - total - received) < 1e-3);
      for (int64_t p = 0; p < a.layout.pre; ++p)
        for (int64_t m = 0; m < a.layout.mid; ++m)
          for (int64_t c = 0; c < a.layout.width; ++c) {
            const auto at = [&](int64_t t) { return x[place(a.layout, a.x_batch, a.count, p, own, m, t) + c]; };
            const float found = y[place(a.layout, a.batch, a.left, p, b, m, j) + c];
            if (received == 0) {
              CHECK(found == at(members[0]));
              continue;
            }
            double sum = 0;
            for (const int64_t t : members)
              if (size_of(b, t) > 0) sum += static_cast<double>(at(t)) * size_of(b, t);
            CHECK(fabs(static_cast<double>(found) - sum / (total + received)) < 1e-4);
          }
    }
  }
}

elision_merge_args merge_lengths(int64_t batch, int64_t count, int64_t gone) {
  elision_merge_args a{};
  a.batch = a.x_batch = a.map_batch = batch, a.size_batch = 1;
  a.count = count, a.gone = gone, a.left = count - gone;
  a.layout = {1, 1, 4, 0}, a.dtype = ELISION_F32;
  return a;
}

// The smallest and largest indices that are none.
constexpr int32_t WILD[] = {INT32_MIN, -2, -1, 9, 10, 1 << 20, INT32_MAX};

void wild_maps() {
  Random random(4);
  Call call(3);
  for (const int32_t wild : WILD)
    for (int which = 0; which < 3; ++which)
      for (int64_t sample = 0; sample < 2; ++sample) {
        elision_merge_args a = merge_lengths(2, 13, 4);  // nine slots
        Map map(random, 2, 13, 4);
        Guarded<float> x(2 * 13 * 4), y(2 * 9 * 4), new_size(2 * 9);
        memset(x.data(), 0, x.bytes());
        a.x = x.given(), a.y = y.given(), a.new_size = new_size.given();
        a.slot = map.slot.given(), a.keep = map.keep.given(), a.source = map.source.given();
        const int64_t at = sample * 4 + between(random, 0, 3);
        if (which == 0) map.slot[sample * 13 + map.source[at]] = wild;
        if (which == 1) map.keep[sample * 9 + at % 4] = wild;
        if (which == 2) map.source[at] = wild;
        const bool fine = which == 0 ? wild == -1 : wild == 9 || wild == 10;
        if (fine)
          CHECK(call(elision_merge, a) == 0);
        else
          CHECK(call.refuses(elision_merge, a, which == 0   ? "a slot is out of range"
                                               : which == 1 ? "a kept token is out of range"
                                                            : "a source is out of range"));
        elision_restore_args r{};
        r.batch = r.y_batch = r.map_batch = 2, r.count = 13, r.left = 9, r.itemsize = 4, r.layout = {1, 1, 4, 0};
        r.y = y.data(), r.x = x.data(), r.slot = a.slot;
        if (which == 0 && wild != -1)
          CHECK(call.refuses(elision_restore, r, "a slot is out of range"));
        else
          CHECK(call(elision_restore, r) == 0);
      }
}

}  // namespace

void test_merge() {
  Call call;
  const char* misfit = "do not fit together";
  elision_merge_args a = merge_lengths(2, 8, 3);
  a.dtype = 7;
  CHECK(call.refuses(elision_merge, a, "neither float32"));
  const auto broken = [&](auto change) {
    elision_merge_args b = merge_lengths(2, 8, 3);
    float size[1];
    b.size = size;
    change(b);
    return call.refuses(elision_merge, b, misfit);
  };
  CHECK(broken([](auto& b) { b.count = -1; }) && broken([](auto& b) { b.left = 9; }) && broken([](auto& b) { b.left = -1; }));
  CHECK(broken([](auto& b) { b.gone = 9; }) && broken([](auto& b) { b.gone = -1; }));
  CHECK(broken([](auto& b) { b.x_batch = 3; }) && broken([](auto& b) { b.map_batch = 0; }));
  CHECK(broken([](auto& b) { b.size_batch = 5; }) && broken([](auto& b) { b.batch = -2; }));
  CHECK(broken([](auto& b) { b.layout.pre = 1LL << 60; }) && broken([](auto& b) { b.layout.mid = INT64_MAX; }));
  CHECK(broken([](auto& b) { b.layout.width = -1; }) && broken([](auto& b) { b.count = 1LL << 32; }));
  CHECK(broken([](auto& b) { b.layout.width = 0, b.layout.pre = 1LL << 40, b.layout.mid = 1LL << 40; }));
  CHECK(broken([](auto& b) { b.batch = b.x_batch = b.map_batch = 1LL << 50, b.layout.width = 0; }));
  wild_maps();
  Random random(3);
  for (int i = 0; i < 600; ++i) {
    const int64_t count = one_of(random, {0, 1, 2, 5, 17, 64, 150}), batch = between(random, 0, 3);
    a = merge_lengths(batch, count, count > 1 ? between(random, 0, count - 1) : 0);
    a.layout = random_layout(random);
    if (random() % 4 == 0) a.x_batch = 1;
    if (random() % 4 == 0) a.map_batch = 1;
    a.size_batch = random() % 2 ? 1 : batch;
    a.dtype = i % 3 == 0 ? ELISION_F16 : i % 3 == 1 ? ELISION_BF16 : ELISION_F32;
    const Map map(random, a.map_batch, count, a.gone);
    Guarded<unsigned char> x(elements(a.layout, a.x_batch, count) * bytes_of(a.dtype));
    Guarded<unsigned char> y(elements(a.layout, batch, a.left) * bytes_of(a.dtype));
    Guarded<float> size(a.size_batch * count), new_size(batch * a.left);
    fill(random, x.data(), elements(a.layout, a.x_batch, count), a.dtype);
    for (int64_t s = 0; s < size.count(); ++s) size[s] = static_cast<float>(between(random, 0, 4));
    a.x = x.given(), a.y = y.given(), a.size = random() % 3 ? size.given() : nullptr, a.new_size = new_size.given();
    a.slot = map.slot.given(), a.keep = map.keep.given(), a.source = map.source.given();
    Call threads(static_cast<int>(between(random, 1, 3)));
    CHECK(threads(elision_merge, a) == 0);
    if (a.dtype == ELISION_F32) compare(a);
  }
}

void test_restore() {
  Call call(2);
  Random random(5);
  for (int i = 0; i < 600; ++i) {
    elision_restore_args a{};
    a.layout = random_layout(random), a.batch = between(random, 0, 3), a.itemsize = 1 << between(random, 0, 3);
    a.y_batch = random() % 4 ? a.batch : 1, a.map_batch = random() % 4 ? a.batch : 1;
    a.count = one_of(random, {0, 1, 2, 5, 17, 150}), a.left = one_of(random, {0, 1, 3, 16, 33});
    Guarded<unsigned char> y(elements(a.layout, a.y_batch, a.left) * a.itemsize);
    Guarded<unsigned char> x(elements(a.layout, a.batch, a.count) * a.itemsize);
    Guarded<int32_t> slot(a.map_batch * a.count);
    for (int64_t j = 0; j < y.count(); ++j) y[j] = static_cast<unsigned char>(random());
    for (int64_t j = 0; j < slot.count(); ++j) slot[j] = static_cast<int32_t>(between(random, -1, a.left - 1));
    a.y = y.given(), a.x = x.given(), a.slot = slot.given();
    CHECK(call(elision_restore, a) == 0);
    const size_t row = static_cast<size_t>(a.layout.width * a.itemsize);
    const Guarded<unsigned char> zeros(static_cast<int64_t>(row));
    memset(zeros.data(), 0, row);
    for (int64_t b = 0; b < a.batch; ++b)
      for (int64_t p = 0; p < a.layout.pre; ++p)
        for (int64_t m = 0; m < a.layout.mid; ++m)
          for (int64_t t = 0; t < a.count; ++t) {
            const int32_t from = slot[(a.map_batch == 1 ? 0 : b) * a.count + t];
            const int64_t own = a.y_batch == 1 ? 0 : b;
            const unsigned char* wanted =
                from < 0 ? zeros.data() : y.data() + place(a.layout, a.y_batch, a.left, p, own, m, from) * a.itemsize;
            CHECK(memcmp(x.data() + place(a.layout, a.batch, a.count, p, b, m, t) * a.itemsize, wanted, row) == 0);
          }
  }
  elision_restore_args a{};
  a.batch = a.y_batch = a.map_batch = 1, a.count = a.left = 4, a.layout = {1, 1, 4, 0};
  for (const int32_t item : {0, -1, 3, 16}) {
    a.itemsize = item;
    CHECK(call.refuses(elision_restore, a, "are not known"));
  }
  a.itemsize = 8;
  const auto broken = [&](auto change) {
    elision_restore_args b = a;
    change(b);
    return call.refuses(elision_restore, b, "do not fit together");
  };
  CHECK(broken([](auto& b) { b.count = INT64_MAX; }) && broken([](auto& b) { b.left = -1; }));
  CHECK(broken([](auto& b) { b.map_batch = 2; }) && broken([](auto& b) { b.y_batch = 0; }));
  CHECK(broken([](auto& b) { b.layout.width = 1LL << 62; }) && broken([](auto& b) { b.layout.mid = -3; }));
  CHECK(broken([](auto& b) { b.count = 0, b.layout.pre = b.layout.mid = 1LL << 40; }));
}
