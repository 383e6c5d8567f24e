// y [M, N] = x [M, K] @ weight [N, K].T for x rounded to int8 and a packed weight in layout rows16 whose codes stand for
// integers.
//
// Both sides' integers are multiplied. The sum of at most PIECE columns of a group is int32 and exact; what it stands for
// is added up in float32, where s is the scale of the row of x, or of its group:
//
//     y[m, n] = sum over groups of (sum_k (code - BIAS - zero_point) q) * S * s    or    (...) * S * s + O s sum_k q
//
// Stands for itself where the markers are: 4-bit integers with a bfloat16 scale a group, x in float32, a scale a row.
#include "vector.h"
#if defined(_OPENMP)
#include <omp.h>
#endif

// <constants>
using Element = float;
using Scale = bfloat16;
using SuperScale = float;
constexpr bool ZERO_POINT = false;
constexpr bool OFFSET = false;
constexpr bool SUPER_SCALE = false;
constexpr int BITS = 4;
constexpr int UNIT = 32;         // columns at a time, a divisor of a group's
constexpr bool MASKED = true;    // codes are multiplied by whole bytes
constexpr int BIAS = 8;          // what is subtracted from a code, or from its entry in a table
constexpr float STEP = 1.0f;     // of the integers that codes stand for
constexpr bool GROUPED = false;  // whether each group of x has a scale
// </constants>

#include "weight.h"

// <integers>
// What codes stand for, plus BIAS.
static inline u32 integers(u32 codes) {
  return codes;
}
constexpr int WIDTH = BITS;              // in bits
constexpr bool READY = false;            // whether codes of 8 bits are the integers as they lie in memory
// </integers>

constexpr i64 PIECE = 1024;  // columns: the sum of so many products of 8 bits is exact in float32
constexpr i64 RUN = 64;      // columns of x that lie together
constexpr int OFF = BIAS - SHIFTED<WIDTH>;

// Columns [begin, end) of one group, for whose sum of x there is a place; the group's columns end at `last`.
struct Piece {
  i64 index, group, begin, end, last;
};

// All columns of a weight, in order.
struct Pieces {
  i64 width, of_group, columns;

  explicit Pieces(const Weight& w) : width((w.k + UNIT - 1) / UNIT * UNIT), of_group(w.columns) {
    columns = of_group < PIECE ? of_group : PIECE;
  }
  i64 count() const { return (width + of_group - 1) / of_group * ((of_group + columns - 1) / columns); }
  Piece cut(i64 index, i64 group, i64 begin, i64 last) const {
    last = last < width ? last : width;
    return {index, group, begin, begin + columns < last ? begin + columns : last, last};
  }
  Piece first() const { return cut(0, 0, 0, of_group); }
  Piece after(const Piece& p) const {
    return p.end < p.last ? cut(p.index + 1, p.group, p.end, p.last)
                          : cut(p.index + 1, p.group + 1, p.end, p.end + of_group);
  }
};

// x as integers: codes [runs, rows, RUN] with columns 4 t + 0, 2, 1, 3 in this order, as those of a weight; a scale for
// each row or, if GROUPED, [groups, rows]; and the sum of each piece, [pieces, rows]. Rows are padded with zeros.
struct Integers {
  i64 rows;
  std::int8_t* codes;
  float* scale;
  std::int32_t* sums;

  std::int8_t* at(i64 row, i64 column) const { return codes + (column / RUN * rows + row) * RUN + column % RUN; }
};

// The greatest magnitude among x [count], a multiple of 16; NaN if there is one.
static float greatest(const Element* x, i64 count) {
  u32 top{};
  for (i64 k = 0; k < count; k += LANES) {
    u32 bits = as_u32(values(x + k)) & 0x7fffffffu;
    top = top > bits ? top : bits;  // floats are ordered as their bits, NaN above all
  }
  std::uint32_t most = 0;
  for (int lane = 0; lane < LANES; ++lane) most = most > top[lane] ? most : top[lane];
  float value;
  std::memcpy(&value, &most, sizeof(value));
  return value;
}

// The nearest int8 of x / scale, ties to even.
static inline i32 nearest(f32 x, float scale) {
  constexpr float MAGIC = 0x1.8p23f;  // adding it rounds at the last binary place, which is 1
  i32 code = as_i32(x / everywhere(scale) + MAGIC) - 0x4b400000;
  code = code < 127 ? code : i32{} + 127;
  return code > -128 ? code : i32{} - 128;
}

