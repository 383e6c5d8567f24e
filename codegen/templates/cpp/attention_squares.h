// The products of attention.cpp by the matrix unit.
#if defined(__AMX_BF16__)
// Tiles 0 and 1 are sums [16 positions, 16 rows], 2 and 7 keys of as many positions [16, 32 columns], 3 pairs of columns
// of queries [16, 16 rows, 2]; 4 and 5 are outputs [up to 16 rows, 16 columns], 6 weights [rows, 32 positions], 3 and 7
// then pairs of positions of values [16, 16 columns, 2]. Of more than 16 rows two tiles are taken at a time, so that
// each load serves two products: those of the second are sums 4 and 5 of queries 6, and outputs 0 and 1 of weights 2.
static void configure_tiles(i64 rows) {
  Tiles tiles;
  for (int tile = 0; tile < 8; ++tile) tiles.set(tile, 4 <= tile && tile <= 6 ? least(rows, 16) : 16, 64);
  tiles.configure();
}

// 16 rows of queries as tiles: [columns / 32, 16 pairs of columns, 16 rows].
static void arrange_squares(const Element* rows, i64 columns, Element* to) {
  for (i64 d = 0; d < columns; d += 32, to += 16 * 32) {
    __m512i x[16], y[16];
    each<16>([&](auto i) { x[i] = (__m512i)get<u32>(rows + i * columns + d); });
    each<8>([&](auto i) {
      y[2 * i] = _mm512_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
      y[2 * i + 1] = _mm512_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
    });
    each<4>([&](auto i) {
      each<2>([&](auto j) {
        x[4 * i + 2 * j] = _mm512_unpacklo_epi64(y[4 * i + j], y[4 * i + 2 + j]);
        x[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(y[4 * i + j], y[4 * i + 2 + j]);
      });
    });
    each<4>([&](auto j) {  // x[4 i + j] holds pairs j, j + 4, j + 8, j + 12 of rows 4 i to 4 i + 3
      __m512i low = _mm512_shuffle_i32x4(x[j], x[4 + j], 0x88), high = _mm512_shuffle_i32x4(x[j], x[4 + j], 0xdd);
      __m512i low2 = _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0x88);
      __m512i high2 = _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0xdd);
      put(to + j * 32, _mm512_shuffle_i32x4(low, low2, 0x88));
      put(to + (8 + j) * 32, _mm512_shuffle_i32x4(low, low2, 0xdd));
      put(to + (4 + j) * 32, _mm512_shuffle_i32x4(high, high2, 0x88));
      put(to + (12 + j) * 32, _mm512_shuffle_i32x4(high, high2, 0xdd));
    });
  }
}

// scores [row + 0 to 3, 16] = sums [16, row + 0 to 3]
static inline void turn(const float (*sums)[16], float* scores, i64 rows) {
  __m512 x[4], y[4];
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm512_castps128_ps512(_mm_loadu_ps(sums[i]));
    x[i] = _mm512_insertf32x4(x[i], _mm_loadu_ps(sums[i + 4]), 1);
    x[i] = _mm512_insertf32x4(x[i], _mm_loadu_ps(sums[i + 8]), 2);
    x[i] = _mm512_insertf32x4(x[i], _mm_loadu_ps(sums[i + 12]), 3);
  }
  for (int i = 0; i < 2; ++i) {
    y[i] = _mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]);
    y[i + 2] = _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]);
  }
  for (int i = 0; i < 4 && i < rows; ++i) {
    __m512d low = (__m512d)y[i / 2 * 2], high = (__m512d)y[i / 2 * 2 + 1];
    put(scores + i * STRETCH, i % 2 ? _mm512_unpackhi_pd(low, high) : _mm512_unpacklo_pd(low, high));
  }
}

// Products of all rows and 32 keys; meanwhile the vector units decode another block.
template <class Other>
static void multiply_squares(
    const Element* queries, i64 rows, const Element* keys, i64 stride, i64 columns, float* scores,
    const Other& other) {
  alignas(64) float sums[64][16];
  const i64 steps = quotient(rows, 32) * columns / 32;
  i64 step = 0;
  for (i64 r = 0; r < rows; r += 32, queries += 32 * columns) {
    const bool two = rows - r > 16;
    zero_tile<0>();
    zero_tile<1>();
    if (two) {
      zero_tile<4>();
      zero_tile<5>();
    }
    for (i64 d = 0; d < columns; d += 32) {
      load_tile<3>(queries + d * 16, 64);
      load_tile<2>(keys + d, 2 * stride);
      dot_tiles_bf16<0, 2, 3>();
      load_tile<7>(keys + 16 * stride + d, 2 * stride);
      dot_tiles_bf16<1, 7, 3>();
      if (two) {
        load_tile<6>(queries + (columns + d) * 16, 64);
        dot_tiles_bf16<4, 2, 6>();
        dot_tiles_bf16<5, 7, 6>();
      }
      other.decode(step++, steps);
    }
    store_tile<0>(sums[0], 64);
    store_tile<1>(sums[16], 64);
    if (two) {
      store_tile<4>(sums[32], 64);
      store_tile<5>(sums[48], 64);
    }
    for (i64 quad = r; quad < least(r + 32, rows); quad += 4) {
      for (i64 t = 0; t < 32; t += 16) {
        const float* from = sums[(quad - r) / 16 * 32 + t] + quad % 16;
        turn((const float (*)[16])from, scores + quad * STRETCH + t, rows - quad);
      }
    }
  }
}

// output [held rows, columns] += weights times words of `count` positions, a multiple of 32. Meanwhile as above.
template <class Other>
static void add_squares(
    const Element* weights, i64 rows, const Word* words, i64 count, i64 columns, float* output, const Other& other) {
  const i64 steps = quotient(rows, 32) * columns / 32;
  i64 step = 0;
  for (i64 r = 0; r < rows; r += 32, weights += 32 * STRETCH, output += 32 * columns) {
    const bool two = rows - r > 16;
    float* second = output + 16 * columns;
    for (i64 d = 0; d < columns; d += 32) {
      load_tile<4>(output + d, 4 * columns);
      load_tile<5>(output + d + 16, 4 * columns);
      if (two) {
        load_tile<0>(second + d, 4 * columns);
        load_tile<1>(second + d + 16, 4 * columns);
      }
      for (i64 t = 0; t < count; t += 32) {
        load_tile<6>(weights + t, 2 * STRETCH);
        load_tile<3>(words + t / 2 * columns + d, 4 * columns);
        dot_tiles_bf16<4, 6, 3>();
        load_tile<7>(words + t / 2 * columns + d + 16, 4 * columns);
        dot_tiles_bf16<5, 6, 7>();
        if (two) {
          load_tile<2>(weights + 16 * STRETCH + t, 2 * STRETCH);
          dot_tiles_bf16<0, 2, 3>();
          dot_tiles_bf16<1, 2, 7>();
        }
      }
      store_tile<4>(output + d, 4 * columns);
      store_tile<5>(output + d + 16, 4 * columns);
      if (two) {
        store_tile<0>(second + d, 4 * columns);
        store_tile<1>(second + d + 16, 4 * columns);
      }
      other.decode(step++, steps);
    }
  }
}
#endif
