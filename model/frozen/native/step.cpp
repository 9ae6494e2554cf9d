// The calls of the interface. A call is a sequence of stages, and a stage is small units of work (pool.h). A chunk is
// the rows of a unit, at most MAX_ROWS.
//
//   decode   EMBED   for each layer: ATTEND, MIX          SCORE  [TAILS  JOIN]  [DRAW]
//   extend   EMBED   for each layer: PROJECT, LOOK, MIX
//   logits   LOAD                                         SCORE  [TAILS  JOIN]  [RANK]
//
// A line names the stage, the size of its unit, and its work:
//
//   EMBED    chunk               copy the vectors of tokens into `hidden`
//   LOAD     chunk               copy given hidden states into `hidden`
//   ATTEND   chunk x head        from `hidden` to `attended`: q, k, v; scores of the ring and of persistent vectors;
//                                softmax; the weighted sum of values
//   PROJECT  chunk x head        q, k, v; write k and v after a copy of the ring that is in the order of time
//   LOOK     chunk x head        the rest of ATTEND, on that copy
//   MIX      chunk x 64 columns  output projection; the unit that ends last in a chunk adds the projection to `hidden`
//                                and normalises
//   SCORE    chunk x columns     scores of all tokens; with clusters, scores of the first cluster, and the narrow
//                                vectors of the other clusters
//   TAILS    chunk x columns     scores of the other clusters
//   JOIN     row                 log-probabilities of all tokens, from the scores of all clusters
//   DRAW     row                 a drawn token and its log-probability
//   RANK     row                 rank and log-probability of a given token
//
// A row's context scores lie in the order of time, wherever its ring begins: index i of S is distance S - i. In extend,
// index 0 of row t is the oldest key of row t. So a product of all rows with the keys, which are in the order of time,
// must write row t shifted by t: it reads and writes rows of scores with a stride that is 1 less than their length.
#include <cmath>
#include <cstring>

#include "model.h"
#include "vector.h"

namespace {

constexpr int MIX_COLUMNS = 64, SCORE_COLUMNS = 128, TAIL_COLUMNS = 512;

struct Call {
    Model& m;
    int num_rows;             // number of rows, or of new tokens of one row
    const int64_t* tokens;    // [num_rows]
    const int64_t* rows = nullptr;  // decode: [num_rows]
    char* rings = nullptr;    // decode: rings of all rows; extend: rings of the row
    int64_t* lengths = nullptr;  // decode: lengths of all rows; extend: length of the row
    float* fresh = nullptr;   // [L, fresh_rows, 2, H, D]
    long fresh_rows = 0;
    float* hidden = nullptr;  // [num_rows, E], input or output
    float* logits = nullptr;
    float* shares = nullptr;  // [num_rows, L, H]
    const Draw* draws = nullptr;
    int64_t* drawn = nullptr;  // or ranks
    float* logprobs = nullptr;
    bool commit = false;
    int chunk = MAX_ROWS;