// Row `row` of x, from numbers [stride], or as codes with a scale already.
static void round_row(const Weight& w, const Element* x, const std::int8_t* given, i64 row, const Integers& to) {
  const Pieces pieces(w);
  float scale = 1;
  auto choose = [&](i64 begin, i64 end) {
    float top = greatest(x + begin, end - begin);
    return scale = top == 0 ? 1 : top / 127.5f;
  };
  if (!GROUPED && given == nullptr) to.scale[row] = choose(0, pieces.width);
  for (Piece p = pieces.first(); p.begin < pieces.width; p = pieces.after(p)) {
    if (GROUPED && given == nullptr && p.begin == p.group * w.columns) {
      to.scale[p.group * to.rows + row] = choose(p.begin, p.last);
    }
    i32 sum{};
    for (i64 k = p.begin; k < p.end; k += LANES) {
      i32 code = given ? __builtin_convertvector(load<i8>(given + k), i32) : nearest(values(x + k), scale);
      sum += code;
      i8 narrow = __builtin_convertvector(code, i8);
      std::uint32_t quads[LANES / 4];
      std::memcpy(quads, &narrow, sizeof(narrow));
      for (auto& q : quads) q = (q & 0xff0000ffu) | (q >> 8 & 0xff00u) | (q << 8 & 0xff0000u);
      std::memcpy(to.at(row, k), quads, sizeof(quads));
    }
    std::int32_t total = 0;
    for (int lane = 0; lane < LANES; ++lane) total += sum[lane];
    to.sums[p.index * to.rows + row] = total;
  }
  for (i64 k = pieces.width; k % RUN; k += 4) std::memset(to.at(row, k), 0, 4);
}

// All rows; to be called by all threads of a team.
static void round_rows(
    const Weight& w, const Element* x, const std::int8_t* given, i64 m, i64 stride, const Integers& to) {
#pragma omp for schedule(static)
  for (i64 row = 0; row < m; ++row) {
    round_row(w, x ? x + row * stride : nullptr, given ? given + row * stride : nullptr, row, to);
  }
}

// What the sums of a group's integers are combined with, for LANES rows of the weight.
struct Group {
  f32 scale, offset;
  i32 zero_point;

  Group(const Weight& w, i64 row, i64 group) {
    scale = scale_of(w, w.scale, w.super_scale, row, group) * STEP;
    if constexpr (ZERO_POINT) zero_point = widen(load<u8>(w.zero_point + of_group(row, group, w.groups())));
    if constexpr (OFFSET) offset = scale_of(w, w.offset, w.super_offset, row, group);
  }

  // total + what the sum of (code - BIAS) q stands for, given the sum of q and the scale of x if its groups have one.
  f32 add(f32 total, u32 sum, std::int32_t x_sum, float x_scale) const {
    if constexpr (ZERO_POINT) sum -= (u32)zero_point * everywhere((std::uint32_t)x_sum);
    f32 part = to_f32((i32)sum) * scale;
    if constexpr (OFFSET) part += offset * (float)x_sum;
    return GROUPED ? total + part * x_scale : total + part;
  }
};

// The integers of columns 4 STEP + 0, 2, 1, 3 of a unit, of codes as they are stored, or of those that were unpacked to
// [columns / 4, BLOCK].
template <int STEP, bool UNPACKED>
static inline u32 quad_of(const std::uint32_t* codes, i64 unit) {
  if constexpr (UNPACKED) return load<u32>(codes + (unit * (UNIT / 4) + STEP) * BLOCK);
  return integers(quad<STEP>(codes, unit));
}

