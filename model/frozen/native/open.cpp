// Opens a model, fills in its weights, and closes it.
#include <cmath>
#include <cstring>
#include <exception>

#include "model.h"

namespace {

const Kernels& kernels_of(int variant) {
    switch (variant) {
#if defined(__x86_64__)
        case AVX2: return *kernels_avx2();
        case AVX512: return *kernels_avx512();
        case VNNI: return *kernels_avx512_vnni();
        case AMX: return *kernels_amx();
#endif
        default: return *kernels_generic();
    }
}

void lay_out_heads(Model& m, const int32_t* slots) {
    const Shape& s = m.shape;
    long bytes = 0;
    for (int l = 0; l < s.num_layers; ++l) {
        Layer& layer = m.layers[size_t(l)];
        layer.heads.resize(size_t(s.num_heads));
        for (int h = 0; h < s.num_heads; ++h) {
            Head& head = layer.heads[size_t(h)];
            head.slots = slots[l * s.num_heads + h];
            head.ring = bytes;
            bytes += 2 * head.slots * m.head * m.ring_element();
            m.longest = head.slots > m.longest ? head.slots : m.longest;
            head.query_key_value = new_matrix(m.weights, m.kind(), s.width, 3 * m.head);
            head.persistent_key = new_matrix(m.weights, m.kind(), m.head, m.persistent);
            head.persistent_value = new_matrix(m.weights, m.kind(), m.persistent, m.head);
            head.log_mass = m.weights.take<float>(head.slots);
        }
        layer.out = new_matrix(m.weights, m.kind(), s.num_heads * m.head, s.width);
        layer.norm_weight = m.weights.take<float>(s.width);
        layer.norm_bias = m.weights.take<float>(s.width);
    }
    m.row_bytes = round_up(bytes, 64);
    m.context_ld = m.longest + 2 * MARGIN;
    m.position = new_matrix(m.weights, m.position_kind(), m.head, m.longest);
}

void lay_out_clusters(Model& m, const int32_t* sizes, const int32_t* widths) {
    int count = m.shape.num_clusters;
    WeightKind kind = WeightKind(m.shape.output);
    long score = 0;
    for (int i = 0; i < count; ++i) {
        Cluster& c = m.clusters[size_t(i)];
        c.size = sizes[i];
        c.width = widths[i];
        c.columns = c.size + (i ? 0 : count - 1);
        c.first_score = score;
        c.embedding = m.weights.take<float>(long(c.size) * c.width);
        if (count > 1) c.into = new_matrix(m.weights, FLOAT32, c.width, m.shape.width);
        if (i) c.narrow = new_matrix(m.weights, kind, m.shape.width, c.width);
        c.output = new_matrix(m.weights, kind, i ? c.width : m.shape.width, c.columns);
        c.bias = m.weights.take<float>(c.output.columns);
        for (long n = c.columns; n < c.output.columns; ++n) c.bias[n] = -INFINITY;
        score += c.output.columns;
    }
    m.scores_ld = score;
    m.vocab = round_up(m.shape.vocab_size, BLOCK);
}

void fill_attention(Model& m, int part, int l, int h, const float* values) {
    long D = m.shape.head_size, E = m.shape.width, N = m.shape.num_persistent;
    Layer& layer = m.layers[size_t(l)];
    Head& head = layer.heads[size_t(h)];
    switch (part) {
        case QUERY_KEY_VALUE:
            for (int i = 0; i < 3; ++i) pack(head.query_key_value, values + i * D, 3 * D, E, D, 0, i * m.head);
            break;
        case PERSISTENT_KEY: pack(head.persistent_key, values, N, D, N); break;
        case PERSISTENT_VALUE: pack(head.persistent_value, values, D, N, D); break;
        case LOG_MASS: memcpy(head.log_mass, values, size_t(head.slots) * sizeof(float)); break;
        case OUT:
            for (int i = 0; i < m.shape.num_heads; ++i) pack(layer.out, values + i * D * E, E, D, E, i * m.head);
            break;
        case NORM_WEIGHT: memcpy(layer.norm_weight, values, size_t(E) * sizeof(float)); break;
        case NORM_BIAS: memcpy(layer.norm_bias, values, size_t(E) * sizeof(float)); break;
    }
}

void fill_embeddings(Model& m, int part, int index, const float* values) {
    Cluster& c = m.clusters[size_t(index)];
    long E = m.shape.width;
    switch (part) {
        case EMBEDDING: memcpy(c.embedding, values, size_t(c.size) * size_t(c.width) * sizeof(float)); break;
        case INTO: pack(c.into, values, E, c.width, E); break;
        case OUTPUT: pack(c.output, values, c.columns, E, c.columns); break;
        case NARROW: pack(c.narrow, values, c.width, E, c.width); break;
        case TAIL: pack(c.output, values, c.columns, c.width, c.columns); break;
        case OUTPUT_BIAS:
        case TAIL_BIAS: memcpy(c.bias, values, size_t(c.columns) * sizeof(float)); break;
    }
}

}  // namespace

PUBLIC Model* allattn_open(const Shape* shape, const int32_t* slots, const int32_t* cluster_sizes,
                           const int32_t* cluster_widths) try {
    Model* m = new Model(*shape, kernels_of(shape->variant));
    WeightKind kind = m->kind();
    m->head = round_up(shape->head_size, depth_unit(kind));
    m->width = round_up(shape->width, GROUP);
    m->persistent = round_up(shape->num_persistent, GROUP);
    m->longest = 0;
    m->layers.resize(size_t(shape->num_layers));
    m->clusters.resize(size_t(shape->num_clusters));
    m->keys.resize(size_t(shape->num_heads));
    m->values.resize(size_t(shape->num_heads));
    m->scratch.resize(size_t(shape->num_threads));
    lay_out_heads(*m, slots);
    lay_out_clusters(*m, cluster_sizes, cluster_widths);
    return m;
} catch (const std::exception&) {
    return nullptr;
}

PUBLIC void allattn_close(Model* model) { delete model; }

PUBLIC int32_t allattn_set(Model* model, int32_t part, int32_t layer, int32_t index, const float* values) {
    if (part == POSITION) pack(model->position, values, model->longest, model->shape.head_size, model->longest);
    else if (part >= QUERY_KEY_VALUE && part <= NORM_BIAS) fill_attention(*model, part, layer, index, values);
    else fill_embeddings(*model, part, index, values);
    return 0;
}

PUBLIC int64_t allattn_row_bytes(const Model* model) { return model->row_bytes; }
PUBLIC int64_t allattn_weight_bytes(const Model* model) { return model->weights.bytes(); }
PUBLIC int32_t allattn_reserve(Model* model, int64_t tokens) { return model->reserve(tokens) ? 0 : -1; }
