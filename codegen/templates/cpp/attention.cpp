// y [B, heads * group, Q, Dv] = softmax(query key^T * scale + mask) value over a cache of keys and values.
//
// Queries are cut into blocks of up to MOST_ROWS, counting all query heads of a head of keys; a block shares one read
// of it.
// The context is cut into parts, as many as the shape says, whatever the number of threads; a thread takes a part
// STRETCH positions at a time, with a running softmax in float32, and parts are added in their order at the end:
//
//     scores [rows, STRETCH] -> weights, with the values' scales -> output [rows, Dv] and, a row, top and total
//
// With PAIRED, products are of pairs of bfloat16: neighbours in a row of keys, and neighbouring positions of values.
// Columns lie as decoding leaves them: of STEP columns of values those that leave the least remainder by STEP / LANES
// come first, and of 8-bit keys the even ones. Otherwise all numbers are float32.
//
// Stands for itself where the markers are: codes of 8-bit integers, queries of float32.
#include "vector.h"
#include "functions.h"

// <constants>
using Query = float;           // of queries and results
using Stored = std::uint8_t;   // codes, or the numbers of a cache that is not quantized
constexpr bool PAIRED = false;
constexpr int BITS = 8;        // of a code
constexpr bool MASKED = true;  // whether decode needs the bits above a code to be 0
constexpr bool COMPACT = false;  // whether a vector has scales of groups, and offsets, which decoding applies
constexpr int GROUP_SIZE = 0;    // numbers of a group, 0 for all of a vector
constexpr bool OFFSETS = false;
// </constants>

// <decode>
static inline f32 decode(i32 code) {
  return to_f32(code) - 128.0f;
}

// Two codes, in the lowest bits of the halves of each lane, as bfloat16 there.
static inline u32 decode_pair(u32 codes) {
  u32 low = as_u32(decode((i32)(codes & 255))), high = as_u32(decode((i32)(codes >> 16 & 255)));
  return low >> 16 | (high & 0xffff0000u);
}

// Four codes, in the bytes of each lane, as bfloat16: those of bytes 0 and 2, and of bytes 1 and 3.
static inline Pairs decode_four(u32 codes) {
  return {decode_pair(codes & 0x00ff00ffu), decode_pair(codes >> 8 & 0x00ff00ffu)};
}
// </decode>

constexpr bool PLAIN = !std::is_same_v<Stored, std::uint8_t>;

using Scale = std::conditional_t<COMPACT, bfloat16, float>;

using Element = std::conditional_t<PAIRED, bfloat16, float>;  // what is multiplied
using Word = std::conditional_t<PAIRED, std::uint32_t, float>;  // values of a column: of two positions, or of one
using Vector = std::conditional_t<PAIRED, u32, f32>;            // LANES of them

constexpr int HALVES = BITS == 4 ? 2 : 1;                             // low and high halves of bytes
constexpr int STEP = (PAIRED ? BITS == 8 ? 4 : 2 : 1) * LANES;        // columns of a half that are decoded at a time
constexpr int DEPTH = PAIRED ? 2 : 1;             // positions of a word
constexpr i64 STRETCH = 128;                     // positions of a step of the running softmax
#if defined(__AMX_BF16__)
constexpr bool SQUARES = PAIRED;  // whether the matrix unit multiplies
#else
constexpr bool SQUARES = false;
#endif
constexpr i64 KEYS = SQUARES ? 32 : LANES;   // positions whose keys are decoded at a time
constexpr i64 PARTS = 64;                    // all blocks together, if the context is long enough
constexpr i64 MOST_ROWS = 128;               // of a block
constexpr i64 NUMBERS_PER_THREAD = 1 << 16;  // as many are read sooner than another thread starts
constexpr i64 ALL = i64(1) << 40;            // more positions than there are
constexpr i64 AHEAD = 32;                    // positions that pages are fetched ahead

