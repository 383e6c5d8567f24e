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

constexpr i64 PIECE = 1024;  // columns: the sum of so many products of 8 bits is exact in float32
constexpr i64 RUN = 64;      // columns of x that lie together
constexpr i64 SLAB = 1024;   // columns of all rows of x that do, and of the weight that are unpacked at a time
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

// x as integers, in LIMBS rows for each of its own: codes [slabs, rows / high, runs, high, RUN] with columns 4 t + 0, 2, 1,
// 3 in this order, as those of a weight; a scale for each row or, if GROUPED, [groups, rows]; and the sum of each piece,
// [pieces, rows].
struct Integers {
  i64 rows, high;
  std::int8_t* codes;
  float* scale;
  std::int32_t* sums;

  std::int8_t* at(i64 row) const { return codes + (row / high * (SLAB / RUN) * high + row % high) * RUN; }
  i64 offset(i64 column) const { return column / SLAB * rows * SLAB + column % SLAB / RUN * high * RUN + column % RUN; }
};

// The greatest magnitude among x [count], a multiple of 16; NaN if there is one.
static float greatest(const Element* x, i64 count) {
  u32 top{};
  for (i64 k = 0; k < count; k += LANES) {
    u32 bits = as_u32(values(x + k)) & 0x7fffffffu;
    top = top > bits ? top : bits;  // floats are ordered as their bits, NaN above all
  }
  const std::uint32_t most = greatest_of(top);
  float value;
  std::memcpy(&value, &most, sizeof(value));
  return value;
}

// The nearest int8 of x / scale, ties to even.
static inline i32 nearest_int8(f32 x, float scale, float inverse) {
  constexpr float MAGIC = 0x1.8p23f;  // adding it rounds at the last binary place, which is 1
  const f32 found = scale < 0x1p-100f ? x / everywhere(scale) : quotient(x, scale, inverse);
  i32 code = as_i32(found + MAGIC) - 0x4b400000;
  code = code < 127 ? code : i32{} + 127;
  return code > -128 ? code : i32{} - 128;
}

// x times a power of two as an integer of 23 bits, ties to even.
static inline i32 nearest(f32 x, float inverse) { return as_i32(x * inverse + 0x1.8p23f) - 0x4b400000; }

// The least power of two of which x up to `top` are multiples below 2^22, exactly where they are above top 2^-14 and of
// 8 bits; NaN if top is no number.
static float fine_scale(float top) {
  std::uint32_t bits;
  std::memcpy(&bits, &top, sizeof(bits));
  std::uint32_t exponent = bits >> 23;
  if (exponent == 255) return __builtin_nanf("");
  bits = (exponent > 22 ? exponent - 21 : 1) << 23;
  float scale;
  std::memcpy(&scale, &bits, sizeof(scale));
  return scale;
}

static void store_codes(std::int8_t* to, i32 codes) {
#if defined(__AVX512F__)
  const __m128i order = _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
  _mm_storeu_si128((__m128i*)to, _mm_shuffle_epi8(_mm512_cvtepi32_epi8((__m512i)codes), order));
#else
  i8 narrow = __builtin_convertvector(codes, i8);
  std::uint32_t quads[LANES / 4];
  std::memcpy(quads, &narrow, sizeof(narrow));
  for (auto& q : quads) q = (q & 0xff0000ffu) | (q >> 8 & 0xff00u) | (q << 8 & 0xff0000u);
  std::memcpy(to, quads, sizeof(quads));
#endif
}

