// The interface of the native step: a frozen all-attention model on a CPU, called through ctypes.
//
// Sizes: B rows of a batch, T new tokens, E width, H heads, D head size, S slots of a head's ring (a multiple of 16,
// at least its reach), N persistent vectors, V vocabulary, V' = V rounded up to 16, L layers, K clusters of tokens.
// All arrays are C-contiguous. Nothing is global: two models in one process share no state. Only one thread at a time
// may call with the same model. After `allattn_reserve` no call allocates memory.
#pragma once

#include <cstdint>

#if defined(__GNUC__)
#define PUBLIC extern "C" __attribute__((visibility("default")))
#endif

struct Model;

enum WeightKind { FLOAT32, BFLOAT16, INT8, INT4 };

struct Shape {
    int32_t num_layers, width, num_heads, head_size, num_persistent, vocab_size;
    int32_t weights;       // WeightKind
    int32_t rings;         // FLOAT32 or BFLOAT16
    int32_t output;        // WeightKind of the output layer's matrices
    int32_t mask_empty;    // 1: empty slots get no attention; 0: they hold zero vectors, which get a share
    int32_t num_clusters;  // 1: plain embeddings
    int32_t num_threads;
    int32_t variant;  // Variant of kernels.h
};

// The parts of a model, as the arrays that `allattn_set` takes. n and w are a cluster's number of tokens and its width.
// "In the order of time" means that column i of S lies at distance S - i.
enum Part {
    EMBEDDING,         // [n, w] of cluster `index`; plain embeddings have w = E
    INTO,              // [w, E] of cluster `index`, only with clusters
    QUERY_KEY_VALUE,   // [E, 3 D] of layer and head `index`; queries scaled by 1 / sqrt(D)
    PERSISTENT_KEY,    // [D, N] of layer and head, scaled by sqrt(D)
    PERSISTENT_VALUE,  // [N, D] of layer and head, scaled by sqrt(N)
    LOG_MASS,          // [S] of layer and head, in the order of time
    OUT,               // [H D, E] of a layer
    NORM_WEIGHT,       // [E] of a layer
    NORM_BIAS,         // [E] of a layer
    POSITION,          // [D, largest S] in the order of time
    OUTPUT,            // [E, V], or with clusters [E, n_0 + K - 1]
    OUTPUT_BIAS,       // [V], or with clusters [n_0 + K - 1]
    NARROW,            // [E, w] of cluster `index` >= 1
    TAIL,              // [w, n] of cluster `index` >= 1
    TAIL_BIAS,         // [n] of cluster `index` >= 1
};

// Return 1 if processor and operating system can run a variant, else 0.
PUBLIC int32_t allattn_can_run(int32_t variant);
// Return a model without weights, or nullptr if there is no memory or no thread.
// `slots` [L, H]: S of each head; `cluster_sizes`, `cluster_widths` [K]: n and w of each cluster.
PUBLIC Model* allattn_open(const Shape* shape, const int32_t* slots, const int32_t* cluster_sizes,
                           const int32_t* cluster_widths);
PUBLIC void allattn_close(Model* model);
// Round one part of the weights and copy it into the model; returns 0.
PUBLIC int32_t allattn_set(Model* model, int32_t part, int32_t layer, int32_t index, const float* values);
// Return the size of one row's rings, a multiple of 64.
PUBLIC int64_t allattn_row_bytes(const Model* model);
PUBLIC int64_t allattn_weight_bytes(const Model* model);
// Allocate memory for calls with up to `tokens` rows or new tokens. Returns 0, or -1 if there is no memory.
PUBLIC int32_t allattn_reserve(Model* model, int64_t tokens);

// How to draw a row's next token: at temperature 0 the largest score, else at random as model/sampling/draw.py does.
struct Draw {
    float temperature, unused;
    uint64_t seed;
    int64_t position;
};

// Compute one step: one token of each of B rows. `rings` and `lengths` are those of all rows.
//   logits [B, V'], padded with -infinity; fresh, if not null: receives new keys and values [L, B, 1, 2, H, D]
//   draws [B], if not null: `drawn` [B] and `logprobs` [B] receive tokens and their log-probabilities
//   commit: 1 writes the keys and values into the rings and advances the lengths
// Returns 0; or 1 + the index of a token that is not in the vocabulary, and then the call has changed nothing.
PUBLIC int64_t allattn_decode(Model* model, char* rings, int64_t* lengths, const int64_t* rows, const int64_t* tokens,
                              int64_t num_rows, float* logits, float* fresh, const Draw* draws, int64_t* drawn,
                              float* logprobs, int32_t commit);
// Draw tokens from logits [n, V'], padded as allattn_decode pads them, into `drawn` [n] and `logprobs` [n].
PUBLIC void allattn_draw(Model* model, const float* logits, int64_t n, const Draw* draws, int64_t* drawn,
                         float* logprobs);
// Compute T new tokens of the row whose rings start at `rings`. Changes no ring. Returns as allattn_decode.
//   hidden [T, E]; fresh [L, stride, 2, H, D]: the first T of each layer's `stride` entries are written
//   shares [T, L, H], if not null: the share of attention on persistent vectors
PUBLIC int64_t allattn_extend(Model* model, const char* rings, int64_t length, const int64_t* tokens, int64_t num_new,
                              float* hidden, float* fresh, int64_t stride, float* shares);
// Compute logits [n, V'] from hidden states [n, E].
PUBLIC void allattn_logits(Model* model, const float* hidden, int64_t n, float* logits);
// Compute logits too, and for each token targets[i] its log-probability and its rank: the number of tokens with a
// larger score. Returns as allattn_decode.
PUBLIC int64_t allattn_score(Model* model, const float* hidden, int64_t n, const int64_t* targets, float* logits,
                             float* logprobs, int64_t* ranks);
// Write the first num_new entries of each layer of fresh [L, stride, 2, H, D] into a row's rings. The caller advances
// the row's length.
PUBLIC void allattn_commit(Model* model, char* rings, int64_t length, const float* fresh, int64_t stride,
                           int64_t num_new);
