// Vectors of LANES 32-bit numbers in the compiler's vector extension, and the few instructions that it has no operator
// for, chosen by what the compiler is told to generate code for.
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#if defined(__AMX_TILE__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

using i64 = std::int64_t;

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int BLOCK = 16;  // rows whose codes lie side by side

typedef float f32 __attribute__((vector_size(4 * LANES)));
typedef std::int32_t i32 __attribute__((vector_size(4 * LANES)));
typedef std::uint32_t u32 __attribute__((vector_size(4 * LANES)));
typedef std::uint16_t u16 __attribute__((vector_size(2 * LANES)));
typedef std::uint8_t bytes __attribute__((vector_size(4 * LANES)));
typedef std::uint8_t u8 __attribute__((vector_size(LANES)));
typedef std::int8_t i8 __attribute__((vector_size(LANES)));

template <class To, class From>
static inline To load(const From* from) {
  To value;
  static_assert(sizeof(value[0]) == sizeof(*from));
  std::memcpy(&value, from, sizeof(value));
  return value;
}

static inline f32 as_f32(u32 x) { return (f32)x; }
static inline f32 as_f32(i32 x) { return (f32)x; }
static inline u32 as_u32(f32 x) { return (u32)x; }
static inline i32 as_i32(f32 x) { return (i32)x; }
static inline f32 to_f32(i32 x) { return __builtin_convertvector(x, f32); }
static inline f32 everywhere(float x) { return x - f32{}; }
static inline u32 everywhere(std::uint32_t x) { return x + u32{}; }
static inline f32 where(i32 condition, f32 a, f32 b) { return condition ? a : b; }
static inline f32 where(i32 condition, float a, f32 b) { return condition ? everywhere(a) : b; }

// 16 values of codes 0 to 15; and those of 32 or 64 codes, or of the 128 whose sign bit is 0, as bfloat16. Higher bits of
// a code are not looked at, but for the sign.
struct Table {
  float values[16];
};
template <int COUNT>
struct PairTable {
  std::uint16_t values[COUNT];
};

static inline f32 lookup(i32 code, const Table& table) {
#if defined(__AVX512F__)
  return (f32)_mm512_permutexvar_ps((__m512i)code, _mm512_loadu_ps(table.values));
#elif defined(__AVX2__)
  __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table.values), (__m256i)code);
  __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table.values + 8), (__m256i)code);
  return (f32)_mm256_blendv_ps(low, high, (__m256)(code << 28));
#else
  f32 value;
  for (int lane = 0; lane < LANES; ++lane) value[lane] = table.values[code[lane] & 15];
  return value;
#endif
}

// bfloat16 of four codes in the bytes of a lane: those of bytes 0 and 2, and of bytes 1 and 3.
struct Pairs {
  u32 even, odd;
};

#if defined(__AVX512VBMI__)
// The low and the high bytes of the bfloat16 of 64 codes, or of the 128 whose sign bit is 0.
template <int COUNT>
struct ByteTables {
  std::uint8_t low[COUNT], high[COUNT];
};

template <int COUNT>
static inline Pairs lookup(u32 codes, const ByteTables<COUNT>& table) {
  auto part = [&](const std::uint8_t* bytes) {
    __m512i first = _mm512_loadu_si512(bytes);
    if constexpr (COUNT == 64) return (u32)_mm512_permutexvar_epi8((__m512i)codes, first);
    else return (u32)_mm512_permutex2var_epi8(first, (__m512i)codes, _mm512_loadu_si512(bytes + 64));
  };
  u32 low = part(table.low), high = part(table.high);
  if constexpr (COUNT == 128) high |= codes & 0x80808080u;
  const __mmask64 odd = 0xaaaaaaaaaaaaaaaa;
  return {(u32)_mm512_mask_mov_epi8((__m512i)low, odd, _mm512_slli_epi16((__m512i)high, 8)),
          (u32)_mm512_mask_mov_epi8(_mm512_srli_epi16((__m512i)low, 8), odd, (__m512i)high)};
}

// What a PairTable<128> has, its lower bytes before its upper ones: those of all codes of a quad are looked up together.
struct BytesTable {
  std::uint8_t values[256];
};