// Row `row` of x, from numbers [stride], or as codes with a scale already.
static void round_row(const Weight& w, const Element* x, const std::int8_t* given, i64 row, const Integers& to) {
  const Pieces pieces(w);
  std::int8_t* codes[LIMBS];
  each<LIMBS>([&](auto limb) { codes[limb] = to.at(row * LIMBS + limb); });
  float scale = 1;
  auto choose = [&](i64 begin, i64 end) {
    const float top = greatest(x + begin, end - begin);
    return scale = LIMBS > 1 ? fine_scale(top) : top == 0 ? 1 : top / 127.5f;
  };
  if (!GROUPED && given == nullptr) to.scale[row] = choose(0, pieces.width);
  for (Piece p = pieces.first(); p.begin < pieces.width; p = pieces.after(p)) {
    if (GROUPED && given == nullptr && p.begin == p.group * w.columns) {
      float* scales = to.scale + p.group * to.rows + row * LIMBS;
      scales[LIMBS - 1] = choose(p.begin, p.last);
      for (int limb = LIMBS - 1; limb > 0; --limb) scales[limb - 1] = scales[limb] * 256;
    }
    i32 sum[LIMBS] = {};
    const float inverse = 1 / scale;
    for (i64 k = p.begin; k < p.end; k += LANES) {
      const i64 offset = to.offset(k);
      if constexpr (LIMBS > 1) {
        i32 code = nearest(values(x + k), inverse);
        for (int limb = LIMBS - 1; limb >= 0; --limb) {
          const i32 low = limb ? (code << 24) >> 24 : code;
          store_codes(codes[limb] + offset, low);
          sum[limb] += low;
          code = (code - low) >> 8;
        }
      } else {
        const i32 code = given ? widen(load<i8>(given + k)) : nearest_int8(values(x + k), scale, inverse);
        store_codes(codes[0] + offset, code);
        sum[0] += code;
      }
    }
    for (int limb = 0; limb < LIMBS; ++limb) to.sums[p.index * to.rows + row * LIMBS + limb] = sum_of(sum[limb]);
  }
  for (i64 k = pieces.width; k % RUN; k += 4) {
    for (auto limb : codes) std::memset(limb + to.offset(k), 0, 4);
  }
}

// All rows; to be called by all threads of a team.
static void round_rows(
    const Weight& w, const Element* x, const std::int8_t* given, i64 m, i64 stride, const Integers& to) {
#pragma omp for schedule(static)
  for (i64 row = 0; row < m; ++row) {
    round_row(w, x ? x + row * stride : nullptr, given ? given + row * stride : nullptr, row, to);
  }
}

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
    if constexpr (OFFSET) each<ROWS / LIMBS>([&](auto m) { x_sum[m] = sum_of_group(sums + m * LIMBS, scales + m * LIMBS); });
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
  constexpr int VECTORS = LIMBS > 1 ? 4 : 8;
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
// The product by the matrix unit. A tile of x is 16 of its rows [16, depth], one of the weight integers of 16 of its rows
// [depth / 4, 16, 4], and tiles 0 to 3 are sums [16, 16].
//
// Integers are multiplied as they lie in memory, or unpacked and without their bias: up to 32 rows of x by those of a few
// columns at a time, more of them by a slab of the weight that was unpacked before.
constexpr i64 BLOCKS_MOST = 8;  // of a thread's chunk of the weight's rows

// HALVES is 1 or 2: of 16 rows of x, which has `rows` if they are fewer.
template <int HALVES>
static void configure_tiles(i64 rows, i64 depth) {
  Tiles tiles;
  for (int tile = 0; tile < 4; ++tile) tiles.set(tile, rows, 64);
  for (int tile = 4; tile < 8; ++tile) {
    tile < 4 + HALVES ? tiles.set(tile, rows, depth) : tiles.set(tile, depth / 4, 64);
  }
  tiles.configure();
}

// Adds the product of `depth` columns: of x [HALVES], `distance` apart, and of BLOCKS blocks of the weight.
template <int BLOCKS, int HALVES>
static inline void add_columns(const std::int8_t* x, i64 distance, const std::uint32_t* const* integers, i64 at) {
  each<HALVES>([&](auto h) { load_tile<4 + h>(x + h * distance, RUN); });
  each<BLOCKS>([&](auto b) {
    constexpr int QUADS = BLOCKS == 4 ? 5 + b % 3 : 6 + b % 2;
    load_tile<QUADS>(integers[b] + at, 64);
    each<HALVES>([&](auto h) { dot_tiles_int8<b * HALVES + h, 4 + h, QUADS, !READY>(); });
  });
}

