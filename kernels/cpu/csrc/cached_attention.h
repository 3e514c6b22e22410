// cached_attention: new rows against a cache, each over its own slots in its own logical order.
//
// A row's keys are taken in blocks of KEY_RUN logical positions. Each block gives a maximum, a sum and weighted values,
// which are merged in order: so a row's bits depend on its keys alone, not on where they stand, on the rows beside it,
// or on who computed which block. Rows that begin with the same run of slots share its loads. Floor: both caches read
// once; with many rows 2 * (width + value_width) operations a key and line.
#pragma once
#include "common.h"
#include "functions.h"
#include "head_rows.h"
#include "key_tiles.h"

namespace elision {
namespace ELISION_VARIANT {

constexpr int64_t KEY_RUN = 128;
constexpr int64_t UNIT_LINES = 64;      // lines (a row's query heads) that walk the keys together
constexpr int64_t WANTED_TASKS = 8;     // below that, a unit's blocks are dealt out
constexpr int64_t WORTH_TASKS = 60000;  // multiply-adds below which nobody is asked to help

// What a row sees. `run` slots from `start`, where ancestors that go on in memory count as well; then the list.
struct Seen {
  const int32_t* list;
  int64_t start, run, count, low;  // positions below `low` lie outside the window
};

template <class T>
struct CachedAttention {
  const elision_cached_args& args;
  int64_t group, lines, columns, blocks, unit_rows, units, chunks;
  Seen* seen;
  float *all_q, *all_k;  // [rows]: what a norm over all heads multiplies by, or null
  float* q;              // [kv_heads, rows, group, width]
  float* parts;          // [kv_heads, units, blocks, lines of a unit, columns + 2], with chunks > 1
  int32_t* pending;      // [kv_heads, units]: tasks of a unit that are not done
  Trouble trouble;

  // ---- before ------------------------------------------------------------------------------------------
  int check(char* error, size_t room) {
    blocks = 0;
    for (int64_t m = 0; m < args.rows; ++m) {
      const int32_t* list = args.ancestors + m * args.columns;
      const int64_t slot = args.slots[m], start = args.prefix[2 * m], run = args.prefix[2 * m + 1];
      if (slot < 0 || slot >= args.capacity)
        return fail(error, room, "cached_attention: row %lld writes to slot %lld of %lld", static_cast<long long>(m),
                    static_cast<long long>(slot), static_cast<long long>(args.capacity));
      if (start < 0 || run < 0 || start + run > args.capacity)
        return fail(error, room, "cached_attention: row %lld sees %lld slots from %lld of %lld",
                    static_cast<long long>(m), static_cast<long long>(run), static_cast<long long>(start),
                    static_cast<long long>(args.capacity));
      int64_t listed = 0, joined = 0;
      for (; listed < args.columns && list[listed] >= 0; ++listed)
        if (list[listed] >= args.capacity)
          return fail(error, room, "cached_attention: row %lld has ancestor %lld of %lld slots",
                      static_cast<long long>(m), static_cast<long long>(list[listed]),
                      static_cast<long long>(args.capacity));
      Seen& row = seen[m];
      row.start = run > 0 || listed == 0 ? start : list[0];
      while (joined < listed && list[joined] == row.start + run + joined) ++joined;
      row.list = list + joined, row.run = run + joined, row.count = run + listed;
      row.low = args.window > 0 && row.count > args.window ? row.count - args.window : 0;
      blocks = larger(blocks, (row.count + KEY_RUN - 1) / KEY_RUN);
    }
    return 0;
  }

  // One head of a row, normed and turned, to `to`.
  void prepared(const float* x, const float* norm, int64_t length, const float* all, int64_t head, int64_t m,
                float* to) const {
    const int64_t width = args.width;
    if (norm != nullptr) {
      const bool whole = length != width;
      const float by = whole ? all[m] : inverse_root(sum_of_squares(x, width), width, args.eps);
      norm_row(x, by, whole ? norm + head * width : norm, args.norm_offset, width, to);
    } else {
      memcpy(to, x, sizeof(float) * static_cast<size_t>(width));
    }
    if (args.rotary == 0) return;
    const float *cos = args.cos + m * args.turned, *sin = args.sin + m * args.turned;
    if (args.rotary == 1) turn_halves(to, cos, sin, args.turned);
    else turn_pairs(to, cos, sin, args.turned);
  }

  static void put(const float* x, int64_t width, T* to) {
    int64_t i = 0;
    for (; i + W <= width; i += W) store(to + i, load(x + i));
    if (i < width) store(to + i, load(x + i, width - i), width - i);
  }

