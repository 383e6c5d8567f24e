// The product by the matrix unit, to be included in `gemm.cpp` where there is one. A tile of x is 16 of its rows
// [16, UNIT], one of the weight pairs of columns of 16 of its rows [UNIT / 2, 16, 2], as decode_pair has them, and tiles 0
// to 3 are sums [16, 16].
//
// Up to 32 rows of x are multiplied by four or two blocks of the weight as those decode. More are multiplied by a slab of
// the weight that was decoded before. Groups that are small have too many sums then, so weights of such are decoded with
// their scale, and rounded to bfloat16.
constexpr i64 CHUNK = 16;    // blocks of the weight that a thread takes at once
constexpr i64 SLAB = 768;    // columns of them that are decoded at once
constexpr i64 BAND = 512;    // rows of x that they are multiplied by
constexpr i64 SMALL = 512;   // columns of a group: fewer are small

static i64 height(i64 m) { return m < 16 ? m : 16; }

// HALVES is 1 or 2: of 16 rows of x; x of `rows` has fewer if there is but one.
template <int HALVES>
static void configure_tiles(i64 rows) {
  Tiles tiles;
  for (int tile = 0; tile < 4; ++tile) tiles.set(tile, rows, 64);
  for (int tile = 4; tile < 8; ++tile) {
    tile < 4 + HALVES ? tiles.set(tile, rows, 2 * UNIT) : tiles.set(tile, UNIT / 2, 64);
  }
  tiles.configure();
}

// Up to 32 rows of x as [blocks of 16 rows, units, height, UNIT].
static void arrange(const Weight& w, const Element* x, i64 m, i64 stride, Element* to) {
  const i64 units = w.units(), high = height(m);
#pragma omp for schedule(static) collapse(2)
  for (i64 row = 0; row < m; row += high) {
    for (i64 unit = 0; unit < units; ++unit) {
      Element* here = to + (row * units + unit * high) * UNIT;
      for (i64 r = row; r < row + high && r < m; ++r) {
        std::memcpy(here + (r - row) * UNIT, x + r * stride + unit * UNIT, UNIT * sizeof(Element));
      }
    }
  }
}

// The rows of x after the last 32, and as many of zeros as make 32 of them.
static void copy_last(const Element* x, i64 m, i64 stride, Element* to) {
#pragma omp for schedule(static)
  for (i64 row = m / 32 * 32; row < (m + 31) / 32 * 32; ++row) {
    Element* here = to + row % 32 * stride;
    if (row < m) std::memcpy(here, x + row * stride, sizeof(Element) * stride);
    else std::memset(here, 0, sizeof(Element) * stride);
  }
}

// Adds the product of a unit: of x [HALVES], `distance` apart and with `stride` from row to row, and of BLOCKS blocks of
// the weight, `apart` apart. What vectors do for a block meanwhile is `beside`, which the processor finds in time only if
// it lies between.
template <int BLOCKS, int HALVES, class Beside>
static inline void add_unit(
    const Element* x, i64 stride, i64 distance, const std::uint32_t* pairs, i64 apart, Beside beside) {
  each<HALVES>([&](auto h) { load_tile<4 + h>(x + h * distance, sizeof(Element) * stride); });
  each<BLOCKS>([&](auto b) {
    beside(b);
    constexpr int PAIRS = BLOCKS == 4 ? 5 + b % 3 : 6 + b % 2;
    load_tile<PAIRS>(pairs + b * apart, 64);
    each<HALVES>([&](auto h) { dot_tiles_bf16<b * HALVES + h, 4 + h, PAIRS>(); });
  });
}

template <int COUNT>
static inline void zero_tiles() {
  each<COUNT>([&](auto tile) { zero_tile<tile>(); });
}

template <int COUNT>
static inline void store_tiles(float (&to)[COUNT][16][BLOCK]) {
  each<COUNT>([&](auto tile) { store_tile<tile>(to[tile], 64); });
}

static inline void decode_unit(const std::uint32_t* codes, i64 unit, std::uint32_t (*to)[BLOCK]) {
  each<UNIT / 8>([&](auto half) {
    u32 found[4];  // before any is stored, as compilers take what follows a store for changed
    each<4>([&](auto i) { found[i] = pair<2 * half + i / 2, i % 2>(codes, unit); });
    std::memcpy(to[4 * half], found, sizeof(found));
  });
}

