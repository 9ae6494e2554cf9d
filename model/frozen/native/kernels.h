// The functions that are compiled once for each variant (set of instructions); each variant has a table of them.
//
// Sizes: R rows of a product, K its depth, N its columns, C = N / 16 blocks of columns, S slots of a ring.
#pragma once

#include <cstdint>

constexpr int BLOCK = 16;          // columns side by side in memory: the lanes of a vector
constexpr int GROUP = 64;          // rows of w (along K) that share a scale in int8 and int4
constexpr int MAX_ROWS = 32;       // rows of a unit of work, at most
constexpr int MARGIN = 48;         // floats before and after a row of scores, see Attention
constexpr int TILE_ROWS = 16;      // rows of an AMX tile; operands have so many rows of padding

// y [R, N] = x [R, K] w [K, N], or y += x w with `onto`. Lanes are columns and k counts up from 0, so that R, N,
// blocking and threads change no sum. The layout of w, for row k and block c of columns, in elements from `w`:
//
//   float32   c * block + k * step + lane                          a sum for each lane: a chain of fma over k
//   bfloat16  [C][K/2][16][2]                                      for each 32 k two chains, of even k and of odd k;
//                                                                  their sum is added to y, as AMX does
//   int8      [C][K/4][16][4] bytes                                exact int32 sums of 64 k, and an fma for each:
//                                                                  y += float(sum) * (scale of w * scale of x)
//   int4      [C][K/64][8][16][4] bytes: in each group byte row j has k = 4 j .. 4 j + 3 in its low nibbles and
//             k = 4 (j + 8) .. 4 (j + 8) + 3 in its high nibbles, each plus 8; sums as in int8
struct Product {
    const void* x;  // float32, bfloat16, or int8 plus 128
    long ldx;       // elements from one row to the next
    const float* x_scales;  // int8, int4: [R, K / 64]
    long ld_scales;
    const void* w;
    const float* w_scales;  // int8, int4: [C, K / 64, 16]
    const int32_t* w_sums;  // int8, int4: -128 times the sum of w in each group, [C, K / 64, 16]
    long block, step;       // float32 and rings: see the layout
    long depth;             // K: a multiple of 32 in bfloat16 and of 64 in int8 and int4
    float* y;
    long ldy;
    int rows, blocks;
    bool onto;
};

// The attention of one query: softmax reads scores and replaces them by probabilities that are not yet divided by their
// sum. Index i of S lies at distance S - i. Slots before `first` are empty. MARGIN floats on both sides of `context`
// belong to the row.
struct Attention {
    float* context;         // [S] q . k, then probabilities; MAX_ROWS floats before and after become 0
    const float* position;  // [S] q . p
    const float* log_mass;  // [S]
    int slots, first;
    float* persistent;  // [N] scores, padded with any numbers; then probabilities, padded with 0, here in float32,
    uint16_t* halves;   // or, if given, here in bfloat16,
    uint8_t* bytes;     // or, if given, here and
    float* scales;      //   here, as `quantise` writes them
    int num_persistent, padded;
    float context_sum, persistent_sum;
};

struct Kernels {
    const char* name;
    void (*float32)(const Product&);
    void (*rings16)(const Product&);  // x float32, w bfloat16, which is widened; block and step as in float32
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
    // x to int8 plus 128, with a scale for each group of 64
    void (*quantise)(const float* x, uint8_t* out, float* scales, int size);
    float (*maximum)(const float* x, long size);
    // out = e^((x - shift) * factor); returns the sum of out; shift >= x, factor > 0
    float (*exponentials)(const float* x, float shift, float factor, float* out, long size);
    // Put the thread into the state that the kernels need (no subnormal numbers, AMX tiles configured), and back.
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