  // All rows of one head of the caches, and the queries that go with it. Rows in order: of equal slots the last stays.
  void prepare(int64_t kv) {
    const int64_t width = args.width, value_width = args.value_width;
    const Scratch memory(TASK_FLOATS, sizeof(float) * static_cast<size_t>(width));
    float* line = static_cast<float*>(memory.data());
    if (line == nullptr) return trouble.report(TROUBLE_MEMORY);
    T* keys = static_cast<T*>(args.key_cache) + kv * args.capacity * width;
    T* values = static_cast<T*>(args.value_cache) + kv * args.capacity * value_width;
    for (int64_t m = 0; m < args.rows; ++m) {
      const int64_t slot = args.slots[m];
      prepared(args.k + m * args.k_stride[0] + kv * args.k_stride[1], args.k_norm, args.k_norm_length, all_k, kv, m, line);
      put(line, width, keys + slot * width);
      put(args.v + m * args.v_stride[0] + kv * args.v_stride[1], value_width, values + slot * value_width);
      for (int64_t i = 0; i < group; ++i) {
        const int64_t head = kv * group + i;
        prepared(args.q + m * args.q_stride[0] + head * args.q_stride[1], args.q_norm, args.q_norm_length, all_q, head, m,
                 q + ((kv * args.rows + m) * group + i) * width);
      }
    }
  }

  // ---- a block -----------------------------------------------------------------------------------------
  // The lines of rows first ... last - 1 with one head of the caches; a line is counted from `first`.
  struct Unit {
    const CachedAttention& whole;
    const T *keys, *values;
    const float* q;
    const Seen* seen;  // of row `first`
    int64_t kv, first, rows;
    float *logits, *sums, *added;

    int64_t row_of(int64_t line) const { return line / whole.group; }
    static int64_t within(int64_t position, int64_t low) { return smaller(low + KEY_RUN, larger(low, position)) - low; }
    // Places in the block at `low`: of a row's first key inside the window, behind its run, behind its last key.
    int64_t from(int64_t row, int64_t low) const { return within(seen[row].low, low); }
    int64_t ran(int64_t row, int64_t low) const { return within(seen[row].run, low); }
    int64_t end(int64_t row, int64_t low) const { return within(seen[row].count, low); }

    struct Scores {
      const Unit& unit;
      int64_t low;
      template <int N>
      ELISION_INLINE void tile(int64_t line) const {
        const int64_t width = unit.whole.args.width, start = unit.seen[unit.row_of(line)].start;
        int64_t from = KEY_RUN, to = 0;
        for (int64_t r = unit.row_of(line); r <= unit.row_of(line + N - 1); ++r) {
          from = smaller(from, unit.from(r, low));
          to = larger(to, unit.ran(r, low));
        }
        if (from >= to) return;
        const Run<T> run{unit.keys + (start + low + from) * width, width};
        score<N>(unit.q + line * width, width, run, to - from, unit.logits + line * KEY_RUN + from, KEY_RUN);
      }
    };
    struct ListedScores {
      const Unit& unit;
      int64_t low, row, from, to;
      template <int N>
      ELISION_INLINE void tile(int64_t line) const {
        const int64_t width = unit.whole.args.width;
        const Listed<T> listed{unit.keys, width, unit.seen[row].list + (low + from - unit.seen[row].run)};
        score<N>(unit.q + line * width, width, listed, to - from, unit.logits + line * KEY_RUN + from, KEY_RUN);
      }
    };
    struct Values {
      const Unit& unit;
      int64_t low;
      template <int N>
      ELISION_INLINE void tile(int64_t line) const {
        const int64_t last = line + N - 1;
        int64_t from = 0, to = KEY_RUN;
        for (int64_t r = unit.row_of(line); r <= unit.row_of(last); ++r) {
          from = larger(from, unit.from(r, low));
          to = smaller(to, unit.ran(r, low));
        }
        to = larger(from, to);
        for (int64_t i = line; i <= last; ++i) part<1>(i, unit.from(unit.row_of(i), low), from);
        part<N>(line, from, to);
        for (int64_t i = line; i <= last; ++i) part<1>(i, to, unit.ran(unit.row_of(i), low));
      }
      // Places from ... to - 1 of the run; a row whose run ends before sees none of them.
      template <int N>
      ELISION_INLINE void part(int64_t line, int64_t from, int64_t to) const {
        const int64_t width = unit.whole.args.value_width, columns = unit.whole.columns, row = unit.row_of(line);
        if (N == 1) to = smaller(to, unit.ran(row, low));
        if (from >= to) return;
        const Run<T> run{unit.values + (unit.seen[row].start + low + from) * width, width};
        weigh<N>(unit.logits + line * KEY_RUN + from, KEY_RUN, run, to - from, width, unit.sums + line * columns, columns);
      }
    };
    struct ListedValues {
      const Unit& unit;
      int64_t low, row, from, to;
      template <int N>
      ELISION_INLINE void tile(int64_t line) const {
        const int64_t width = unit.whole.args.value_width, columns = unit.whole.columns;
        const Listed<T> listed{unit.values, width, unit.seen[row].list + (low + from - unit.seen[row].run)};
        weigh<N>(unit.logits + line * KEY_RUN + from, KEY_RUN, listed, to - from, width, unit.sums + line * columns,
                 columns);
      }
    };

