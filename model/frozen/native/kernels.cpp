// The kernels. The build compiles this file once for each variant, with -DVARIANT=name and the variant's instructions.
#include "kernels.h"

#include "vector.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

// The number of rows and of blocks of columns that a product keeps in registers.
#if defined(__AVX512F__)
constexpr int MOST_ROWS = 8, BLOCKS_OF_1 = 8, BLOCKS_OF_2 = 4, BLOCKS_OF_4 = 4, BLOCKS_OF_8 = 2;
#elif defined(__AVX2__)
constexpr int MOST_ROWS = 4, BLOCKS_OF_1 = 4, BLOCKS_OF_2 = 2, BLOCKS_OF_4 = 1, BLOCKS_OF_8 = 1;
#else
constexpr int MOST_ROWS = 4, BLOCKS_OF_1 = 1, BLOCKS_OF_2 = 1, BLOCKS_OF_4 = 1, BLOCKS_OF_8 = 1;
#endif

// `Tile<R, C>::compute(p, row, block)` computes R rows of C blocks of columns. `sweep` and `walk` cover a whole product
// with tiles.
template <template <int, int> class Tile, int R, int C>
INLINE void sweep(const Product& p, int row, int block) {
    for (; block + C <= p.blocks; block += C) Tile<R, C>::compute(p, row, block);
    if constexpr (C > 1)
        if (block < p.blocks) sweep<Tile, R, C / 2>(p, row, block);
}

template <template <int, int> class Tile>
INLINE void walk(const Product& p, int row = 0) {
    if constexpr (MOST_ROWS >= 8)
        for (; row + 8 <= p.rows; row += 8) sweep<Tile, 8, BLOCKS_OF_8>(p, row, 0);
    for (; row + 4 <= p.rows; row += 4) sweep<Tile, 4, BLOCKS_OF_4>(p, row, 0);
    if (row + 2 <= p.rows) sweep<Tile, 2, BLOCKS_OF_2>(p, row, 0), row += 2;
    if (row < p.rows) sweep<Tile, 1, BLOCKS_OF_1>(p, row, 0);
}

// Weights in float32, or in bfloat16 that is widened.
template <class W>
struct Plain {
    template <int R, int C>
    struct Tile {
        INLINE void compute(const Product& p, int row, int block) {
            const float* x = (const float*)p.x + row * p.ldx;
            const W* w = (const W*)p.w + block * p.block;
            float* y = p.y + row * p.ldy + block * BLOCK;
            Floats sum[R][C];
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
                for (int c = 0; c < C; ++c) sum[r][c] = p.onto ? load(y + r * p.ldy + c * BLOCK) : zeros();
            for (long k = 0; k < p.depth; ++k, w += p.step) {
                Floats column[C];
#pragma GCC unroll 8
                for (int c = 0; c < C; ++c) column[c] = load(w + c * p.block);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) {
                    Floats value = all(x[r * p.ldx + k]);
#pragma GCC unroll 8
                    for (int c = 0; c < C; ++c) sum[r][c] = fma(value, column[c], sum[r][c]);
                }
            }
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
                for (int c = 0; c < C; ++c) store(y + r * p.ldy + c * BLOCK, sum[r][c]);
        }
    };
};

void float32(const Product& p) { walk<Plain<float>::Tile>(p); }
void rings16(const Product& p) { walk<Plain<uint16_t>::Tile>(p); }