static inline i64 least(i64 a, i64 b) { return a < b ? a : b; }
static inline i64 quotient(i64 a, i64 b) { return (a + b - 1) / b; }

// Columns of a row of `size` numbers as it is decoded: each half padded to a multiple of STEP.
static inline i64 padded(i64 size) { return quotient(size, HALVES * STEP) * HALVES * STEP; }

template <class To>
static inline void put(void* to, To x) {
  std::memcpy(to, &x, sizeof(x));
}
template <class From>
static inline From get(const void* from) {
  From x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}

static inline f32 dot(f32 sum, f32 x, f32 other) { return sum + x * other; }

template <class T>
struct Array {
  T* data;

  explicit Array(i64 count) : data((T*)::operator new(count * sizeof(T), std::align_val_t(64))) {}
  ~Array() { ::operator delete(data, std::align_val_t(64)); }
  Array(const Array&) = delete;
  operator T*() const { return data; }
};

#include "attention_call.h"
#include "attention_decode.h"
#include "attention_places.h"

// What a thread works with.
struct Workspace {
  Array<Element> queries, weights, keys;
  Array<Word> words;
  Array<float> scores, higher, rescale;
  Array<Found> places;  // of keys and values, and of those after these

  Workspace(const Attention& a, const Block& largest)
      : queries((SQUARES ? quotient(largest.rows(), 16) * 16 : largest.rows()) * padded(a.key.size)),
        weights(largest.held() * STRETCH), keys(2 * KEYS * padded(a.key.size)),
        words(STRETCH / DEPTH * padded(a.value.size)), scores(largest.rows() * STRETCH),
        higher(largest.lines()), rescale(largest.lines()), places(4) {
    if (SQUARES) std::memset(weights, 0, sizeof(Element) * largest.held() * STRETCH);
  }
};

// Whether rows are multiplied from where they lie.
template <class To>
static inline bool lies_so(const Strip& strip) {
  return PLAIN && std::is_same_v<Stored, To> && strip.size % STEP == 0 && strip.page % 32 == 0;
}

// The products of a query and LANES keys.
static inline f32 products(const Element* query, const Element* keys, i64 stride, i64 columns) {
  f32 sum[LANES] = {};
  for (i64 d = 0; d < columns; d += sizeof(Vector) / sizeof(Element)) {
    Vector q = get<Vector>(query + d);
    each<LANES>([&](auto t) { sum[t] = dot(sum[t], get<Vector>(keys + t * stride + d), q); });
  }
  return sums_of(sum);
}

#include "attention_squares.h"

// A step of the decoding of `count` things, of `steps`: which of them.
struct Share {
  i64 begin, end;

  Share(i64 count, i64 step, i64 steps) : begin(count * step / steps), end(count * (step + 1) / steps) {}
};

// Keys of up to KEYS positions from `t` of their stretch on.
struct KeyBlock {
  const Places& keys;
  i64 t;
  Element* to;

  i64 count() const { return least(KEYS, keys.count - t); }
  bool as_it_is() const { return lies_so<Element>(keys.of) && count() == KEYS && t >= keys.before; }
  const Element* rows() const { return as_it_is() ? (const Element*)keys.row(t) : to; }
  i64 stride() const { return as_it_is() ? keys.of.position : padded(keys.of.size); }

  void decode(i64 step, i64 steps) const {
    if (as_it_is()) return;
    const Share share(count(), step, steps);
    for (i64 i = share.begin; i < share.end; ++i) {
      keys.fetch(t + i + AHEAD);
      decode_key(keys.row(t + i), keys.of.size, keys.found->vectors[t + i], to + i * padded(keys.of.size));
    }
  }
};