template <int FROM>
static inline u32 lookup(u32 quad, const BytesTable& table) {
  const __m512i codes = (__m512i)quad;
  auto of = [&](int place) { return _mm512_loadu_si512(table.values + 64 * place); };
  const u32 low = (u32)_mm512_permutex2var_epi8(of(0), codes, of(1));
  const u32 high = (u32)_mm512_permutex2var_epi8(of(2), codes, of(3)) | (quad & 0x80808080u);
  if constexpr (FROM == 0) return (low & 0x00ff00ffu) | (high << 8 & 0xff00ff00u);
  static_assert(FROM == 0 || FROM == 8);
  return (low >> 8 & 0x00ff00ffu) | (high & 0xff00ff00u);
}
#endif

// The bytes of each lane as float32, less a number, in the halves of lanes that bfloat16 takes: exact up to 8 bits.
static inline Pairs integers_of(u32 bytes, float less) {
  // The lowest byte of a float is its integer where that begins at 2^23, the next one where it begins at 2^15.
  auto low = [&](u32 x) { return as_u32(as_f32((x & 0xffu) | 0x4b000000u) - (0x1p23f + less)); };
  auto next = [&](u32 x) { return as_u32(as_f32((x & 0xff00u) | 0x47000000u) - (0x1p15f + less)); };
  u32 upper = bytes >> 16;
  return {low(bytes) >> 16 | (low(upper) & 0xffff0000u), next(bytes) >> 16 | (next(upper) & 0xffff0000u)};
}

// The halves of each lane over 2^BITS, without what is shifted into their upper bits. By a product, which two ports have
// where one has shifts.
template <int BITS>
static inline u32 lowered(u32 x) {
#if defined(__AVX512BW__)
  if constexpr (BITS > 0) return (u32)_mm512_mulhi_epu16((__m512i)x, _mm512_set1_epi16((short)(1 << (16 - BITS))));
#endif
  return x >> BITS;
}

// Codes from bit FROM of the halves of each lane on at bit TO, where `mask` has a bit for each of theirs, and `rest`.
template <int TO, int FROM>
static inline u32 put(u32 codes, std::uint32_t mask, std::uint32_t rest) {
  if constexpr (FROM < TO) return (codes << (TO - FROM) & mask) | rest;
  else return (lowered<FROM - TO>(codes) & mask) | rest;
}

#if defined(__AVX512BW__)
// Both halves of each lane at once.
template <int COUNT>
static inline u32 lookup(u32 pair, const PairTable<COUNT>& table) {
  __m512i codes = (__m512i)pair, part[COUNT / 32];
  for (int i = 0; i < COUNT / 32; ++i) part[i] = _mm512_loadu_si512(table.values + 32 * i);
  if constexpr (COUNT == 32) {
    return (u32)_mm512_permutexvar_epi16(codes, part[0]);
  } else if constexpr (COUNT == 64) {
    return (u32)_mm512_permutex2var_epi16(part[0], codes, part[1]);
  } else {
    __m512i low = _mm512_permutex2var_epi16(part[0], codes, part[1]);
    __m512i high = _mm512_permutex2var_epi16(part[2], codes, part[3]);
    __mmask32 upper = _mm512_test_epi16_mask(codes, _mm512_set1_epi16(0x40));
    return (u32)_mm512_mask_blend_epi16(upper, low, high) | (pair & 0x00800080u) << 8;
  }
}
#endif

// sum + the products of the bfloat16 halves of each lane
static inline f32 dot(f32 sum, u32 pair, u32 other) {
#if defined(__AVX512BF16__)
  return (f32)_mm512_dpbf16_ps((__m512)sum, (__m512bh)pair, (__m512bh)other);
#else
  sum += as_f32(pair << 16) * as_f32(other << 16);
  return sum + as_f32(pair & 0xffff0000u) * as_f32(other & 0xffff0000u);
#endif
}

// Sixteen bytes that the lower halves of codes choose from.
struct ByteTable {
  std::uint8_t values[16];
};

// The bytes that codes 0 to 15, in the bytes of each lane, choose.
static inline u32 lookup(u32 codes, const ByteTable& table) {
#if defined(__AVX512BW__)
  __m128i all = _mm_loadu_si128((const __m128i*)table.values);
  return (u32)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(all), (__m512i)codes);
