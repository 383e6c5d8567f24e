// x as integers of 8 bits, to be included in `gemm_int8.cpp`: where they lie, and how numbers are rounded to them.

constexpr i64 PIECE = 1024;  // columns: the sum of so many products of 8 bits is exact in float32
constexpr i64 RUN = 64;      // columns of x that lie together
constexpr i64 SLAB = 1024;   // columns of all rows of x that do, and of the weight that are unpacked at a time

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
