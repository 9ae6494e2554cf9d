// Memory of a model: the arena, the packing of weights, and scratch memory.
#include "model.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "vector.h"

void Arena::clear() {
    for (void* piece : pieces) free(piece);
    pieces.clear();
    next = nullptr;
    remaining = taken = 0;
}

void* Arena::take_bytes(long bytes) {
#if defined(__SANITIZE_ADDRESS__)
    constexpr long HUGE_PAGE = 64, PIECE = 0;  // each array apart, so that AddressSanitizer guards its ends
#else
    constexpr long HUGE_PAGE = 2 << 20, PIECE = 16 << 20;
#endif
    bytes = round_up(bytes, 64);
    if (bytes > remaining) {
        long size = round_up(bytes > PIECE ? bytes : PIECE, HUGE_PAGE);
        void* piece = std::aligned_alloc(HUGE_PAGE, size_t(size));
        if (!piece) throw std::bad_alloc();
#if defined(__linux__)
        madvise(piece, size_t(size), MADV_HUGEPAGE);
#endif
        memset(piece, 0, size_t(size));
        pieces.push_back(piece);
        next = (char*)piece;
        remaining = size;
    }
    void* result = next;
    next += bytes;
    remaining -= bytes;
    taken += bytes;
    return result;
}

long depth_unit(WeightKind kind) { return kind == FLOAT32 ? 16 : kind == BFLOAT16 ? 32 : GROUP; }

Matrix new_matrix(Arena& memory, WeightKind kind, long depth, long columns) {
    depth = round_up(depth, depth_unit(kind));
    columns = round_up(columns, BLOCK);
    Matrix m = {kind, depth, columns, nullptr, nullptr, nullptr};
    long count = depth * columns, groups = count / GROUP;
    switch (kind) {
        case FLOAT32: m.data = memory.take<float>(count); return m;
        case BFLOAT16: m.data = memory.take<uint16_t>(count); return m;
        case INT8: m.data = memory.take<uint8_t>(count); break;
        case INT4: m.data = memory.take<uint8_t>(count / 2); memset(m.data, 0x88, size_t(count / 2)); break;
    }
    m.scales = memory.take<float>(groups);
    m.sums = memory.take<int32_t>(groups);
    return m;
}

namespace {

float to_whole(float x) { return (x + ROUNDER) - ROUNDER; }

// Return the scale of 64 weights. In int8 the largest magnitude becomes 127. int4 has one more negative number than
// positive numbers, so 40 scales of both signs are tried, and the scale with the least squared error is chosen.
float choose_scale(const float* group, WeightKind kind) {
    float most = 0;
    for (int i = 0; i < GROUP; ++i) most = std::fmax(most, std::fabs(group[i]));
    if (kind == INT8 || most == 0) return most / 127.0f;
    float best = 0, least = INFINITY;
    for (int step = 0; step < 40; ++step) {
        float scale = most / (6.0f + 0.15f * float(step / 2)) * (step % 2 ? -1.0f : 1.0f), loss = 0;
        float inverse = 1.0f / scale;
        for (int i = 0; i < GROUP; ++i) {
            float whole = to_whole(group[i] * inverse);
            whole = whole > 7.0f ? 7.0f : whole < -8.0f ? -8.0f : whole;
            float wrong = group[i] - whole * scale;
            loss += wrong * wrong;
        }
        if (loss < least) least = loss, best = scale;
    }
    return best;
}

void pack_group(const Matrix& m, const float* group, long g, long column) {
    int limit = m.kind == INT8 ? 127 : 7, lowest = m.kind == INT8 ? -127 : -8;
    long groups = m.depth / GROUP, block = column / BLOCK, lane = column % BLOCK;
    float scale = choose_scale(group, m.kind);
    uint8_t* bytes = (uint8_t*)m.data + (block * groups + g) * GROUP * BLOCK / (m.kind == INT8 ? 1 : 2);
    int32_t sum = 0;
    for (int k = 0; k < GROUP; ++k) {
        float exact = scale != 0 ? to_whole(group[k] / scale) : 0.0f;
        int whole = int(std::fmin(float(limit), std::fmax(float(lowest), exact)));
        sum += whole;
        long place = k / 4 * 64 + lane * 4 + k % 4;
        if (m.kind == INT8) {
            bytes[place] = uint8_t(whole);
        } else {
            uint8_t& pair = bytes[place % 512];
            pair = uint8_t(place < 512 ? (pair & 0xf0) | (whole + 8) : (pair & 0x0f) | (whole + 8) << 4);
        }
    }
    m.scales[(block * groups + g) * BLOCK + lane] = scale;
    m.sums[(block * groups + g) * BLOCK + lane] = -128 * sum;
}

}  // namespace