// Rows of x times the weight's rows from `first` on, whose unpacked integers lie `distance` apart.
template <int VECTORS, int ROWS, bool UNPACKED>
[[gnu::flatten]] static void tile(
    const Weight& w, const Integers& x, i64 row, i64 first, const std::uint32_t* unpacked, i64 distance, Element* y) {
  constexpr int CHAINS = VECTORS * ROWS < 8 ? 2 : 1;  // sums that do not wait for each other
  const Pieces pieces(w);
  const std::uint32_t* codes[VECTORS];
  each<VECTORS>([&](auto v) {
    i64 at = v * LANES;
    codes[v] = UNPACKED ? unpacked + at / BLOCK * distance + at % BLOCK : codes_of(w, first + at);
  });
  f32 total[VECTORS][ROWS] = {};
  for (Piece p = pieces.first(); p.begin < pieces.width; p = pieces.after(p)) {
    const std::int32_t* sums = x.sums + p.index * x.rows + row;
    u32 sum[VECTORS][ROWS][CHAINS] = {};
    each<ROWS>([&](auto m) {
      each<VECTORS>([&](auto v) { sum[v][m][0] = everywhere((std::uint32_t)(-OFF * sums[m])); });
    });
    for (i64 k = p.begin; k < p.end; k += UNIT) {
      const std::int8_t* x_here = x.at(row, k);
      each<UNIT / 4>([&](auto step) {
        u32 here[VECTORS];
        each<VECTORS>([&](auto v) { here[v] = quad_of<step, UNPACKED>(codes[v], k / UNIT); });
        each<ROWS>([&](auto m) {
          std::uint32_t word;
          std::memcpy(&word, x_here + m * RUN + 4 * step, sizeof(word));
          const Four<WIDTH> four(word);
          each<VECTORS>([&](auto v) {
            u32& chain = sum[v][m][step % CHAINS];
            chain = dot(chain, here[v], four);
          });
        });
      });
    }
    each<VECTORS>([&](auto v) {
      Group g(w, first + v * LANES, p.group);
      each<ROWS>([&](auto m) {
        u32 all = CHAINS == 1 ? sum[v][m][0] : sum[v][m][0] + sum[v][m][CHAINS - 1];
        total[v][m] = g.add(total[v][m], all, sums[m], GROUPED ? x.scale[p.group * x.rows + row + m] : 1);
      });
    });
  }
  each<VECTORS>([&](auto v) {
    i64 at = first + v * LANES;
    if (at < w.n) each<ROWS>([&](auto m) {
      store(y + m * w.n + at, GROUPED ? total[v][m] : total[v][m] * x.scale[row + m], w.n - at);
    });
  });
}

static inline int thread() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

template <int VALUE>
using constant = std::integral_constant<int, VALUE>;

// Integers less LESS, modulo 256, of `blocks` blocks of rows from `first` on, columns [begin, end) of them, as
// [blocks, columns / 4, BLOCK].
template <int LESS>
static void unpack(const Weight& w, i64 first, i64 blocks, i64 begin, i64 end, std::uint32_t* to) {
  for (i64 k = begin; k < end; k += UNIT) {
    for (i64 row = 0; row < blocks * BLOCK; row += LANES) {
      const std::uint32_t* codes = codes_of(w, first + row);
      std::uint32_t* here = to + (row / BLOCK * (end - begin) + k - begin) / 4 * BLOCK + row % BLOCK;
      each<UNIT / 4>([&](auto step) {
        u32 found = quad_of<step, false>(codes, k / UNIT);
        if constexpr (LESS) found = (u32)((bytes)found - (std::uint8_t)LESS);
        std::memcpy(here + step * BLOCK, &found, sizeof(found));
      });
    }
  }
}

constexpr bool FEW_REGISTERS = LANES == 8;
constexpr i64 CHUNK = 4 * LANES;             // rows of the weight that a thread takes at once
constexpr int TALL = FEW_REGISTERS ? 2 : 6;  // most rows of x in registers beside them
constexpr i64 FEW = 2 * TALL;                // rows of x for which integers are not unpacked first

// The product of one row of x: eight streams of codes at a time, which memory delivers faster than fewer.
static void multiply_row(const Weight& w, const Integers& x, Element* y) {
  const i64 padded = w.padded();
#pragma omp for schedule(static)
  for (i64 first = 0; first < padded; first += 2 * CHUNK) {
    const i64 end = first + 2 * CHUNK < padded ? first + 2 * CHUNK : padded;
    i64 at = first;
    for (; end - at >= 8 * LANES; at += 8 * LANES) tile<8, 1, false>(w, x, 0, at, nullptr, 0, y);
    for (; end - at >= 4 * LANES; at += 4 * LANES) tile<4, 1, false>(w, x, 0, at, nullptr, 0, y);
    for (; at < end; at += LANES) tile<1, 1, false>(w, x, 0, at, nullptr, 0, y);
  }
}

