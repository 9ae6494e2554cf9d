// Sixteen lanes of float32 or int32 on each kind of processor: the only file that names instructions.
//
// Every operation gives the same bits on every processor: it is one correctly rounded IEEE operation for each lane, and
// multiply and add are fused only where the code says fma() (the build sets -ffp-contract=off). `Floats` and `Ints` are
// one 512-bit register, two 256-bit registers, or an array that the compiler vectorises as it can.
// Everything is in an anonymous namespace: this header is compiled several times with different instructions, and the
// linker must never confuse the functions of two variants.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

namespace {

constexpr int LANES = 16;

INLINE float float_of_bits(uint32_t bits) { float value; memcpy(&value, &bits, 4); return value; }
INLINE uint32_t bits_of_float(float value) { uint32_t bits; memcpy(&bits, &value, 4); return bits; }
INLINE float widen(uint16_t half) { return float_of_bits(uint32_t(half) << 16); }
INLINE uint16_t to_bfloat16(float value) {  // to nearest, ties to even
    uint32_t bits = bits_of_float(value);
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#if defined(__AVX512F__)

struct Floats { __m512 v; };
struct Ints { __m512i v; };

INLINE Floats zeros() { return {_mm512_setzero_ps()}; }
INLINE Floats all(float x) { return {_mm512_set1_ps(x)}; }
INLINE Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
INLINE Floats load(const uint16_t* p) {  // bfloat16
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16))};
}
INLINE void store(float* p, Floats a) { _mm512_storeu_ps(p, a.v); }
INLINE Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
INLINE Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
INLINE Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
INLINE Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
INLINE Floats larger(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
INLINE Floats magnitude(Floats a) { return {_mm512_abs_ps(a.v)}; }
INLINE Floats zero_below(Floats a, Floats x, float limit) {  // a where x >= limit, else 0
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, _mm512_set1_ps(limit), _CMP_GE_OQ), a.v)};
}
INLINE Ints bits(Floats a) { return {_mm512_castps_si512(a.v)}; }
INLINE Floats from_bits(Ints a) { return {_mm512_castsi512_ps(a.v)}; }
INLINE Ints all(int32_t x) { return {_mm512_set1_epi32(x)}; }
INLINE Ints load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
INLINE Ints load_bytes(const void* p) { return {_mm512_loadu_si512(p)}; }
INLINE void store_bytes(void* p, Ints a) { _mm512_storeu_si512(p, a.v); }
INLINE Ints operator+(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
INLINE Ints operator&(Ints a, Ints b) { return {_mm512_and_si512(a.v, b.v)}; }
INLINE Ints operator^(Ints a, Ints b) { return {_mm512_xor_si512(a.v, b.v)}; }
INLINE Ints shift_left(Ints a, int by) { return {_mm512_slli_epi32(a.v, by)}; }
INLINE Ints shift_right(Ints a, int by) { return {_mm512_srli_epi32(a.v, by)}; }
INLINE Floats to_floats(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }
INLINE void store_low_bytes(uint8_t* p, Ints a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(a.v)); }
INLINE void store_low_halves(uint16_t* p, Ints a) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(a.v)); }
INLINE Ints minus_bytes(Ints a, Ints b) {
#if defined(__AVX512BW__)
    return {_mm512_sub_epi8(a.v, b.v)};
#endif
}
INLINE Ints add_products(Ints sum, Ints x, Ints w) {  // sum += the 4 products of unsigned bytes x and signed bytes w
#if defined(__AVX512VNNI__)
    return {_mm512_dpbusd_epi32(sum.v, x.v, w.v)};
#else  // multiply as 16-bit halves: sums of two products of bytes overflow 16 bits
    __m512i low = _mm512_set1_epi16(0xff);
    __m512i even = _mm512_madd_epi16(_mm512_and_si512(x.v, low), _mm512_srai_epi16(_mm512_slli_epi16(w.v, 8), 8));
    __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(x.v, 8), _mm512_srai_epi16(w.v, 8));
    return {_mm512_add_epi32(sum.v, _mm512_add_epi32(even, odd))};
#endif
}

#elif defined(__AVX2__) && defined(__FMA__)

struct Floats { __m256 a, b; };
struct Ints { __m256i a, b; };