    // Logits of a line become weights; its maximum and the weights' sum.
    ELISION_INLINE void soften(int64_t line, int64_t low, float* most_of, float* sum_of) const {
      const elision_cached_args& args = whole.args;
      const int64_t row = row_of(line), from = this->from(row, low), to = end(row, low);
      float* x = logits + line * KEY_RUN;
      const int64_t begin = from / W * W, stop = (to + W - 1) / W * W;
      const Vec scale = set(args.scale);
      if (args.bias != nullptr) bias_of(line, low, from, to);
      for (int64_t j = begin; j < stop; j += W) {
        Vec logit = mul(load(x + j), scale);
        if (args.softcap > 0) {
          const Vec cap = set(args.softcap);
          logit = mul(hyperbolic_tangent(divide(logit, cap)), cap);
        }
        if (args.bias != nullptr) logit = add(logit, load(added + j));
        store(x + j, logit);
      }
      for (int64_t j = begin; j < from; ++j) x[j] = -__builtin_inff();
      for (int64_t j = to; j < stop; ++j) x[j] = -__builtin_inff();
      Vec top = set(-__builtin_inff()), sums = set(0.0f);
      for (int64_t j = begin; j < stop; j += W) top = most(top, load(x + j));
      const float most_here = maximum(top), base = most_here > -__builtin_inff() ? most_here : 0.0f;
      for (int64_t j = begin; j < stop; j += W) {
        const Vec e = exponential(sub(load(x + j), set(base)));
        store(x + j, e);
        sums = add(sums, e);
      }
      *most_of = most_here, *sum_of = elision::ELISION_VARIANT::sum(sums);
    }

    ELISION_INLINE void bias_of(int64_t line, int64_t low, int64_t from, int64_t to) const {
      const elision_cached_args& args = whole.args;
      const int64_t head = kv * whole.group + line % whole.group, last = args.bias_length - 1;
      const int64_t end = seen[row_of(line)].count - 1;
      const float* bias = args.bias + (args.bias_heads == 1 ? 0 : head * args.bias_length);
      for (int64_t j = from; j < to; ++j) added[j] = bias[smaller(last, args.key_bias ? low + j : end - low - j)];
    }

    // One block of all lines: hand(line, maximum, sum, weighted values) for each that sees something in it.
    template <class Hand>
    void block(int64_t index, const Hand& hand) const {
      const int64_t low = index * KEY_RUN, group = whole.group;
      const int64_t columns = whole.columns;
      for (int64_t begin = 0, stop; begin < rows; begin = stop) {  // rows that begin at the same slot
        for (stop = begin + 1; stop < rows && seen[stop].start == seen[begin].start;) ++stop;
        for_lines(begin * group, (stop - begin) * group, Scores{*this, low});
        for (int64_t r = begin; r < stop; ++r) {
          const int64_t first_listed = larger(ran(r, low), from(r, low)), last_listed = end(r, low);
          if (first_listed < last_listed)
            for_lines(r * group, group, ListedScores{*this, low, r, first_listed, last_listed});
        }
        memset(sums + begin * group * columns, 0, sizeof(float) * static_cast<size_t>((stop - begin) * group * columns));
        float tops[2 * UNIT_LINES];
        // A row has more heads than fit only where one row is a unit: then line by line in pieces.
        for (int64_t piece = begin * group; piece < stop * group; piece += UNIT_LINES) {
          const int64_t here = smaller(UNIT_LINES, stop * group - piece);
          for (int64_t i = 0; i < here; ++i)
            if (from(row_of(piece + i), low) < end(row_of(piece + i), low))
              soften(piece + i, low, tops + 2 * i, tops + 2 * i + 1);
          for_lines(piece, here, Values{*this, low});
          for (int64_t r = row_of(piece); r <= row_of(piece + here - 1); ++r) {
            const int64_t first_listed = larger(ran(r, low), from(r, low)), last_listed = end(r, low);
            const int64_t line = larger(piece, r * group), count = smaller(piece + here, (r + 1) * group) - line;
            if (first_listed < last_listed)
              for_lines(line, count, ListedValues{*this, low, r, first_listed, last_listed});
          }
          for (int64_t i = 0; i < here; ++i)
            if (from(row_of(piece + i), low) < end(row_of(piece + i), low))
              hand(piece + i, tops[2 * i], tops[2 * i + 1], sums + (piece + i) * columns);
        }
      }
    }
  };