// Products of all rows and a block of keys: scores [rows, STRETCH]. Meanwhile another block is decoded.
template <class Other>
static void multiply_keys(const Block& block, const Workspace& w, const KeyBlock& keys, const Other& other) {
  const i64 columns = padded(keys.keys.of.size);
#if defined(__AMX_BF16__)
  if constexpr (SQUARES) {
    multiply_squares(w.queries, block.rows(), keys.rows(), keys.stride(), columns, w.scores + keys.t, other);
    return;
  }
#endif
  other.decode(0, 1);
  for (i64 r = 0; r < block.rows(); ++r) {
    put(w.scores + r * STRETCH + keys.t, products(w.queries + r * columns, keys.rows(), keys.stride(), columns));
  }
}

static inline f32 add_mask(const Attention& a, f32 scores, i64 at, i64 count) {
  const float lowest = -__builtin_inff();
  switch (a.mask_kind) {
    case BOOLEAN: return where(some<std::uint8_t>(a.mask, at, count) == 0.0f, lowest, scores);
    case FLOAT32: return scores + some<float>(a.mask, at, count);
    case BFLOAT16: return scores + some<bfloat16>(a.mask, at, count);
    case FLOAT16: return scores + some<float16>(a.mask, at, count);
  }
  return scores;
}

// The positions of a stretch from `first` on that a row attends to, counted from there.
struct Seen {
  i64 begin, end;

  Seen(const Attention& a, const Block& block, i64 row, i64 first, i64 count) {
    const i64 last = a.causal ? block.end - block.queries + row % block.queries : block.end - 1;
    begin = block.start - first;
    if (a.window && begin < last + 1 - a.window - first) begin = last + 1 - a.window - first;
    end = least(count, last + 1 - first);
  }

  // Of the LANES from `t` on.
  bool none(i64 t) const { return t >= end || t + LANES <= begin; }
  i32 those(i64 t) const {
    i32 lane;
    for (int i = 0; i < LANES; ++i) lane[i] = i;
    return (lane < (std::int32_t)least(end - t, LANES)) & (lane >= (std::int32_t)(begin > t ? begin - t : 0));
  }
  bool all(i64 t) const { return t >= begin && t + LANES <= end; }
};

// The scores of a row, scaled, capped and masked, and the greatest of them.
static inline float finish_scores(
    const Attention& a, const Block& block, const Places& keys, const Seen& seen, i64 row, i64 first, float* scores) {
  const i64 query = block.first + row % block.queries, head = block.h * a.group + row / block.queries;
  const i64 mask = block.b * a.mask_batch + head * a.mask_head + query * a.mask_query;
  const float lowest = -__builtin_inff();
  f32 tops = everywhere(lowest);
  for (i64 t = 0; t < keys.count; t += LANES) {
    if (seen.none(t)) continue;
    f32 s = load<f32>(scores + t) * keys.scale(t) * (float)a.scale;
    if (a.softcap != 0) s = (float)a.softcap * tanh_of(s / (float)a.softcap);
    if (a.mask_kind != NONE) s = add_mask(a, s, mask + first + t, keys.count - t);
    if (!seen.all(t)) s = where(seen.those(t), s, everywhere(lowest));
    put(scores + t, s);
    tops = where(s > tops, s, tops);
  }
  return highest(tops);
}

static inline void put_weights(float* to, f32 x) { put(to, x); }
static inline void put_weights(bfloat16* to, f32 x) {
#if defined(__AVX512BF16__)
  put(to, _mm512_cvtneps_pbh((__m512)x));  // 0 below 2^-126
#else
  store(to, x, LANES);
#endif
}

// The weights of a row, times the scales of values: the sum of those before.
static inline float weigh(
    const Places& values, const Seen& seen, float base, const float* scores, Element* weights) {
  f32 sum{};
  for (i64 t = 0; t < values.count; t += LANES) {
    f32 weight = seen.none(t) ? f32{} : exp_of(load<f32>(scores + t) - base);
    sum += weight;
    put_weights(weights + t, weight * values.scale(t));
  }
  return sum_of(sum);
}