// The product of more rows; `unpacked` has room for the integers of a chunk.
static void multiply_rows(const Weight& w, const Integers& x, i64 m, std::uint32_t* unpacked, Element* y) {
  const i64 padded = w.padded(), width = Pieces(w).width;
#pragma omp for schedule(static)
  for (i64 first = 0; first < padded; first += CHUNK) {
    i64 row = 0;
    auto rows_of = [&](auto vectors, auto rows, auto is_unpacked, i64 at) {
      tile<vectors, rows, is_unpacked>(w, x, row, at, unpacked, width / 4 * BLOCK, y + row * w.n);
    };
    if (first + CHUNK <= padded) {
      constant<4> vectors;
      if (m > FEW) {
        unpack<0>(w, first, CHUNK / BLOCK, 0, width, unpacked);
        for (; m - row >= TALL; row += TALL) rows_of(vectors, constant<TALL>(), constant<true>(), first);
      }
      if constexpr (!FEW_REGISTERS) {
        for (; m - row >= 4; row += 4) rows_of(vectors, constant<4>(), constant<false>(), first);
      }
      for (; m - row >= 2; row += 2) rows_of(vectors, constant<2>(), constant<false>(), first);
      for (; m > row; ++row) rows_of(vectors, constant<1>(), constant<false>(), first);
    }
    for (; row < m; ++row) {
      for (i64 at = first; at < padded; at += LANES) rows_of(constant<1>(), constant<1>(), constant<false>(), at);
    }
  }
}

// The product by vectors; `scratch` has room for the integers of a chunk for each thread.
static void multiply(
    const Weight& w, const Element* x, const std::int8_t* given, i64 m, i64 stride, const Integers& integers,
    std::uint32_t* scratch, Element* y, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    round_rows(w, x, given, m, stride, integers);
    if (m == 1) {
      multiply_row(w, integers, y);
    } else {
      multiply_rows(w, integers, m, scratch + thread() * (CHUNK / 4 * Pieces(w).width), y);
    }
  }
}

#if defined(__AMX_INT8__)
// The product by the matrix unit. Its tiles 0 to 3 are sums [16 rows of x, 16 rows of the weight], 4 and 5 are 32 rows of
// x [16, depth], 6 and 7 are integers [depth / 4, 16, 4] of 16 rows of the weight.
static void configure_tiles(i64 depth) {
  struct alignas(64) {
    std::uint8_t palette = 1, start = 0, reserved[14] = {};
    std::uint16_t bytes[16] = {};
    std::uint8_t rows[16] = {};
  } shape;
  for (int tile = 0; tile < 8; ++tile) {
    shape.rows[tile] = (std::uint8_t)(tile < 6 ? 16 : depth / 4);
    shape.bytes[tile] = (std::uint16_t)(tile == 4 || tile == 5 ? depth : 64);
  }
  asm volatile("" ::"r"(&shape) : "memory");  // all of it is read
  _tile_loadconfig(&shape);
}

// Integers of the weight in the matrix unit: as they lie in memory, or unpacked and without their bias.
constexpr bool SUMS = READY || ZERO_POINT || OFFSET;  // whether the sum of x comes into the product's
// A macro, as those of the compiler are, whose arguments are names of tiles.
#define MULTIPLY_TILES(to, x, codes) \
  if constexpr (READY) { \
    _tile_dpbsud(to, x, codes); \
  } else { \
    _tile_dpbssd(to, x, codes); \
  }