    int chunks() const { return (num_rows + chunk - 1) / chunk; }
    int rows_from(int first) const { return num_rows - first < chunk ? num_rows - first : chunk; }
};

long divided_up(long value, long by) { return (value + by - 1) / by; }

// Convert `rows` rows of an operand, columns `from` .. `from + count`, from float32 to the form that products need.
void prepare(const Kernels& k, const Operand& o, WeightKind kind, long row, int rows, long from, long count) {
    for (long r = row; r < row + rows; ++r) {
        long at = r * o.width + from;
        if (kind == BFLOAT16) k.round(o.f + at, o.halves + at, int(count));
        else if (kind != FLOAT32) k.quantise(o.f + at, o.bytes + at, o.scales + at / GROUP, int(count));
    }
}

// y [rows, 16 blocks] = rows of x times the columns of w from block `block` on.
void multiply(const Kernels& k, const Matrix& w, const Operand& x, long row, int rows, int block, int blocks, float* y,
              long ldy) {
    Product p = {};
    long at = row * x.width, groups = w.depth / GROUP, size = w.depth * BLOCK;
    p.ldx = x.width, p.depth = w.depth, p.y = y, p.ldy = ldy, p.rows = rows, p.blocks = blocks;
    if (w.kind == FLOAT32) {
        p.x = x.f + at, p.w = (float*)w.data + block * size, p.block = size, p.step = BLOCK;
        return k.float32(p);
    }
    if (w.kind == BFLOAT16) {
        p.x = x.halves + at, p.w = (uint16_t*)w.data + block * size;
        return k.bfloat16(p);
    }
    p.x = x.bytes + at, p.x_scales = x.scales + at / GROUP, p.ld_scales = x.width / GROUP;
    p.w = (uint8_t*)w.data + block * size / (w.kind == INT8 ? 1 : 2);
    p.w_scales = w.scales + block * groups * BLOCK, p.w_sums = w.sums + block * groups * BLOCK;
    (w.kind == INT8 ? k.int8 : k.int4)(p);
}

// y = x times keys or values, or y += with `onto`; they are those of a ring or its copy, from element `from` of `w` on.
void multiply_ring(const Model& m, const char* w, long from, Product& p) {
    p.w = w + from * m.ring_element();
    (m.shape.rings == FLOAT32 ? m.kernels.float32 : m.kernels.rings16)(p);
}

// y = scores of `blocks` blocks of 16 slots, from `block` on, for queries x [rows, D']; y has the stride `ldy`.
void multiply_keys(const Model& m, const char* keys, long block, int blocks, const float* x, float* y, long ldy,
                   int rows) {
    Product p = {};
    p.x = x, p.ldx = m.head, p.block = m.head * BLOCK, p.step = BLOCK, p.depth = m.head;
    p.y = y, p.ldy = ldy, p.rows = rows, p.blocks = blocks;
    if (blocks > 0) multiply_ring(m, keys, block * p.block, p);
}

// y [rows, D'] = probabilities x times the values of slots `slot` .. `slot + count`, or y += with `onto`.
void multiply_values(const Model& m, const char* values, long slot, long count, const float* x, long ldx, float* y,
                     int rows, bool onto) {
    Product p = {};
    p.x = x, p.ldx = ldx, p.block = BLOCK, p.step = m.head, p.depth = count;
    p.y = y, p.ldy = m.head, p.rows = rows, p.blocks = int(m.head / BLOCK), p.onto = onto;
    multiply_ring(m, values, slot * m.head, p);
}

void put(const Model& m, char* ring, long element, float value) {
    if (m.shape.rings == FLOAT32) ((float*)ring)[element] = value;
    else ((uint16_t*)ring)[element] = to_bfloat16(value);
}

// Write a token's key and value [D] into slot `slot` of keys [S/16][D'][16] and values [S][D'].
void put_pair(const Model& m, char* keys, char* values, long slot, const float* key, const float* value) {
    long first = slot / BLOCK * BLOCK * m.head + slot % BLOCK;
    for (int d = 0; d < m.shape.head_size; ++d) {
        put(m, keys, first + d * BLOCK, key[d]);
        put(m, values, slot * m.head + d, value[d]);
    }
}

// Start to load memory into the second-level cache.
void prefetch(const char* from, long bytes) {
    for (long i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
}

char* values_of(const Model& m, const Head& h, char* ring) { return ring + h.slots * m.head * m.ring_element(); }

// Compute q, k, v of a chunk into qkv [rows, 3 D'], and copy k and v to `fresh` if the caller wants them.
void project(Call& c, int layer, int head, int row, int rows, float* qkv) {
    Model& m = c.m;
    const Head& h = m.layers[size_t(layer)].heads[size_t(head)];
    multiply(m.kernels, h.query_key_value, m.hidden, row, rows, 0, int(h.query_key_value.columns / BLOCK), qkv,
             3 * m.head);
    if (!c.fresh) return;
    long H = m.shape.num_heads, D = m.shape.head_size;
    for (int r = 0; r < rows; ++r)
        for (int pair = 0; pair < 2; ++pair) {
            float* to = c.fresh + (((layer * c.fresh_rows + row + r) * 2 + pair) * H + head) * D;
            memcpy(to, qkv + (r * 3 + 1 + pair) * m.head, size_t(D) * sizeof(float));
        }
}

// Compute the scores of persistent vectors and of positions, from queries [rows, D'] in s.query.
void score_constants(Model& m, const Head& h, int rows, Scratch& s) {
    const Kernels& k = m.kernels;
    prepare(k, s.query, m.kind(), 0, rows, 0, m.head);
    if (m.position_kind() == BFLOAT16 && m.kind() != BFLOAT16) prepare(k, s.query, BFLOAT16, 0, rows, 0, m.head);
    multiply(k, h.persistent_key, s.query, 0, rows, 0, int(m.persistent / BLOCK), s.share.f, m.persistent);
    multiply(k, m.position, s.query, 0, rows, int((m.longest - h.slots) / BLOCK), h.slots / BLOCK, s.position, m.longest);
}

// Turn the scores of row `r` into probabilities that are not yet divided by their sum, and return this sum.
float normalise(Call& c, int layer, int head, int row, int r, int64_t length, Scratch& s) {
    Model& m = c.m;
    const Head& h = m.layers[size_t(layer)].heads[size_t(head)];
    int first = m.shape.mask_empty && length < h.slots ? int(h.slots - length) : 0;
    Attention a = {s.context + r * m.context_ld + MARGIN, s.position + r * m.longest, h.log_mass, h.slots, first,
                   s.share.f + r * m.persistent, nullptr, nullptr, nullptr, m.shape.num_persistent, int(m.persistent), 0, 0};
    if (m.kind() == BFLOAT16) a.halves = s.share.halves + r * m.persistent;
    else if (m.kind() != FLOAT32) a.bytes = s.share.bytes + r * m.persistent, a.scales = s.share.scales + r * m.persistent / GROUP;
    m.kernels.softmax(a);
    float sum = a.context_sum + a.persistent_sum;
    if (c.shares) c.shares[((row + r) * long(m.shape.num_layers) + layer) * m.shape.num_heads + head] = a.persistent_sum / sum;
    return sum;
}

// Compute the weighted values of persistent vectors, add those of the context (s.values), and divide by the sums: the
// columns of a head in `attended`.
void finish_head(Call& c, const Head& h, int head, int row, int rows, const float* sums, Scratch& s) {
    Model& m = c.m;
    multiply(m.kernels, h.persistent_value, s.share, 0, rows, 0, int(m.head / BLOCK), s.persistent_values, m.head);
    for (int r = 0; r < rows; ++r) {
        float* out = m.attended.f + (row + r) * m.attended.width + head * m.head;
        m.kernels.merge(s.values + r * m.head, s.persistent_values + r * m.head, sums[r], out, int(m.head));
    }
    prepare(m.kernels, m.attended, m.kind(), row, rows, head * m.head, m.head);
}

void attend(Call& c, int layer, int head, int row, int rows, Scratch& s) {
    Model& m = c.m;
    const Head& h = m.layers[size_t(layer)].heads[size_t(head)];
    project(c, layer, head, row, rows, s.qkv);
    for (int r = 0; r < rows; ++r)
        memcpy(s.query.f + r * m.head, s.qkv + r * 3 * m.head, size_t(m.head) * sizeof(float));
    score_constants(m, h, rows, s);
    float sums[MAX_ROWS];
    long S = h.slots, bytes = S * m.head * m.ring_element();
    for (int r = 0; r < rows; ++r) {
        long which = c.rows[row + r], length = c.lengths[which], next = length % S;
        char *keys = c.rings + which * m.row_bytes + h.ring, *values = values_of(m, h, keys);
        float *context = s.context + r * m.context_ld + MARGIN, *query = s.query.f + r * m.head;
        prefetch(values, bytes);
        bool older = length >= S || !m.shape.mask_empty;  // slots next .. S - 1 hold the older tokens
        long whole = next / BLOCK;  // older and newer tokens share this block: it is computed twice
        if (older) multiply_keys(m, keys, whole, int(S / BLOCK - whole), query, context - next % BLOCK, 0, 1);
        multiply_keys(m, keys, 0, int(divided_up(next, BLOCK)), query, context + S - next, 0, 1);
        if (r + 1 < rows) prefetch(c.rings + c.rows[row + r + 1] * m.row_bytes + h.ring, bytes);
        sums[r] = normalise(c, layer, head, row, r, length, s);
        float* out = s.values + r * m.head;
        multiply_values(m, values, next, older ? S - next : 0, context, 0, out, 1, false);
        multiply_values(m, values, 0, next, context + S - next, 0, out, 1, true);
        const float* pair = s.qkv + (r * 3 + 1) * m.head;
        if (c.commit) put_pair(m, keys, values, next, pair, pair + m.head);
    }
    finish_head(c, h, head, row, rows, sums, s);
}

// Return the position of slot 0 of extend's copy of a ring: at most 15 before the oldest key of the first new token.
long copy_begin(const Head& h, int64_t length) { return long(floor(double(length - h.slots) / BLOCK)) * BLOCK; }

void copy_ring(Call& c, const Head& h, int head) {
    Model& m = c.m;
    long begin = copy_begin(h, *c.lengths), bytes = BLOCK * m.head * m.ring_element();
    char *keys = c.rings + h.ring, *values = values_of(m, h, keys);
    for (long block = 0; begin + block * BLOCK < *c.lengths; ++block) {
        long from = ((begin + block * BLOCK) % h.slots + h.slots) % h.slots / BLOCK;
        memcpy(m.keys[size_t(head)] + block * bytes, keys + from * bytes, size_t(bytes));
        memcpy(m.values[size_t(head)] + block * bytes, values + from * bytes, size_t(bytes));
    }
}

void project_new(Call& c, int layer, int head, int row, int rows, Scratch& s) {
    Model& m = c.m;
    const Head& h = m.layers[size_t(layer)].heads[size_t(head)];
    project(c, layer, head, row, rows, s.qkv);
    for (int r = 0; r < rows; ++r) {
        const float* qkv = s.qkv + r * 3 * m.head;
        memcpy(m.queries + ((row + r) * m.shape.num_heads + head) * m.head, qkv, size_t(m.head) * sizeof(float));
        long slot = *c.lengths + row + r - copy_begin(h, *c.lengths);
        put_pair(m, m.keys[size_t(head)], m.values[size_t(head)], slot, qkv + m.head, qkv + 2 * m.head);
    }
}

void look(Call& c, int layer, int head, int row, int rows, Scratch& s) {
    Model& m = c.m;
    const Head& h = m.layers[size_t(layer)].heads[size_t(head)];
    for (int r = 0; r < rows; ++r)
        memcpy(s.query.f + r * m.head, m.queries + ((row + r) * m.shape.num_heads + head) * m.head,
               size_t(m.head) * sizeof(float));
    score_constants(m, h, rows, s);
    long oldest = *c.lengths + row - h.slots - copy_begin(h, *c.lengths);  // in the copy: index 0 of the first row
    long stop = oldest + h.slots + rows - 1, start = oldest;
    long nothing_before = -copy_begin(h, *c.lengths);  // first slot of the stream
    if (m.shape.mask_empty && start < nothing_before) start = nothing_before < stop ? nothing_before : stop;
    float* origin = s.context + MARGIN - oldest;  // of the first row, for index = slot - oldest
    long block = start / BLOCK;
    multiply_keys(m, m.keys[size_t(head)], block, int(divided_up(stop, BLOCK) - block), s.query.f, origin + block * BLOCK,
                  m.context_ld - 1, rows);
    float sums[MAX_ROWS];
    for (int r = 0; r < rows; ++r) sums[r] = normalise(c, layer, head, row, r, *c.lengths + row + r, s);
    multiply_values(m, m.values[size_t(head)], start, stop - start, origin + start, m.context_ld - 1, s.values, rows, false);
    finish_head(c, h, head, row, rows, sums, s);
}

void mix(Call& c, int layer, int row, int rows, int part) {
    Model& m = c.m;
    const Layer& l = m.layers[size_t(layer)];
    int E = m.shape.width, blocks = int(l.out.columns / BLOCK), per = MIX_COLUMNS / BLOCK, first = part * per;
    int count = blocks - first < per ? blocks - first : per;
    multiply(m.kernels, l.out, m.attended, row, rows, first, count, m.mixed + row * m.width + first * BLOCK, m.width);
    std::atomic<int>& done = m.mixed_units[size_t(row / c.chunk)];
    if (done.fetch_add(1, std::memory_order_acq_rel) + 1 < divided_up(blocks, per)) return;
    done.store(0, std::memory_order_relaxed);
    for (int r = row; r < row + rows; ++r) {
        float* hidden = m.hidden.f + r * m.width;
        m.kernels.norm(hidden, m.mixed + r * m.width, l.norm_weight, l.norm_bias, E);
        if (c.hidden && layer + 1 == m.shape.num_layers) memcpy(c.hidden + long(r) * E, hidden, size_t(E) * sizeof(float));
    }
    prepare(m.kernels, m.hidden, m.kind(), row, rows, 0, m.width);
    if (m.shape.output != m.kind() && layer + 1 == m.shape.num_layers)
        prepare(m.kernels, m.hidden, WeightKind(m.shape.output), row, rows, 0, m.width);
}

void embed(Call& c, int row, int rows) {
    Model& m = c.m;
    for (int r = row; r < row + rows; ++r) {
        long word = c.tokens[r];
        float* hidden = m.hidden.f + r * m.width;
        size_t i = 0;
        while (word >= m.clusters[i].size) word -= m.clusters[i++].size;
        const Cluster& cluster = m.clusters[i];
        const float* vector = cluster.embedding + word * cluster.width;
        if (m.shape.num_clusters == 1) {
            memcpy(hidden, vector, size_t(m.shape.width) * sizeof(float));
            continue;
        }
        Product p = {};
        p.x = vector, p.depth = cluster.width, p.w = cluster.into.data, p.block = cluster.into.depth * BLOCK;
        p.step = BLOCK, p.y = hidden, p.rows = 1, p.blocks = int(cluster.into.columns / BLOCK);
        m.kernels.float32(p);
    }
    prepare(m.kernels, m.hidden, m.kind(), row, rows, 0, m.width);
}

void load_hidden(Call& c, int row, int rows) {
    Model& m = c.m;
    long E = m.shape.width;
    for (int r = row; r < row + rows; ++r)
        memcpy(m.hidden.f + r * m.width, c.hidden + r * E, size_t(E) * sizeof(float));
    prepare(m.kernels, m.hidden, WeightKind(m.shape.output), row, rows, 0, m.width);
}

// Compute a part of a cluster's columns of scores, with their bias.
void score_cluster(Call& c, const Cluster& cluster, const Operand& x, int row, int rows, int part, int columns) {
    Model& m = c.m;
    bool plain = m.shape.num_clusters == 1;
    long ld = plain ? m.vocab : m.scores_ld, first = long(part) * columns;
    long left = cluster.output.columns - first, count = left < columns ? left : columns;
    float* y = (plain ? c.logits : m.scores) + row * ld + cluster.first_score + first;
    multiply(m.kernels, cluster.output, x, row, rows, int(first / BLOCK), int(count / BLOCK), y, ld);
    for (int r = 0; r < rows; ++r) m.kernels.add(y + r * ld, cluster.bias + first, count);
}

void score(Call& c, int row, int rows, int part) {
    Model& m = c.m;
    int parts = int(divided_up(m.clusters[0].output.columns, SCORE_COLUMNS));
    if (part < parts) return score_cluster(c, m.clusters[0], m.hidden, row, rows, part, SCORE_COLUMNS);
    const Cluster& cluster = m.clusters[size_t(part - parts + 1)];
    const Operand& to = cluster.narrowed;
    multiply(m.kernels, cluster.narrow, m.hidden, row, rows, 0, int(cluster.narrow.columns / BLOCK),
             to.f + row * to.width, to.width);
    prepare(m.kernels, to, cluster.output.kind, row, rows, 0, to.width);
}

void score_tail(Call& c, int row, int rows, int part) {
    for (size_t i = 1; i < c.m.clusters.size(); ++i) {
        const Cluster& cluster = c.m.clusters[i];
        int parts = int(divided_up(cluster.output.columns, TAIL_COLUMNS));
        if (part < parts) return score_cluster(c, cluster, cluster.narrowed, row, rows, part, TAIL_COLUMNS);
        part -= parts;
    }
}

// Return the natural logarithm of a normal number, by a fixed sequence of operations.
double logarithm(double x) {
    int exponent;
    double m = frexp(x, &exponent);
    if (m < 0.70710678118654752) m *= 2, --exponent;
    double t = (m - 1) / (m + 1), square = t * t, sum = 0;  // log m = 2 artanh t
    for (int n = 23; n > 0; n -= 2) sum = sum * square + 1.0 / n;
    return 2 * t * sum + exponent * 0.69314718055994531;
}

float log_sum(const Kernels& k, const float* x, long size, float* scratch) {
    float most = k.maximum(x, size), sum = k.exponentials(x, most, 1.0f, scratch, size);
    return float(most + logarithm(sum));
}

void join(Call& c, int row, int thread) {
    Model& m = c.m;
    float *scores = m.scores + row * m.scores_ld, *logits = c.logits + row * m.vocab;
    float* scratch = m.exponentials + thread * (m.scores_ld + m.vocab);
    const Cluster& head = m.clusters[0];
    float head_sum = log_sum(m.kernels, scores, head.output.columns, scratch);
    float* to = logits;
    for (int i = 0; i < m.shape.num_clusters; ++i) {
        const Cluster& cluster = m.clusters[size_t(i)];
        const float* from = scores + cluster.first_score;
        float own = i ? log_sum(m.kernels, from, cluster.output.columns, scratch) : head_sum;
        float entry = i ? scores[head.columns - i] - head_sum : 0.0f;
        for (int n = 0; n < cluster.size; ++n) *to++ = entry + (from[n] - own);
    }
    while (to < logits + m.vocab) *to++ = -INFINITY;
}

uint64_t mixed_bits(uint64_t state) {  // SplitMix64
    state += 0x9E3779B97F4A7C15u;
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9u;
    state = (state ^ state >> 27) * 0x94D049BB133111EBu;
    return state ^ state >> 31;
}

// Draw a token as model/sampling/draw.py and filters.py do: weights are multiples of 2^-60, and the drawn token is the
// first at which their sum exceeds the uniform share of the whole.
int64_t draw_at_random(const float* probabilities, float sum, long size, const Draw& d) {
    constexpr float ONE = 1152921504606846976.0f;
    double uniform = double(mixed_bits(mixed_bits(d.seed) ^ uint64_t(d.position)) >> 16) * 0x1p-48;
    int64_t all = 0, below = 0;
    for (long i = 0; i < size; ++i) all += int64_t(probabilities[i] / sum * ONE);
    int64_t target = int64_t(uniform * double(all));
    for (long i = 0; i < size; ++i) {
        below += int64_t(probabilities[i] / sum * ONE);
        if (below > target) return i;
    }
    return size - 1;
}

void draw(Call& c, int row, int thread) {
    Model& m = c.m;
    const Draw& d = c.draws[row];
    const float* logits = c.logits + row * m.vocab;
    long V = m.shape.vocab_size, best = 0;
    float* scratch = m.exponentials + thread * (m.scores_ld + m.vocab);
    bool broken = false;  // a score is NaN or +infinity
    for (long i = 0; i < V; ++i) {
        if (logits[i] > logits[best]) best = i;
        broken |= !(logits[i] < INFINITY);
    }
    if (d.temperature > 0 && !broken) {
        float coldest = 1e-20f, factor = 1.0f / (d.temperature > coldest ? d.temperature : coldest);
        float sum = m.kernels.exponentials(logits, logits[best], factor, scratch, m.vocab);
        c.drawn[row] = draw_at_random(scratch, sum, V, d);
    } else {
        c.drawn[row] = best;
    }
    c.logprobs[row] = broken ? NAN : logits[c.drawn[row]] - log_sum(m.kernels, logits, m.vocab, scratch);
}

void rank(Call& c, int row, int thread) {
    Model& m = c.m;
    const float* logits = c.logits + row * m.vocab;
    float own = logits[c.tokens[row]], sum = log_sum(m.kernels, logits, m.vocab, m.exponentials + thread * (m.scores_ld + m.vocab));
    int32_t larger = 0, broken = 0;
    for (long i = 0; i < m.shape.vocab_size; ++i) {
        larger += logits[i] > own;
        broken += !(logits[i] < INFINITY);
    }
    c.drawn[row] = larger;
    c.logprobs[row] = broken ? NAN : own - sum;
}

int units_of(const Call& c, Stage stage) {
    const Model& m = c.m;
    int chunks = c.chunks(), tails = 0;
    switch (stage.kind) {
        case Stage::ATTEND: case Stage::PROJECT: case Stage::LOOK: return chunks * m.shape.num_heads;
        case Stage::MIX: return chunks * int(divided_up(m.shape.width, MIX_COLUMNS));
        case Stage::SCORE:
            return chunks * (int(divided_up(m.clusters[0].output.columns, SCORE_COLUMNS)) + m.shape.num_clusters - 1);
        case Stage::TAILS:
            for (size_t i = 1; i < m.clusters.size(); ++i)
                tails += int(divided_up(m.clusters[i].output.columns, TAIL_COLUMNS));
            return chunks * tails;
        case Stage::JOIN: case Stage::DRAW: case Stage::RANK: return c.num_rows;
        default: return chunks;
    }
}

// Do one unit. The units of one part (a head, some columns) follow each other for all chunks, so that threads read the
// same weights at the same time.
void do_unit(void* context, int number, int unit, int thread) {
    Call& c = *(Call*)context;
    Model& m = c.m;
    Stage stage = m.stages[size_t(number)];
    Scratch& s = m.scratch[size_t(thread)];
    int part = unit / c.chunks(), row = unit % c.chunks() * c.chunk, rows = c.rows_from(row);
    switch (stage.kind) {
        case Stage::EMBED: return embed(c, row, rows);
        case Stage::LOAD: return load_hidden(c, row, rows);
        case Stage::ATTEND: return attend(c, stage.layer, part, row, rows, s);
        case Stage::PROJECT:
            if (row == 0) copy_ring(c, m.layers[size_t(stage.layer)].heads[size_t(part)], part);
            return project_new(c, stage.layer, part, row, rows, s);
        case Stage::LOOK: return look(c, stage.layer, part, row, rows, s);
        case Stage::MIX: return mix(c, stage.layer, row, rows, part);
        case Stage::SCORE: return score(c, row, rows, part);
        case Stage::TAILS: return score_tail(c, row, rows, part);
        case Stage::JOIN: return join(c, unit, thread);
        case Stage::DRAW: return draw(c, unit, thread);
        case Stage::RANK: return rank(c, unit, thread);
    }
}

void add_stage(Model& m, Stage::Kind kind, int layer = 0) { m.stages.push_back({kind, layer}); }

void add_scores(Model& m) {
    add_stage(m, Stage::SCORE);
    if (m.shape.num_clusters > 1) add_stage(m, Stage::TAILS), add_stage(m, Stage::JOIN);
}

void run(Call& c) {
    Model& m = c.m;
    m.units.clear();
    for (Stage stage : m.stages) m.units.push_back(units_of(c, stage));
    m.pool.run(m.units.data(), int(m.stages.size()), do_unit, &c);
}

int64_t wrong_token(const Model& m, const int64_t* tokens, int64_t count) {
    for (int64_t i = 0; i < count; ++i)
        if (tokens[i] < 0 || tokens[i] >= m.shape.vocab_size) return i + 1;
    return 0;
}

}  // namespace

PUBLIC int64_t allattn_decode(Model* model, char* rings, int64_t* lengths, const int64_t* rows, const int64_t* tokens,
                              int64_t num_rows, float* logits, float* fresh, const Draw* draws, int64_t* drawn,
                              float* logprobs, int32_t commit) {
    Model& m = *model;
    if (int64_t wrong = wrong_token(m, tokens, num_rows)) return wrong;
    Call c = {m, int(num_rows), tokens};
    c.rows = rows, c.rings = rings, c.lengths = lengths, c.fresh = fresh, c.fresh_rows = num_rows, c.logits = logits;
    c.draws = draws, c.drawn = drawn, c.logprobs = logprobs, c.commit = commit;
    while (c.chunk > 8 && c.chunks() * m.shape.num_heads < 2 * m.pool.num_threads) c.chunk /= 2;
    m.stages.clear();
    add_stage(m, Stage::EMBED);
    for (int l = 0; l < m.shape.num_layers; ++l) add_stage(m, Stage::ATTEND, l), add_stage(m, Stage::MIX, l);
    add_scores(m);
    if (draws) add_stage(m, Stage::DRAW);
    run(c);
    for (int64_t r = 0; commit && r < num_rows; ++r) ++lengths[rows[r]];
    return 0;
}

PUBLIC int64_t allattn_extend(Model* model, const char* rings, int64_t length, const int64_t* tokens, int64_t num_new,
                              float* hidden, float* fresh, int64_t stride, float* shares) {
    Model& m = *model;
    if (int64_t wrong = wrong_token(m, tokens, num_new)) return wrong;
    Call c = {m, int(num_new), tokens};
    c.rings = (char*)rings, c.lengths = &length, c.hidden = hidden, c.fresh = fresh, c.fresh_rows = stride;
    c.shares = shares;
    m.stages.clear();
    add_stage(m, Stage::EMBED);
    for (int l = 0; l < m.shape.num_layers; ++l)
        add_stage(m, Stage::PROJECT, l), add_stage(m, Stage::LOOK, l), add_stage(m, Stage::MIX, l);
    run(c);
    return 0;
}

PUBLIC void allattn_logits(Model* model, const float* hidden, int64_t n, float* logits) {
    Model& m = *model;
    Call c = {m, int(n), nullptr};
    c.hidden = (float*)hidden, c.logits = logits;
    m.stages.clear();
    add_stage(m, Stage::LOAD);
    add_scores(m);
    run(c);
}

PUBLIC void allattn_draw(Model* model, const float* logits, int64_t n, const Draw* draws, int64_t* drawn,
                         float* logprobs) {
    Call c = {*model, int(n), nullptr};
    c.logits = (float*)logits, c.draws = draws, c.drawn = drawn, c.logprobs = logprobs;
    model->stages.clear();
    add_stage(*model, Stage::DRAW);
    run(c);
}

PUBLIC int64_t allattn_score(Model* model, const float* hidden, int64_t n, const int64_t* targets, float* logits,
                             float* logprobs, int64_t* ranks) {
    Model& m = *model;
    if (int64_t wrong = wrong_token(m, targets, n)) return wrong;
    Call c = {m, int(n), targets};
    c.hidden = (float*)hidden, c.logits = logits, c.logprobs = logprobs, c.drawn = ranks;
    m.stages.clear();
    add_stage(m, Stage::LOAD);
    add_scores(m);
    add_stage(m, Stage::RANK);
    run(c);
    return 0;
}

PUBLIC void allattn_commit(Model* model, char* rings, int64_t length, const float* fresh, int64_t stride,
                           int64_t num_new) {
    const Model& m = *model;
    long H = m.shape.num_heads, D = m.shape.head_size;
    for (int l = 0; l < m.shape.num_layers; ++l)
        for (int i = 0; i < H; ++i) {
            const Head& h = m.layers[size_t(l)].heads[size_t(i)];
            char *keys = rings + h.ring, *values = values_of(m, h, keys);
            for (int64_t t = num_new > h.slots ? num_new - h.slots : 0; t < num_new; ++t) {
                const float* key = fresh + ((l * stride + t) * 2 * H + i) * D;
                put_pair(m, keys, values, (length + t) % h.slots, key, key + H * D);
            }
        }
}