// Scores of all rows to weights: the greatest so far and the sums of weights move on, and outputs with them.
static void soften(const Attention& a, const Block& block, const Workspace& w, const Places& keys, const Places& values,
                   i64 first, float* output, float* top, float* total) {
  const i64 out = padded(values.of.size), count = keys.count;
  for (i64 r = 0; r < block.rows(); ++r) {
    const Seen seen(a, block, r, first, count);
    const float here = finish_scores(a, block, keys, seen, r, first, w.scores + r * STRETCH);
    w.higher[r] = here > top[r] ? here : top[r];
  }
  for (i64 r = 0; r < block.rows(); r += LANES) {
    f32 higher = load<f32>(w.higher + r), base = where(higher == -__builtin_inff(), 0.0f, higher);
    put(w.rescale + r, exp_of(load<f32>(top + r) - base));
    put(top + r, higher);
    put(w.higher + r, base);
  }
  for (i64 r = 0; r < block.rows(); ++r) {
    const Seen seen(a, block, r, first, count);
    const i64 at = r * STRETCH;
    const float rescale = w.rescale[r];
    total[r] = total[r] * rescale + weigh(values, seen, w.higher[r], w.scores + at, w.weights + at);
    if (rescale == 1.0f) continue;
    for (i64 d = 0; d < out; d += LANES) put(output + r * out + d, load<f32>(output + r * out + d) * rescale);
  }
}

// output [ROWS, VECTORS * LANES] += weights times words, of `count` positions.
template <int ROWS, int VECTORS>
[[gnu::flatten]] static void add_tile(
    const Element* weights, const Word* words, i64 stride, i64 count, i64 columns, float* output) {
  f32 sum[ROWS][VECTORS];
  each<ROWS>([&](auto r) {
    each<VECTORS>([&](auto v) { sum[r][v] = load<f32>(output + r * columns + v * LANES); });
  });
  for (i64 t = 0; t < count; t += DEPTH, words += stride) {
    Vector value[VECTORS];
    each<VECTORS>([&](auto v) { value[v] = get<Vector>(words + v * LANES); });
    each<ROWS>([&](auto r) {
      Vector weight = everywhere(get<Word>(weights + r * STRETCH + t));
      each<VECTORS>([&](auto v) { sum[r][v] = dot(sum[r][v], value[v], weight); });
    });
  }
  each<ROWS>([&](auto r) {
    each<VECTORS>([&](auto v) { put(output + r * columns + v * LANES, sum[r][v]); });
  });
}

template <int ROWS>
static void add_rows(const Element* weights, const Word* words, i64 stride, i64 count, i64 columns, float* output) {
  constexpr int VECTORS = LANES == 16 ? 4 : 2;
  i64 d = 0;
  for (; d + VECTORS * LANES <= columns; d += VECTORS * LANES) {
    add_tile<ROWS, VECTORS>(weights, words + d, stride, count, columns, output + d);
  }
  for (; d < columns; d += LANES) add_tile<ROWS, 1>(weights, words + d, stride, count, columns, output + d);
}

// Values of up to `most` positions from `t` of their stretch on.
struct ValueBlock {
  const Places& values;
  i64 t, most;
  Word* to;

  i64 count() const { return least(most, values.count - t); }
  // With zeros where the matrix unit multiplies 32 positions at a time.
  i64 held() const { return SQUARES ? quotient(count(), 32) * 32 : count(); }
  bool as_it_is() const { return lies_so<Word>(values.of) && t >= values.before; }
  const Word* words() const { return as_it_is() ? (const Word*)values.row(t) : to; }
  i64 stride() const { return as_it_is() ? values.of.position : padded(values.of.size); }

