// The product by the matrix unit, to be included in `gemm_int8.cpp` where there is one. A tile of x is 16 of its rows
// [16, depth], one of the weight integers of 16 of its rows [depth / 4, 16, 4], and tiles 0 to 3 are sums [16, 16].
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
        fetch_ahead<BITS * UNIT / 32>(codes[b] + (k + unit * UNIT) / 32 * BITS * BLOCK);
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