// bfloat16, with the order of sums that AMX's instruction has.
template <int R, int C>
struct Halves {
    INLINE void compute(const Product& p, int row, int block) {
        if constexpr (R * C > 8) {  // each sum takes three registers: too many
            Halves<R, C / 2>::compute(p, row, block);
            Halves<R, C / 2>::compute(p, row, block + C / 2);
        } else {
            const uint16_t* x = (const uint16_t*)p.x + row * p.ldx;
            const uint16_t* w = (const uint16_t*)p.w + block * p.depth * BLOCK;
            Floats sum[R][C];
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
                for (int c = 0; c < C; ++c) sum[r][c] = zeros();
            for (long k = 0; k < p.depth; k += 32) {
                Floats even[R][C], odd[R][C];
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
                    for (int c = 0; c < C; ++c) even[r][c] = odd[r][c] = zeros();
                for (int pair = 0; pair < 16; ++pair) {
                    Floats low[C], high[C];
#pragma GCC unroll 8
                    for (int c = 0; c < C; ++c) {
                        Ints both = load_bytes(w + c * p.depth * BLOCK + (k / 2 + pair) * 2 * BLOCK);
                        low[c] = from_bits(shift_left(both, 16));
                        high[c] = from_bits(both & all(int32_t(0xffff0000)));
                    }
#pragma GCC unroll 8
                    for (int r = 0; r < R; ++r) {
                        Floats first = all(widen(x[r * p.ldx + k + 2 * pair]));
                        Floats second = all(widen(x[r * p.ldx + k + 2 * pair + 1]));
#pragma GCC unroll 8
                        for (int c = 0; c < C; ++c) {
                            even[r][c] = fma(first, low[c], even[r][c]);
                            odd[r][c] = fma(second, high[c], odd[r][c]);
                        }
                    }
                }
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
                    for (int c = 0; c < C; ++c) sum[r][c] = sum[r][c] + (even[r][c] + odd[r][c]);
            }
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
                for (int c = 0; c < C; ++c) store(p.y + (row + r) * p.ldy + (block + c) * BLOCK, sum[r][c]);
        }
    }
};

// int8 and int4: four k at a time.
INLINE Ints unpack_nibbles(const uint8_t* group, int quad) {
    Ints both = load_bytes(group + (quad & 7) * 64);
    Ints nibbles = (quad < 8 ? both : shift_right(both, 4)) & all(int32_t(0x0f0f0f0f));
    return minus_bytes(nibbles, all(int32_t(0x08080808)));
}

template <bool FOUR>
struct Bytes {
    template <int R, int C>
    struct Tile {
        INLINE void compute(const Product& p, int row, int block) {
            if constexpr (R * C > 8) {
                Tile<R, C / 2>::compute(p, row, block);
                Tile<R, C / 2>::compute(p, row, block + C / 2);
            } else {
                long groups = p.depth / GROUP, bytes = FOUR ? GROUP * BLOCK / 2 : GROUP * BLOCK;
                const uint8_t* x = (const uint8_t*)p.x + row * p.ldx;
                Floats sum[R][C];
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
                    for (int c = 0; c < C; ++c) sum[r][c] = zeros();
                for (long g = 0; g < groups; ++g) {
                    Ints part[R][C];
#pragma GCC unroll 8
                    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
                        for (int c = 0; c < C; ++c) part[r][c] = load(p.w_sums + ((block + c) * groups + g) * BLOCK);
#pragma GCC unroll 16
                    for (int quad = 0; quad < GROUP / 4; ++quad) {
                        Ints column[C];
#pragma GCC unroll 8
                        for (int c = 0; c < C; ++c) {
                            const uint8_t* w = (const uint8_t*)p.w + ((block + c) * groups + g) * bytes;
                            if constexpr (FOUR) column[c] = unpack_nibbles(w, quad);
                            else column[c] = load_bytes(w + quad * 64);
                        }
#pragma GCC unroll 8
                        for (int r = 0; r < R; ++r) {
                            int32_t four;
                            memcpy(&four, x + r * p.ldx + g * GROUP + 4 * quad, 4);
                            Ints value = all(four);
#pragma GCC unroll 8
                            for (int c = 0; c < C; ++c) part[r][c] = add_products(part[r][c], value, column[c]);
                        }
                    }
#pragma GCC unroll 8
                    for (int c = 0; c < C; ++c) {
                        Floats scale = load(p.w_scales + ((block + c) * groups + g) * BLOCK);
#pragma GCC unroll 8
                        for (int r = 0; r < R; ++r) {
                            Floats both = scale * all(p.x_scales[(row + r) * p.ld_scales + g]);
                            sum[r][c] = fma(to_floats(part[r][c]), both, sum[r][c]);
                        }
                    }
                }
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
                    for (int c = 0; c < C; ++c) store(p.y + (row + r) * p.ldy + (block + c) * BLOCK, sum[r][c]);
            }
        }
    };
};

#if defined(__AMX_TILE__)