void pack(const Matrix& m, const float* source, long ld, long rows, long columns, long row, long column) {
    for (long n = 0; n < columns; ++n) {
        long block = (column + n) / BLOCK, lane = (column + n) % BLOCK;
        if (m.kind == INT8 || m.kind == INT4) {
            for (long k = 0; k < rows; k += GROUP) {
                float group[GROUP] = {};
                for (long i = 0; i < GROUP && k + i < rows; ++i) group[i] = source[(k + i) * ld + n];
                pack_group(m, group, (row + k) / GROUP, column + n);
            }
        } else {
            for (long k = 0; k < rows; ++k) {
                float value = source[k * ld + n];
                long at = row + k;
                if (m.kind == FLOAT32) ((float*)m.data)[(block * m.depth + at) * BLOCK + lane] = value;
                else ((uint16_t*)m.data)[(block * m.depth + at / 2 * 2) * BLOCK + lane * 2 + at % 2] = to_bfloat16(value);
            }
        }
    }
}

Model::Model(const Shape& s, const Kernels& k)
    : shape(s), kernels(k), pool(s.num_threads, 3 * s.num_layers + 8, k.enter, k.leave) {}

Operand Model::operand(Arena& memory, long rows, long columns, WeightKind kind) const {
    rows = round_up(rows, MAX_ROWS) + TILE_ROWS;
    Operand o = {memory.take<float>(rows * columns), nullptr, nullptr, nullptr, columns};
    if (kind == BFLOAT16 || position_kind() == BFLOAT16) o.halves = memory.take<uint16_t>(rows * columns);
    if (kind == INT8 || kind == INT4) {
        o.bytes = memory.take<uint8_t>(rows * columns);
        o.scales = memory.take<float>(rows * (columns / GROUP));
    }
    return o;
}

bool Model::reserve(long tokens) try {
    if (tokens <= capacity) return true;
    stages.reserve(size_t(3 * shape.num_layers + 8));
    units.reserve(size_t(3 * shape.num_layers + 8));
    capacity = 0;
    tokens = round_up(tokens, MAX_ROWS);
    arena.clear();
    hidden = operand(arena, tokens, width, kind());
    attended = operand(arena, tokens, shape.num_heads * head, kind());
    mixed = arena.take<float>(tokens * width);
    queries = arena.take<float>(tokens * shape.num_heads * head);
    scores = arena.take<float>(tokens * (shape.num_clusters > 1 ? scores_ld : 0));
    exponentials = arena.take<float>(pool.num_threads * (scores_ld + vocab));
    for (Cluster& cluster : clusters)
        if (&cluster != &clusters[0]) cluster.narrowed = operand(arena, tokens, cluster.output.depth, cluster.output.kind);
    for (int i = 0; i < shape.num_heads; ++i) {
        long most = 0;
        for (Layer& layer : layers) most = layer.heads[i].slots > most ? layer.heads[i].slots : most;
        long slots = round_up(most + tokens, BLOCK) + 2 * BLOCK;
        keys[i] = arena.take<char>(slots * head * ring_element());
        values[i] = arena.take<char>(slots * head * ring_element());
    }
    for (Scratch& s : scratch) {
        s.qkv = arena.take<float>(MAX_ROWS * 3 * head);
        s.context = arena.take<float>(MAX_ROWS * context_ld);
        s.position = arena.take<float>(MAX_ROWS * longest);
        s.values = arena.take<float>(MAX_ROWS * head);
        s.persistent_values = arena.take<float>(MAX_ROWS * head);
        s.query = operand(arena, MAX_ROWS, head, kind());
        s.share = operand(arena, MAX_ROWS, persistent, kind());
    }
    mixed_units = std::vector<std::atomic<int>>(size_t(tokens / 8 + 1));
    capacity = tokens;
    return true;
} catch (const std::bad_alloc&) {
    arena.clear();
    return false;
}
