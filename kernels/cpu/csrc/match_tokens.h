// match_tokens, match_padded_tokens: which tokens merge.
//
// The scores of a sample are never stored: a tile of them only moves the running maximum of its rows.
// Floor: the metric is read once (4 * N * D bytes), N^2 / 4 * D multiply-adds.
#pragma once
#include "common.h"
#include "dot_tile.h"

namespace elision {
namespace ELISION_VARIANT {

constexpr float UNLIKE = -3.0f;  // below every cosine
constexpr int64_t ROW_CHUNK = 96;  // rows of A a task takes; a multiple of every tile

template <class T>
ELISION_INLINE void unit_row(const T* x, int64_t width, float* out) {
  Vec squares = set(0.0f);
  int64_t k = 0;
  for (; k + W <= width; k += W) {
    const Vec v = load(x + k);
    store(out + k, v);
    squares = fma(v, v, squares);
  }
  if (k < width) {
    const Vec v = load(x + k, width - k);
    store(out + k, v, width - k);
    squares = fma(v, v, squares);
  }
  const float length = __builtin_sqrtf(sum(squares));
  const Vec by = set(1.0f / (length > 1e-12f || length != length ? length : 1e-12f));
  for (k = 0; k + W <= width; k += W) store(out + k, mul(load(out + k), by));
  if (k < width) store(out + k, mul(load(out + k, width - k), by), width - k);
}

// Everything a sample's tasks share. Tokens are counted by rank: real ones first, by position.
template <class T>
struct Match {
  const elision_match_args& args;
  Trouble trouble;
  int64_t most_a, most_b, chunks;  // per sample: rows of A, columns of B, tasks
  float *a_unit, *b_panel, *best;
  int32_t *partner, *place;  // place: the position of every rank
  int64_t *real;             // real tokens of a sample
  uint64_t* keys;

  struct Sides {
    int64_t first_a, first_b, a, b;  // first rank and number on each side
  };
  Sides sides(int64_t n) const {
    const int64_t prefix = args.prefix, end = n - args.suffix;
    Sides s;
    s.first_a = prefix + prefix % 2;
    s.first_b = prefix + 1 - prefix % 2;
    s.a = larger<int64_t>(0, (end - s.first_a + 1) / 2);
    s.b = larger<int64_t>(0, (end - s.first_b + 1) / 2);
    if (end <= s.first_a) s.a = 0;
    if (end <= s.first_b) s.b = 0;
    return s;
  }

  // Ranks, and both sides of a sample as unit vectors, B as columns.
  void prepare(int64_t sample) {
    const int64_t count = args.count, width = args.width;
    int32_t* at = place + sample * count;
    int64_t n = count;
    if (args.size != nullptr) {
      const float* size = args.size + (args.size_batch == 1 ? 0 : sample * count);
      n = 0;
      for (int64_t i = 0; i < count; ++i)
        if (size[i] > 0) at[n++] = static_cast<int32_t>(i);
      int64_t next = n;
      for (int64_t i = 0; i < count; ++i)
        if (!(size[i] > 0)) at[next++] = static_cast<int32_t>(i);
    } else {
      for (int64_t i = 0; i < count; ++i) at[i] = static_cast<int32_t>(i);
    }
    real[sample] = n;
    const T* x = static_cast<const T*>(args.metric) + sample * count * width;
    const Sides s = sides(n);
    float* a = a_unit + sample * most_a * width;
    for (int64_t i = 0; i < s.a; ++i) unit_row(x + at[s.first_a + 2 * i] * width, width, a + i * width);
    const Scratch memory(TASK_FLOATS, sizeof(float) * static_cast<size_t>(width));
    float* line = static_cast<float*>(memory.data());
    if (line == nullptr) return trouble.report(TROUBLE_MEMORY);
    pack_columns(s.b, width, b_panel + sample * most_b * width, line,
                 [&](int64_t i, float* out) { unit_row(x + at[s.first_b + 2 * i] * width, width, out); });
  }