#elif defined(__AVX2__)
  __m128i all = _mm_loadu_si128((const __m128i*)table.values);
  return (u32)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(all), (__m256i)codes);
#elif defined(__aarch64__)
  return (u32)vqtbl1q_u8(vld1q_u8(table.values), (uint8x16_t)codes);
#else
  u32 found{};
  for (int byte = 0; byte < 4; ++byte) {
    for (int lane = 0; lane < LANES; ++lane) {
      found[lane] |= (std::uint32_t)table.values[codes[lane] >> (8 * byte) & 15] << (8 * byte);
    }
  }
  return found;
#endif
}

// What `dot` subtracts from codes of BITS bits before it multiplies them: Arm's older products are of signed bytes alone.
#if defined(__ARM_FEATURE_DOTPROD) && !defined(__ARM_FEATURE_MATMUL_INT8)
template <int BITS>
constexpr int SHIFTED = BITS == 8 ? 128 : 0;
#else
template <int BITS>
constexpr int SHIFTED = 0;
#endif

#if defined(__AVX2__)
// Sums of the products of neighbours: int16 in each lane's halves; unsigned and signed bytes, whose sums must be int16.
static inline u32 pairs(u32 a, u32 b) {
#if defined(__AVX512BW__)
  return (u32)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#else
  return (u32)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#endif
}
static inline u32 pairs_of_bytes(u32 codes, u32 x) {
#if defined(__AVX512BW__)
  return (u32)_mm512_maddubs_epi16((__m512i)codes, (__m512i)x);
#else
  return (u32)_mm256_maddubs_epi16((__m256i)codes, (__m256i)x);
#endif
}
#endif

// Four int8, the same in each lane, by which codes of BITS bits are multiplied.
template <int BITS>
struct Four {
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(__ARM_FEATURE_DOTPROD)
  u32 all;
  explicit Four(std::uint32_t x) : all(everywhere(x)) {}
#elif defined(__AVX2__)
  typedef std::int16_t i16 __attribute__((vector_size(4 * LANES)));
  u32 all, even, odd;
  explicit Four(std::uint32_t x) : all(everywhere(x)) {
    // Two products of a 7-bit code and an int8 are an int16, two of an 8-bit code are not.
    if constexpr (BITS == 8) even = (u32)((i16)(all << 8) >> 8), odd = (u32)((i16)all >> 8);
  }
#else
  u32 each[4];
  explicit Four(std::uint32_t x) {
    for (int i = 0; i < 4; ++i) each[i] = everywhere((std::uint32_t)(std::int8_t)(x >> (8 * i)));
  }
#endif
};

// sum + the products of each lane's bytes, unsigned codes (less SHIFTED) and int8; sums wrap around.
template <int BITS>
static inline u32 dot(u32 sum, u32 codes, const Four<BITS>& x) {
#if defined(__AVX512VNNI__)
  return (u32)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, (__m512i)x.all);
#elif defined(__AVXVNNI__)
  return (u32)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)codes, (__m256i)x.all);
#elif defined(__AVX2__)
  if constexpr (BITS < 8) return sum + pairs(pairs_of_bytes(codes, x.all), everywhere(0x00010001u));
  sum += pairs(codes & 0x00ff00ffu, x.even);
  return sum + pairs(codes >> 8 & 0x00ff00ffu, x.odd);
#elif defined(__ARM_FEATURE_MATMUL_INT8)
  return (u32)vusdotq_s32((int32x4_t)sum, (uint8x16_t)codes, (int8x16_t)x.all);
#elif defined(__ARM_FEATURE_DOTPROD)
  if constexpr (BITS == 8) codes ^= 0x80808080u;
  return (u32)vdotq_s32((int32x4_t)sum, (int8x16_t)codes, (int8x16_t)x.all);
#else
  for (int i = 0; i < 4; ++i) sum += (codes >> (8 * i) & 255u) * x.each[i];
  return sum;
#endif
}

// x / by, where inverse is 1 / by: the nearest float32, by what a product with it leaves over. Not for `by` below 2^-100.
static inline f32 quotient(f32 x, float by, float inverse) {
#if defined(__AVX512F__)
  const __m512 near = (__m512)(x * inverse), over = _mm512_set1_ps(inverse);
  return (f32)_mm512_fmadd_ps(_mm512_fnmadd_ps(near, _mm512_set1_ps(by), (__m512)x), over, near);
#else
  return x / everywhere(by);  // which takes few cycles of so few lanes
#endif
}

