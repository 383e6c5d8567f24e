// Functions of vectors that softmax needs: sums and maxima across lanes, exp and tanh.

// The sums of LANES vectors, one in each lane.
static inline f32 sums_of(const f32 (&x)[LANES]) {
#if defined(__AVX512F__)
  __m512 two[8], four[4], eight[2];
  for (int i = 0; i < 8; ++i) {
    __m512 a = (__m512)x[2 * i], b = (__m512)x[2 * i + 1];
    two[i] = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
  }
  for (int i = 0; i < 4; ++i) {
    __m512d a = (__m512d)two[2 * i], b = (__m512d)two[2 * i + 1];
    four[i] = (__m512)_mm512_unpacklo_pd(a, b) + (__m512)_mm512_unpackhi_pd(a, b);
  }
  for (int i = 0; i < 2; ++i) {
    __m512 a = four[2 * i], b = four[2 * i + 1];
    eight[i] = _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd);
  }
  return (f32)(_mm512_shuffle_f32x4(eight[0], eight[1], 0x88) + _mm512_shuffle_f32x4(eight[0], eight[1], 0xdd));
#elif defined(__AVX2__)
  __m256 two[4], four[2];
  for (int i = 0; i < 4; ++i) {
    __m256 a = (__m256)x[2 * i], b = (__m256)x[2 * i + 1];
    two[i] = _mm256_unpacklo_ps(a, b) + _mm256_unpackhi_ps(a, b);
  }
  for (int i = 0; i < 2; ++i) {
    __m256d a = (__m256d)two[2 * i], b = (__m256d)two[2 * i + 1];
    four[i] = (__m256)_mm256_unpacklo_pd(a, b) + (__m256)_mm256_unpackhi_pd(a, b);
  }
  return (f32)(_mm256_permute2f128_ps(four[0], four[1], 0x20) + _mm256_permute2f128_ps(four[0], four[1], 0x31));
#else
  f32 sum;
  for (int lane = 0; lane < LANES; ++lane) sum[lane] = (x[lane][0] + x[lane][1]) + (x[lane][2] + x[lane][3]);
  return sum;
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

// Of numbers that are not NaN.
static inline float highest(f32 x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#else
  float top = x[0];
  for (int lane = 1; lane < LANES; ++lane) top = x[lane] > top ? x[lane] : top;
  return top;
#endif
}

// e to the power of x <= 0, with a relative error below (3 + 2 |x|) 2^-24; 0 below -87, and NaN of NaN.
//
// 2^t, t = x / ln 2, is an integer power times a polynomial on [-1/2, 1/2], whose coefficients interpolate 2^t in
// Chebyshev's points with a relative error of 2.6e-9.
static inline f32 exp_of(f32 x) {
  constexpr float LEAST = -87.0f, TO_INTEGER = 0x1.8p23f;
  f32 t = where(x < LEAST, LEAST, x) * 0x1.715476p0f;
  f32 whole = (t + TO_INTEGER) - TO_INTEGER;
  f32 rest = t - whole;
  f32 y = 0x1.5f48c0p-10f + rest * 0x1.444000p-13f;
  y = 0x1.3b2a1cp-7f + rest * y;
  y = 0x1.c6aeccp-5f + rest * y;
  y = 0x1.ebfbe0p-3f + rest * y;
  y = 0x1.62e430p-1f + rest * y;
  y = 1.0f + rest * y;
#if defined(__AVX512F__)
  f32 power = (f32)_mm512_scalef_ps((__m512)y, (__m512)whole);
#else
  f32 power = y * as_f32((__builtin_convertvector(whole, i32) + 127) << 23);
#endif
  return where(x < LEAST, 0.0f, power);
}

static inline float exp_of(float x) { return exp_of(everywhere(x))[0]; }

// With an absolute error below 2^-22; near 0 by differences of numbers near 1.
static inline f32 tanh_of(f32 x) {
  f32 size = as_f32(as_i32(x) & 0x7fffffff);
  f32 decay = exp_of(-2.0f * size);
  f32 y = (1.0f - decay) / (1.0f + decay);
  return as_f32(as_i32(y) | (as_i32(x) & (i32)(0x80000000u + u32{})));
}
