// Rows of keys, values and queries as attention.cpp multiplies them.

// The even and the odd ones of the halves of all lanes of two vectors.
static inline Pairs apart(u32 a, u32 b) {
#if defined(__AVX512BW__)
  __m512i even = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16((__m512i)a)),
                                    _mm512_cvtepi32_epi16((__m512i)b), 1);
  __m512i odd = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16((__m512i)(a >> 16))),
                                   _mm512_cvtepi32_epi16((__m512i)(b >> 16)), 1);
  return {(u32)even, (u32)odd};
#else
  std::uint16_t from[4 * LANES], to[4 * LANES];
  put(from, a), put(from + 2 * LANES, b);
  for (int i = 0; i < 4 * LANES; ++i) to[i % 2 * 2 * LANES + i / 2] = from[i];
  return {get<u32>(to), get<u32>(to + 2 * LANES)};
#endif
}

// The lanes of two vectors by turns.
static inline Pairs together(u32 a, u32 b) {
#if defined(__AVX512F__)
  const __m512i first = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  return {(u32)_mm512_permutex2var_epi32((__m512i)a, first, (__m512i)b),
          (u32)_mm512_permutex2var_epi32((__m512i)a, second, (__m512i)b)};
#else
  std::uint32_t to[2 * LANES];
  for (int i = 0; i < LANES; ++i) to[2 * i] = a[i], to[2 * i + 1] = b[i];
  return {get<u32>(to), get<u32>(to + LANES)};
#endif
}

// `from`, or where the COUNT numbers from there on would go past `count`, a copy of what is there.
template <class T, int COUNT = LANES>
struct Some {
  T copy[COUNT];
  const T* from;

  Some(const T* given, i64 count) : from(given) {
    if (count >= COUNT) return;
    std::memset(copy, 0, sizeof(copy));
    if (count > 0) std::memcpy(copy, given, count * sizeof(T));
    from = copy;
  }
};

template <class T>
static inline f32 some(const void* from, i64 first, i64 count) {
  return values(Some<T>((const T*)from + first, count).from);
}

// body(d, whole) for the first of each STEP columns, and whether all of these are there.
template <class Body>
static inline void by_steps(i64 columns, Body body) {
  i64 d = 0;
  for (; d + STEP <= columns; d += STEP) body(d, std::true_type());
  if (d < columns) body(d, std::false_type());
}

// STEP numbers or bytes of a row, of which `count` are there: numbers, and bytes of two codes, in 16 bits each.
template <class Whole>
static inline u32 neighbours(const bfloat16* from, i64 count, Whole) {
  if constexpr (Whole()) return get<u32>(from);
  u32 found{};
  std::memcpy(&found, from, count * sizeof(*from));
  return found;
}
template <class Whole>
static inline u32 neighbours(const std::uint8_t* from, i64 count, Whole) {
  typedef std::uint8_t bytes __attribute__((vector_size(2 * LANES)));
  typedef std::uint16_t words __attribute__((vector_size(4 * LANES)));
  u32 found{};
  if constexpr (!Whole()) std::memcpy(&found, from, count);
  const void* there = Whole() ? (const void*)from : &found;
  if constexpr (BITS == 8) return get<u32>(there);
#if defined(__AVX512BW__)
  return (u32)_mm512_cvtepu8_epi16(get<__m256i>(there));  // compilers make two instructions and their joining
#else
  return (u32)__builtin_convertvector(get<bytes>(there), words);
#endif
}

// The bfloat16 of what `neighbours` gives, of which all low halves are even and all high ones odd.
static inline Pairs pairs_of(u32 stored) {
  if constexpr (HALVES == 1) return decode_four(stored);
  stored |= stored << 4;
  return decode_four(MASKED ? stored & 0x0f0f0f0fu : stored);
}

