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
// </constants>

// <decode>
static inline f32 decode(i32 code) {
  return to_f32(code) - 8.0f;
}

// Two codes, in the lowest bits of the halves of each lane, as bfloat16 there.
static inline u32 decode_pair(u32 codes) {
  u32 low = as_u32(decode((i32)(codes & 255))), high = as_u32(decode((i32)(codes >> 16 & 255)));
  return low >> 16 | (high & 0xffff0000u);
}
// </decode>

#include "weight.h"

// What a group's codes are combined with, for LANES rows.
struct Group {
  f32 scale, zero_point, offset;

  Group(const Weight& w, i64 row, i64 group) {
    scale = scale_of(w, w.scale, w.super_scale, row, group);
    if constexpr (ZERO_POINT) zero_point = values(w.zero_point + of_group(row, group, w.groups()));
    if constexpr (OFFSET) offset = scale_of(w, w.offset, w.super_offset, row, group);
  }

  // total + the product of a group's weights and x, whose product with the codes is sum and whose own sum is x_sum.
  f32 add(f32 total, f32 sum, const float* x_sum) const {
    if constexpr (ZERO_POINT) sum -= zero_point * *x_sum;
    total += sum * scale;
    if constexpr (OFFSET) total += offset * *x_sum;
    return total;
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
    const Weight& w, const Element* x, i64 stride, const float* sums, i64 first, float* y) {
  const std::uint32_t* codes[VECTORS];
  each<VECTORS>([&](auto v) { codes[v] = codes_of(w, first + v * LANES); });
  f32 total[VECTORS][ROWS] = {};
  i64 unit = 0;
  for (i64 group = 0; group < w.groups(); ++group) {
    f32 sum[VECTORS][ROWS] = {};
    i64 left = w.units() - unit;
    i64 end = unit + (left < w.columns / UNIT ? left : w.columns / UNIT);
    for (; unit < end; ++unit) {
      each<UNIT / 4>([&](auto step) {
        u32 codes_here[VECTORS];
        each<VECTORS>([&](auto v) { codes_here[v] = quad<step>(codes[v], unit); });
        const Element* x_here = x + unit * UNIT + 4 * step;
        if constexpr (std::is_same_v<Element, bfloat16>) {
          each<2>([&](auto c) {
            u32 weight[VECTORS];
            each<VECTORS>([&](auto v) { weight[v] = decode_pair(codes_here[v] >> (8 * c)); });
            each<ROWS>([&](auto m) {
              std::uint32_t pair;
              std::memcpy(&pair, x_here + m * stride + 2 * c, sizeof(pair));
              each<VECTORS>([&](auto v) { sum[v][m] = dot(sum[v][m], weight[v], everywhere(pair)); });
            });
          });
        } else {
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
      Group g(w, first + v * LANES, group);
      each<ROWS>([&](auto m) { total[v][m] = g.add(total[v][m], sum[v][m], sums + m * w.groups() + group); });
    });
  }
  each<VECTORS>([&](auto v) {
    i64 row = first + v * LANES;
    if (row < w.n) each<ROWS>([&](auto m) { store(y + m * w.n + row, total[v][m], w.n - row); });
  });
}

template <int VALUE>
using constant = std::integral_constant<int, VALUE>;

// sums[row, group] of x [m, stride], for all rows; to be called by all threads of a team.
static void sum_groups(const Weight& w, const Element* x, i64 m, i64 stride, float* sums) {
#pragma omp for schedule(static)
  for (i64 row = 0; row < m; ++row) {
    for (i64 group = 0; group < w.groups(); ++group) {
      i64 end = (group + 1) * w.columns < w.k ? (group + 1) * w.columns : w.k;
      float sum = 0;
      for (i64 k = group * w.columns; k < end; ++k) sum += number(x[row * stride + k]);
      sums[row * w.groups() + group] = sum;
    }
  }
}

// The product of one row of x: eight streams of codes at a time, which memory delivers faster than fewer.
static void multiply_row(const Weight& w, const Element* x, const float* sums, float* y) {
  const i64 padded = w.padded(), chunk = 8 * LANES;
#pragma omp for schedule(static)
  for (i64 first = 0; first < padded; first += chunk) {
    const i64 end = first + chunk < padded ? first + chunk : padded;
    i64 at = first;
    for (; end - at >= 8 * LANES; at += 8 * LANES) tile<8, 1>(w, x, 0, sums, at, y);
    for (; end - at >= 4 * LANES; at += 4 * LANES) tile<4, 1>(w, x, 0, sums, at, y);
    for (; at < end; at += LANES) tile<1, 1>(w, x, 0, sums, at, y);
  }
}

// The product by vectors.
static void multiply(
    const Element* x, i64 m, i64 stride, const Weight& w, float* scratch, float* y, int threads) {
  const i64 groups = w.groups(), padded = w.padded(), chunk = 4 * LANES;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    if (ZERO_POINT || OFFSET) sum_groups(w, x, m, stride, scratch);
    if (m == 1) multiply_row(w, x, scratch, y);
#pragma omp for schedule(static)
    for (i64 first = 0; first < (m == 1 ? 0 : padded); first += chunk) {
      i64 row = 0;
      auto rows_of = [&](auto vectors, auto rows, i64 at) {
        tile<vectors, rows>(w, x + row * stride, stride, scratch + row * groups, at, y + row * w.n);
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
// The product by the matrix unit. Its tiles 0 to 3 are sums [rows of x, 16 rows of the weight], 4 and 5 are up to 32
// rows of x [rows, UNIT], 6 and 7 pairs of columns of 16 rows of the weight [UNIT / 2, 16, 2], as decode_pair has them.
static void configure_tiles(int rows) {
  struct alignas(64) {
    std::uint8_t palette = 1, start = 0, reserved[14] = {};
    std::uint16_t bytes[16] = {};
    std::uint8_t rows[16] = {};
  } shape;
  auto set = [&](int tile, int count, int bytes) {
    shape.rows[tile] = (std::uint8_t)count;
    shape.bytes[tile] = (std::uint16_t)(count ? bytes : 0);
  };
  int low = rows < 16 ? rows : 16;
  for (int tile : {0, 2}) set(tile, low, 64), set(tile + 1, rows - low, 64);
  set(4, low, 2 * UNIT), set(5, rows - low, 2 * UNIT);
  set(6, UNIT / 2, 64), set(7, UNIT / 2, 64);
  asm volatile("" ::"r"(&shape) : "memory");  // all of it is read
  _tile_loadconfig(&shape);
}

// As `tile`, for x [units, rows, UNIT].
template <int BLOCKS, int HALVES>
[[gnu::flatten]] static void square(
    const Weight& w, const Element* x, int rows, const float* sums, i64 first, float* y) {
  const std::uint32_t* codes[BLOCKS];
  each<BLOCKS>([&](auto b) { codes[b] = codes_of(w, first + b * BLOCK); });
  alignas(64) std::uint32_t decoded[2][BLOCKS][UNIT / 2][BLOCK];
  alignas(64) float sum[BLOCKS][16 * HALVES][BLOCK];
  f32 total[BLOCKS][16 * HALVES] = {};
  auto decode_unit = [&](i64 unit) {
    each<BLOCKS>([&](auto b) {
      each<UNIT / 4>([&](auto step) {
        u32 here = quad<step>(codes[b], unit);
        each<2>([&](auto c) {
          u32 pair = decode_pair(here >> (8 * c));
          std::memcpy(decoded[unit % 2][b][2 * step + c], &pair, sizeof(pair));
        });
      });
    });
  };
  decode_unit(0);
  i64 unit = 0;
  for (i64 group = 0; group < w.groups(); ++group) {
    _tile_zero(0);
    if constexpr (HALVES > 1) _tile_zero(1);
    if constexpr (BLOCKS > 1) _tile_zero(2);
    if constexpr (BLOCKS > 1 && HALVES > 1) _tile_zero(3);
    i64 left = w.units() - unit;
    i64 end = unit + (left < w.columns / UNIT ? left : w.columns / UNIT);
    for (; unit < end; ++unit) {
      if (unit + 1 < w.units()) decode_unit(unit + 1);
      asm volatile("" ::"r"(decoded), "r"(x) : "memory");  // tiles read what was stored above
      const Element* x_here = x + unit * rows * UNIT;
      _tile_loadd(4, x_here, 2 * UNIT);
      if constexpr (HALVES > 1) _tile_loadd(5, x_here + 16 * UNIT, 2 * UNIT);
      _tile_loadd(6, decoded[unit % 2][0], 64);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (HALVES > 1) _tile_dpbf16ps(1, 5, 6);
      if constexpr (BLOCKS > 1) {
        _tile_loadd(7, decoded[unit % 2][1], 64);
        _tile_dpbf16ps(2, 4, 7);
        if constexpr (HALVES > 1) _tile_dpbf16ps(3, 5, 7);
      }
    }
    asm volatile("" ::"r"(sum) : "memory");
    _tile_stored(0, sum[0][0], 64);
    if constexpr (HALVES > 1) _tile_stored(1, sum[0][16], 64);
    if constexpr (BLOCKS > 1) _tile_stored(2, sum[1][0], 64);
    if constexpr (BLOCKS > 1 && HALVES > 1) _tile_stored(3, sum[1][16], 64);
    each<BLOCKS>([&](auto b) {
      Group g(w, first + b * BLOCK, group);
      for (int m = 0; m < rows; ++m) {
        total[b][m] = g.add(total[b][m], load<f32>(sum[b][m]), sums + m * w.groups() + group);
      }
    });
  }
  each<BLOCKS>([&](auto b) {
    i64 row = first + b * BLOCK;
    if (row < w.n) for (int m = 0; m < rows; ++m) store(y + m * w.n + row, total[b][m], w.n - row);
  });
}

static void multiply_by_squares(
    const Element* x, int rows, i64 stride, const Weight& w, float* scratch, float* y, int threads) {
  const i64 padded = w.padded();
  Element* arranged = reinterpret_cast<Element*>(scratch + rows * w.groups());
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    if (ZERO_POINT || OFFSET) sum_groups(w, x, rows, stride, scratch);
#pragma omp for schedule(static)
    for (i64 unit = 0; unit < w.units(); ++unit) {
      for (int m = 0; m < rows; ++m) {
        std::memcpy(arranged + (unit * rows + m) * UNIT, x + m * stride + unit * UNIT, sizeof(Element) * UNIT);
      }
    }
    configure_tiles(rows);
#pragma omp for schedule(static)
    for (i64 first = 0; first < padded; first += 2 * BLOCK) {
      auto blocks_of = [&](auto blocks, auto halves) {
        square<blocks, halves>(w, arranged, rows, scratch, first, y);
      };
      if (first + 2 * BLOCK <= padded) {
        rows > 16 ? blocks_of(constant<2>(), constant<2>()) : blocks_of(constant<2>(), constant<1>());
      } else {
        rows > 16 ? blocks_of(constant<1>(), constant<2>()) : blocks_of(constant<1>(), constant<1>());
      }
    }
    _tile_release();
  }
}
#endif

// x is [m, stride], where stride is K rounded up to a multiple of 32 and columns from K on are 0; scratch is of
// m (stride + groups) floats.
extern "C" void gemm(
    const Element* x, i64 m, i64 stride, const Weight* weight, float* scratch, float* y, int threads) {
#if defined(__AMX_BF16__)
  if constexpr (std::is_same_v<Element, bfloat16>) {
    if (m > 1) {
      for (i64 row = 0; row < m; row += 32) {
        int rows = (int)(m - row < 32 ? m - row : 32);
        multiply_by_squares(x + row * stride, rows, stride, *weight, scratch, y + row * weight->n, threads);
      }
      return;
    }
  }
#endif
  multiply(x, m, stride, *weight, scratch, y, threads);
}

// weight[first : first + count].T as Element [K, count], or its codes as int8 without scales; count is a multiple of 16.
template <class Out>
[[gnu::flatten]] static void decode_rows(const Weight& w, i64 row, Out* out, i64 count) {
  const std::uint32_t* codes = codes_of(w, row);
  i64 unit = 0;
  for (i64 group = 0; group < w.groups(); ++group) {
    Group g(w, row, group);
    i64 left = w.units() - unit;
    i64 end = unit + (left < w.columns / UNIT ? left : w.columns / UNIT);
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
