// The functions that are compiled once for each kind of processor, as one table a variant.
//
// Sizes: R rows of a product, K its depth, N its columns, C = N / 16 blocks of columns, S slots of a ring.
#pragma once

#include <cstdint>

constexpr int BLOCK = 16;          // columns that lie together in memory: the lanes of a vector
constexpr int GROUP = 64;          // of K, that share a scale in int8 and int4
constexpr int MAX_ROWS = 32;       // of a unit of work
constexpr int MARGIN = 48;         // floats before and behind a row of scores, see Attention
constexpr int TILE_ROWS = 16;      // rows of operands are padded to a multiple, for AMX

// y [R, N] = x [R, K] w [K, N], or += where `onto`. Lanes are columns, K is walked from 0 up, so that nothing about R,
// N, blocking or threads changes a sum. Where the columns k of block c lie, in elements from `w`:
//
//   float32   c * block + k * step + lane                          one sum a lane, a chain of fma over k
//   bfloat16  [C][K/2][16][2]                                      stretches of 32 k: even k and odd k in two chains,
//                                                                  added to each other and then to y, as AMX does
//   int8      [C][K/4][16][4] bytes                                exact int32 sums of 64 k, then one fma a group:
//                                                                  y += float(sum) * (scale of w * scale of x)
//   int4      [C][K/64][8][16][4] bytes, j holds k = 4 j .. in low, 4 (j + 8) .. in high nibbles, each plus 8
struct Product {
    const void* x;  // float32; bfloat16; bytes plus 128
    long ldx;       // elements from one row to the next
    const float* x_scales;  // int8, int4: [R, K / 64]
    long ld_scales;
    const void* w;
    const float* w_scales;  // int8, int4: [C, K / 64, 16]
    const int32_t* w_sums;  // int8, int4: -128 times the sum of w in each group, [C, K / 64, 16]
    long block, step;       // float32 and rings
    long depth;             // K; a multiple of 32 in bfloat16, of 64 in int8 and int4
    float* y;
    long ldy;
    int rows, blocks;
    bool onto;
};

// One query's scores before and its probabilities, not yet divided by their sum, after. In the order of time: index i
// of S lies at distance S - i. Slots before `first` are empty. MARGIN floats on both sides of `context` are the row's.
struct Attention {
    float* context;         // [S] q . k, then probabilities; MAX_ROWS floats before and behind become 0
    const float* position;  // [S] q . p
    const float* log_mass;  // [S]
    int slots, first;
    float* persistent;  // [N], padded with anything; then probabilities, padded with 0, in one of three forms:
    uint16_t* halves;   // if given, here in bfloat16
    uint8_t* bytes;     // if given, here and
    float* scales;      //   here as `quantise` does
    int num_persistent, padded;
    float context_sum, persistent_sum;
};

struct Kernels {
    const char* name;
    void (*float32)(const Product&);
    void (*rings16)(const Product&);  // x float32, w bfloat16, each widened: block and step as in float32
    void (*bfloat16)(const Product&);
    void (*int8)(const Product&);
    void (*int4)(const Product&);
    void (*softmax)(Attention&);
    // out[d] = (a[d] + b[d]) / sum
    void (*merge)(const float* a, const float* b, float sum, float* out, int size);
    // hidden = norm(hidden + added) * weight + bias; `size` is a multiple of 16
    void (*norm)(float* hidden, const float* added, const float* weight, const float* bias, int size);
    void (*add)(float* y, const float* x, long size);
    void (*round)(const float* x, uint16_t* out, int size);
    // bytes plus 128 and a scale for each group of 64
    void (*quantise)(const float* x, uint8_t* out, float* scales, int size);
    float (*maximum)(const float* x, long size);
    // out = e^((x - shift) * factor), and their sum; shift >= x, factor > 0
    float (*exponentials)(const float* x, float shift, float factor, float* out, long size);
    // Put the thread into the state that the kernels need (no subnormal numbers, tiles), and back.
    uint32_t (*enter)();
    void (*leave)(uint32_t);
};

enum Variant { GENERIC, AVX2, AVX512, VNNI, AMX, NUM_VARIANTS };

extern "C" {
const Kernels* kernels_generic();
#if defined(__x86_64__)
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
const Kernels* kernels_avx512_vnni();
const Kernels* kernels_amx();
#endif
}