constexpr int FEWEST_TILE_ROWS = 4;  // fewer rows are quicker without tiles

// The use of tiles: 0 .. 3 are sums, 4 and 5 rows of x, 6 and 7 weights. Each has 16 rows of 64 bytes.
struct alignas(64) TileShapes {
    uint8_t palette, start, zeros[14];
    uint16_t bytes[16];
    uint8_t rows[16];
};

void configure_tiles() {
    TileShapes shapes;
    memset(&shapes, 0, sizeof shapes);
    shapes.palette = 1;
    for (int i = 0; i < 8; ++i) shapes.bytes[i] = 64, shapes.rows[i] = TILE_ROWS;
    asm volatile("" ::"r"(&shapes) : "memory");  // else GCC assumes that tile instructions read no memory
    _tile_loadconfig(&shapes);
}

void store_rows(const float* tile, const Product& p, int row, int block) {
    for (int r = 0; r < TILE_ROWS && row + r < p.rows; ++r)
        store(p.y + (row + r) * p.ldy + block * BLOCK, load(tile + r * BLOCK));
}

void bfloat16(const Product& p) {
    if (p.rows < FEWEST_TILE_ROWS) return walk<Halves>(p);
    alignas(64) float tile[TILE_ROWS * BLOCK];
    for (int row = 0; row < p.rows; row += 2 * TILE_ROWS) {
        const uint16_t* x = (const uint16_t*)p.x + row * p.ldx;
        bool lower = row + TILE_ROWS < p.rows;
        for (int block = 0; block < p.blocks; block += 2) {
            const uint16_t* w = (const uint16_t*)p.w + block * p.depth * BLOCK;
            bool right = block + 1 < p.blocks;
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (long k = 0; k < p.depth; k += 32) {
                _tile_loadd(4, x + k, p.ldx * 2);
                _tile_loadd(6, w + k * BLOCK, 64);
                _tile_dpbf16ps(0, 4, 6);
                if (right) {
                    _tile_loadd(7, w + (p.depth + k) * BLOCK, 64);
                    _tile_dpbf16ps(1, 4, 7);
                }
                if (lower) {
                    _tile_loadd(5, x + TILE_ROWS * p.ldx + k, p.ldx * 2);
                    _tile_dpbf16ps(2, 5, 6);
                }
                if (lower && right) _tile_dpbf16ps(3, 5, 7);
            }
            float* y = p.y + row * p.ldy + block * BLOCK;
            if (row + 2 * TILE_ROWS <= p.rows && right) {
                _tile_stored(0, y, p.ldy * 4);
                _tile_stored(1, y + BLOCK, p.ldy * 4);
                _tile_stored(2, y + TILE_ROWS * p.ldy, p.ldy * 4);
                _tile_stored(3, y + TILE_ROWS * p.ldy + BLOCK, p.ldy * 4);
                continue;
            }
            _tile_stored(0, tile, 64);
            store_rows(tile, p, row, block);
            _tile_stored(1, tile, 64);
            if (right) store_rows(tile, p, row, block + 1);
            _tile_stored(2, tile, 64);
            if (lower) store_rows(tile, p, row + TILE_ROWS, block);
            _tile_stored(3, tile, 64);
            if (lower && right) store_rows(tile, p, row + TILE_ROWS, block + 1);
        }
    }
}