// Adds what the tiles' sums of a piece stand for to total [BLOCKS][rows of x].
template <int BLOCKS, int HALVES>
static inline void add_piece(
    const Weight& w, const Divided& divided, const Piece& p, i64 first, const Integers& x, i64 row, i64 rows,
    f32* const* total) {
  alignas(64) std::uint32_t sum[BLOCKS * HALVES][16][BLOCK];
  each<BLOCKS * HALVES>([&](auto tile) { store_tile<tile>(sum[tile], 64); });
  const std::int32_t* x_sums = x.sums + p.index * x.rows + row;
  const float* x_scale = x.scale + p.group * x.rows + row;
  each<BLOCKS>([&](auto b) {
    const Group g(w, divided, first + b * BLOCK, p.group);
    for (i64 m = 0; m < rows; m += LIMBS) {
      u32 all[LIMBS];
      each<LIMBS>([&](auto limb) {
        all[limb] = load<u32>(sum[b * HALVES][m + limb]);
        if constexpr (READY && BIAS) all[limb] -= everywhere((std::uint32_t)(BIAS * x_sums[m + limb]));
      });
      const float x_sum = OFFSET ? sum_of_group(x_sums + m, x_scale + m) : 0;
      total[b][m / LIMBS] = g.add(total[b][m / LIMBS], all, x_sums + m, x_scale + m, x_sum);
    }
  });
}

// y [rows, 16 BLOCKS] of totals [BLOCKS][rows], a row at a time: its columns lie together.
template <int BLOCKS>
static inline void store_rows(
    const Weight& w, i64 first, const float* scale, i64 rows, const f32* const* totals, Element* y) {
  for (i64 m = 0; m < rows; ++m) {
    auto of = [&](int b) { return GROUPED ? totals[b][m] : totals[b][m] * scale[m]; };
    Element* to = y + m * w.n + first;
    if (BLOCKS == 2 && first + 2 * BLOCK <= w.n) {
      store_pair(to, of(0), of(1));
    } else {
      for (int b = 0; b < BLOCKS && first + b * BLOCK < w.n; ++b) store(to + b * BLOCK, of(b), w.n - first - b * BLOCK);
    }
  }
}

// The rows of the weight from `first` on times all of x, at most 16 HALVES rows.
template <int BLOCKS, int HALVES>
[[gnu::flatten]] static void multiply_as_unpacked(
    const Weight& weight, i64 depth, const Integers& x, i64 rows, i64 first, Element* y) {
  const Weight w = weight;
  const Pieces pieces(w);
  const Divided divided(w);
  alignas(64) std::uint32_t unpacked[2][BLOCKS][RUN / 4][BLOCK];
  f32 total[BLOCKS][16 * HALVES] = {};
  f32* totals[BLOCKS];
  const std::uint32_t *codes[BLOCKS], *integers[2][BLOCKS];
  each<BLOCKS>([&](auto b) {
    totals[b] = total[b];
    codes[b] = codes_of(w, first + b * BLOCK);
    for (int i = 0; i < 2; ++i) integers[i][b] = READY ? codes[b] : unpacked[i][b][0];
  });
  auto prepare = [&](i64 k, i64 place) {
    each<BLOCKS>([&](auto b) {
      for (i64 unit = 0; unit < depth / UNIT; ++unit) {
        unpack_unit<BIAS>(codes[b], k / UNIT + unit, unpacked[place][b] + unit * (UNIT / 4));
      }
    });
  };
  if (!READY) prepare(0, 0);
  i64 place = 0;
  for (Piece p = pieces.first(); p.begin < pieces.width; p = pieces.after(p)) {
    each<BLOCKS * HALVES>([&](auto tile) { zero_tile<tile>(); });
    for (i64 k = p.begin; k < p.end; k += depth, place ^= 1) {
      if (!READY && k + depth < pieces.width) prepare(k + depth, place ^ 1);
      add_columns<BLOCKS, HALVES>(
          x.codes + x.offset(k), SLAB / RUN * x.high * RUN, integers[place], READY ? k / 4 * BLOCK : 0);
    }
    add_piece<BLOCKS, HALVES>(w, divided, p, first, x, 0, rows, totals);
  }
  store_rows<BLOCKS>(w, first, x.scale, rows / LIMBS, totals, y);
}

