// linear_nbits, linear_rows and linear_topk: products of rows with a packed weight (packed.h).
//
// Rows come in panels of as many as share a tile, at most BLOCK_ROWS at a time. First the panels are made (a task each),
// then a task takes some tiles of channels and some panels: of every tile it reads the weight once from memory, and from
// the nearest caches for all but the first panel. Floor: the weight is read once for each BLOCK_ROWS rows.
#pragma once
#include "common.h"
#include "floats_tile.h"
#include "functions.h"
#include "nbits_tile.h"

namespace elision {
namespace ELISION_VARIANT {

constexpr int64_t BLOCK_ROWS = 240;  // a multiple of the rows of every kind of panel
static_assert(BLOCK_ROWS % NBITS_ROWS == 0 && BLOCK_ROWS % FLOATS_ROWS == 0, "panels are whole");
constexpr float LOWEST = -1e30f;  // finite: it is multiplied by 0
constexpr int64_t TASK_NANOSECONDS = 4000, MOST_TASKS = 64, RANKED_TASKS = 12;

template <class T>
struct Linear {
  const elision_linear_args& args;
  const PackedHeader& header;
  const uint8_t* tiles;
  NbitsShape shape;
  bool bytes;         // few bits: the panels hold bytes
  int64_t most;       // rows of a whole panel
  int64_t row_bytes;  // of a panel
  int64_t tile_width, tile_count;
  char* panels;
  int64_t first_row, rows;  // of this block
  int64_t panel_count, chunk_tiles, chunk_panels, panel_chunks;
  Trouble* trouble;
  // the largest of each chunk of tiles, [chunk][row][k]
  float* best;
  int32_t* place;
  float* sums;  // [row][maximum, sum, weighted sum][tile], for the spread

  int panel_rows(int64_t panel) const {
    const int64_t left = rows - panel * most;
    return bytes ? nbits_rows(left) : floats_rows(left);
  }
  char* panel_at(int64_t panel) const { return panels + panel * most * row_bytes; }

  // ---- panels --------------------------------------------------------------------------------------------
  void widen_row(const T* x, float* to, int64_t padded) const {
    const int64_t n = args.width;
    int64_t i = 0;
    for (; i + W <= n; i += W) store(to + i, load(x + i));
    for (; i < n; ++i) to[i] = widen(x[i]);
    for (; i < padded; ++i) to[i] = 0.0f;
    if (args.norm == nullptr) return;
    Vec squares = set(0.0f);
    for (i = 0; i + W <= n; i += W) squares = fma(load(to + i), load(to + i), squares);
    float total = sum(squares);
    for (; i < n; ++i) total += to[i] * to[i];
    const float factor = 1.0f / __builtin_sqrtf(total / static_cast<float>(n) + args.eps);
    for (i = 0; i < n; ++i) to[i] = to[i] * factor * (args.norm[i] + args.norm_offset);
  }

  void make_panel(int64_t panel) const {
    const int64_t width = bytes ? shape.columns() : args.width, padded = (width + W - 1) / W * W;
    const Scratch memory(TASK_FLOATS, static_cast<size_t>(padded) * sizeof(float));
    float* wide = static_cast<float*>(memory.data());
    if (wide == nullptr) return trouble->report(TROUBLE_MEMORY);
    const int64_t count = panel_rows(panel), real = smaller<int64_t>(count, rows - panel * most);
    char* to = panel_at(panel);
    for (int64_t r = 0; r < count; ++r) {
      if (r < real)
        widen_row(static_cast<const T*>(args.x) + (first_row + panel * most + r) * args.width, wide, padded);
      else
        memset(wide, 0, static_cast<size_t>(padded) * sizeof(float));
      if (!bytes)
        for (int64_t k = 0; k < width; ++k) reinterpret_cast<float*>(to)[k * count + r] = wide[k];
      else if (shape.block == 32)
        quantize_row<32>(wide, shape, r, count, to);
      else
        quantize_row<16>(wide, shape, r, count, to);
    }
  }