// Adds the products of pieces `p` to column `end` to total [BLOCKS, m, 16].
template <int BLOCKS, int HALVES>
static void square(
    const Weight& w, const Pieces& pieces, Piece p, i64 end, i64 depth, const Integers& x, i64 row, i64 rows, i64 first,
    const std::uint32_t* const* integers, i64 from, float* const* total) {
  alignas(64) std::uint32_t sum[BLOCKS][16 * HALVES][BLOCK];
  for (; p.begin < end; p = pieces.after(p)) {
    _tile_zero(0);
    if constexpr (HALVES > 1) _tile_zero(1);
    if constexpr (BLOCKS > 1) _tile_zero(2);
    if constexpr (BLOCKS > 1 && HALVES > 1) _tile_zero(3);
    for (i64 k = p.begin; k < p.end; k += depth) {
      const std::int8_t* x_here = x.at(row, k);
      const i64 at = (k - from) / 4 * BLOCK;
      _tile_loadd(6, integers[0] + at, 64);
      _tile_loadd(4, x_here, RUN);
      MULTIPLY_TILES(0, 4, 6)
      if constexpr (HALVES > 1) {
        _tile_loadd(5, x_here + 16 * RUN, RUN);
        MULTIPLY_TILES(1, 5, 6)
      }
      if constexpr (BLOCKS > 1) {
        _tile_loadd(7, integers[BLOCKS - 1] + at, 64);
        MULTIPLY_TILES(2, 4, 7)
        if constexpr (HALVES > 1) {
          MULTIPLY_TILES(3, 5, 7)
        }
      }
    }
    asm volatile("" ::"r"(sum) : "memory");
    _tile_stored(0, sum[0][0], 64);
    if constexpr (HALVES > 1) _tile_stored(1, sum[0][16], 64);
    if constexpr (BLOCKS > 1) _tile_stored(2, sum[BLOCKS - 1][0], 64);
    if constexpr (BLOCKS > 1 && HALVES > 1) _tile_stored(3, sum[BLOCKS - 1][16], 64);
    asm volatile("" ::"r"(sum) : "memory");
    each<BLOCKS>([&](auto b) {
      const Group g(w, first + b * BLOCK, p.group);
      const std::int32_t* x_sums = x.sums + p.index * x.rows + row;
      const float* x_scale = GROUPED ? x.scale + p.group * x.rows + row : nullptr;
      for (i64 m = 0; m < rows; ++m) {
        float* here = total[b] + m * BLOCK;
        const std::int32_t x_sum = SUMS ? x_sums[m] : 0;
        u32 all = load<u32>(sum[b][m]);
        if constexpr (READY && BIAS) all -= everywhere((std::uint32_t)(BIAS * x_sum));
        store(here, g.add(load<f32>(here), all, x_sum, GROUPED ? x_scale[m] : 1), LANES);
      }
    });
  }
}

constexpr i64 BLOCKS_MOST = 8;  // of a thread's chunk of the weight's rows
constexpr i64 SLAB = 1024;      // columns that are unpacked at a time, whole pieces

// `scratch` has room for a thread's SLAB of integers, and its part of y in float32.
static void multiply_by_squares(
    const Weight& w, const Element* x, const std::int8_t* given, i64 m, i64 stride, const Integers& to,
    std::uint32_t* scratch, Element* y, int threads) {
  const Pieces pieces(w);
  const i64 padded = w.padded();
  const i64 depth = pieces.columns % RUN == 0 && pieces.width % RUN == 0 && pieces.of_group % RUN == 0 ? RUN : 32;
  const i64 chunk = padded / BLOCK < 4 * threads * BLOCKS_MOST ? 2 : BLOCKS_MOST;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    round_rows(w, x, given, m, stride, to);
    configure_tiles(depth);
    std::uint32_t* unpacked = scratch + thread() * BLOCKS_MOST * BLOCK * (SLAB / 4 + to.rows);
    float* totals = reinterpret_cast<float*>(unpacked + BLOCKS_MOST * BLOCK * (SLAB / 4));
#pragma omp for schedule(static)
    for (i64 first = 0; first < padded; first += chunk * BLOCK) {
      const i64 left = (padded - first) / BLOCK, blocks = left < chunk ? left : chunk;
      std::memset(totals, 0, sizeof(float) * blocks * BLOCK * to.rows);
      for (Piece p = pieces.first(); p.begin < pieces.width;) {
        const i64 from = p.begin;
        Piece next = p;
        do next = pieces.after(next); while (next.begin < pieces.width && next.end - from <= SLAB);
        const i64 end = next.begin;
        const std::uint32_t* integers[BLOCKS_MOST];
        if (!READY) unpack<BIAS>(w, first, blocks, from, end, unpacked);
        for (i64 b = 0; b < blocks; ++b) {
          integers[b] = READY ? codes_of(w, first + b * BLOCK) + from / 4 * BLOCK : unpacked + b * (end - from) / 4 * BLOCK;
        }
        for (i64 row = 0; row < m; row += 32) {
          const i64 rows = m - row < 32 ? m - row : 32;
          for (i64 b = 0; b < blocks; b += 2) {
            float* total[2];
            for (i64 i = 0; i < 2; ++i) total[i] = totals + ((b + i) * to.rows + row) * BLOCK;
            auto blocks_of = [&](auto count, auto halves) {
              square<count, halves>(
                  w, pieces, p, end, depth, to, row, rows, first + b * BLOCK, integers + b, from, total);
            };
            if (blocks - b > 1) {
              rows > 16 ? blocks_of(constant<2>(), constant<2>()) : blocks_of(constant<2>(), constant<1>());
            } else {
              rows > 16 ? blocks_of(constant<1>(), constant<2>()) : blocks_of(constant<1>(), constant<1>());
            }
          }
        }
        p = next;
      }
      for (i64 b = 0; b < blocks; ++b) {
        const i64 at = first + b * BLOCK;
        if (at >= w.n) break;
        for (i64 row = 0; row < m; ++row) {
          f32 total = load<f32>(totals + (b * to.rows + row) * BLOCK);
          store(y + row * w.n + at, GROUPED ? total : total * to.scale[row], w.n - at);
        }
      }
    }
    _tile_release();
  }
}
#endif