  // ---- blocks together -----------------------------------------------------------------------------------
  // Merge a block's part into what a line has: maximum, sum, weighted values.
  ELISION_INLINE static void merge(float* state, float top, float sum_here, const float* values, int64_t columns) {
    if (!(top > -__builtin_inff()) && top == top) return;
    const float now = larger(state[0], top);
    float factors[W] = {};
    factors[0] = state[0] - now, factors[1] = top - now;
    store(factors, exponential(load(factors)));
    state[0] = now, state[1] = state[1] * factors[0] + sum_here * factors[1];
    const Vec old = set(factors[0]), more = set(factors[1]);
    for (int64_t c = 0; c < columns; c += W)
      store(state + 2 + c, fma(load(values + c), more, mul(load(state + 2 + c), old)));
  }

  static void clear(float* state, int64_t columns) {
    memset(state, 0, sizeof(float) * static_cast<size_t>(columns + 2));
    state[0] = -__builtin_inff();
  }

  void finish(const float* state, int64_t row, int64_t head) const {
    float* to = args.out + row * args.out_stride[0] + head * args.out_stride[1];
    const int64_t width = args.value_width;
    const Vec by = set(state[1] > 0 || state[1] != state[1] ? state[1] : 1.0f);
    int64_t c = 0;
    for (; c + W <= width; c += W) store(to + c, divide(load(state + 2 + c), by));
    if (c < width) store(to + c, divide(load(state + 2 + c, width - c), by), width - c);
  }

  void task(int64_t index) {
    const int64_t chunk = index % chunks, part = index / chunks % units, kv = index / chunks / units;
    const int64_t first = part * unit_rows, rows = smaller(unit_rows, args.rows - first);
    if (rows <= 0) return;
    const int64_t count = rows * group, record = columns + 2;
    const Scratch memory(TASK_FLOATS, sizeof(float) * static_cast<size_t>(count * (KEY_RUN + columns + record) + KEY_RUN));
    float* logits = static_cast<float*>(memory.data());
    if (logits == nullptr) return trouble.report(TROUBLE_MEMORY);
    float *sums = logits + count * KEY_RUN, *states = sums + count * columns, *added = states + count * record;
    const Unit unit{*this, static_cast<const T*>(args.key_cache) + kv * args.capacity * args.width,
                    static_cast<const T*>(args.value_cache) + kv * args.capacity * args.value_width,
                    q + (kv * args.rows + first) * group * args.width, seen + first, kv, first, rows, logits, sums, added};
    int64_t begin = blocks, end = 0;
    for (int64_t r = first; r < first + rows; ++r) {
      begin = smaller(begin, seen[r].low / KEY_RUN);
      end = larger(end, (seen[r].count + KEY_RUN - 1) / KEY_RUN);
    }
    begin = smaller(begin, end);
    for (int64_t i = 0; i < count; ++i) clear(states + i * record, columns);
    if (chunks == 1) {
      for (int64_t b = begin; b < end; ++b)
        unit.block(b, [&](int64_t line, float top, float sum_here, const float* values) {
          merge(states + line * record, top, sum_here, values, columns);
        });
    } else {
      // Every block's part is kept; who comes last merges them in order.
      const int64_t of_unit = kv * units + part;
      float* kept = parts + of_unit * blocks * unit_rows * group * record;
      const auto at = [&](int64_t b, int64_t line) { return kept + (b * unit_rows * group + line) * record; };
      const int64_t share = (end - begin + chunks - 1) / chunks;
      for (int64_t b = begin + chunk * share; b < smaller(end, begin + (chunk + 1) * share); ++b) {
        for (int64_t i = 0; i < count; ++i) clear(at(b, i), columns);
        unit.block(b, [&](int64_t line, float top, float sum_here, const float* values) {
          float* to = at(b, line);
          to[0] = top, to[1] = sum_here;
          memcpy(to + 2, values, sizeof(float) * static_cast<size_t>(columns));
        });
      }
      if (__atomic_sub_fetch(pending + of_unit, 1, __ATOMIC_ACQ_REL) != 0) return;
      for (int64_t i = 0; i < count; ++i)
        for (int64_t b = begin; b < end; ++b) merge(states + i * record, at(b, i)[0], at(b, i)[1], at(b, i) + 2, columns);
    }
    for (int64_t i = 0; i < count; ++i) finish(states + i * record, first + i / group, kv * group + i % group);
  }

