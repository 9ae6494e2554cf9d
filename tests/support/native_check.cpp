// Run the native step on small random models under sanitizers: all weights and rings, plain words and clusters,
// several threads, rows and chunks. The exit status says whether decoding and reading gave the same bits.
//
//   native_check [variant ...]   numbers of `Variant`; the program skips variants that this machine cannot run
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "native.h"

namespace {

uint64_t state = 1;

float random_number() {  // between -1 and 1
    state = state * 6364136223846793005u + 1442695040888963407u;
    return float(int64_t(state >> 40) - (1 << 23)) / float(1 << 23);
}

constexpr int LAYERS = 2, WIDTH = 128, HEADS = 3, HEAD = 40, PERSISTENT = 70, WORDS = 50, ROWS = 37, STEPS = 50;
constexpr int SLOTS[LAYERS * HEADS] = {16, 32, 48, 16, 16, 32};
constexpr int SIZES[3] = {20, 10, 20}, WIDTHS[3] = {WIDTH, 32, 8};

void fill(Model* model, int part, int layer, int index, int count) {
    std::vector<float> values(static_cast<size_t>(count));
    for (float& value : values) value = random_number() * 0.3f;
    allattn_set(model, part, layer, index, values.data());
}

Model* random_model(int variant, int weights, int rings, int clusters, int threads) {
    Shape shape = {LAYERS, WIDTH, HEADS, HEAD, PERSISTENT, WORDS, weights, rings, weights, 1, clusters, threads, variant};
    int whole = WORDS, width = WIDTH;
    Model* model = allattn_open(&shape, SLOTS, clusters > 1 ? SIZES : &whole, clusters > 1 ? WIDTHS : &width);
    fill(model, POSITION, 0, 0, HEAD * 48);
    for (int i = 0; i < clusters; ++i) {
        int size = clusters > 1 ? SIZES[i] : WORDS;
        fill(model, EMBEDDING, 0, i, size * WIDTHS[i]);
        if (clusters > 1) fill(model, INTO, 0, i, WIDTHS[i] * WIDTH);
        if (i) fill(model, NARROW, 0, i, WIDTH * WIDTHS[i]), fill(model, TAIL, 0, i, WIDTHS[i] * size);
        if (i) fill(model, TAIL_BIAS, 0, i, size);
    }
    int columns = clusters > 1 ? SIZES[0] + clusters - 1 : WORDS;
    fill(model, OUTPUT, 0, 0, WIDTH * columns), fill(model, OUTPUT_BIAS, 0, 0, columns);
    for (int l = 0; l < LAYERS; ++l) {
        for (int h = 0; h < HEADS; ++h) {
            fill(model, QUERY_KEY_VALUE, l, h, WIDTH * 3 * HEAD);
            fill(model, PERSISTENT_KEY, l, h, HEAD * PERSISTENT), fill(model, PERSISTENT_VALUE, l, h, PERSISTENT * HEAD);
            fill(model, LOG_MASS, l, h, SLOTS[l * HEADS + h]);
        }
        fill(model, OUT, l, 0, HEADS * HEAD * WIDTH), fill(model, NORM_WEIGHT, l, 0, WIDTH), fill(model, NORM_BIAS, l, 0, WIDTH);
    }
    return model;
}

// Return row 3's logits, computed token by token among many rows: they must equal the logits of a read in chunks.
bool same_bits(Model* model) {
    constexpr int COLUMNS = 64;  // 50 words, padded
    long bytes = allattn_row_bytes(model);
    char* rings = (char*)std::aligned_alloc(64, size_t(bytes * (ROWS + 1)));
    memset(rings, 0, size_t(bytes * (ROWS + 1)));
    std::vector<int64_t> lengths(ROWS, 0), rows(ROWS), tokens(ROWS), text(STEPS), drawn(ROWS);
    std::vector<float> logits(ROWS * COLUMNS), seen, read(STEPS * COLUMNS), logprobs(ROWS), hidden(STEPS * WIDTH);
    std::vector<float> fresh(LAYERS * STEPS * 2 * HEADS * HEAD), shares(STEPS * LAYERS * HEADS);
    std::vector<Draw> draws(ROWS);
    allattn_reserve(model, STEPS);
    for (int i = 0; i < STEPS; ++i) {
        for (int r = 0; r < ROWS; ++r) {
            rows[size_t(r)] = r, tokens[size_t(r)] = (i * 7 + r * 3) % WORDS;
            draws[size_t(r)] = {float(r % 2), 0, uint64_t(r), i};
        }
        text[size_t(i)] = tokens[3];
        allattn_decode(model, rings, lengths.data(), rows.data(), tokens.data(), ROWS, logits.data(), nullptr, draws.data(),
                       drawn.data(), logprobs.data(), 1);
        seen.insert(seen.end(), &logits[3 * COLUMNS], &logits[4 * COLUMNS]);
    }
    char* row = rings + bytes * ROWS;
    for (int at = 0, count = 0; at < STEPS; at += count) {
        count = at ? STEPS - at : 33;
        allattn_extend(model, row, at, &text[size_t(at)], count, &hidden[size_t(at * WIDTH)], fresh.data(), STEPS, shares.data());
        allattn_commit(model, row, at, fresh.data(), STEPS, count);
    }
    allattn_logits(model, hidden.data(), STEPS, read.data());
    bool same = !memcmp(seen.data(), read.data(), read.size() * sizeof(float)) && !memcmp(row, rings + 3 * bytes, size_t(bytes));
    same = same && allattn_decode(model, rings, lengths.data(), rows.data(), &(tokens[0] = WORDS), 1, logits.data(), nullptr,
                                  nullptr, nullptr, nullptr, 1) == 1;
    free(rings);
    return same;
}

}  // namespace

int main(int count, char** arguments) {
    int failed = 0;
    for (int variant = 0; variant < 5; ++variant) {
        bool wanted = count == 1;
        for (int i = 1; i < count; ++i) wanted |= atoi(arguments[i]) == variant;
        if (!wanted || !allattn_can_run(variant)) continue;
        for (int weights = 0; weights < 4; ++weights)
            for (int clusters : {1, 3})
                for (int threads : {1, 3}) {
                    Model* model = random_model(variant, weights, weights ? BFLOAT16 : FLOAT32, clusters, threads);
                    bool same = same_bits(model);
                    allattn_close(model);
                    if (!same) printf("variant %d weights %d clusters %d threads %d: bits differ\n", variant, weights, clusters, threads);
                    failed += !same;
                }
        printf("variant %d done\n", variant);
    }
    return failed > 0;
}
