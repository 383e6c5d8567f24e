// y [M, N] = x [M, K] @ weight [N, K].T for a packed weight in layout rows16, of which a vector holds LANES rows.
//
// A group's codes are multiplied by x as they decode, and the sum by the group's scale; zero points and offsets come in
// by the sum of the group's x:
//
//     y[m, n] = sum over groups of (sum_k decode(code) x - zero_point sum_k x) * S    or    (...) * S + O sum_k x
//
// Sums are float32. A bfloat16 x is multiplied in pairs of columns by bfloat16 weights, any other as float32.
//
// Stands for itself where the markers are: 4-bit integers with a bfloat16 scale a group, x in float32.
#include "vector.h"

// <constants>
using Element = float;
using Scale = bfloat16;
using SuperScale = float;
constexpr bool ZERO_POINT = false;
constexpr bool OFFSET = false;
constexpr bool SUPER_SCALE = false;
constexpr int BITS = 4;
constexpr int UNIT = 32;         // columns at a time, a divisor of a group's
constexpr bool MASKED = true;    // whether decode needs the bits above a code to be 0
constexpr float PAIR_UNIT = 1;   // a pair's numbers are those of codes times this
constexpr float PAIR_MORE = 0;   // and this
// </constants>

// <decode>
static inline f32 decode(i32 code) {
  return to_f32(code) - 8.0f;
}

// Two codes, from bit FROM of the halves of each lane on, as bfloat16 there.
template <int FROM = 0>
static inline u32 decode_pair(u32 codes) {
  codes >>= FROM;
  u32 low = as_u32(decode((i32)(codes & 255))), high = as_u32(decode((i32)(codes >> 16 & 255)));
  return low >> 16 | (high & 0xffff0000u);
}
// </decode>

#include "weight.h"

constexpr bool SUMS = ZERO_POINT || OFFSET || PAIR_MORE != 0;  // whether the sum of x comes in

// Columns 4 STEP + 2 C + 0, 1 of a unit as decode_pair has them.
template <int STEP, int C>
static inline u32 pair(const std::uint32_t* codes, i64 unit) {
  if constexpr (!ONE_PLANE) return decode_pair<8 * C>(quad<STEP>(codes, unit));
  return decode_pair<8 * C + FIELD<STEP, BITS>>(word<STEP, BITS, 0>(codes, unit));
}

// Where the product goes: y [M, N], in bfloat16 or float32.
struct Result {
  void* y;
  bool half;
  i64 n;

  void put(i64 row, i64 column, f32 x) const {
    if (half) store((bfloat16*)y + row * n + column, x, n - column);
    else store((float*)y + row * n + column, x, n - column);
  }

  // Of BLOCKS blocks of columns, whose numbers are `apart`.
  template <int BLOCKS>
  void put_blocks(i64 row, i64 column, const float* x, i64 apart) const {
    if (BLOCKS == 2 && half && column + 2 * BLOCK <= n) {
      return store_pair((bfloat16*)y + row * n + column, load<f32>(x), load<f32>(x + apart));
    }
    for (int b = 0; b < BLOCKS && column + b * BLOCK < n; ++b) put(row, column + b * BLOCK, load<f32>(x + b * apart));
  }
};

// What a group's codes are combined with, for LANES rows.
struct Group {
  f32 scale, zero_point, offset;

  Group() = default;
  Group(const Weight& w, const Divided& divided, i64 row, i64 group) {
    scale = scale_of(w.scale, w.super_scale, divided, row, group);
    if constexpr (ZERO_POINT) zero_point = values(w.zero_point + of_group(row, group, divided.groups));
    if constexpr (OFFSET) offset = scale_of(w.offset, w.super_offset, divided, row, group);
  }

  // total + the product of a group's weights and x, whose product with the codes is sum and whose own sum is x_sum.
  f32 add(f32 total, f32 sum, const float* x_sum) const {
    const f32 of_pairs = scale * (1 / PAIR_UNIT);
    if constexpr (OFFSET) return total + sum * of_pairs + (offset - PAIR_MORE * of_pairs) * *x_sum;
    if constexpr (ZERO_POINT) sum -= (zero_point * PAIR_UNIT + PAIR_MORE) * *x_sum;
    else if constexpr (SUMS) sum -= everywhere(PAIR_MORE) * *x_sum;
    return total + sum * of_pairs;
  }

