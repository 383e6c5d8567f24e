// A packed weight in layout rows16, as addresses, and its codes in vectors: what every product with one shares.
//
// To be included where the constants of `gemm.cpp` are known: BITS, UNIT, MASKED, SUPER_SCALE, Scale and SuperScale.
struct Weight {
  const std::uint32_t* codes;
  const Scale* scale;
  const std::uint8_t* zero_point;
  const Scale* offset;
  const SuperScale* super_scale;
  const SuperScale* super_offset;
  i64 n, k;
  i64 columns;        // in a group
  i64 super_columns;  // in a super group

  i64 padded() const { return (n + BLOCK - 1) / BLOCK * BLOCK; }
  i64 units() const { return (k + UNIT - 1) / UNIT; }
  i64 groups() const { return (k + columns - 1) / columns; }
  i64 super_groups() const { return (k + super_columns - 1) / super_columns; }
};

// Where the 16 rows around `row` have a group's values.
static inline i64 of_group(i64 row, i64 group, i64 groups) {
  return (row / BLOCK * groups + group) * BLOCK + row % BLOCK;
}

// What takes a division of a weight's sizes, so that loops over groups do without.
struct Divided {
  i64 units, groups, super_groups;
  std::uint32_t together;  // groups in a super group

  explicit Divided(const Weight& w)
      : units(w.units()), groups(w.groups()), super_groups(SUPER_SCALE ? w.super_groups() : 0),
        together(SUPER_SCALE ? (std::uint32_t)(w.super_columns / w.columns) : 1) {}
};

static inline f32 scale_of(
    const Scale* scale, const SuperScale* above, const Divided& divided, i64 row, i64 group) {
  f32 value = values(scale + of_group(row, group, divided.groups));
  if constexpr (SUPER_SCALE) {
    value *= values(above + of_group(row, (std::uint32_t)group / divided.together, divided.super_groups));
  }
  return value;
}

static inline const std::uint32_t* codes_of(const Weight& w, i64 row) {
  return w.codes + row / BLOCK * ((w.k + 31) / 32) * BITS * BLOCK + row % BLOCK;
}

// Has memory send LINES of codes, 64 bytes each, that come 2 KB behind these. Processors that look ahead themselves stop
// at the end of a page of 4 KB, and do not see past the instructions of a matrix unit.
template <int LINES>
static inline void fetch_ahead(const std::uint32_t* codes) {
  for (int line = 0; line < LINES; ++line) __builtin_prefetch(codes + 512 + line * BLOCK);
}

// The word that has one plane of WIDTH bits, whose lowest is bit LOW of a code, of columns 4 STEP + 0, 2, 1, 3 of a unit:
// in its bytes from bit FIELD<STEP, WIDTH> on.
template <int STEP, int WIDTH>
constexpr int FIELD = WIDTH * (STEP % (8 / WIDTH));

template <int STEP, int WIDTH, int LOW>
static inline u32 word(const std::uint32_t* codes, i64 unit) {
  constexpr int PLACE = LOW + STEP / (8 / WIDTH);
  if constexpr (UNIT == 32) return load<u32>(codes + (unit * BITS + PLACE) * BLOCK);
  if constexpr (WIDTH == 1) return load<u32>(codes + (unit / 2 * BITS + LOW) * BLOCK) >> (unsigned)(unit % 2 * 4);
  return load<u32>(codes + (unit / 2 * BITS + PLACE + unit % 2 * (WIDTH / 2)) * BLOCK);
}

// The same in 4 codes, in the bytes of each lane.
template <int STEP, int WIDTH, int LOW>
static inline u32 plane(const std::uint32_t* codes, i64 unit) {
  const u32 found = word<STEP, WIDTH, LOW>(codes, unit) >> FIELD<STEP, WIDTH>;
  if constexpr (BITS == WIDTH && !MASKED) return found;
  return (found & (((1u << WIDTH) - 1) * 0x01010101u)) << LOW;
}

constexpr bool ONE_PLANE = BITS == 1 || BITS == 2 || BITS == 4 || BITS == 8;

template <int STEP>
static inline u32 quad(const std::uint32_t* codes, i64 unit) {
  if constexpr (ONE_PLANE) return plane<STEP, BITS, 0>(codes, unit);
  u32 found{};
  if constexpr (BITS & 4) found |= plane<STEP, 4, 0>(codes, unit);
  if constexpr (BITS & 2) found |= plane<STEP, 2, BITS & 4>(codes, unit);
  if constexpr (BITS & 1) found |= plane<STEP, 1, BITS & 6>(codes, unit);
  return found;
}

// How many of `blocks` a thread takes at a time, an even number up to `most`, so that none has many more than others.
static inline i64 even_parts(i64 blocks, i64 threads, i64 most) {
  const i64 each = (blocks + 2 * threads - 1) / (2 * threads);  // pairs of a thread
  auto taken = [&](i64 pairs) { return (each + pairs - 1) / pairs * pairs; };
  i64 best = most / 2;
  for (i64 pairs = best - 1; pairs > most / 8; --pairs) {
    if (taken(pairs) < taken(best)) best = pairs;
  }
  return 2 * best;
}
