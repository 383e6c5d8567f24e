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
constexpr int LIMBS = 1;         // int8 that a number of x becomes, if 3 with next to nothing lost
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

constexpr int OFF = BIAS - SHIFTED<WIDTH>;

#include "integers.h"

// What the sums of a group's integers stand for, of all limbs of a row.
static inline float sum_of_group(const std::int32_t* sums, const float* scale) {
  float sum = 0;
  for (int limb = 0; limb < LIMBS; ++limb) sum += (float)sums[limb] * (GROUPED ? scale[limb] : 1);
  return sum;
}

// What the sums of a group's integers are combined with, for LANES rows of the weight.
struct Group {
  f32 scale, offset;
  i32 zero_point;

  Group(const Weight& w, const Divided& divided, i64 row, i64 group) {
    scale = scale_of(w.scale, w.super_scale, divided, row, group) * STEP;
    if constexpr (ZERO_POINT) zero_point = widen(load<u8>(w.zero_point + of_group(row, group, divided.groups)));
    if constexpr (OFFSET) offset = scale_of(w.offset, w.super_offset, divided, row, group);
  }

  // total + what the sums of (code - BIAS) q stand for, of all limbs, given the sums and scales of q and the sum of x.
  f32 add(f32 total, const u32 (&sum)[LIMBS], const std::int32_t* x_sums, const float* x_scale, float x_sum) const {
    f32 part{};
    each<LIMBS>([&](auto limb) {
      u32 whole = sum[limb];
      if constexpr (ZERO_POINT) whole -= (u32)zero_point * everywhere((std::uint32_t)x_sums[limb]);
      const f32 value = to_f32((i32)whole);
      part = !GROUPED ? value : part + value * x_scale[limb];
    });
    total += part * scale;
    if constexpr (OFFSET) total += offset * x_sum;
    return total;
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
  const Divided divided(w);
  const std::uint32_t* codes[VECTORS];
  each<VECTORS>([&](auto v) {
    i64 at = v * LANES;
    codes[v] = UNPACKED ? unpacked + at / BLOCK * distance + at % BLOCK : codes_of(w, first + at);
  });
  const std::int8_t* x_rows = x.at(row);
  f32 total[VECTORS][ROWS / LIMBS] = {};
  for (Piece p = pieces.first(); p.begin < pieces.width; p = pieces.after(p)) {
    const std::int32_t* sums = x.sums + p.index * x.rows + row;
    const float* scales = x.scale + p.group * x.rows + row;
    u32 sum[CHAINS][VECTORS][ROWS / LIMBS][LIMBS] = {};
    each<ROWS>([&](auto m) {
      each<VECTORS>([&](auto v) { sum[0][v][m / LIMBS][m % LIMBS] = everywhere((std::uint32_t)(-OFF * sums[m])); });
    });
    for (i64 k = p.begin; k < p.end; k += UNIT) {
      const std::int8_t* x_here = x_rows + x.offset(k);
      each<UNIT / 4>([&](auto step) {
        u32 here[VECTORS];
        each<VECTORS>([&](auto v) { here[v] = quad_of<step, UNPACKED>(codes[v], k / UNIT); });
        each<ROWS>([&](auto m) {
          std::uint32_t word;
          std::memcpy(&word, x_here + m * RUN + 4 * step, sizeof(word));
          const Four<WIDTH> four(word);
          each<VECTORS>([&](auto v) {
            u32& chain = sum[step % CHAINS][v][m / LIMBS][m % LIMBS];
            chain = dot(chain, here[v], four);
          });
        });
      });
    }
    float x_sum[ROWS / LIMBS];
    each<ROWS / LIMBS>([&](auto m) {
      x_sum[m] = OFFSET ? sum_of_group(sums + m * LIMBS, scales + m * LIMBS) : 0;
    });
    each<VECTORS>([&](auto v) {
      Group g(w, divided, first + v * LANES, p.group);
      each<ROWS / LIMBS>([&](auto m) {
        auto& all = sum[0][v][m];
        if constexpr (CHAINS > 1) each<LIMBS>([&](auto limb) { all[limb] += sum[1][v][m][limb]; });
        total[v][m] = g.add(total[v][m], all, sums + m * LIMBS, scales + m * LIMBS, x_sum[m]);
      });
    });
  }
  each<VECTORS>([&](auto v) {
    i64 at = first + v * LANES;
    if (at < w.n) each<ROWS / LIMBS>([&](auto m) {
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

// Integers less LESS, modulo 256, of a unit of LANES rows, as [columns / 4, BLOCK].
template <int LESS>
static inline void unpack_unit(const std::uint32_t* codes, i64 unit, std::uint32_t (*to)[BLOCK]) {
  each<UNIT / 4>([&](auto step) {
    u32 found = quad_of<step, false>(codes, unit);
    if constexpr (LESS) found = (u32)((bytes)found - (std::uint8_t)LESS);
    std::memcpy(to[step], &found, sizeof(found));
  });
}

// Those of `blocks` blocks of rows from `first` on, columns [begin, end) of them, as [blocks, columns / 4, BLOCK].
template <int LESS>
static void unpack(const Weight& w, i64 first, i64 blocks, i64 begin, i64 end, std::uint32_t* to) {
  for (i64 row = 0; row < blocks * BLOCK; row += LANES) {
    const std::uint32_t* codes = codes_of(w, first + row);
    std::uint32_t* here = to + row / BLOCK * (end - begin) / 4 * BLOCK + row % BLOCK;
    for (i64 k = begin; k < end; k += UNIT, here += UNIT / 4 * BLOCK) {
      unpack_unit<LESS>(codes, k / UNIT, reinterpret_cast<std::uint32_t(*)[BLOCK]>(here));
    }
  }
}

constexpr bool FEW_REGISTERS = LANES == 8;
constexpr i64 CHUNK = 4 * LANES;             // rows of the weight that a thread takes at once
constexpr int TALL = FEW_REGISTERS ? 2 : 6;  // most rows of x in registers beside them
constexpr i64 FEW = 2 * TALL;                // rows of x for which integers are not unpacked first

// The product of one row of x: many streams of codes at a time, which memory delivers faster than fewer.
static void multiply_row(const Weight& w, const Integers& x, Element* y) {
  constexpr int VECTORS = FEW_REGISTERS && LIMBS > 1 ? 4 : 8;
  const i64 padded = w.padded();
#pragma omp for schedule(static)
  for (i64 first = 0; first < padded; first += VECTORS * LANES) {
    const i64 end = first + VECTORS * LANES < padded ? first + VECTORS * LANES : padded;
    i64 at = first;
    for (; end - at >= VECTORS * LANES; at += VECTORS * LANES) tile<VECTORS, LIMBS, false>(w, x, 0, at, nullptr, 0, y);
    for (; end - at >= 4 * LANES; at += 4 * LANES) tile<4, LIMBS, false>(w, x, 0, at, nullptr, 0, y);
    for (; at < end; at += LANES) tile<1, LIMBS, false>(w, x, 0, at, nullptr, 0, y);
  }
}

// The product of more rows; `unpacked` has room for the integers of a chunk.
static void multiply_rows(const Weight& w, const Integers& x, i64 m, std::uint32_t* unpacked, Element* y) {
  const i64 padded = w.padded(), width = Pieces(w).width;
#pragma omp for schedule(static)
  for (i64 first = 0; first < padded; first += CHUNK) {
    i64 row = 0;
    auto rows_of = [&](auto vectors, auto rows, auto is_unpacked, i64 at) {
      tile<vectors, rows, is_unpacked>(w, x, row, at, unpacked, width / 4 * BLOCK, y + row / LIMBS * w.n);
    };
    if (first + CHUNK <= padded) {
      constant<4> vectors;
      if (LIMBS == 1 && m > FEW) {
        unpack<0>(w, first, CHUNK / BLOCK, 0, width, unpacked);
        for (; m - row >= TALL; row += TALL) rows_of(vectors, constant<TALL>(), constant<true>(), first);
      }
      if constexpr (!FEW_REGISTERS) {
        constexpr int MOST = LIMBS > 1 ? 2 * LIMBS : 4;
        for (; m - row >= MOST; row += MOST) rows_of(vectors, constant<MOST>(), constant<false>(), first);
      }
      if constexpr (LIMBS == 1) {
        for (; m - row >= 2; row += 2) rows_of(vectors, constant<2>(), constant<false>(), first);
      }
      for (; m > row; row += LIMBS) rows_of(vectors, constant<LIMBS>(), constant<false>(), first);
    }
    for (; row < m; row += LIMBS) {
      for (i64 at = first; at < padded; at += LANES) rows_of(constant<1>(), constant<LIMBS>(), constant<false>(), at);
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
      multiply_rows(w, integers, m * LIMBS, scratch + thread() * (CHUNK / 4 * Pieces(w).width), y);
    }
  }
}

#if defined(__AMX_INT8__)
#include "gemm_int8_squares.h"
#endif

constexpr i64 FEWEST_SQUARE = 5;  // rows of integers for which the matrix unit is worth its tiles

static bool by_squares(i64 m) {
#if defined(__AMX_INT8__)
  return m * LIMBS >= FEWEST_SQUARE && UNIT == 32;
#else
  return false;
#endif
}

// Parts of a scratch buffer, in bytes from its begin, each at a multiple of 64.
struct Parts {
  i64 rows, high, scale, sums, rest, end;

  Parts(const Weight& w, i64 m, int threads) {
    const Pieces pieces(w);
    const bool squares = by_squares(m);
    auto after = [](i64 begin, i64 bytes) { return begin + (bytes + 63) / 64 * 64; };
    rows = m * LIMBS;
    if (squares && rows > 16) rows = (rows + 31) / 32 * 32;
    high = squares && rows > 16 ? 16 : rows;
    scale = after(0, (pieces.width + SLAB - 1) / SLAB * SLAB * rows);
    sums = after(scale, 4 * rows * (GROUPED ? w.groups() : 1));
    rest = after(sums, 4 * rows * pieces.count());
#if defined(__AMX_INT8__)
    if (squares) end = after(rest, rows > 32 ? 4 * threads * BLOCKS_MOST * BLOCK * (SLAB / 4 + rows) : 0);
#endif
    if (!squares) end = after(rest, LIMBS == 1 && m > FEW ? threads * CHUNK * pieces.width : 0);
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
      parts.rows, parts.high, (std::int8_t*)scratch, (float*)(scratch + parts.scale),
      (std::int32_t*)(scratch + parts.sums)};
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
  if (by_squares(m)) {
    multiply_by_squares(*weight, x, given, m, stride, integers, rest, y, threads);
    return;
  }
#endif
  multiply(*weight, x, given, m, stride, integers, rest, y, threads);
}