INLINE Floats zeros() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
INLINE Floats all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE __m256 widen8(const uint16_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
INLINE Floats load(const uint16_t* p) { return {widen8(p), widen8(p + 8)}; }
INLINE void store(float* p, Floats x) { _mm256_storeu_ps(p, x.a); _mm256_storeu_ps(p + 8, x.b); }
INLINE Floats operator+(Floats x, Floats y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
INLINE Floats operator-(Floats x, Floats y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
INLINE Floats operator*(Floats x, Floats y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
INLINE Floats fma(Floats x, Floats y, Floats z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
INLINE Floats larger(Floats x, Floats y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
INLINE Floats magnitude(Floats x) {
    __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
INLINE Floats zero_below(Floats a, Floats x, float limit) {
    __m256 l = _mm256_set1_ps(limit);
    return {_mm256_and_ps(a.a, _mm256_cmp_ps(x.a, l, _CMP_GE_OQ)), _mm256_and_ps(a.b, _mm256_cmp_ps(x.b, l, _CMP_GE_OQ))};
}
INLINE Ints bits(Floats x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
INLINE Floats from_bits(Ints x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
INLINE Ints all(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
INLINE Ints load_bytes(const void* p) {
    return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)};
}
INLINE Ints load(const int32_t* p) { return load_bytes(p); }
INLINE void store_bytes(void* p, Ints x) {
    _mm256_storeu_si256((__m256i*)p, x.a);
    _mm256_storeu_si256((__m256i*)p + 1, x.b);
}
INLINE Ints operator+(Ints x, Ints y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
INLINE Ints operator&(Ints x, Ints y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
INLINE Ints operator^(Ints x, Ints y) { return {_mm256_xor_si256(x.a, y.a), _mm256_xor_si256(x.b, y.b)}; }
INLINE Ints shift_left(Ints x, int by) { return {_mm256_slli_epi32(x.a, by), _mm256_slli_epi32(x.b, by)}; }
INLINE Ints shift_right(Ints x, int by) { return {_mm256_srli_epi32(x.a, by), _mm256_srli_epi32(x.b, by)}; }
INLINE Floats to_floats(Ints x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
INLINE void store_low_bytes(uint8_t* p, Ints x) {
    int32_t lanes[LANES];
    store_bytes(lanes, x);
    for (int i = 0; i < LANES; ++i) p[i] = uint8_t(lanes[i]);
}
INLINE void store_low_halves(uint16_t* p, Ints x) {
    __m256i halves = _mm256_packus_epi32(_mm256_and_si256(x.a, _mm256_set1_epi32(0xffff)),
                                         _mm256_and_si256(x.b, _mm256_set1_epi32(0xffff)));
    _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(halves, 0xd8));
}
INLINE Ints minus_bytes(Ints x, Ints y) { return {_mm256_sub_epi8(x.a, y.a), _mm256_sub_epi8(x.b, y.b)}; }
INLINE __m256i add_products8(__m256i sum, __m256i x, __m256i w) {  // as halves: two products overflow 16 bits
    __m256i low = _mm256_set1_epi16(0xff);
    __m256i even = _mm256_madd_epi16(_mm256_and_si256(x, low), _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8));
    __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(x, 8), _mm256_srai_epi16(w, 8));
    return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
}
INLINE Ints add_products(Ints sum, Ints x, Ints w) {
    return {add_products8(sum.a, x.a, w.a), add_products8(sum.b, x.b, w.b)};
}

#else  // any processor

struct Floats { float v[LANES]; };
struct Ints { int32_t v[LANES]; };

#define EACH_LANE(type, expression)                             \
    type result;                                                \
    for (int i = 0; i < LANES; ++i) result.v[i] = (expression); \
    return result;

INLINE Floats zeros() { EACH_LANE(Floats, 0.0f) }
INLINE Floats all(float x) { EACH_LANE(Floats, x) }
INLINE Floats load(const float* p) { EACH_LANE(Floats, p[i]) }
INLINE Floats load(const uint16_t* p) { EACH_LANE(Floats, widen(p[i])) }
INLINE void store(float* p, Floats a) { for (int i = 0; i < LANES; ++i) p[i] = a.v[i]; }
INLINE Floats operator+(Floats a, Floats b) { EACH_LANE(Floats, a.v[i] + b.v[i]) }
INLINE Floats operator-(Floats a, Floats b) { EACH_LANE(Floats, a.v[i] - b.v[i]) }
INLINE Floats operator*(Floats a, Floats b) { EACH_LANE(Floats, a.v[i] * b.v[i]) }
INLINE Floats fma(Floats a, Floats b, Floats c) { EACH_LANE(Floats, __builtin_fmaf(a.v[i], b.v[i], c.v[i])) }
INLINE Floats larger(Floats a, Floats b) { EACH_LANE(Floats, a.v[i] > b.v[i] ? a.v[i] : b.v[i]) }
INLINE Floats magnitude(Floats a) { EACH_LANE(Floats, __builtin_fabsf(a.v[i])) }
INLINE Floats zero_below(Floats a, Floats x, float limit) { EACH_LANE(Floats, x.v[i] >= limit ? a.v[i] : 0.0f) }
INLINE Ints bits(Floats a) { EACH_LANE(Ints, int32_t(bits_of_float(a.v[i]))) }
INLINE Floats from_bits(Ints a) { EACH_LANE(Floats, float_of_bits(uint32_t(a.v[i]))) }
INLINE Ints all(int32_t x) { EACH_LANE(Ints, x) }
INLINE Ints load(const int32_t* p) { EACH_LANE(Ints, p[i]) }
INLINE Ints load_bytes(const void* p) { Ints result; memcpy(&result, p, sizeof result); return result; }
INLINE void store_bytes(void* p, Ints a) { memcpy(p, &a, sizeof a); }
INLINE Ints operator+(Ints a, Ints b) { EACH_LANE(Ints, int32_t(uint32_t(a.v[i]) + uint32_t(b.v[i]))) }
INLINE Ints operator&(Ints a, Ints b) { EACH_LANE(Ints, a.v[i] & b.v[i]) }
INLINE Ints operator^(Ints a, Ints b) { EACH_LANE(Ints, a.v[i] ^ b.v[i]) }
INLINE Ints shift_left(Ints a, int by) { EACH_LANE(Ints, int32_t(uint32_t(a.v[i]) << by)) }
INLINE Ints shift_right(Ints a, int by) { EACH_LANE(Ints, int32_t(uint32_t(a.v[i]) >> by)) }
INLINE Floats to_floats(Ints a) { EACH_LANE(Floats, float(a.v[i])) }
INLINE void store_low_bytes(uint8_t* p, Ints a) { for (int i = 0; i < LANES; ++i) p[i] = uint8_t(a.v[i]); }
INLINE void store_low_halves(uint16_t* p, Ints a) { for (int i = 0; i < LANES; ++i) p[i] = uint16_t(a.v[i]); }
INLINE Ints minus_bytes(Ints a, Ints b) {
    uint8_t x[64], y[64];
    store_bytes(x, a), store_bytes(y, b);
    for (int i = 0; i < 64; ++i) x[i] = uint8_t(x[i] - y[i]);
    return load_bytes(x);
}
INLINE Ints add_products(Ints sum, Ints x, Ints w) {
    uint8_t left[64];
    int8_t right[64];
    store_bytes(left, x), store_bytes(right, w);
    for (int i = 0; i < 64; ++i) sum.v[i / 4] += int32_t(left[i]) * right[i];
    return sum;
}
#undef EACH_LANE

#endif

// Return the sum of the lanes, added in one fixed order: a tree of halves.
INLINE float total(Floats a) {
    float lanes[LANES];
    store(lanes, a);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
}

INLINE float largest(Floats a) {
    float lanes[LANES];
    store(lanes, a);
    for (int i = 1; i < LANES; ++i) lanes[0] = lanes[i] > lanes[0] ? lanes[i] : lanes[0];
    return lanes[0];
}

INLINE Ints to_bfloat16(Floats a) {  // results in the low halves; to nearest, ties to even
    Ints b = bits(a);
    return shift_right(b + all(int32_t(0x7fff)) + (shift_right(b, 16) & all(int32_t(1))), 16);
}

// Round to the nearest integer, ties to even, for |a| < 2^22: the last bits of a + ROUNDER are the integer.
constexpr float ROUNDER = 12582912.0f;  // 1.5 * 2^23
INLINE Ints nearest(Floats a) { return bits(a + all(ROUNDER)) + all(int32_t(-0x4b400000)); }

// Return e^x for x <= 0, within 2 units in the last place; 0 for x < -87 and for NaN.
INLINE Floats exponential(Floats x) {
    Floats shifted = fma(x, all(1.44269504f), all(ROUNDER));  // x / log 2, rounded to an integer
    Floats n = shifted - all(ROUNDER);
    Floats r = fma(n, all(-0.693359375f), x);  // log 2 in two parts, for precision
    r = fma(n, all(2.12194440e-4f), r);
    Floats p = all(1.0f / 720);
    p = fma(p, r, all(1.0f / 120));
    p = fma(p, r, all(1.0f / 24));
    p = fma(p, r, all(1.0f / 6));
    p = fma(p, r, all(0.5f));
    p = fma(p, r, all(1.0f));
    p = fma(p, r, all(1.0f));
    return zero_below(from_bits(bits(p) + shift_left(bits(shifted), 23)), x, -87.0f);
}

}  // namespace