  // ---- tiles ---------------------------------------------------------------------------------------------
  void work(int64_t task) const {
    const int64_t chunk = task / panel_chunks, panel_chunk = task % panel_chunks;
    const int64_t first = chunk * chunk_tiles, last = smaller(tile_count, first + chunk_tiles);
    const int64_t from = panel_chunk * chunk_panels, until = smaller(panel_count, from + chunk_panels);
    const int64_t values = header.groups * TILE_NBITS;
    const bool copies = bytes && (header.scale_dtype != ELISION_F32 || (header.zero_dtype != 0 && header.zero_dtype != ELISION_F32));
    const Scratch memory(TASK_FLOATS, copies ? static_cast<size_t>(values) * 8 : 0);
    if (memory.data() == nullptr) return trouble->report(TROUBLE_MEMORY);
    float* room = static_cast<float*>(memory.data());
    if (best != nullptr) begin_best(chunk, from, until);
    for (int64_t tile = first; tile < last; ++tile) {
      const uint8_t* weight = tiles + tile * header.tile_bytes;
      const float* scales = nullptr;
      const void* zeros = nullptr;
      if (bytes) {
        scales = floats_of(weight, header.scale_dtype, values, room);
        const uint8_t* stored = weight + values * size_of(header.scale_dtype);
        if (shape.zeros == ZERO_INTS) {
          int32_t* ints = reinterpret_cast<int32_t*>(room + values);
          for (int64_t i = 0; i < values; ++i) ints[i] = stored[i];
          zeros = ints;
        } else if (shape.zeros == ZERO_OFFSETS) {
          zeros = floats_of(stored, header.zero_dtype, values, room + values);
        }
        weight += head_bytes(header);
      }
      for (int64_t panel = from; panel < until; ++panel) {
        alignas(64) float out[NBITS_ROWS * TILE_NBITS > FLOATS_ROWS * TILE_FLOATS ? NBITS_ROWS * TILE_NBITS
                                                                                  : FLOATS_ROWS * TILE_FLOATS];
        const int count = panel_rows(panel);
        if (bytes)
          nbits_tile_of(shape, count)(weight, scales, zeros, panel_at(panel), shape, out);
        else if (header.bits == 32)
          floats_tile_of<float>(count)(weight, panel_at(panel), args.width, out);
        else if (header.weight_dtype == ELISION_F16)
          floats_tile_of<f16>(count)(weight, panel_at(panel), args.width, out);
        else
          floats_tile_of<bf16>(count)(weight, panel_at(panel), args.width, out);
        const int64_t real = smaller<int64_t>(count, rows - panel * most);
        for (int64_t r = 0; r < real; ++r) finish(out + r * tile_width, panel * most + r, tile * tile_width, chunk);
      }
    }
  }

  static const float* floats_of(const uint8_t* stored, int32_t dtype, int64_t count, float* room) {
    if (dtype == ELISION_F32) return reinterpret_cast<const float*>(stored);
    const f16* half = reinterpret_cast<const f16*>(stored);
    for (int64_t i = 0; i < count; i += W) store(room + i, load(half + i));  // 16 for a group: whole vectors
    return room;
  }

  // One row of a tile is ready: its channels from `channel` on. `row` is of this block.
  void finish(float* found, int64_t row, int64_t channel, int64_t chunk) const {
    const int64_t count = smaller(tile_width, args.channels - channel);
    if (args.bias != nullptr)
      for (int64_t i = 0; i < count; ++i) found[i] += args.bias[channel + i];
    if (sums != nullptr) add_up(found, row, channel / tile_width, count);
    if (best != nullptr) return keep_best(found, row, channel, count, chunk);
    T* to = static_cast<T*>(args.out) + (first_row + row) * args.channels + channel;
    for (int64_t i = 0; i < count; i += W) {
      const int64_t n = smaller<int64_t>(W, count - i);
      if (n == W)
        store(to + i, load(found + i));
      else
        store(to + i, load(found + i), n);
    }
  }

  // ---- the spread ----------------------------------------------------------------------------------------
  // Of each tile: its maximum m, the sum of e = exp(x - m), that of e * (x - m). Tiles are merged at the end and in their
  // order, so that a row's bits do not depend on who took which tile.
  static ELISION_INLINE Vec upper(Vec a, Vec b) { return elision::ELISION_VARIANT::most(a, b); }
  void add_up(const float* found, int64_t row, int64_t tile, int64_t count) const {
    constexpr int64_t MOST = TILE_NBITS > TILE_FLOATS ? TILE_NBITS : TILE_FLOATS;
    static_assert(MOST % W == 0, "whole vectors");
    alignas(64) float x[MOST];
    for (int64_t i = 0; i < MOST; ++i) x[i] = i < count ? found[i] : LOWEST;
    Vec top = set(LOWEST), total = set(0.0f), weighted = set(0.0f);
    for (int64_t i = 0; i < MOST; i += W) top = upper(top, load(x + i));
    const float highest = maximum(top);
    for (int64_t i = 0; i < MOST; i += W) {
      const Vec less = upper(set(LOWEST), sub(load(x + i), set(highest))), e = exponential(less);
      total = add(total, e);
      weighted = fma(e, less, weighted);
    }
    float* to = sums + row * 3 * tile_count + tile;
    to[0] = highest, to[tile_count] = sum(total), to[2 * tile_count] = sum(weighted);
  }