constexpr i64 FEWEST_SQUARE = 5;  // rows of x for which the matrix unit is worth its tiles

static bool by_squares(const Weight& w, i64 m) {
#if defined(__AMX_INT8__)
  return m >= FEWEST_SQUARE && UNIT == 32;
#else
  return false;
#endif
}

// Parts of a scratch buffer, in bytes from its begin, each at a multiple of 64.
struct Parts {
  i64 rows, scale, sums, rest, end;

  Parts(const Weight& w, i64 m, int threads) {
    const Pieces pieces(w);
    const bool squares = by_squares(w, m);
    auto after = [](i64 begin, i64 bytes) { return begin + (bytes + 63) / 64 * 64; };
    rows = squares ? (m + 15) / 16 * 16 : m;
    rows = squares && m > 16 ? (m + 31) / 32 * 32 : rows;
    scale = after(0, (pieces.width + RUN - 1) / RUN * RUN * rows);
    sums = after(scale, 4 * rows * (GROUPED ? w.groups() : 1));
    rest = after(sums, 4 * rows * pieces.count());
#if defined(__AMX_INT8__)
    if (squares) end = after(rest, 4 * threads * BLOCKS_MOST * BLOCK * (SLAB / 4 + rows));
#endif
    if (!squares) end = after(rest, m > FEW ? threads * CHUNK * pieces.width : 0);
  }
};

// Bytes of `scratch` that `gemm` needs.
extern "C" i64 scratch_bytes(const Weight* weight, i64 m, int threads) { return Parts(*weight, m, threads).end; }

// x is [m, stride], where stride is K rounded up to a multiple of 32 and columns from K on are 0: numbers, or int8 codes
// whose scale is `given_scale`, [m] or, if GROUPED, [m, groups], or 1 if null. The other of the two is null. `scratch` begins at a
// multiple of 64.
extern "C" void gemm(
    const Element* x, const std::int8_t* given, const float* given_scale, i64 m, i64 stride, const Weight* weight,
    std::uint8_t* scratch, Element* y, int threads) {
  const Parts parts(*weight, m, threads);
  const Integers integers{
      parts.rows, (std::int8_t*)scratch, (float*)(scratch + parts.scale), (std::int32_t*)(scratch + parts.sums)};
  std::uint32_t* rest = (std::uint32_t*)(scratch + parts.rest);
  if (given) {
    const i64 groups = GROUPED ? weight->groups() : 1;
    for (i64 row = 0; row < m; ++row) {
      for (i64 group = 0; group < groups; ++group) {
        integers.scale[group * parts.rows + row] = given_scale ? given_scale[row * groups + group] : 1;
      }
    }
  }
#if defined(__AMX_INT8__)
  if (by_squares(*weight, m)) {
    multiply_by_squares(*weight, x, given, m, stride, integers, rest, y, threads);
    return;
  }
#endif
  multiply(*weight, x, given, m, stride, integers, rest, y, threads);
}