// Stored types of scales.
struct bfloat16 {
  std::uint16_t bits;
};
struct float16 {
  std::uint16_t bits;
};
struct float8_e8m0 {
  std::uint8_t bits;
};
struct float8_e4m3 {
  std::uint8_t bits;
};

static inline float number(float x) { return x; }
static inline float number(bfloat16 x) { return as_f32(everywhere((std::uint32_t)x.bits << 16))[0]; }

// Of what compilers would widen number by number.
#if defined(__AVX512F__)
static inline i32 widen(u16 x) { return (i32)_mm512_cvtepu16_epi32((__m256i)x); }
static inline i32 widen(u8 x) { return (i32)_mm512_cvtepu8_epi32((__m128i)x); }
static inline i32 widen(i8 x) { return (i32)_mm512_cvtepi8_epi32((__m128i)x); }
#elif defined(__AVX2__)
static inline i32 widen(u16 x) { return (i32)_mm256_cvtepu16_epi32((__m128i)x); }
static inline i32 widen(u8 x) { return (i32)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((i64)x)); }
static inline i32 widen(i8 x) { return (i32)_mm256_cvtepi8_epi32(_mm_cvtsi64_si128((i64)x)); }
#else
static inline i32 widen(u16 x) { return __builtin_convertvector(x, i32); }
static inline i32 widen(u8 x) { return __builtin_convertvector(x, i32); }
static inline i32 widen(i8 x) { return __builtin_convertvector(x, i32); }
#endif
static inline f32 values(const float* x) { return load<f32>(x); }
static inline f32 values(const std::uint8_t* x) { return to_f32(widen(load<u8>(x))); }
static inline f32 values(const std::int8_t* x) { return to_f32(widen(load<i8>(x))); }
static inline f32 values(const bfloat16* x) { return as_f32(widen(load<u16>(&x->bits)) << 16); }
static inline f32 values(const float8_e8m0* x) {
  i32 exponent = widen(load<u8>(&x->bits));
  f32 value = where(exponent == 0, 0x1p-127f, as_f32(exponent << 23));
  return where(exponent == 255, __builtin_nanf(""), value);
}

// A sign and a magnitude of an exponent and MANTISSA bits, which also tell 0 from subnormal numbers.
template <int SIGN, int MANTISSA, int BIAS>
static inline f32 small_float(i32 bits) {
  i32 magnitude = bits & ((1 << SIGN) - 1);
  i32 sign = (bits >> SIGN) << 31;
  f32 normal = as_f32((magnitude << (23 - MANTISSA)) + ((127 - BIAS) << 23));
  f32 subnormal = to_f32(magnitude) * as_f32(i32{} + ((128 - BIAS - MANTISSA) << 23));
  return as_f32(as_i32(where(magnitude < (1 << MANTISSA), subnormal, normal)) | sign);
}

static inline f32 values(const float16* x) {
#if defined(__AVX512F__)
  return (f32)_mm512_cvtph_ps((__m256i)load<u16>(&x->bits));
#elif defined(__F16C__)
  return (f32)_mm256_cvtph_ps((__m128i)load<u16>(&x->bits));
#else
  i32 bits = widen(load<u16>(&x->bits));
  i32 magnitude = bits & 0x7fff;
  f32 special = as_f32(((bits >> 15) << 31) | 0x7f800000 | (magnitude << 13));
  return where(magnitude >= 0x7c00, special, small_float<15, 10, 15>(bits));
#endif
}
static inline f32 values(const float8_e4m3* x) {
  i32 bits = widen(load<u8>(&x->bits));
  return where((bits & 0x7f) == 0x7f, __builtin_nanf(""), small_float<7, 3, 7>(bits));
}

// The nearest bfloat16, ties to even, in the lower half of each lane.
static inline u32 to_bfloat16(f32 x) {
  u32 bits = as_u32(x);
  u32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return x == x ? rounded : everywhere(0x7fc0u);
}