  void merge_sums(int64_t row) const {
    const float* highest = sums + row * 3 * tile_count;
    const float *totals = highest + tile_count, *weighted = totals + tile_count;
    float top = LOWEST;
    for (int64_t i = 0; i < tile_count; ++i) top = larger(top, highest[i]);
    Vec all = set(0.0f), moment = set(0.0f);
    for (int64_t i = 0; i < tile_count; i += W) {
      const int64_t n = smaller<int64_t>(W, tile_count - i);
      const Vec less = upper(set(LOWEST), sub(load(highest + i, n), set(top)));
      const Vec scale = exponential(less), part = mul(scale, load(totals + i, n));
      all = add(all, part);  // beyond n the totals are 0
      moment = add(moment, fma(scale, load(weighted + i, n), mul(part, less)));
    }
    const float logged = __builtin_logf(sum(all));
    args.spread[2 * (first_row + row)] = top + logged;
    args.spread[2 * (first_row + row) + 1] = logged - sum(moment) / sum(all);
  }

  // ---- the largest -----------------------------------------------------------------------------------------
  // Sorted, the lowest channel first among equals; NaNs before all numbers, as sorting does. A place of -1 is free.
  static bool before(float a, float b) { return a > b || (a != a && b == b); }

  void begin_best(int64_t chunk, int64_t from, int64_t until) const {
    const int64_t first = chunk * rows + from * most, count = smaller(rows, until * most) - from * most;
    for (int64_t i = first * args.k; i < (first + count) * args.k; ++i) best[i] = -__builtin_inff(), place[i] = -1;
  }

  static void insert(float value, int32_t channel, float* values, int32_t* places, int64_t k) {
    if (places[k - 1] >= 0 && !before(value, values[k - 1])) return;
    int64_t i = k - 1;
    for (; i > 0 && (places[i - 1] < 0 || before(value, values[i - 1])); --i)
      values[i] = values[i - 1], places[i] = places[i - 1];
    values[i] = value, places[i] = channel;
  }

  void keep_best(const float* found, int64_t row, int64_t channel, int64_t count, int64_t chunk) const {
    const int64_t k = args.k;
    float* values = best + (chunk * rows + row) * k;
    int32_t* places = place + (chunk * rows + row) * k;
    for (int64_t i = 0; i < count; i += W) {
      const int64_t n = smaller<int64_t>(W, count - i);
      if (n == W && places[k - 1] >= 0 && !any_above(load(found + i), set(values[k - 1]))) continue;
      for (int64_t c = i; c < i + n; ++c) insert(found[c], static_cast<int32_t>(channel + c), values, places, k);
    }
  }