  struct Rows {
    const float *a, *panel;
    int64_t width, columns;
    float* best;
    int32_t* partner;
    template <int ROWS>
    ELISION_INLINE void tile(int64_t row) {
      Vec top[ROWS];
      Ints where[ROWS];
      for (int i = 0; i < ROWS; ++i) {
        top[i] = set(UNLIKE);
        where[i] = ints(0, 0);
      }
      int64_t first = 0;
      for (; first + W < columns; first += TILE_COLUMNS) strip<ROWS, 2>(row, first, top, where);
      if (first < columns) strip<ROWS, 1>(row, first, top, where);
      for (int i = 0; i < ROWS; ++i) {
        float scores[W];
        int32_t places[W];
        store(scores, top[i]);
        store(places, where[i]);
        int chosen = 0;
        for (int j = 1; j < W; ++j)
          if (scores[j] > scores[chosen] || (scores[j] == scores[chosen] && places[j] < places[chosen])) chosen = j;
        best[row + i] = scores[chosen];
        partner[row + i] = places[chosen];
      }
    }
    template <int ROWS, int COLUMNS>
    ELISION_INLINE void strip(int64_t row, int64_t first, Vec (&top)[ROWS], Ints (&where)[ROWS]) {
      Vec acc[ROWS][COLUMNS];
      for (int i = 0; i < ROWS; ++i)
        for (int j = 0; j < COLUMNS; ++j) acc[i][j] = set(0.0f);
      dot_tile(a + row * width, width, panel + first * width, TILE_COLUMNS, width, acc);
      for (int j = 0; j < COLUMNS; ++j) {
        const int64_t base = first + j * W, valid = columns - base;
        const Ints at = ints(static_cast<int32_t>(base), 1);
        for (int i = 0; i < ROWS; ++i) {
          Vec score = acc[i][j];
          if (valid < W) {  // columns that are no tokens must not win
            float part[W];
            store(part, score);
            for (int64_t c = valid; c < W; ++c) part[c] = UNLIKE;
            score = load(part);
          }
          keep_larger(score, at, top[i], where[i]);
        }
      }
    }
  };

  void search(int64_t sample, int64_t chunk) {
    const Sides s = sides(real[sample]);
    const int64_t from = chunk * ROW_CHUNK, rows = smaller(ROW_CHUNK, s.a - from), width = args.width;
    if (rows <= 0 || s.b == 0) return;
    Rows body{a_unit + (sample * most_a + from) * width,
              b_panel + sample * most_b * width,
              width,
              s.b,
              best + sample * most_a + from,
              partner + sample * most_a + from};
    for_row_tiles(rows, body);
  }

  // From the best pairs to slot, keep and source.
  void select(int64_t sample) {
    const int64_t count = args.count, gone = args.gone, left = count - gone, n = real[sample];
    const Sides s = sides(n);
    const int32_t* at = place + sample * count;
    int32_t *slot = args.slot + sample * count, *keep = args.keep + sample * left;
    int32_t* source = args.source + sample * gone;
    int64_t wish = args.r;
    if (wish < 0) wish = n / args.denominator * args.numerator + n % args.denominator * args.numerator / args.denominator;
    const int64_t own = smaller(smaller(wish, larger<int64_t>(0, (n - args.prefix - args.suffix) / 2)), gone);
    uint64_t* order = keys + sample * most_a;
    const float* score = best + sample * most_a;
    for (int64_t i = 0; i < s.a && own > 0; ++i) {
      // Falling similarity, then rising position; a NaN comes first, as in torch's sort.
      const uint32_t bits = to_bits(score[i] + 0.0f);
      const uint32_t rising = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
      order[i] = static_cast<uint64_t>(~rising) << 32 | static_cast<uint32_t>(i);
    }
    if (own > 0) sort_keys(order, static_cast<size_t>(s.a));
    const auto rank_a = [&](int64_t i) { return s.first_a + 2 * static_cast<int64_t>(order[i] & 0xffffffffu); };

    // slot is written by position; first it marks who goes.
    for (int64_t i = 0; i < count; ++i) slot[i] = 0;
    for (int64_t i = 0; i < own; ++i) source[i] = at[rank_a(i)], slot[source[i]] = -1;
    for (int64_t i = own; i < gone; ++i) source[i] = at[left + i], slot[source[i]] = -1;
    int64_t next = 0;
    const auto stays = [&](int64_t rank) {
      if (slot[at[rank]] >= 0) keep[next++] = at[rank];
    };
    const int64_t last = larger<int64_t>(args.prefix, n - args.suffix);
    if (own > 0 && args.published) {
      for (int64_t i = 0; i < args.prefix; ++i) stays(i);
      if (args.prefix > 0) {
        for (int64_t i = 0; i < s.a; ++i) stays(s.first_a + 2 * i);
      } else {
        for (int64_t i = own; i < s.a; ++i) stays(rank_a(i));
      }
      for (int64_t i = 0; i < s.b; ++i) stays(s.first_b + 2 * i);
      for (int64_t i = last; i < n; ++i) stays(i);
    } else {
      for (int64_t i = 0; i < n; ++i) stays(i);
    }
    for (int64_t i = n; i < count; ++i) stays(i);
    for (int64_t i = 0; i < left; ++i) slot[keep[i]] = static_cast<int32_t>(i);
    for (int64_t i = 0; i < own; ++i) {
      const int64_t other = partner[sample * most_a + static_cast<int64_t>(order[i] & 0xffffffffu)];
      slot[source[i]] = slot[at[s.first_b + 2 * other]];
    }
  }