  int run(const elision_runner& runner, char* error, size_t room) {
    group = args.heads / args.kv_heads, columns = (args.value_width + W - 1) / W * W;
    const Scratch index_memory(CALL_INDICES, sizeof(Seen) * static_cast<size_t>(args.rows) +
                                                 sizeof(int32_t) * static_cast<size_t>(args.rows * args.kv_heads));
    seen = static_cast<Seen*>(index_memory.data());
    if (seen == nullptr) return fail(error, room, "cached_attention: out of memory");
    if (check(error, room) != 0) return 1;
    unit_rows = args.rows * group <= UNIT_LINES ? args.rows : larger<int64_t>(1, UNIT_LINES / group);
    units = (args.rows + unit_rows - 1) / unit_rows;
    unit_rows = (args.rows + units - 1) / units;
    units = (args.rows + unit_rows - 1) / unit_rows;
    int64_t work = 0;
    for (int64_t m = 0; m < args.rows; ++m) work += (seen[m].count - seen[m].low) * (args.width + args.value_width);
    const bool alone = work * args.heads < WORTH_TASKS;
    const int64_t wanted = (WANTED_TASKS + units * args.kv_heads - 1) / (units * args.kv_heads);
    chunks = alone ? 1 : larger<int64_t>(1, smaller(wanted, blocks));
    const int64_t queries = args.rows * args.heads * args.width;
    const int64_t record = chunks == 1 ? 0 : columns + 2;
    const Scratch memory(CALL_FLOATS, sizeof(float) * static_cast<size_t>(2 * args.rows + queries +
                                                                         args.kv_heads * units * blocks * unit_rows * group * record));
    q = static_cast<float*>(memory.data());
    if (q == nullptr) return fail(error, room, "cached_attention: out of memory");
    parts = q + queries;
    all_q = parts + args.kv_heads * units * blocks * unit_rows * group * record, all_k = all_q + args.rows;
    const auto over_all = [&](const float* x, int64_t stride, const float* norm, int64_t length, float* all) {
      if (norm == nullptr || length == args.width) return;
      for (int64_t m = 0; m < args.rows; ++m)
        all[m] = inverse_root(sum_of_squares(x + m * stride, length), length, args.eps);
    };
    over_all(args.q, args.q_stride[0], args.q_norm, args.q_norm_length, all_q);
    over_all(args.k, args.k_stride[0], args.k_norm, args.k_norm_length, all_k);
    pending = reinterpret_cast<int32_t*>(seen + args.rows);
    for (int64_t i = 0; i < args.kv_heads * units; ++i) pending[i] = static_cast<int32_t>(chunks);

    const auto ready = [](void* self, size_t i) { static_cast<CachedAttention*>(self)->prepare(static_cast<int64_t>(i)); };
    const auto one = [](void* self, size_t i) { static_cast<CachedAttention*>(self)->task(static_cast<int64_t>(i)); };
    const auto spread = [&](bool here, elision_task task, int64_t count) {
      if (!here) return runner.run(runner.self, task, this, static_cast<size_t>(count));
      for (int64_t i = 0; i < count; ++i) task(this, static_cast<size_t>(i));
    };
    const int64_t moved = queries + args.rows * args.kv_heads * (args.width + args.value_width);
    spread(moved < WORTH_TASKS, ready, args.kv_heads);
    if (trouble.code == 0) spread(alone, one, args.kv_heads * units * chunks);
    return explain(trouble, "cached_attention", error, room);
  }
};

template <class T>
int cached_of(const elision_cached_args& args, const elision_runner& runner, char* error, size_t room) {
  CachedAttention<T> attention{args, 0, 0, 0, 0, 0, 0, 0, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, {}};
  return attention.run(runner, error, room);
}

inline int cached(const elision_cached_args& args, const elision_runner& runner, char* error, size_t room) {
  if (args.cache_dtype == ELISION_F16) return cached_of<f16>(args, runner, error, room);
  if (args.cache_dtype == ELISION_BF16) return cached_of<bf16>(args, runner, error, room);
  return cached_of<float>(args, runner, error, room);
}

}  // namespace ELISION_VARIANT
}  // namespace elision