  void decode(i64 step, i64 steps) const {
    if (as_it_is()) return;
    const i64 columns = padded(values.of.size);
    const Share share(quotient(held(), DEPTH), step, steps);
    for (i64 i = share.begin; i < share.end; ++i) {
      const i64 at = i * DEPTH, left = count() - at;
      for (int j = 0; j < DEPTH; ++j) values.fetch(t + at + j + AHEAD);
      // A position that is not there has a weight of 0; of the matrix unit's more may be left from before.
      if (left <= 0) std::memset(to + i * columns, 0, sizeof(Word) * columns);
      else decode_value(values.row(t + at), values.row(t + at + (left > 1)), values.of.size,
                        values.found->vectors[t + at], to + i * columns);
    }
  }
};

// output [rows, columns] += weights [rows, STRETCH] times a block of values. Meanwhile another block is decoded.
template <class Other>
static void add_values(
    const Block& block, const Workspace& w, const ValueBlock& values, const Other& other, float* output) {
  const i64 columns = padded(values.values.of.size);
  const Element* weights = w.weights + values.t;
#if defined(__AMX_BF16__)
  if constexpr (SQUARES) {
    add_squares(weights, block.rows(), values.words(), values.held(), columns, output, other);
    return;
  }
#endif
  other.decode(0, 1);
  i64 r = 0;
  auto rows_of = [&](auto rows) {
    add_rows<rows>(weights + r * STRETCH, values.words(), values.stride(), values.count(), columns, output + r * columns);
    r += rows;
  };
  while (block.rows() - r >= 4) rows_of(std::integral_constant<int, 4>());
  while (block.rows() - r >= 2) rows_of(std::integral_constant<int, 2>());
  if (r < block.rows()) rows_of(std::integral_constant<int, 1>());
}

// What a part of a block gives: output [rows, columns], then the top and the total of each row.
static inline i64 partial_size(const Attention& a, const Block& block) {
  return block.held() * padded(a.value.size) + 2 * block.lines();
}

static void attend(const Attention& a, const Block& block, const Workspace& w, i64 begin, i64 end, float* partial) {
  const i64 rows = block.rows();
  const Strip key = a.strip(a.key, block.b, block.h), value = a.strip(a.value, block.b, block.h);
  const i64 columns = padded(key.size), out = padded(value.size);
  float *top = partial + block.held() * out, *total = top + block.lines();
  std::memset(partial, 0, sizeof(float) * partial_size(a, block));
  for (i64 r = 0; r < rows; ++r) {
    Element* to = SQUARES ? w.keys + r % 16 * columns : w.queries + r * columns;
    arrange_query(block.row(a.query, r), key.size, to);
    top[r] = -__builtin_inff();
#if defined(__AMX_BF16__)
    if (SQUARES && (r % 16 == 15 || r + 1 == rows)) arrange_squares(w.keys, columns, w.queries + r / 16 * 16 * columns);
#endif
  }
  end = least(end, block.end);
  if (a.window) {
    i64 unseen = block.end - block.queries + 1 - a.window - begin;
    if (unseen > 0) begin += unseen / STRETCH * STRETCH;
  }
  Places keys(key, w.places[0]), values(value, w.places[1]), next_keys(key, w.places[2]), next_values(value, w.places[3]);
  const i64 unit = SQUARES && rows > 16 ? STRETCH : 32;  // outputs of few rows are little to load
  auto keys_at = [&](const Places& from, i64 t) { return KeyBlock{from, t, w.keys + t / KEYS % 2 * KEYS * columns}; };
  auto values_at = [&](i64 t) { return ValueBlock{values, t, unit, w.words + t / unit % 2 * unit / DEPTH * out}; };
  keys.find(begin, end);
  values.find(begin, end);
  if (begin < end) keys_at(keys, 0).decode(0, 1);
  for (i64 first = begin; first < end; first += STRETCH) {
    next_keys.find(first + STRETCH, end);
    next_values.find(first + STRETCH, end);
    keys.read_scales();
    values.read_scales();
    for (i64 t = 0; t < keys.count; t += KEYS) {
      if (t + KEYS < keys.count) multiply_keys(block, w, keys_at(keys, t), keys_at(keys, t + KEYS));
      else multiply_keys(block, w, keys_at(keys, t), values_at(0));
    }
    soften(a, block, w, keys, values, first, partial, top, total);
    for (i64 t = 0; t < values.count; t += unit) {
      if (t + unit < values.count) add_values(block, w, values_at(t), values_at(t + unit), partial);
      else add_values(block, w, values_at(t), keys_at(next_keys, 0), partial);
    }
    std::swap(keys, next_keys);
    std::swap(values, next_values);
  }
}