  int run(const elision_runner& runner, char* error, size_t room) {
    const int64_t batch = args.batch;
    if (args.gone == 0) {  // where nothing is removed nothing moves, padding neither
      for (int64_t i = 0; i < batch * args.count; ++i) args.slot[i] = args.keep[i] = static_cast<int32_t>(i % args.count);
      return 0;
    }
    most_a = args.count / 2 + 1;
    most_b = padded_columns(args.count / 2 + 1);
    chunks = (most_a + ROW_CHUNK - 1) / ROW_CHUNK;
    const size_t floats = static_cast<size_t>(batch) * (most_a * args.width + most_b * args.width + most_a);
    const size_t words = static_cast<size_t>(batch) * (2 * most_a + 2 + most_a + args.count);
    const Scratch float_memory(CALL_FLOATS, sizeof(float) * floats);
    const Scratch word_memory(CALL_INDICES, sizeof(int32_t) * words);
    a_unit = static_cast<float*>(float_memory.data());
    keys = static_cast<uint64_t*>(word_memory.data());
    if (a_unit == nullptr || keys == nullptr) return fail(error, room, "match_tokens: out of memory");
    b_panel = a_unit + batch * most_a * args.width;
    best = b_panel + batch * most_b * args.width;
    real = reinterpret_cast<int64_t*>(keys + batch * most_a);
    partner = reinterpret_cast<int32_t*>(real + batch);
    place = partner + batch * most_a;
    memset(partner, 0, sizeof(int32_t) * static_cast<size_t>(batch * most_a));
    const auto each = [](void* self, size_t i) { static_cast<Match*>(self)->prepare(static_cast<int64_t>(i)); };
    runner.run(runner.self, each, this, static_cast<size_t>(batch));
    if (trouble.code == 0) {
      const auto chunk = [](void* self, size_t i) {
        Match* m = static_cast<Match*>(self);
        m->search(static_cast<int64_t>(i) / m->chunks, static_cast<int64_t>(i) % m->chunks);
      };
      runner.run(runner.self, chunk, this, static_cast<size_t>(batch * chunks));
      const auto last = [](void* self, size_t i) { static_cast<Match*>(self)->select(static_cast<int64_t>(i)); };
      runner.run(runner.self, last, this, static_cast<size_t>(batch));
    }
    return explain(trouble, "match_tokens", error, room);
  }
};

template <class T>
int match_of(const elision_match_args& args, const elision_runner& runner, char* error, size_t room) {
  Match<T> match{args, {}, 0, 0, 0, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
  return match.run(runner, error, room);
}

inline int match(const elision_match_args& args, const elision_runner& runner, char* error, size_t room) {
  if (args.dtype == ELISION_F16) return match_of<f16>(args, runner, error, room);
  if (args.dtype == ELISION_BF16) return match_of<bf16>(args, runner, error, room);
  return match_of<float>(args, runner, error, room);
}

}  // namespace ELISION_VARIANT
}  // namespace elision