// The nearest bfloat16, in the halves of each lane.
static inline u32 to_pair(f32 low, f32 high) {
#if defined(__AVX512BF16__)
  typedef std::uint16_t halves __attribute__((vector_size(64)));
  const halves interleaved = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                              8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  return (u32)_mm512_permutexvar_epi16((__m512i)interleaved, both);
#else
  return to_bfloat16(low) | to_bfloat16(high) << 16;
#endif
}

static inline float sum_of(f32 x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float sum = 0;
  for (int lane = 0; lane < LANES; ++lane) sum += x[lane];
  return sum;
#endif
}

static inline std::int32_t sum_of(i32 x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_epi32((__m512i)x);
#else
  std::int32_t sum = 0;
  for (int lane = 0; lane < LANES; ++lane) sum += x[lane];
  return sum;
#endif
}

static inline std::uint32_t greatest_of(u32 x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_epu32((__m512i)x);
#else
  std::uint32_t most = 0;
  for (int lane = 0; lane < LANES; ++lane) most = most > x[lane] ? most : x[lane];
  return most;
#endif
}

// Up to LANES numbers to memory.
template <class To, class Vector>
static inline void store_some(To* to, const Vector& x, i64 count) {
  static_assert(sizeof(x) == LANES * sizeof(To));
  if (count >= LANES) std::memcpy(to, &x, sizeof(x));  // of a constant size: no call
  else std::memcpy(to, &x, count * sizeof(To));
}
static inline void store(float* to, f32 x, i64 count) { store_some(to, x, count); }
static inline void store(bfloat16* to, f32 x, i64 count) {
#if defined(__AVX512BF16__)
  u16 bits = (u16)_mm512_cvtneps_pbh((__m512)x);
#else
  u16 bits = __builtin_convertvector(to_bfloat16(x), u16);
#endif
  store_some(to, bits, count);
}

// Two vectors, one behind the other: a whole line of the cache where LANES are 16.
template <class To>
static inline void store_pair(To* to, f32 low, f32 high) {
  store(to, low, LANES);
  store(to + LANES, high, LANES);
}
#if defined(__AVX512BF16__)
static inline void store_pair(bfloat16* to, f32 low, f32 high) {
  _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
}
#endif

static inline void store(std::int8_t* to, f32 x, i64 count) {
  i8 bits = __builtin_convertvector(__builtin_convertvector(x, i32), i8);
  store_some(to, bits, count);
}

// body(0) to body(COUNT - 1) with constants for arguments, so that all that is indexed by them stays in registers.
template <int... INDEX, class Body>
static inline void each(std::integer_sequence<int, INDEX...>, Body body) {
  (body(std::integral_constant<int, INDEX>()), ...);
}
template <int COUNT, class Body>
static inline void each(Body body) {
  each(std::make_integer_sequence<int, COUNT>(), body);
}

#if defined(__AMX_TILE__)
// The matrix unit has 8 tiles of at most 16 rows of 64 bytes. GCC 12's own functions keep from the compiler what memory
// they read.
struct alignas(64) Tiles {
  std::uint8_t palette = 1, start = 0, reserved[14] = {};
  std::uint16_t bytes[16] = {};
  std::uint8_t rows[16] = {};

  void set(int tile, i64 count, i64 width) {
    rows[tile] = (std::uint8_t)count;
    bytes[tile] = (std::uint16_t)width;
  }
  void configure() const { asm volatile("ldtilecfg %0" ::"m"(*this)); }
};

template <int TILE>
static inline void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(TILE));
}
template <int TILE>
static inline void load_tile(const void* from, i64 stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(TILE) : "memory");
}
template <int TILE>
static inline void store_tile(void* to, i64 stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(TILE) : "memory");
}

// SUM += X * PAIRS, of bfloat16 [rows, 2 k] and [k, columns, 2].
template <int SUM, int X, int PAIRS>
static inline void dot_tiles_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(X), "i"(PAIRS));
}

// The same for int8 [rows, 4 k] and integers [k, columns, 4], signed or not.
template <int SUM, int X, int QUADS, bool SIGNED>
static inline void dot_tiles_int8() {
  if constexpr (SIGNED) {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(X), "i"(QUADS));
  } else {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(X), "i"(QUADS));
  }
}
#endif

// Whether the operating system lets this process use what the kernel needs: 0 if so.
extern "C" int prepare() {
#if defined(__AMX_TILE__)
  constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  return (int)syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA);
#else
  return 0;
#endif
}