// The parts of a block, in their order, to y; each part has `size` numbers.
static void combine(const Attention& a, const Block& block, const float* partials, i64 parts, i64 size) {
  const i64 out = padded(a.value.size);
  const i64 columns = a.value.size / HALVES, half = out / HALVES;
  Array<float> scale(parts);
  for (i64 r = 0; r < block.rows(); ++r) {
    const float *output = partials + r * out, *top = partials + block.held() * out + r, *sum = top + block.lines();
    float higher = -__builtin_inff(), total = 0;
    for (i64 p = 0; p < parts; ++p) higher = top[p * size] > higher ? top[p * size] : higher;
    const float base = higher == -__builtin_inff() ? 0.0f : higher;
    for (i64 p = 0; p < parts; ++p) {
      scale[p] = exp_of(top[p * size] - base);
      total += scale[p] * sum[p * size];
    }
    auto result = [&](i64 column) {
      f32 y{};
      for (i64 p = 0; p < parts; ++p) y += load<f32>(output + p * size + column) * scale[p];
      return y / (total == 0 ? 1.0f : total);
    };
    Query* y = block.row(a.y, r);
    for (i64 h = 0; h < HALVES; ++h, y += columns) {
      for (i64 d = 0; d < columns; d += STEP) {
        if constexpr (PAIRED) {
          const i64 at = h * half + d;
          auto rounded = [&](i64 at) { return to_bfloat16(result(at)) | to_bfloat16(result(at + LANES)) << 16; };
          u32 words[2] = {rounded(at)};
          if constexpr (BITS == 8) {
            Pairs both = together(words[0], rounded(at + 2 * LANES));
            words[0] = both.even, words[1] = both.odd;
          }
          std::memcpy(y + d, words, sizeof(Query) * least(STEP, columns - d));
        } else {
          store(y + d, result(h * half + d), columns - d);
        }
      }
    }
  }
}

extern "C" void attention(const Attention* given, int most_threads) {
  const Attention& a = *given;
  const Block largest(a, 0);
  const Plan plan(a);
  const int threads = (int)least(most_threads, 1 + plan.numbers / NUMBERS_PER_THREAD);
  const i64 tasks = a.tasks(), parts = plan.parts, size = partial_size(a, largest);
  Array<float> partials(tasks * parts * size);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Workspace w(a, largest);
#if defined(__AMX_BF16__)
    i64 configured = 0;
#endif
#pragma omp for schedule(dynamic)
    for (i64 item = tasks * parts - 1; item >= 0; --item) {  // blocks of the last queries take the longest
      const Block block(a, item / parts);
      const i64 begin = block.begin + item % parts * plan.part;
      if (begin >= block.end) continue;
#if defined(__AMX_BF16__)
      if (SQUARES && configured != block.rows()) configure_tiles(configured = block.rows());
#endif
      attend(a, block, w, begin, begin + plan.part, partials + item * size);
    }
#pragma omp for schedule(static)
    for (i64 task = 0; task < tasks; ++task) {
      const Block block(a, task);
      const i64 own = block.end > block.begin ? quotient(block.end - block.begin, plan.part) : 0;
      combine(a, block, partials + task * parts * size, own, size);
    }
#if defined(__AMX_BF16__)
    if (SQUARES) _tile_release();
#endif
  }
}