// Groups whose sums a tile holds at once. Storing a tile takes longer than multiplying it by a unit does, so that of `m`
// rows of x and groups of one unit a tile has the sums of several: each in rows of its own, in which x is not 0.
static i64 groups_of_tile(const Weight& w, i64 m) { return w.columns == UNIT && m <= 8 ? 16 / m : 1; }

// x as [units, 16, UNIT] for tiles of `together` groups.
static void arrange_groups(const Weight& w, const Element* x, i64 m, i64 stride, i64 together, Element* to) {
#pragma omp for schedule(static)
  for (i64 unit = 0; unit < w.units(); ++unit) {
    Element* here = to + unit * 16 * UNIT;
    std::memset(here, 0, 16 * UNIT * sizeof(Element));
    for (i64 r = 0; r < m; ++r) {
      std::memcpy(here + (unit % together * m + r) * UNIT, x + r * stride + unit * UNIT, UNIT * sizeof(Element));
    }
  }
}

// The rows of the weight from `first` on times up to 16 HALVES rows of x, arranged for tiles of `together` groups.
template <int BLOCKS, int HALVES>
[[gnu::flatten]] static void multiply_as_decoded(
    const Weight& weight, const Element* x, i64 rows, i64 together, const float* sums, i64 first,
    const Result& result) {
  const Weight w = weight;
  const Divided divided(w);
  const i64 units = w.units(), of_tile = w.columns / UNIT * together, high = together > 1 ? 16 : height(rows);
  const std::uint32_t* codes[BLOCKS];
  each<BLOCKS>([&](auto b) { codes[b] = codes_of(w, first + b * BLOCK); });
  alignas(64) std::uint32_t pairs[2][BLOCKS][UNIT / 2][BLOCK];
  alignas(64) float sum[2][BLOCKS * HALVES][16][BLOCK];
  f32 total[16 * HALVES][BLOCKS] = {};
  auto add_groups = [&](i64 group, const float(*tiles)[16][BLOCK]) {
    const i64 last = group + together < divided.groups ? group + together : divided.groups;
    for (i64 row = 0; group < last; ++group, row += rows) {
      Group g[BLOCKS];
      each<BLOCKS>([&](auto b) { g[b] = Group(w, divided, first + b * BLOCK, group); });
      for (i64 m = 0; m < rows; ++m) {
        each<BLOCKS>([&](auto b) {
          const f32 here = load<f32>(tiles[b * HALVES][row + m]);
          total[m][b] = g[b].add(total[m][b], here, sums + m * divided.groups + group);
        });
      }
    }
  };
  each<BLOCKS>([&](auto b) { decode_unit(codes[b], 0, pairs[0][b]); });
  i64 place = 0;
  for (i64 unit = 0, group = 0; unit < units; group += together, place ^= 1) {
    const i64 end = unit + of_tile < units ? unit + of_tile : units;
    zero_tiles<BLOCKS * HALVES>();
    for (; unit < end; ++unit) {
      const i64 next = unit + 1 < units ? unit + 1 : unit;
      add_unit<BLOCKS, HALVES>(
          x + unit * high * UNIT, UNIT, units * 16 * UNIT, pairs[unit & 1][0][0], UNIT / 2 * BLOCK,
          [&](auto b) {
            fetch_ahead<BITS * UNIT / 32>(codes[b] + unit * UNIT / 32 * BITS * BLOCK);
            decode_unit(codes[b], next, pairs[(unit + 1) & 1][b]);
          });
    }
    store_tiles(sum[place]);
    if (group) add_groups(group - together, sum[place ^ 1]);  // while the matrix unit is busy
    if (unit == units) add_groups(group, sum[place]);
  }
  each<BLOCKS>([&](auto b) {
    const i64 row = first + b * BLOCK;
    if (row < w.n) for (i64 m = 0; m < rows; ++m) result.put(m, row, total[m][b]);
  });
}

