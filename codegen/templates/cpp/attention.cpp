// y [B, heads * group, Q, Dv] = softmax(query key^T * scale + mask) value over a cache of keys and values, for few queries.
//
// All queries of a head of keys (`rows` of them) share one read of it. The context is cut into parts, as many as the
// shape says, whatever the number of threads; a thread takes a part STRETCH positions at a time, with a running softmax
// in float32, and parts are added in their order at the end:
//
//     scores [rows, STRETCH] -> weights, with the values' scales -> output [rows, Dv] and, a row, top and total
//
// With PAIRED, products are of pairs of bfloat16: neighbours in a row of keys, and neighbouring positions of values, of
// which the even columns of STEP come before the odd ones. Otherwise all numbers are float32.
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
// </decode>

constexpr bool PLAIN = !std::is_same_v<Stored, std::uint8_t>;

using Element = std::conditional_t<PAIRED, bfloat16, float>;  // what is multiplied
using Word = std::conditional_t<PAIRED, std::uint32_t, float>;  // values of a column: of two positions, or of one
using Vector = std::conditional_t<PAIRED, u32, f32>;            // LANES of them

constexpr int STEP = PAIRED ? 2 * LANES : LANES;  // columns that are decoded at a time
constexpr int HALVES = BITS == 4 ? 2 : 1;        // low and high halves of bytes
constexpr int DEPTH = PAIRED ? 2 : 1;             // positions of a word
constexpr i64 STRETCH = 128;                     // positions of a step of the running softmax
constexpr i64 UNIT = 32;                         // positions whose values are decoded at a time
constexpr i64 PARTS = 64;                        // all heads of all sequences together, if the context is long enough

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

// Keys or values of one head of one sequence.
struct Strip {
  const Stored* rows;
  const float* scale;
  i64 stride, scale_stride, size;

  const Stored* row(i64 position) const { return rows + position * stride; }
};

// Keys or values of all: strides are in elements, those of scales 0 where a scale is shared.
struct Half {
  const Stored* codes;
  const float* scale;
  i64 batch, head, position;
  i64 scale_batch, scale_head, scale_position;
  i64 size;

  Strip strip(i64 b, i64 h) const {
    return {codes + b * batch + h * head, scale + b * scale_batch + h * scale_head, position, scale_position, size};
  }
};

enum Mask : i64 { NONE, BOOLEAN, FLOAT32, BFLOAT16, FLOAT16 };

struct Attention {
  const Query* query;  // [batch, heads, rows, key.size], where row r is query r % queries of head r / queries
  Query* y;            // [batch, heads, rows, value.size]
  Half key, value;
  const void* mask;
  i64 mask_kind, mask_batch, mask_head, mask_query;  // strides in elements; that of positions is 1
  i64 batch, heads, group, queries;
  i64 length;  // positions that are attended to
  double scale, softcap;

  i64 rows() const { return group * queries; }
  i64 part() const {
    i64 steps = quotient(length, STRETCH), parts = least(steps, quotient(PARTS, batch * heads));
    return parts > 1 ? quotient(steps, parts) * STRETCH : length > 0 ? length : 1;
  }
  i64 parts() const { return length > 0 ? quotient(length, part()) : 1; }
};

// `from`, or where the LANES numbers from there on would go past `count`, a copy of what is there.
template <class T>
struct Some {
  T copy[LANES];
  const T* from;

  Some(const T* given, i64 count) : from(given) {
    if (count >= LANES) return;
    std::memset(copy, 0, sizeof(copy));
    std::memcpy(copy, given, count * sizeof(T));
    from = copy;
  }
};

template <class T>
static inline f32 some(const void* from, i64 first, i64 count) {
  return values(Some<T>((const T*)from + first, count).from);
}