template <int HALF, class T>
static inline f32 number_of(const T* from, i64 count) {
  Some<T> there(from, count);
  if constexpr (PLAIN) {
    return values(there.from);
  } else {
    i32 codes = widen(load<u8>(there.from)) >> (4 * HALF);
    if constexpr (HALVES > 1 && MASKED) codes &= 15;
    return decode(codes);
  }
}

// Numbers of one group, from `first` of a vector on, of which `own` are the scales and then the offsets.
static inline f32 scaled(f32 x, i64 first, i64 size, const Scale* own) {
  if constexpr (COMPACT) {
    const i64 group = GROUP_SIZE ? GROUP_SIZE : size;
    x *= number(own[first / group]);
    if constexpr (OFFSETS) x += number(own[size / group + first / group]);
  }
  return x;
}

// One row of keys.
template <class T>
static inline void decode_key(const T* row, i64 size, const Scale* own, Element* to) {
  const i64 columns = size / HALVES, half = padded(size) / HALVES;
  by_steps(columns, [&](i64 d, auto whole) {
    if constexpr (PAIRED && PLAIN) {
      put(to + d, neighbours(row + d, columns - d, whole));
    } else if constexpr (PAIRED) {
      Pairs pairs = pairs_of(neighbours(row + d, columns - d, whole));
      put(to + d, pairs.even);
      put(to + d + (HALVES == 1 ? 2 * LANES : half), pairs.odd);
    } else {
      each<HALVES>([&](auto h) {
        put(to + h * half + d, scaled(number_of<h>(row + d, columns - d), h * columns + d, size, own));
      });
    }
  });
}

// The rows of values of DEPTH positions as words.
template <class T>
static inline void decode_value(const T* row, const T* next, i64 size, const Scale* own, Word* to) {
  const i64 columns = size / HALVES, half = padded(size) / HALVES;
  by_steps(columns, [&](i64 d, auto whole) {
    if constexpr (PAIRED) {
      u32 first = neighbours(row + d, columns - d, whole), second = neighbours(next + d, columns - d, whole);
      u32 even = (first & 0xffffu) | second << 16, odd = first >> 16 | (second & 0xffff0000u);
      if constexpr (PLAIN) {
        put(to + d, even);
        put(to + d + LANES, odd);
      } else {
        const i64 other = HALVES == 1 ? LANES : half, rest = HALVES == 1 ? 2 * LANES : LANES;
        Pairs pairs = pairs_of(even), after = pairs_of(odd);
        put(to + d, pairs.even);
        put(to + d + other, pairs.odd);
        put(to + d + rest, after.even);
        put(to + d + rest + other, after.odd);
      }
    } else {
      each<HALVES>([&](auto h) {
        put(to + h * half + d, scaled(number_of<h>(row + d, columns - d), h * columns + d, size, own));
      });
    }
  });
}

template <class To, class From>
static inline To converted(From x) {
  if constexpr (std::is_same_v<To, From>) return x;
  else return number(x);
}

// A row of queries as keys are decoded, with zeros where they have no column.
template <class T>
static inline void arrange_query(const T* row, i64 size, Element* to) {
  const i64 columns = size / HALVES, half = padded(size) / HALVES;
  for (i64 h = 0; h < HALVES; ++h, row += columns, to += half) {
    if constexpr (PAIRED && BITS == 8) {
      for (i64 d = 0; d < half; d += STEP) {
        Some<T, STEP> there(row + d, columns - d);
        Pairs words = apart(get<u32>(there.from), get<u32>(there.from + 2 * LANES));
        put(to + d, words.even);
        put(to + d + 2 * LANES, words.odd);
      }
    } else if constexpr (PAIRED) {
      for (i64 d = 0; d < half; d += STEP) put(to + d, get<u32>(Some<T, STEP>(row + d, columns - d).from));
    } else {
      for (i64 d = 0; d < half; ++d) to[d] = d < columns ? converted<Element>(row[d]) : Element{};
    }
  }
}