// Units [begin, end) of 16 rows of the weight as pairs; SCALED by the scale of their group and rounded, or as they are.
template <bool SCALED>
[[gnu::flatten]] static void decode_slab(
    const Weight& w, const Divided& divided, i64 row, i64 begin, i64 end, std::uint32_t (*to)[BLOCK]) {
  const std::uint32_t* codes = codes_of(w, row);
  if constexpr (!SCALED) {
    for (i64 unit = begin; unit < end; ++unit) decode_unit(codes, unit, to + (unit - begin) * (UNIT / 2));
  } else {
    const i64 in_group = w.columns / UNIT;
    for (i64 unit = begin, group = begin / in_group; unit < end; ++group) {
      const Group g(w, divided, row, group);
      const i64 last = (group + 1) * in_group < end ? (group + 1) * in_group : end;
      for (; unit < last; ++unit) {
        each<UNIT / 4>([&](auto step) {
          u32 here = quad<step>(codes, unit);
          each<2>([&](auto c) {
            u32 pair = to_pair(g.weight(value<2 * c>(here)), g.weight(value<2 * c + 1>(here)));
            std::memcpy(to[(unit - begin) * (UNIT / 2) + 2 * step + c], &pair, sizeof(pair));
          });
        });
      }
    }
  }
}

// total [blocks of the weight, rows of x, 16] += the product of a slab's units [begin, end) and `rows` rows of x, the
// first of which is `row`.
template <bool SCALED, int BLOCKS, int HALVES>
[[gnu::flatten]] static void multiply_slab(
    const Weight& w, const Divided& divided, i64 first, i64 begin, i64 end, const Element* x, i64 stride, i64 row,
    i64 rows, const float* sums, const std::uint32_t (*pairs)[SLAB / 2][BLOCK], float (*total)[BAND][BLOCK],
    const Result& result) {
  alignas(64) float sum[BLOCKS * HALVES][16][BLOCK];
  auto add = [&](i64 unit) {
    add_unit<BLOCKS, HALVES>(
        x + unit * UNIT, stride, 16 * stride, pairs[0][(unit - begin) * (UNIT / 2)], SLAB / 2 * BLOCK, [](auto) {});
  };
  if (SCALED && end - begin == divided.units) {
    zero_tiles<BLOCKS * HALVES>();
    for (i64 unit = begin; unit < end; ++unit) add(unit);
    store_tiles(sum);
    for (i64 r = 0; r < rows; ++r) result.put_blocks<BLOCKS>(row + r, first, sum[0][r], HALVES * 16 * BLOCK);
    return;
  }
  if constexpr (SCALED) {
    auto tile_of = [&](auto tile) { return total[tile / HALVES] + row % BAND + tile % HALVES * 16; };
    each<BLOCKS * HALVES>([&](auto tile) { load_tile<tile>(tile_of(tile), 64); });
    for (i64 unit = begin; unit < end; ++unit) add(unit);
    each<BLOCKS * HALVES>([&](auto tile) { store_tile<tile>(tile_of(tile), 64); });
    return;
  }
  const i64 in_group = w.columns / UNIT;
  for (i64 unit = begin, group = begin / in_group; unit < end; ++group) {
    const i64 last = (group + 1) * in_group < end ? (group + 1) * in_group : end;
    zero_tiles<BLOCKS * HALVES>();
    for (; unit < last; ++unit) add(unit);
    store_tiles(sum);
    each<BLOCKS>([&](auto b) {
      const Group g(w, divided, first + b * BLOCK, group);
      float(*to)[BLOCK] = total[b] + row % BAND;
      for (i64 m = 0; m < rows; ++m) {
        f32 all = g.add(load<f32>(to[m]), load<f32>(sum[b * HALVES][m]), sums + (row + m) * divided.groups + group);
        std::memcpy(to[m], &all, sizeof(all));
      }
    });
  }
}

static i64 units_of_slab(const Weight& w) { return (w.columns < SLAB ? SLAB / w.columns * w.columns : SLAB) / UNIT; }