// STEP numbers of a row, of which `count` are there, in 16 bits each: neighbours in the halves of a lane.
static inline u32 neighbours(const std::uint16_t* from, i64 count) {
  if (count >= STEP) return get<u32>(from);
  u32 found{};
  std::memcpy(&found, from, count * sizeof(*from));
  return found;
}
static inline u32 neighbours(const bfloat16* from, i64 count) { return neighbours(&from->bits, count); }
static inline u32 neighbours(const std::uint8_t* from, i64 count) {
  typedef std::uint8_t bytes __attribute__((vector_size(2 * LANES)));
  typedef std::uint16_t words __attribute__((vector_size(4 * LANES)));
  bytes found{};
  if (count >= STEP) found = get<bytes>(from);
  else std::memcpy(&found, from, count);
  return (u32)__builtin_convertvector(found, words);
}

// The bfloat16 of codes, or of numbers as they are; of 4-bit codes those of one half.
template <int HALF>
static inline u32 pair_of(u32 stored) {
  if constexpr (PLAIN) {
    return stored;
  } else {
    u32 codes = stored >> (4 * HALF);
    if constexpr (HALVES > 1 && MASKED) codes &= 0x000f000fu;
    return decode_pair(codes);
  }
}

template <int HALF, class T>
static inline f32 number_of(const T* from, i64 count) {
  Some<T> there(from, count);
  if constexpr (PLAIN) {
    return values(there.from);
  } else {
    i32 codes = widen(load<u8>(there.from)) >> (4 * HALF);
    if constexpr (HALVES > 1 && MASKED) codes &= 15;
    return decode(codes);
  }
}

// One row of keys.
template <class T>
static inline void decode_key(const T* row, i64 size, Element* to) {
  const i64 columns = size / HALVES, half = padded(size) / HALVES;
  for (i64 d = 0; d < columns; d += STEP) {
    if constexpr (PAIRED) {
      u32 stored = neighbours(row + d, columns - d);
      each<HALVES>([&](auto h) { put(to + h * half + d, pair_of<h>(stored)); });
    } else {
      each<HALVES>([&](auto h) { put(to + h * half + d, number_of<h>(row + d, columns - d)); });
    }
  }
}

// The rows of values of up to DEPTH positions as words; what is not there is that of code 0.
template <class T>
static inline void decode_value(const T* row, const T* next, i64 size, Word* to) {
  const i64 columns = size / HALVES, half = padded(size) / HALVES;
  for (i64 d = 0; d < columns; d += STEP) {
    if constexpr (PAIRED) {
      u32 first = neighbours(row + d, columns - d), second{};
      if (next != nullptr) second = neighbours(next + d, columns - d);
      u32 even = (first & 0xffffu) | second << 16, odd = first >> 16 | (second & 0xffff0000u);
      each<HALVES>([&](auto h) {
        put(to + h * half + d, pair_of<h>(even));
        put(to + h * half + d + LANES, pair_of<h>(odd));
      });
    } else {
      each<HALVES>([&](auto h) { put(to + h * half + d, number_of<h>(row + d, columns - d)); });
    }
  }
}

template <class To, class From>
static inline To converted(From x) {
  if constexpr (std::is_same_v<To, From>) return x;
  else return number(x);
}

// A row of queries as keys are decoded, with zeros where they have no column.
static inline void arrange_query(const Query* row, i64 size, Element* to) {
  const i64 columns = size / HALVES, half = padded(size) / HALVES;
  std::memset(to, 0, sizeof(Element) * padded(size));
  for (i64 d = 0; d < size; ++d) {
    to[d / columns * half + d % columns] = converted<Element>(row[d]);
  }
}

// What a thread works with.
struct Workspace {
  Array<Element> queries, weights, keys;
  Array<Word> words;
  Array<float> scores;

  explicit Workspace(const Attention& a)
      : queries(a.rows() * padded(a.key.size)), weights(a.rows() * STRETCH), keys(LANES * padded(a.key.size)),
        words(UNIT / DEPTH * padded(a.value.size)), scores(a.rows() * STRETCH) {}
};