  // Chunks in their order: among equals the lowest channel is met first.
  void merge_best(int64_t row, int64_t chunks) const {
    const int64_t k = args.k;
    float* values = best + row * k;
    int32_t* places = place + row * k;
    for (int64_t chunk = 1; chunk < chunks; ++chunk) {
      const float* more = best + (chunk * rows + row) * k;
      const int32_t* where = place + (chunk * rows + row) * k;
      for (int64_t i = 0; i < k && where[i] >= 0; ++i) insert(more[i], where[i], values, places, k);
    }
    for (int64_t i = 0; i < k; ++i) {
      args.values[(first_row + row) * k + i] = values[i];
      args.indices[(first_row + row) * k + i] = places[i];
    }
  }
};

template <class T>
int linear_of(const elision_linear_args& args, const PackedHeader& header, const elision_runner& runner, char* error,
              size_t room) {
  const char* op = args.values == nullptr ? "linear" : "linear_topk";
  Trouble trouble;
  Linear<T> l{args, header, static_cast<const uint8_t*>(args.packed) + PACKED_HEADER, {}, few_bits(header.bits), 0, 0,
              tile_channels(header), tiles_of(header), nullptr, 0, 0, 0, 0, 0, 0, &trouble, nullptr, nullptr, nullptr};
  if (l.bytes) {
    l.shape.block = header.group == 16 ? 16 : 32;
    l.shape.groups = header.groups, l.shape.per_group = header.group / l.shape.block, l.shape.bits = header.bits;
    l.shape.zeros = header.zero_dtype == 0 ? ZERO_FIXED : header.zero_dtype == ELISION_U8 ? ZERO_INTS : ZERO_OFFSETS;
    l.shape.head = head_bytes(header);
    l.shape.share = (header.tile_bytes + l.shape.groups * l.shape.per_group - 1) / (l.shape.groups * l.shape.per_group);
    l.most = NBITS_ROWS, l.row_bytes = l.shape.row_bytes();
  } else {
    l.most = FLOATS_ROWS, l.row_bytes = args.width * 4;
  }
  const int64_t block = smaller(args.rows, BLOCK_ROWS), blocks = (block + l.most - 1) / l.most;
  const Scratch memory(CALL_FLOATS, static_cast<size_t>(blocks * l.most * l.row_bytes));
  l.panels = static_cast<char*>(memory.data());
  if (l.panels == nullptr) return fail(error, room, "%s: out of memory", op);
  for (l.first_row = 0; l.first_row < args.rows; l.first_row += BLOCK_ROWS) {
    l.rows = smaller(BLOCK_ROWS, args.rows - l.first_row);
    l.panel_count = (l.rows + l.most - 1) / l.most;
    // What a tile takes, roughly: its bytes from memory, or its multiply-adds.
    const double columns = static_cast<double>(args.width), lanes = static_cast<double>(l.tile_width);
    const double nanoseconds = larger(static_cast<double>(header.tile_bytes) / 15.0,
                                      static_cast<double>(l.rows) * columns * lanes / (l.bytes ? 200.0 : 50.0));
    // Each chunk of tiles keeps its own largest, which it has to find first: few chunks where that is what is asked for.
    const int64_t limit = args.values == nullptr ? MOST_TASKS : RANKED_TASKS;
    const int64_t wanted = larger<int64_t>(
        1, smaller<int64_t>(limit, static_cast<int64_t>(nanoseconds * static_cast<double>(l.tile_count)) / TASK_NANOSECONDS));
    l.chunk_tiles = larger<int64_t>(1, l.tile_count / wanted);
    const int64_t chunks = (l.tile_count + l.chunk_tiles - 1) / l.chunk_tiles;
    l.panel_chunks = larger<int64_t>(1, smaller(l.panel_count, wanted / chunks));
    l.chunk_panels = (l.panel_count + l.panel_chunks - 1) / l.panel_chunks;
    l.panel_chunks = (l.panel_count + l.chunk_panels - 1) / l.chunk_panels;
    const auto prepare = [](void* self, size_t i) { static_cast<Linear<T>*>(self)->make_panel(static_cast<int64_t>(i)); };
    if (l.rows * args.width < 1 << 14)
      for (int64_t i = 0; i < l.panel_count; ++i) l.make_panel(i);
    else
      runner.run(runner.self, prepare, &l, static_cast<size_t>(l.panel_count));
    const auto task = [](void* self, size_t i) { static_cast<Linear<T>*>(self)->work(static_cast<int64_t>(i)); };
    const int64_t kept = args.values == nullptr ? 0 : chunks * l.rows * args.k;
    const Scratch largest(CALL_INDICES, static_cast<size_t>(kept) * 8);
    if (largest.data() == nullptr) return fail(error, room, "%s: out of memory", op);
    if (args.values != nullptr) {
      l.best = static_cast<float*>(largest.data());
      l.place = reinterpret_cast<int32_t*>(l.best + kept);
    }
    const int64_t summed = args.spread == nullptr ? 0 : 3 * l.rows * l.tile_count;
    const Scratch sums(CALL_SUMS, static_cast<size_t>(summed) * sizeof(float));
    if (sums.data() == nullptr) return fail(error, room, "%s: out of memory", op);
    if (args.spread != nullptr) l.sums = static_cast<float*>(sums.data());
    if (trouble.code.load() == 0) runner.run(runner.self, task, &l, static_cast<size_t>(chunks * l.panel_chunks));
    if (trouble.code.load() != 0) return explain(trouble, op, error, room);
    if (args.values != nullptr)
      for (int64_t row = 0; row < l.rows; ++row) l.merge_best(row, chunks);
    if (args.spread != nullptr)
      for (int64_t row = 0; row < l.rows; ++row) l.merge_sums(row);
  }
  return 0;
}

inline int linear(const elision_linear_args& args, const PackedHeader& header, const elision_runner& runner, char* error,
                  size_t room) {
  if (args.dtype == ELISION_F16) return linear_of<f16>(args, header, runner, error, room);
  if (args.dtype == ELISION_BF16) return linear_of<bf16>(args, header, runner, error, room);
  return linear_of<float>(args, header, runner, error, room);
}

}  // namespace ELISION_VARIANT
}  // namespace elision
