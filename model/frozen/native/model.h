// A model in memory: weights packed for the kernels, and all scratch memory of a step.
//
// Sizes are as in native.h; a size with a ' is padded. D' is padded to the unit of depth of the weights' kind (float32
// 16, bfloat16 32, int8 and int4 64), E' and N' to 64, and columns to 16. Padding is zero and stays zero.
#pragma once

#include <atomic>
#include <vector>

#include "kernels.h"
#include "native.h"
#include "pool.h"

inline long round_up(long value, long to) { return (value + to - 1) / to * to; }

// Memory that lives until `clear`: zeroed, aligned to cache lines, in huge pages where the system has them.
class Arena {
public:
    Arena() = default;
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;
    ~Arena() { clear(); }
    void clear();
    long bytes() const { return taken; }
    template <class T>
    T* take(long count) { return (T*)take_bytes(count * long(sizeof(T))); }

private:
    void* take_bytes(long bytes);
    std::vector<void*> pieces;
    char* next = nullptr;
    long remaining = 0, taken = 0;
};

// Weights [depth, columns], both padded, in the layout that kernels.h gives for their kind.
struct Matrix {
    WeightKind kind;
    long depth, columns;
    void* data;
    float* scales;
    int32_t* sums;
};

// The left side of products: rows in float32, and in the form that the kind of the weights needs.
struct Operand {
    float* f;
    uint16_t* halves;
    uint8_t* bytes;
    float* scales;  // [rows, width / 64]
    long width;
};

struct Head {
    int slots;  // S
    long ring;  // offset in bytes in a row's rings, of keys [S/16][D'][16] and then values [S][D']
    Matrix query_key_value, persistent_key, persistent_value;
    float* log_mass;  // [S]
};

struct Layer {
    std::vector<Head> heads;
    Matrix out;
    float *norm_weight, *norm_bias;
};

struct Cluster {
    int size, width, columns;  // columns: its tokens, and in the first cluster one entry for each other cluster
    long first_score;          // index of its first column in a row of scores
    float* embedding;          // [n, w]
    Matrix into, narrow, output;
    float* bias;     // [columns], padded with -infinity
    Operand narrowed;  // [tokens, w']
};

// The memory that one thread needs for a unit of at most MAX_ROWS rows.
struct Scratch {
    float *qkv, *context, *position, *persistent, *values, *persistent_values;
    Operand query, share;  // queries of one head; its probabilities of persistent vectors
};

// A stage of a call; step.cpp explains the kinds.
struct Stage {
    enum Kind { EMBED, LOAD, ATTEND, PROJECT, LOOK, MIX, SCORE, TAILS, JOIN, DRAW, RANK } kind;
    int layer;
};

struct Model {
    Model(const Shape& shape, const Kernels& kernels);

    Shape shape;
    const Kernels& kernels;
    long head, width, persistent, longest, context_ld, vocab;  // D', E', N', largest S, size of a row of context, V'
    long row_bytes;
    std::vector<Layer> layers;
    std::vector<Cluster> clusters;
    Matrix position;  // [D', largest S] in the order of time
    long scores_ld;   // floats in a row of all clusters' scores
    Arena weights;
    Pool pool;

    // Scratch memory, for calls of up to `capacity` rows or tokens.
    long capacity = 0;
    Arena arena;
    Operand hidden, attended;  // [tokens, E'], [tokens, H D']
    float *mixed, *queries, *scores, *exponentials;
    std::vector<char*> keys, values;  // extend's copies, for each head: [(S + T)/16][D'][16] and [S + T, D']
    std::vector<std::atomic<int>> mixed_units;  // for each chunk, the number of MIX units that are done
    std::vector<Scratch> scratch;               // one for each thread
    std::vector<Stage> stages;                  // stages of the running call
    std::vector<int> units;                     // number of units of each stage

    WeightKind kind() const { return WeightKind(shape.weights); }
    WeightKind position_kind() const { return kind() == FLOAT32 ? FLOAT32 : BFLOAT16; }
    long ring_element() const { return shape.rings == FLOAT32 ? 4 : 2; }
    bool reserve(long tokens);
    Operand operand(Arena& memory, long rows, long columns, WeightKind kind) const;
};

long depth_unit(WeightKind kind);
Matrix new_matrix(Arena& memory, WeightKind kind, long depth, long columns);
// Round weights, of which row k and column n lie at source[k * ld + n], and write them into a matrix from row `row` and
// column `column` on. In int8 and int4 a call fills whole groups of 64 rows.
void pack(const Matrix& matrix, const float* source, long ld, long rows, long columns, long row = 0, long column = 0);