  f32 weight(f32 value) const {
    if constexpr (ZERO_POINT) value -= zero_point;
    value *= scale;
    if constexpr (OFFSET) value += offset;
    return value;
  }
};

// The value of column J of a quad, which lies in byte 2 (J % 2) + J / 2.
template <int J>
static inline f32 value(u32 quad) {
  u32 code = quad >> (16 * (J % 2) + 8 * (J / 2));
  if constexpr (MASKED) code &= 255;
  return decode((i32)code);
}

// Rows of x times the weight's rows from `first` on.
template <int VECTORS, int ROWS>
[[gnu::flatten]] static void tile(
    const Weight& w, const Element* x, i64 stride, const float* sums, i64 first, const Result& result, i64 from) {
  const std::uint32_t* codes[VECTORS];
  each<VECTORS>([&](auto v) { codes[v] = codes_of(w, first + v * LANES); });
  f32 total[VECTORS][ROWS] = {};
  const Divided divided(w);
  const i64 in_group = w.columns / UNIT;
  i64 unit = 0;
  for (i64 group = 0; group < divided.groups; ++group) {
    f32 sum[VECTORS][ROWS] = {};
    const i64 end = unit + in_group < divided.units ? unit + in_group : divided.units;
    for (; unit < end; ++unit) {
      each<UNIT / 4>([&](auto step) {
        const Element* x_here = x + unit * UNIT + 4 * step;
        if constexpr (std::is_same_v<Element, bfloat16>) {
          each<2>([&](auto c) {
            u32 weight[VECTORS];
            each<VECTORS>([&](auto v) { weight[v] = pair<step, c>(codes[v], unit); });
            each<ROWS>([&](auto m) {
              std::uint32_t pair;
              std::memcpy(&pair, x_here + m * stride + 2 * c, sizeof(pair));
              each<VECTORS>([&](auto v) { sum[v][m] = dot(sum[v][m], weight[v], everywhere(pair)); });
            });
          });
        } else {
          u32 codes_here[VECTORS];
          each<VECTORS>([&](auto v) { codes_here[v] = quad<step>(codes[v], unit); });
          each<4>([&](auto j) {
            f32 weight[VECTORS];
            each<VECTORS>([&](auto v) { weight[v] = value<j>(codes_here[v]); });
            each<ROWS>([&](auto m) {
              float other = number(x_here[m * stride + j]);
              each<VECTORS>([&](auto v) { sum[v][m] += weight[v] * other; });
            });
          });
        }
      });
    }
    each<VECTORS>([&](auto v) {
      Group g(w, divided, first + v * LANES, group);
      each<ROWS>([&](auto m) { total[v][m] = g.add(total[v][m], sum[v][m], sums + m * divided.groups + group); });
    });
  }
  each<VECTORS>([&](auto v) {
    i64 row = first + v * LANES;
    if (row < w.n) each<ROWS>([&](auto m) { result.put(from + m, row, total[v][m]); });
  });
}

template <int VALUE>
using constant = std::integral_constant<int, VALUE>;

// sums[row, group] of x [m, stride], for all rows; to be called by all threads of a team.
static void sum_groups(const Weight& w, const Element* x, i64 m, i64 stride, float* sums) {
#pragma omp for schedule(static)
  for (i64 row = 0; row < m; ++row) {
    for (i64 group = 0; group < w.groups(); ++group) {
      const i64 end = (group + 1) * w.columns < stride ? (group + 1) * w.columns : stride;
      f32 sum{};
      for (i64 k = group * w.columns; k < end; k += LANES) sum += values(x + row * stride + k);
      sums[row * w.groups() + group] = sum_of(sum);
    }
  }
}