// `blocks` blocks of the weight times all rows of x; `last` has those after the last 32, and what fills them up.
template <bool SCALED>
static void multiply_chunk(
    const Weight& weight, i64 first, i64 blocks, const Element* x, const Element* last, i64 m, i64 stride,
    const float* sums, const Result& result) {
  alignas(64) std::uint32_t pairs[CHUNK][SLAB / 2][BLOCK];
  alignas(64) float total[CHUNK][BAND][BLOCK];
  const Weight w = weight;
  const Divided divided(w);
  const i64 units = divided.units, step = units_of_slab(w);
  const bool summed = !SCALED || step < units;  // else tiles go to the result
  for (i64 band = 0; band < m; band += BAND) {
    const i64 rows = m - band < BAND ? m - band : BAND;
    if (summed) {
      for (i64 b = 0; b < blocks; ++b) std::memset(total[b], 0, (rows + 15) / 16 * 16 * sizeof(total[0][0]));
    }
    for (i64 begin = 0; begin < units; begin += step) {
      const i64 end = begin + step < units ? begin + step : units;
      for (i64 b = 0; b < blocks; ++b) decode_slab<SCALED>(w, divided, first + b * BLOCK, begin, end, pairs[b]);
      for (i64 row = band; row < band + rows; row += 32) {
        const i64 left = band + rows - row, here = left < 32 ? left : 32;
        const Element* x_rows = row + 32 > m ? last : x + row * stride;
        for (i64 b = 0; b < blocks; b += 2) {
          auto of = [&](auto count, auto halves) {
            multiply_slab<SCALED, count, halves>(
                w, divided, first + b * BLOCK, begin, end, x_rows, stride, row, here, sums, pairs + b, total + b,
                result);
          };
          if (blocks - b > 1) {
            here > 16 ? of(constant<2>(), constant<2>()) : of(constant<2>(), constant<1>());
          } else {
            here > 16 ? of(constant<1>(), constant<2>()) : of(constant<1>(), constant<1>());
          }
        }
      }
    }
    if (!summed) continue;
    for (i64 r = 0; r < rows; ++r) {  // a row at a time: its columns lie together
      for (i64 b = 0; b < blocks; b += 2) {
        auto put = [&](auto count) {
          result.put_blocks<count>(band + r, first + b * BLOCK, total[b][r], BAND * BLOCK);
        };
        blocks - b > 1 ? put(constant<2>()) : put(constant<1>());
      }
    }
  }
}

static void multiply_by_squares(
    const Element* x, i64 m, i64 stride, const Weight& w, float* scratch, const Result& result, int threads) {
  const i64 padded = w.padded(), together = groups_of_tile(w, m);
  const i64 chunk = m <= 32 ? 4 : even_parts(padded / BLOCK, threads, CHUNK);
  const std::uintptr_t rest = reinterpret_cast<std::uintptr_t>(scratch + m * w.groups());
  Element* arranged = reinterpret_cast<Element*>((rest + 63) / 64 * 64);
  const bool scaled = m > 32 && w.columns < SMALL;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    if (SUMS && !scaled) sum_groups(w, x, m, stride, scratch);
    if (together > 1) arrange_groups(w, x, m, stride, together, arranged);
    else if (m > 1 && m <= 32) arrange(w, x, m, stride, arranged);
    const Element* given = m > 1 || together > 1 ? arranged : x;
    if (m > 32) copy_last(x, m, stride, arranged);
    m > 16 ? configure_tiles<2>(16) : configure_tiles<1>(together > 1 ? 16 : m);
#pragma omp for schedule(static)
    for (i64 first = 0; first < padded; first += chunk * BLOCK) {
      const i64 left = (padded - first) / BLOCK, blocks = left < chunk ? left : chunk;
      auto few = [&](auto most, auto halves) {
        if (blocks == most) return multiply_as_decoded<most, halves>(w, given, m, together, scratch, first, result);
        for (i64 b = 0; b < blocks; ++b) {
          multiply_as_decoded<1, halves>(w, given, m, together, scratch, first + b * BLOCK, result);
        }
      };
      if (m <= 16) few(constant<4>(), constant<1>());
      else if (m <= 32) few(constant<2>(), constant<2>());
      else if (scaled) multiply_chunk<true>(w, first, blocks, x, arranged, m, stride, scratch, result);
      else multiply_chunk<false>(w, first, blocks, x, arranged, m, stride, scratch, result);
    }
    _tile_release();
  }
}