template <bool FOUR>
INLINE void tile_rows(const Product& p, int row, int block) {
    alignas(64) int32_t tile[TILE_ROWS * BLOCK];
    alignas(64) uint8_t unpacked[GROUP * BLOCK];
    long groups = p.depth / GROUP;
    const uint8_t* x = (const uint8_t*)p.x + row * p.ldx;
    Floats sum[TILE_ROWS];
#pragma GCC unroll 16
    for (int r = 0; r < TILE_ROWS; ++r) sum[r] = zeros();
    for (long g = 0; g < groups; ++g) {
        const uint8_t* w = (const uint8_t*)p.w + (block * groups + g) * (FOUR ? GROUP * BLOCK / 2 : GROUP * BLOCK);
        if constexpr (FOUR) {
#pragma GCC unroll 16
            for (int quad = 0; quad < GROUP / 4; ++quad) store_bytes(unpacked + quad * 64, unpack_nibbles(w, quad));
            asm volatile("" ::"r"(unpacked) : "memory");  // see configure_tiles
            w = unpacked;
        }
        _tile_zero(0);
        _tile_loadd(4, x + g * GROUP, p.ldx);
        _tile_loadd(6, w, 64);
        _tile_dpbusd(0, 4, 6);
        _tile_stored(0, tile, 64);
        Floats scale = load(p.w_scales + (block * groups + g) * BLOCK);
        Ints offset = load(p.w_sums + (block * groups + g) * BLOCK);
#pragma GCC unroll 16
        for (int r = 0; r < TILE_ROWS; ++r) {
            Floats both = scale * all(p.x_scales[(row + r) * p.ld_scales + g]);
            sum[r] = fma(to_floats(load(tile + r * BLOCK) + offset), both, sum[r]);
        }
    }
    int count = p.rows - row < TILE_ROWS ? p.rows - row : TILE_ROWS;
#pragma GCC unroll 16
    for (int r = 0; r < TILE_ROWS; ++r)
        if (r < count) store(p.y + (row + r) * p.ldy + block * BLOCK, sum[r]);
}

template <bool FOUR>
INLINE void bytes(const Product& p) {
    if (p.rows < FEWEST_TILE_ROWS) return walk<Bytes<FOUR>::template Tile>(p);
    for (int block = 0; block < p.blocks; ++block)
        for (int row = 0; row < p.rows; row += TILE_ROWS) tile_rows<FOUR>(p, row, block);
}

#else

void configure_tiles() {}
void bfloat16(const Product& p) { walk<Halves>(p); }
template <bool FOUR>
INLINE void bytes(const Product& p) { walk<Bytes<FOUR>::template Tile>(p); }

#endif

void int8(const Product& p) { bytes<false>(p); }
void int4(const Product& p) { bytes<true>(p); }

// Quantise 64 numbers, of which the largest magnitude is `bound`, to int8 plus 128.
INLINE void quantise_group(const Floats* x, float bound, uint8_t* out, float* scale) {
    *scale = bound / 127.0f;
    Floats inverse = all(bound > 1e-30f ? 127.0f / bound : 0.0f);
    for (int i = 0; i < GROUP / LANES; ++i) store_low_bytes(out + i * LANES, nearest(x[i] * inverse) + all(int32_t(128)));
}

// softmax(context + position + log_mass | persistent), not divided by the sum. Lane i % 16 sums element i; then total()
// sums the lanes.
void softmax(Attention& a) {
    const float nothing = float_of_bits(0xff800000);  // -infinity
    for (int i = a.num_persistent; i < a.padded; ++i) a.persistent[i] = nothing;
    int start = a.first / LANES * LANES;
    for (int i = start; i < a.first; ++i) a.context[i] = nothing;  // stays -infinity when finite numbers are added
    Floats best = all(nothing), other = best;
    for (int i = start; i < a.slots; i += LANES) {
        Floats score = load(a.context + i) + load(a.position + i) + load(a.log_mass + i);
        store(a.context + i, score);
        best = larger(score, best);
    }
    for (int i = 0; i < a.padded; i += 2 * LANES) {
        best = larger(load(a.persistent + i), best);
        other = larger(load(a.persistent + i + LANES), other);
    }
    Floats most = all(largest(larger(best, other))), sum = zeros();
    for (int i = start; i < a.slots; i += LANES) {
        Floats p = exponential(load(a.context + i) - most);
        store(a.context + i, p);
        sum = sum + p;
    }
    a.context_sum = total(sum);
    sum = zeros();
    for (int g = 0; g < a.padded; g += GROUP) {
        Floats p[GROUP / LANES];
#pragma GCC unroll 4
        for (int i = 0; i < GROUP / LANES; ++i) {
            p[i] = exponential(load(a.persistent + g + i * LANES) - most);
            sum = sum + p[i];
        }
        if (a.bytes) {
            float bound = largest(larger(larger(p[0], p[1]), larger(p[2], p[3])));
            quantise_group(p, bound, a.bytes + g, a.scales + g / GROUP);
        }
#pragma GCC unroll 4
        for (int i = 0; i < GROUP / LANES; ++i) {
            if (a.halves) store_low_halves(a.halves + g + i * LANES, to_bfloat16(p[i]));
            else if (!a.bytes) store(a.persistent + g + i * LANES, p[i]);
        }
    }
    a.persistent_sum = total(sum);
    for (int i = -MAX_ROWS; i < start; ++i) a.context[i] = 0;
    for (int i = 0; i < MAX_ROWS; ++i) a.context[a.slots + i] = 0;
}