// The product of one row of x: eight streams of codes at a time, which memory delivers faster than fewer.
static void multiply_row(const Weight& w, const Element* x, const float* sums, const Result& result) {
  const i64 padded = w.padded(), chunk = 8 * LANES;
#pragma omp for schedule(static)
  for (i64 first = 0; first < padded; first += chunk) {
    const i64 end = first + chunk < padded ? first + chunk : padded;
    i64 at = first;
    for (; end - at >= 8 * LANES; at += 8 * LANES) tile<8, 1>(w, x, 0, sums, at, result, 0);
    for (; end - at >= 4 * LANES; at += 4 * LANES) tile<4, 1>(w, x, 0, sums, at, result, 0);
    for (; at < end; at += LANES) tile<1, 1>(w, x, 0, sums, at, result, 0);
  }
}

// The product by vectors.
static void multiply(
    const Element* x, i64 m, i64 stride, const Weight& w, float* scratch, const Result& result, int threads) {
  const i64 groups = w.groups(), padded = w.padded(), chunk = 4 * LANES;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    if (SUMS) sum_groups(w, x, m, stride, scratch);
    if (m == 1) multiply_row(w, x, scratch, result);
#pragma omp for schedule(static)
    for (i64 first = 0; first < (m == 1 ? 0 : padded); first += chunk) {
      i64 row = 0;
      auto rows_of = [&](auto vectors, auto rows, i64 at) {
        tile<vectors, rows>(w, x + row * stride, stride, scratch + row * groups, at, result, row);
      };
      if (first + chunk <= padded) {
        for (; m - row >= 4; row += 4) rows_of(constant<4>(), constant<4>(), first);
        for (; m - row >= 2; row += 2) rows_of(constant<4>(), constant<2>(), first);
        for (; m > row; ++row) rows_of(constant<4>(), constant<1>(), first);
      }
      for (; row < m; ++row) {
        for (i64 at = first; at < padded; at += LANES) rows_of(constant<1>(), constant<1>(), at);
      }
    }
  }
}

#if defined(__AMX_BF16__)
#include "gemm_squares.h"
#endif

// x is [m, stride], where stride is K rounded up to a multiple of 32 and columns from K on are 0; scratch is of
// m (stride + groups) floats, and of those for 16 rows at least; y is bfloat16 if `half`, else float32.
extern "C" void gemm(
    const Element* x, i64 m, i64 stride, const Weight* weight, float* scratch, void* y, int half, int threads) {
  const Result result = {y, half != 0, weight->n};
#if defined(__AMX_BF16__)
  if constexpr (std::is_same_v<Element, bfloat16>) {
    multiply_by_squares(x, m, stride, *weight, scratch, result, threads);
    return;
  }
#endif
  multiply(x, m, stride, *weight, scratch, result, threads);
}

// weight[first : first + count].T as Element [K, count], or its codes as int8 without scales; count is a multiple of 16.
template <class Out>
[[gnu::flatten]] static void decode_rows(const Weight& w, i64 row, Out* out, i64 count) {
  const std::uint32_t* codes = codes_of(w, row);
  const Divided divided(w);
  const i64 in_group = w.columns / UNIT;
  i64 unit = 0;
  for (i64 group = 0; group < divided.groups; ++group) {
    Group g(w, divided, row, group);
    const i64 end = unit + in_group < divided.units ? unit + in_group : divided.units;
    for (; unit < end; ++unit) {
      each<UNIT / 4>([&](auto step) {
        u32 here = quad<step>(codes, unit);
        each<4>([&](auto j) {
          i64 k = unit * UNIT + 4 * step + j;
          f32 weight = value<j>(here);
          if constexpr (!std::is_same_v<Out, std::int8_t>) weight = g.weight(weight);
          if (k < w.k) store(out + k * count, weight, LANES);
        });
      });
    }
  }
}

template <class Out>
static void decode_all(const Weight& w, i64 first, i64 count, Out* out, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (i64 row = 0; row < count; row += LANES) decode_rows(w, first + row, out + row, count);
}

extern "C" void decode(const Weight* weight, i64 first, i64 count, Element* out, int threads) {
  decode_all(*weight, first, count, out, threads);
}

// <codes>
// </codes>