// `blocks` blocks of the weight times all rows of x; `scratch` has room for a slab of their integers, and their part of y
// in float32.
static void multiply_chunk(
    const Weight& weight, i64 depth, const Integers& x, i64 m, i64 first, i64 blocks, std::uint32_t* scratch,
    Element* y) {
  const Weight w = weight;
  const Pieces pieces(w);
  const Divided divided(w);
  f32* totals = reinterpret_cast<f32*>(scratch + BLOCKS_MOST * BLOCK * (SLAB / 4));
  std::memset(totals, 0, sizeof(f32) * blocks * x.rows);
  for (Piece from = pieces.first(); from.begin < pieces.width;) {
    Piece next = from;
    do next = pieces.after(next); while (next.begin < pieces.width && next.end - from.begin <= SLAB);
    const i64 end = next.begin, width = end - from.begin;
    const std::uint32_t* integers[BLOCKS_MOST];
    for (i64 b = 0; b < blocks; ++b) {
      integers[b] = READY ? codes_of(w, first + b * BLOCK) + from.begin / 4 * BLOCK : scratch + b * width / 4 * BLOCK;
    }
    if (!READY) unpack<BIAS>(w, first, blocks, from.begin, end, scratch);
    for (i64 row = 0; row < m; row += 32) {
      const std::int8_t* x_rows = x.at(row);
      const i64 rows = m - row < 32 ? m - row : 32;
      for (i64 b = 0; b < blocks; b += 2) {
        f32* total[2] = {totals + b * x.rows + row, totals + (b + 1) * x.rows + row};
        auto of = [&](auto count) {
          for (Piece p = from; p.begin < end; p = pieces.after(p)) {
            each<2 * count>([&](auto tile) { zero_tile<tile>(); });
            for (i64 k = p.begin; k < p.end; k += depth) {
              add_columns<count, 2>(
                  x_rows + x.offset(k), SLAB / RUN * x.high * RUN, integers + b, (k - from.begin) / 4 * BLOCK);
            }
            add_piece<count, 2>(w, divided, p, first + b * BLOCK, x, row, rows, total);
          }
          if (end == pieces.width) store_rows<count>(w, first + b * BLOCK, x.scale + row, rows, total, y + row * w.n);
        };
        blocks - b > 1 ? of(constant<2>()) : of(constant<1>());
      }
    }
    from = next;
  }
}

static void multiply_by_squares(
    const Weight& w, const Element* x, const std::int8_t* given, i64 m, i64 stride, const Integers& to,
    std::uint32_t* scratch, Element* y, int threads) {
  const Pieces pieces(w);
  const i64 padded = w.padded(), rows = m * LIMBS;
  const i64 depth = pieces.columns % RUN == 0 && pieces.width % RUN == 0 && pieces.of_group % RUN == 0 ? RUN : 32;
  const i64 chunk = rows <= 16 ? 4 : rows <= 32 ? 2 : even_parts(padded / BLOCK, threads, BLOCKS_MOST);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    round_rows(w, x, given, m, stride, to);
    rows > 16 ? configure_tiles<2>(16, depth) : configure_tiles<1>(rows, depth);
    std::uint32_t* own = scratch + thread() * BLOCKS_MOST * BLOCK * (SLAB / 4 + to.rows);
#pragma omp for schedule(static)
    for (i64 first = 0; first < padded; first += chunk * BLOCK) {
      const i64 left = (padded - first) / BLOCK, blocks = left < chunk ? left : chunk;
      auto few = [&](auto most, auto halves) {
        if (blocks == most) return multiply_as_unpacked<most, halves>(w, depth, to, rows, first, y);
        for (i64 b = 0; b < blocks; ++b) multiply_as_unpacked<1, halves>(w, depth, to, rows, first + b * BLOCK, y);
      };
      if (rows <= 16) few(constant<4>(), constant<1>());
      else if (rows <= 32) few(constant<2>(), constant<2>());
      else if constexpr (LIMBS == 1) multiply_chunk(w, depth, to, rows, first, blocks, own, y);
    }
    _tile_release();
  }
}
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