void merge(const float* a, const float* b, float sum, float* out, int size) {
    Floats share = all(1.0f / sum);
    for (int i = 0; i < size; i += LANES) store(out + i, (load(a + i) + load(b + i)) * share);
}

void norm(float* hidden, const float* added, const float* weight, const float* bias, int size) {
    Floats sum = zeros();
    for (int i = 0; i < size; i += LANES) {
        Floats value = load(hidden + i) + load(added + i);
        store(hidden + i, value);
        sum = sum + value;
    }
    Floats mean = all(total(sum) / float(size)), squares = zeros();
    for (int i = 0; i < size; i += LANES) {
        Floats value = load(hidden + i) - mean;
        squares = fma(value, value, squares);
    }
    Floats scale = all(1.0f / __builtin_sqrtf(total(squares) / float(size) + 1e-5f));
    for (int i = 0; i < size; i += LANES) {
        Floats value = (load(hidden + i) - mean) * scale;
        store(hidden + i, fma(value, load(weight + i), load(bias + i)));
    }
}

void add(float* y, const float* x, long size) {
    for (long i = 0; i < size; i += LANES) store(y + i, load(y + i) + load(x + i));
}

void round(const float* x, uint16_t* out, int size) {
    for (int i = 0; i < size; i += LANES) store_low_halves(out + i, to_bfloat16(load(x + i)));
}

void quantise(const float* x, uint8_t* out, float* scales, int size) {
    for (int g = 0; g < size; g += GROUP) {
        Floats values[GROUP / LANES], most = zeros();
        for (int i = 0; i < GROUP / LANES; ++i) {
            values[i] = load(x + g + i * LANES);
            most = larger(magnitude(values[i]), most);
        }
        quantise_group(values, largest(most), out + g, scales + g / GROUP);
    }
}

float maximum(const float* x, long size) {
    Floats best = load(x);
    for (long i = LANES; i < size; i += LANES) best = larger(load(x + i), best);
    return largest(best);
}

float exponentials(const float* x, float shift, float factor, float* out, long size) {
    Floats sum = zeros();
    for (long i = 0; i < size; i += LANES) {
        Floats p = exponential((load(x + i) - all(shift)) * all(factor));
        store(out + i, p);
        sum = sum + p;
    }
    return total(sum);
}

uint32_t enter() {
    configure_tiles();
#if defined(__x86_64__)
    uint32_t before = _mm_getcsr();
    _mm_setcsr((before & ~0x6000u) | 0x8040);  // round to nearest; read and write subnormal numbers as 0
    return before;
#elif defined(__aarch64__)
    uint64_t before;
    asm volatile("mrs %0, fpcr" : "=r"(before));
    asm volatile("msr fpcr, %0" ::"r"(uint64_t(1) << 24));
    return uint32_t(before);
#else
    return 0;
#endif
}

void leave(uint32_t before) {
#if defined(__AMX_TILE__)
    _tile_release();
#endif
#if defined(__x86_64__)
    _mm_setcsr(before);
#elif defined(__aarch64__)
    asm volatile("msr fpcr, %0" ::"r"(uint64_t(before)));
#else
    (void)before;
#endif
}

#define TEXT_OF(name) #name
#define NAME_OF(name) TEXT_OF(name)
const Kernels table = {NAME_OF(VARIANT), float32, rings16, bfloat16, int8,    int4,         softmax, merge,
                       norm,             add,     round,   quantise, maximum, exponentials, enter,   leave};

}  // namespace

#define JOINED(a, b) a##b
#define FUNCTION(name) JOINED(kernels_, name)
extern "C" const Kernels* FUNCTION(VARIANT)() { return &table; }