// Whether rows are multiplied from where they lie.
template <class To>
static inline bool as_it_is(i64 size) {
  return PLAIN && std::is_same_v<Stored, To> && size % STEP == 0;
}

// The products of a query and LANES keys.
static inline f32 products(const Element* query, const Element* keys, i64 stride, i64 columns) {
  f32 sum[LANES] = {};
  for (i64 d = 0; d < columns; d += STEP) {
    Vector q = get<Vector>(query + d);
    each<LANES>([&](auto t) { sum[t] = dot(sum[t], get<Vector>(keys + t * stride + d), q); });
  }
  return sums_of(sum);
}

// Products of all rows and `count` keys from position `first` on: scores [rows, STRETCH].
static void multiply_keys(const Attention& a, const Workspace& w, const Strip& keys, i64 first, i64 count) {
  const i64 columns = padded(keys.size);
  for (i64 t = 0; t < count; t += LANES) {
    const Element* here = w.keys;
    i64 stride = columns;
    if (as_it_is<Element>(keys.size) && t + LANES <= count) {
      here = (const Element*)keys.row(first + t);
      stride = keys.stride;
    } else {
      i64 end = least(LANES, count - t);
      for (i64 i = 0; i < end; ++i) decode_key(keys.row(first + t + i), keys.size, w.keys + i * columns);
    }
    for (i64 r = 0; r < a.rows(); ++r) {
      put(w.scores + r * STRETCH + t, products(w.queries + r * columns, here, stride, columns));
    }
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

static inline f32 scales(const Strip& strip, i64 at, i64 count) {
  if constexpr (PLAIN) return everywhere(1.0f);
  return strip.scale_stride == 0 ? everywhere(*strip.scale) : some<float>(strip.scale, at, count);
}

// Scores of a row to weights: the greatest so far and the sum of weights move on.
static inline void soften(const Attention& a, const Workspace& w, const Strip& keys, const Strip& values, i64 row,
                          i64 mask, i64 first, i64 count, float* output, float* top, float* total) {
  float* scores = w.scores + row * STRETCH;
  i32 lane;
  for (int i = 0; i < LANES; ++i) lane[i] = i;
  f32 tops = everywhere(*top);
  for (i64 t = 0; t < count; t += LANES) {
    f32 s = load<f32>(scores + t) * scales(keys, first + t, count - t) * (float)a.scale;
    if (a.softcap != 0) s = (float)a.softcap * tanh_of(s / (float)a.softcap);
    s = add_mask(a, s, mask + first + t, count - t);
    s = where(lane < (std::int32_t)(count - t), s, everywhere(-__builtin_inff()));
    put(scores + t, s);
    tops = where(s > tops, s, tops);
  }
  const float higher = highest(tops), base = higher == -__builtin_inff() ? 0.0f : higher;
  const float rescale = exp_of(*top - base);
  f32 sum{};
  for (i64 t = 0; t < count; t += LANES) {
    f32 weight = exp_of(load<f32>(scores + t) - base);
    sum += weight;
    store(w.weights + row * STRETCH + t, weight * scales(values, first + t, count - t), LANES);
  }
  *total = *total * rescale + sum_of(sum);
  *top = higher;
  if (rescale == 1.0f) return;
  for (i64 d = 0; d < padded(values.size); d += LANES) put(output + d, load<f32>(output + d) * rescale);
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

// output [rows, columns] += weights [rows, STRETCH] times the values of `count` positions from `first` on.
static void add_values(
    const Attention& a, const Workspace& w, const Strip& values, i64 first, i64 count, float* output) {
  const i64 columns = padded(values.size);
  for (i64 t = 0; t < count; t += UNIT) {
    const i64 end = least(UNIT, count - t);
    const Word* words = w.words;
    i64 stride = columns;
    if (as_it_is<Word>(values.size)) {
      words = (const Word*)values.row(first + t);
      stride = values.stride;
    } else {
      for (i64 i = 0; i < end; i += DEPTH) {
        const Stored* next = i + 1 < end ? values.row(first + t + i + 1) : nullptr;
        decode_value(values.row(first + t + i), next, values.size, w.words + i / DEPTH * columns);
      }
    }
    i64 r = 0;
    auto rows_of = [&](auto rows) {
      add_rows<rows>(w.weights + r * STRETCH + t, words, stride, end, columns, output + r * columns);
      r += rows;
    };
    while (a.rows() - r >= 4) rows_of(std::integral_constant<int, 4>());
    while (a.rows() - r >= 2) rows_of(std::integral_constant<int, 2>());
    if (r < a.rows()) rows_of(std::integral_constant<int, 1>());
  }
}

// What a part gives: output [rows, columns], then the top and the total of each row.
static inline i64 partial_size(const Attention& a) { return a.rows() * (padded(a.value.size) + 2); }

static void attend(const Attention& a, const Workspace& w, i64 pair, i64 begin, i64 end, float* partial) {
  const i64 rows = a.rows(), b = pair / a.heads, h = pair % a.heads;
  const Strip keys = a.key.strip(b, h), values = a.value.strip(b, h);
  const i64 columns = padded(keys.size), out = padded(values.size);
  float *top = partial + rows * out, *total = top + rows;
  std::memset(partial, 0, sizeof(float) * partial_size(a));
  for (i64 r = 0; r < rows; ++r) {
    arrange_query(a.query + (pair * rows + r) * keys.size, keys.size, w.queries + r * columns);
    top[r] = -__builtin_inff();
  }
  for (i64 first = begin; first < end; first += STRETCH) {
    const i64 count = least(STRETCH, end - first);
    multiply_keys(a, w, keys, first, count);
    for (i64 r = 0; r < rows; ++r) {
      i64 head = h * a.group + r / a.queries;
      i64 mask = b * a.mask_batch + head * a.mask_head + r % a.queries * a.mask_query;
      soften(a, w, keys, values, r, mask, first, count, partial + r * out, top + r, total + r);
    }
    add_values(a, w, values, first, count, partial);
  }
}

// The parts of a head of keys, in their order, to y.
static void combine(const Attention& a, i64 pair, const float* partials) {
  const i64 rows = a.rows(), out = padded(a.value.size), size = partial_size(a), parts = a.parts();
  const i64 columns = a.value.size / HALVES, half = out / HALVES;
  partials += pair * parts * size;
  Array<float> scale(parts);
  for (i64 r = 0; r < rows; ++r) {
    const float *output = partials + r * out, *top = partials + rows * out + r, *sum = top + rows;
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
    Query* y = a.y + (pair * rows + r) * a.value.size;
    for (i64 h = 0; h < HALVES; ++h, y += columns) {
      for (i64 d = 0; d < columns; d += STEP) {
        if constexpr (PAIRED) {
          u32 both = to_bfloat16(result(h * half + d)) | to_bfloat16(result(h * half + d + LANES)) << 16;
          std::memcpy(y + d, &both, sizeof(Query) * least(STEP, columns - d));
        } else {
          store(y + d, result(h * half + d), columns - d);
        }
      }
    }
  }
}

// Whether the operating system lets this process use what the kernel needs: 0 if so.
extern "C" int prepare() { return 0; }

extern "C" void attention(const Attention* given, int threads) {
  const Attention& a = *given;
  const i64 pairs = a.batch * a.heads, parts = a.parts(), part = a.part(), size = partial_size(a);
  Array<float> partials(pairs * parts * size);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Workspace w(a);
#pragma omp for schedule(static)
    for (i64 task = 0; task < pairs * parts; ++task) {
      i64 begin = task % parts * part;
      attend(a, w, task / parts, begin, least(begin + part, a.length), partials + task * size);
    }
#pragma omp for schedule(static)
    for (i64 pair = 0; pair < pairs; ++pair) combine(a, pair, partials);
  }
}
